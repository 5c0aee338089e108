package freeze_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/freeze"
	"tidemark/internal/testkit"
)

const (
	fiFreeze = 0xc0045877
	fiThaw   = 0xc0045878
)

// TestMain is also the watchdog, and the caller that is killed while it holds a freeze.
func TestMain(m *testing.M) {
	if freeze.IsWatchdog() {
		os.Exit(freeze.WatchdogMain())
	}
	if mounts := os.Getenv("FREEZE_TEST_MOUNTS"); mounts != "" {
		f, err := freeze.Freeze(context.Background(), freeze.Request{Mounts: strings.Split(mounts, ":"), Timeout: time.Minute})
		fmt.Println("frozen", err)
		_, _ = io.Copy(io.Discard, os.Stdin) // until the test ends
		_ = f.Thaw()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func do(dir string, req uint) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.IoctlSetInt(fd, req, 0)
}

// isFrozen asks by trying: a second freeze of a frozen file system is refused.
func isFrozen(t *testing.T, dir string) bool {
	t.Helper()
	err := do(dir, fiFreeze)
	if errors.Is(err, unix.EBUSY) {
		return true
	}
	if err == nil {
		err = do(dir, fiThaw)
	}
	if err != nil {
		t.Fatal(err)
	}
	return false
}

// mounted gives a file system that is thawed before it is unmounted, whatever the test did.
func mounted(t *testing.T, fs string) string {
	t.Helper()
	testkit.Need(t, fs)
	d := testkit.NewDisk(t, 320<<20)
	testkit.Mkfs(t, d.Path, fs)
	return mount(t, d.Path)
}

func mount(t *testing.T, dev string) string {
	dir := testkit.Mount(t, dev)
	t.Cleanup(func() { _ = do(dir, fiThaw) })
	return dir
}

func freezeNow(t *testing.T, r freeze.Request) *freeze.Frozen {
	t.Helper()
	f, err := freeze.Freeze(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Thaw() })
	return f
}

func eventually(t *testing.T, what string, within time.Duration, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(within); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", within, what)
		}
	}
}

func TestFreezeAndThaw(t *testing.T) {
	for _, fs := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fs, func(t *testing.T) {
			testkit.NoLeaks(t)
			dir := mounted(t, fs)
			if err := os.WriteFile(dir+"/a", make([]byte, 1<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			f := freezeNow(t, freeze.Request{Mounts: []string{dir, dir + "/"}})
			if !f.Still() || !isFrozen(t, dir) || len(f.Mounts()) != 1 {
				t.Errorf("not frozen: still %v, mounts %v", f.Still(), f.Mounts())
			}
			if err := f.Thaw(); err != nil {
				t.Error(err)
			}
			if isFrozen(t, dir) {
				t.Error("frozen after the thaw")
			}
		})
	}
}

func TestTimeIsOver(t *testing.T) {
	testkit.NoLeaks(t)
	dir := mounted(t, "ext4")
	f := freezeNow(t, freeze.Request{Mounts: []string{dir}, Timeout: 2 * time.Second}) // time enough to freeze on a busy machine
	eventually(t, "the watchdog fires", 10*time.Second, func() bool { return !f.Still() })
	eventually(t, "it thaws", 5*time.Second, func() bool { return !isFrozen(t, dir) })
	if err := f.Thaw(); !errors.Is(err, freeze.ErrNotHeld) {
		t.Errorf("Thaw: %v", err)
	}
}

func TestThawedByAnother(t *testing.T) {
	dir := mounted(t, "ext4")
	f := freezeNow(t, freeze.Request{Mounts: []string{dir}})
	if err := do(dir, fiThaw); err != nil {
		t.Fatal(err)
	}
	if err := f.Thaw(); !errors.Is(err, freeze.ErrNotHeld) {
		t.Errorf("Thaw: %v", err)
	}
}

func TestForeignFreeze(t *testing.T) {
	testkit.NoLeaks(t)
	first, second := mounted(t, "ext4"), mounted(t, "xfs")
	testkit.Run(t, "fsfreeze", "-f", second)
	_, err := freeze.Freeze(t.Context(), freeze.Request{Mounts: []string{first, second}})
	if !errors.Is(err, freeze.ErrForeign) || !strings.Contains(err.Error(), second) {
		t.Errorf("%v", err)
	}
	if isFrozen(t, first) || !isFrozen(t, second) {
		t.Error("ours must be thawed, theirs must stay frozen")
	}
	testkit.Run(t, "fsfreeze", "-u", second)
}

// child starts this program as a caller that freezes and then waits.
func child(t *testing.T, mounts ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "FREEZE_TEST_MOUNTS="+strings.Join(mounts, ":"))
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); _ = cmd.Process.Kill(); _ = cmd.Wait() })
	line := make([]byte, 512)
	n, _ := out.Read(line)
	if got := string(line[:n]); got != "frozen <nil>\n" {
		t.Fatalf("the child said %q", got)
	}
	return cmd
}

