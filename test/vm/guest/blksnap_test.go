//go:build guest

package guest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// compiled is a C program of testdata, built against an interface's own header.
func compiled(t *testing.T, name, headers string) string {
	t.Helper()
	testkit.Need(t, "gcc")
	out := filepath.Join(t.TempDir(), name)
	if text, err := exec.Command("gcc", "-O1", "-Wall", "-Werror", "-pthread", "-I", headers, "-o", out, "testdata/"+name+".c").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return out
}

// exitCode is how a program ended; -1: by a signal or not at all.
func exitCode(err error) int {
	var e *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &e):
		return e.ExitCode()
	}
	return -1
}

// TestBlksnap: a client that was written against the module's header, in C,
// walks through every command, right and wrong. What it makes the native commands see, and the other way
// round; a killed client and a killed daemon leave a held snapshot whole.
func TestBlksnap(t *testing.T) {
	testkit.Need(t, "cuse")
	client := compiled(t, "blksnap", "../../../internal/abi/blksnap/testdata")
	d := program.New(t, "--compat", "blksnap")
	var devices []string
	for _, name := range []string{"a", "b"} {
		image := filepath.Join(d.Dir, name+".img")
		if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 24<<20)); err != nil {
			t.Fatal(err)
		}
		devices = append(devices, strings.TrimSpace(d.Run("device", "create", "--backing", image, "--name", name)))
	}
	storage, foreign := testkit.NewDisk(t, 64<<20), testkit.NewDisk(t, 16<<20)
	cmd := exec.CommandContext(t.Context(), client, "walk", devices[0], devices[1], storage.Path, foreign.Path)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s\n%s", err, out, d.Log())
	}
	if text := d.Run("status"); !strings.Contains(text, "snapshot-foreign-device") {
		t.Errorf("nothing says why a program got no snapshot: %s", text)
	}
	nothingLeft(t, "the walk", 2)
	d.Restart()

	out, err := exec.Command(client, "hold", devices[0], storage.Path).CombinedOutput()
	id := strings.TrimSpace(string(out))
	if err != nil || len(id) != 32 {
		t.Fatalf("%v: %s", err, out)
	}
	if text := d.Run("snapshot", "ls"); !strings.Contains(text, id) {
		t.Errorf("the native command does not see it: %s", text)
	}
	waiting := exec.Command(client, "wait", id)
	if err := waiting.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second)
	if err := waiting.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = waiting.Wait() // would hang if the killed one was not let go
	d.Restart()
	if text := d.Run("snapshot", "ls"); !strings.Contains(text, id) {
		t.Errorf("after a restart: %s", text)
	}
	if nodes, err := filepath.Glob("/dev/blksnap-image*"); err != nil || len(nodes) == 0 {
		t.Errorf("images after a restart: %v, %v", nodes, err)
	}
	waiting = exec.Command(client, "wait", id)
	if err := waiting.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second)
	d.Run("snapshot", "destroy", id)
	if code := exitCode(waiting.Wait()); code != int(syscall.ESRCH) {
		t.Errorf("whoever waited when it was destroyed natively: %d", code)
	}
	if code := exitCode(exec.Command(client, "end", id).Run()); code != int(syscall.ENODEV) {
		t.Errorf("destroyed twice: %d", code)
	}
	nothingLeft(t, "the destroyed snapshot", 2)

	// Destroyed while somebody has the image open, and then the daemon is killed: the next one takes it away.
	if out, err = exec.Command(client, "hold", devices[0], storage.Path).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	image, err := os.Open("/dev/blksnap-image0")
	if err != nil {
		t.Fatal(err)
	}
	d.Run("snapshot", "destroy", strings.TrimSpace(string(out)))
	d.Kill()
	image.Close()
	d.Start()
	nothingLeft(t, "an image that was open when its daemon was killed", 2)
	d.Stop()
	for _, name := range []string{"/dev/blksnap", "/dev/blksnap-image0"} {
		if _, err := os.Lstat(name); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", name, err)
		}
	}
	d.Start()
	for _, name := range []string{"a", "b"} {
		d.Run("device", "rm", name)
	}
	nothingLeft(t, "the devices", 0)
}

// nothingLeft: of the kernel's NBD and ublk devices only so many are in use.
func nothingLeft(t *testing.T, after string, want int) {
	t.Helper()
	program.Eventually(t, 30*time.Second, "devices are free after "+after, func() error {
		left, _ := filepath.Glob("/sys/block/nbd*/backend")
		ublk, _ := filepath.Glob("/sys/block/ublkb*")
		left = append(left, ublk...)
		if len(left) <= want {
			return nil
		}
		return fmt.Errorf("in use: %v", left)
	})
}
