//go:build guest

package guest

import (
	"bytes"
	"encoding/json"
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

// storageHelpers are the processes that do something to difference storage on a device of ours.
func storageHelpers() (out []string) {
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline") // a pattern without faults
	for _, path := range all {
		if b, err := os.ReadFile(path); err == nil && bytes.Contains(b, []byte("device-helper\x00file\x00")) {
			out = append(out, path)
		}
	}
	return out
}

// TestKilledWhileStorageGrows: difference storage on the device itself grows under
// load when the daemon is stopped dead, so that nothing moves, and then killed. It
// ends; the next one takes the device over, whose users see a pause; the snapshot is
// whole, grows on, and no process stays behind.
func TestKilledWhileStorageGrows(t *testing.T) {
	for _, module := range []string{"ublk_drv", "nbd"} {
		_ = exec.Command("modprobe", module).Run() // one of them is enough
	}
	d := program.New(t)
	image := filepath.Join(d.Dir, "image")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 400<<20)); err != nil {
		t.Fatal(err)
	}
	node := strings.TrimSpace(d.Run("device", "create", "--backing", image, "--name", "data"))
	dir := t.TempDir()
	testkit.Run(t, "mkfs.ext4", "-q", "-b", "4096", node)
	testkit.Run(t, "mount", node, dir)
	t.Cleanup(func() { _ = exec.Command("umount", dir).Run() })
	before := bytes.Repeat([]byte("before"), 100<<10)
	if err := os.WriteFile(filepath.Join(dir, "file"), before, 0o600); err != nil {
		t.Fatal(err)
	}
	testkit.Run(t, "sync", "-f", dir)
	// More than fio's file and a journal that has gone round: how many kills it takes is not known.
	id := strings.TrimSpace(d.Run("snapshot", "create", "--storage", filepath.Join(dir, "diff")+":96M", "data"))
	d.Run("snapshot", "take", id)
	if err := os.WriteFile(filepath.Join(dir, "file"), bytes.Repeat([]byte("after!"), 100<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	fio := startFio(t, dir, 8)
	caught := 0
	for i := 0; caught == 0 && i < 12; i++ {
		d.Background("snapshot", "append", id, filepath.Join(dir, fmt.Sprint("more", i))+":16M")
		for end := time.Now().Add(5 * time.Second); len(storageHelpers()) == 0 && time.Now().Before(end); {
			time.Sleep(time.Millisecond)
		}
		time.Sleep(time.Duration(i) * 15 * time.Millisecond) // first it looks at the path, then it makes and grows the file
		if err := syscall.Kill(d.PID(), syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond) // who needs the device waits by now
		if len(storageHelpers()) > 0 {
			caught++
		}
		ended := make(chan struct{})
		go func() { d.Kill(); close(ended) }()
		select {
		case <-ended:
		case <-time.After(time.Minute):
			text, _ := exec.Command("sh", "-c", fmt.Sprintf("grep -H . /proc/%d/task/*/wchan /proc/%[1]d/task/*/stack", d.PID())).CombinedOutput()
			t.Fatalf("the daemon was killed and does not end: %s", text)
		}
		d.Start()
		var all []struct{ ID, State, Reason string }
		if err := json.Unmarshal([]byte(d.Run("snapshot", "ls", "--json")), &all); err != nil || len(all) != 1 || all[0].State != "taken" {
			t.Fatalf("snapshots: %+v, %v", all, err)
		}
	}
	if caught == 0 {
		t.Error("no kill met a helper")
	}
	fio.wait(t, d)
	program.Eventually(t, time.Minute, "no helper is left", func() error {
		if left := storageHelpers(); len(left) > 0 {
			return fmt.Errorf("%v", left)
		}
		return nil
	})
	d.Run("snapshot", "append", id, filepath.Join(dir, "last")+":16M")
	if attributes := testkit.Run(t, "lsattr", filepath.Join(dir, "diff")); !strings.Contains(strings.Fields(attributes)[0], "i") {
		t.Errorf("its storage can be moved: %s", attributes)
	}
	copied := "/dev/tidemark/data@" + id
	testkit.Run(t, "e2fsck", "-fn", copied)
	at := t.TempDir()
	testkit.Run(t, "mount", "-o", "ro", copied, at)
	t.Cleanup(func() { _ = exec.Command("umount", "-l", at).Run() })
	if got, err := os.ReadFile(filepath.Join(at, "file")); err != nil || !bytes.Equal(got, before) {
		t.Errorf("the image's file is not what it was: %v", err)
	}
	reader, err := os.OpenFile(copied, os.O_RDONLY|syscall.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	d.Run("snapshot", "destroy", id) // waits for nobody
	if _, err := reader.ReadAt(aligned(t, 4096), 0); err == nil {
		t.Error("the image of a destroyed snapshot can be read")
	}
	reader.Close()
	testkit.Run(t, "umount", at)
	if left, _ := filepath.Glob(filepath.Join(dir, "more*")); len(left) > 0 {
		t.Logf("files of appends that were cut off before they were noted: %v", left)
	}
	testkit.Run(t, "umount", dir)
	testkit.Run(t, "e2fsck", "-fn", node)
	d.Run("device", "rm", "data")
}

// TestKilledWhileTaking: the daemon is killed anywhere in the taking of a snapshot,
// when it may have frozen the very file system whose device it serves. What is
// mounted is thawed when the device is served again, and everything goes on.
func TestKilledWhileTaking(t *testing.T) {
	_ = exec.Command("modprobe", "ublk_drv").Run() // or nbd, which comes by itself
	d := program.New(t)
	image := filepath.Join(d.Dir, "image")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 96<<20)); err != nil {
		t.Fatal(err)
	}
	node := strings.TrimSpace(d.Run("device", "create", "--backing", image, "--name", "data"))
	dir := t.TempDir()
	testkit.Run(t, "mkfs.ext4", "-q", node)
	testkit.Run(t, "mount", node, dir)
	t.Cleanup(func() { _ = exec.Command("umount", dir).Run() })
	fio := startFio(t, dir, 8)
	rng := seed(t)
	for i := range 4 {
		id := strings.TrimSpace(d.Run("snapshot", "create", "--storage", filepath.Join(d.Dir, fmt.Sprint("diff", i))+":64M", "data"))
		take := d.Background("snapshot", "take", id)
		time.Sleep(time.Duration(rng.IntN(400)) * time.Millisecond) // anywhere in it
		d.Kill()
		_ = take.Wait() // the next daemon is not asked
		d.Start()
		testkit.Run(t, "timeout", "60", "sh", "-c", "echo x > "+dir+"/probe && sync -f "+dir)
		var all []struct{ ID, State string }
		if err := json.Unmarshal([]byte(d.Run("snapshot", "ls", "--json")), &all); err != nil || len(all) != 1 {
			t.Fatalf("snapshots: %+v, %v", all, err)
		}
		switch all[0].State {
		case "taken":
			testkit.Run(t, "e2fsck", "-fn", "/dev/tidemark/data@"+id)
		case "created":
			d.Run("snapshot", "take", id)
		default:
			t.Errorf("it is %s", all[0].State)
		}
		d.Run("snapshot", "destroy", id)
	}
	fio.wait(t, d)
	testkit.Run(t, "umount", dir)
	testkit.Run(t, "e2fsck", "-fn", node)
	d.Run("device", "rm", "data")
}