// watchdogOf finds the watchdog of a process among its children.
func watchdogOf(t *testing.T, pid int) int {
	t.Helper()
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, task := range tasks {
		b, _ := os.ReadFile(task)
		for _, f := range strings.Fields(string(b)) {
			line, _ := os.ReadFile("/proc/" + f + "/cmdline")
			if strings.Contains(string(line), freeze.WatchdogVerb) {
				var dog int
				fmt.Sscan(f, &dog)
				return dog
			}
		}
	}
	t.Fatalf("process %d has no watchdog", pid)
	return 0
}

func TestCallerKilled(t *testing.T) {
	a, b := mounted(t, "ext4"), mounted(t, "btrfs")
	cmd := child(t, a, b)
	dog := watchdogOf(t, cmd.Process.Pid)
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", dog))
	if strings.Contains(string(status), "VmLck:\t       0 kB") || !strings.Contains(string(status), "VmLck:") {
		t.Errorf("the watchdog's memory is not locked:\n%s", status)
	}
	if !isFrozen(t, a) || !isFrozen(t, b) {
		t.Fatal("not frozen")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "thawed after the caller's death", 5*time.Second, func() bool { return !isFrozen(t, a) && !isFrozen(t, b) })
	_ = cmd.Wait() // says that it was killed
	eventually(t, "the watchdog ends", 5*time.Second, func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", dog))
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", dog)) // a dead first thread does not mean that all are
		return err != nil || len(tasks) < 2 && strings.Contains(string(b), ") Z ")
	})
}

// TestWatchdogKilled: the caller takes its place.
func TestWatchdogKilled(t *testing.T) {
	testkit.NoLeaks(t)
	dir := mounted(t, "ext4")
	f := freezeNow(t, freeze.Request{Mounts: []string{dir}, Timeout: time.Minute})
	dog := watchdogOf(t, os.Getpid())
	if err := unix.Kill(dog, unix.SIGTERM); err != nil { // a service manager's: ignored
		t.Fatal(err)
	}
	if !f.Still() || !isFrozen(t, dir) {
		t.Fatal("SIGTERM ended the freeze")
	}
	if err := unix.Kill(dog, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "thawed by the caller", 5*time.Second, func() bool { return !isFrozen(t, dir) })
	if f.Still() {
		t.Error("still, they say")
	}
	if err := f.Thaw(); !errors.Is(err, freeze.ErrNotHeld) {
		t.Errorf("Thaw: %v", err)
	}
}

// TestStacked: a file system in a file of another one freezes first; the other
// way round its last writes would wait for the thaw.
func TestStacked(t *testing.T) {
	testkit.NoLeaks(t)
	outer := mounted(t, "ext4")
	inner := nested(t, outer)
	if err := os.WriteFile(inner+"/dirty", make([]byte, 4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	f := freezeNow(t, freeze.Request{Mounts: []string{outer, inner}})
	if !slices.Equal(f.Mounts(), []string{inner, outer}) {
		t.Errorf("frozen in the order %v, want inner %s first", f.Mounts(), inner)
	}
	if err := f.Thaw(); err != nil {
		t.Error(err)
	}
	if isFrozen(t, inner) || isFrozen(t, outer) {
		t.Error("frozen after the thaw")
	}
}

func TestOwnFolders(t *testing.T) {
	outer := mounted(t, "ext4")
	inner := nested(t, outer)
	refused := func(what string, r freeze.Request) {
		t.Helper()
		_, err := freeze.Freeze(t.Context(), r)
		if !errors.Is(err, freeze.ErrOwn) || isFrozen(t, outer) {
			t.Errorf("%s: %v", what, err)
		}
	}
	refused("a folder on it", freeze.Request{Mounts: []string{outer}, Own: []string{outer + "/state"}})
	refused("a folder in a file on it", freeze.Request{Mounts: []string{outer}, Own: []string{inner}})
	log, err := os.Create(outer + "/log")
	if err != nil {
		t.Fatal(err)
	}
	refused("an open file", freeze.Request{Mounts: []string{outer}})
	log.Close()
	freezeNow(t, freeze.Request{Mounts: []string{inner}, Own: []string{outer}})
}

func TestNotToBeFrozen(t *testing.T) {
	dir := mounted(t, "ext4")
	_, err := freeze.Freeze(t.Context(), freeze.Request{Mounts: []string{dir, "/dev/shm"}})
	if !errors.Is(err, freeze.ErrUnsupported) || isFrozen(t, dir) {
		t.Errorf("tmpfs: %v", err)
	}
	if _, err = freeze.Freeze(t.Context(), freeze.Request{Mounts: []string{dir + "/nothing"}}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no mount point: %v", err)
	}
}
