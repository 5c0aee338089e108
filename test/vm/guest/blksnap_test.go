//go:build guest

package guest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
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
	client := compiled(t, "blksnap", blksnapHeaders)
	d := program.New(t, "--compat", "blksnap")
	var devices []string
	for name, size := range map[string]int64{"a": 1<<30 + 512, "b": 24 << 20} { // a: with a change map of more than a request can carry
		devices = append(devices, served(t, d, name, fronts()[0], size))
	}
	slices.Sort(devices)
	storage, foreign := testkit.NewDisk(t, 64<<20), testkit.NewDisk(t, 16<<20)
	walks := func(client string, args ...string) {
		t.Helper()
		if out, err := exec.CommandContext(t.Context(), client, args...).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s\n%s", err, out, d.Log())
		}
		nothingLeft(t, "the walk", 2)
	}
	used := testkit.NewDisk(t, 16<<20)
	testkit.Mkfs(t, used.Path, "ext4")
	testkit.Mount(t, used.Path)
	walks(compiled(t, "blksnap_edges", blksnapHeaders), devices[0], devices[1], storage.Path, used.Path)
	walks(client, "walk", devices[0], devices[1], storage.Path, foreign.Path)
	if text := d.Run("status"); !strings.Contains(text, "snapshot-foreign-device") || !strings.Contains(text, "device create") || !strings.Contains(text, "snapshot-foreign-storage") {
		t.Errorf("nothing says why a program got no snapshot and no storage: %s", text)
	}
	// Who does what the remedy says gets rid of it.
	now := strings.TrimSpace(d.Run("device", "create", "--backing", foreign.Path, "--name", "foreign"))
	out, err := exec.Command(client, "hold", now, storage.Path).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if text := d.Run("status"); strings.Contains(text, "snapshot-foreign-device") {
		t.Errorf("the device is served, and status says %s", text)
	}
	d.Run("snapshot", "destroy", strings.TrimSpace(string(out)))
	d.Run("device", "rm", "foreign")
	d.Restart()

	out, err = exec.Command(client, "hold", devices[0], storage.Path).CombinedOutput()
	id := strings.TrimSpace(string(out))
	if err != nil || len(id) != 32 {
		t.Fatalf("%v: %s", err, out)
	}
	if text := d.Run("snapshot", "ls"); !strings.Contains(text, id) {
		t.Errorf("the native command does not see it: %s", text)
	}
	// Another daemon cannot have the device, and leaves alone what this one has made.
	second := program.New(t, "--compat", "blksnap")
	if text := second.Run("status"); !strings.Contains(text, "compat-unavailable") || !strings.Contains(text, "/dev/blksnap") {
		t.Errorf("two daemons have /dev/blksnap: %s", text)
	}
	second.Stop()
	if nodes := imageNodes(t); len(nodes) == 0 {
		t.Error("it has taken the images' nodes away")
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
	if nodes := imageNodes(t); len(nodes) == 0 {
		t.Error("no images after a restart")
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

	// What the native commands make has its nodes as soon as they return, and they go with it.
	native := strings.TrimSpace(d.Run("snapshot", "create", "--storage", filepath.Join(d.Dir, "native")+":16M", "a", "b"))
	d.Run("snapshot", "take", native)
	if nodes := imageNodes(t); !slices.Contains(nodes, "/dev/blksnap-image0") {
		t.Errorf("the nodes of a snapshot that was taken natively: %v", nodes)
	}
	d.Run("snapshot", "destroy", native)
	if nodes := imageNodes(t); len(nodes) > 0 {
		t.Errorf("nodes of a snapshot that was destroyed natively: %v", nodes)
	}

	// A client is killed while it makes one: whatever is there by then is whole.
	for _, after := range []time.Duration{0, 20 * time.Millisecond, 200 * time.Millisecond} {
		making := exec.Command(client, "hold", devices[0], storage.Path)
		if err := making.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(after)
		_ = making.Process.Kill()
		_ = making.Wait()
		if code := exitCode(exec.Command(client, "clean", "all").Run()); code != 0 {
			t.Errorf("destroying what a killed client left: %d", code)
		}
		nothingLeft(t, "a killed client", 2)
	}

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

// imageNodes lists those under the names that clients of /dev/blksnap look for.
func imageNodes(t *testing.T) []string {
	t.Helper()
	nodes, err := filepath.Glob("/dev/blksnap-image*")
	if err != nil {
		t.Fatal(err)
	}
	return nodes
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

// TestBlksnapFuzzed: whatever bytes a program sends, the daemon lives, nobody
// hangs, and a command that fails has changed nothing.
func TestBlksnapFuzzed(t *testing.T) {
	testkit.Need(t, "cuse")
	client := compiled(t, "blksnap_fuzz", blksnapHeaders)
	storage, foreign := testkit.NewDisk(t, 1<<30), testkit.NewDisk(t, 1<<20) // sparse
	kinds := fronts()
	d := program.New(t, "--compat", "blksnap")
	devices := []string{served(t, d, "a", kinds[0], servedSize), served(t, d, "b", kinds[len(kinds)-1], servedSize)}
	random := fmt.Sprint(seed(t).Uint64())
	for _, seed := range []string{"1", random} {
		out, err := exec.CommandContext(t.Context(), client, append([]string{seed, "150", storage.Path, foreign.Path}, devices...)...).CombinedOutput()
		t.Logf("seed %s: %s", seed, out)
		if err != nil {
			t.Fatalf("seed %s: %v\n%s", seed, err, d.Log())
		}
	}
	nothingLeft(t, "all that", 2)
	for _, name := range []string{"a", "b"} {
		d.Run("device", "rm", name)
	}
	nothingLeft(t, "the devices", 0)
}
