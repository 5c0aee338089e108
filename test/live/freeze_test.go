package live

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/loop"
	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

const (
	fiFreeze = 0xc0045877
	fiThaw   = 0xc0045878
)

// freezing is a mounted, protected ext4.
type freezing struct {
	t    *testing.T
	d    *program.Daemon
	disk *testkit.Disk
	mnt  string
}

func newFreezing(t *testing.T) *freezing {
	testkit.Need(t, "root", "tap", "loop", "ext4")
	f := &freezing{t: t, disk: testkit.NewDisk(t, 32*mib)}
	testkit.Mkfs(t, f.disk.Path, "ext4")
	f.mnt = mountThawed(t, f.disk.Path)
	return f
}

// protect begins to protect it.
func (f *freezing) protect(args ...string) {
	f.t.Helper()
	f.d = program.New(f.t)
	f.d.Protect("g", append(args, f.disk.Path)...)
}

// mountThawed mounts a device until the test ends; whatever happened, it is thawed before.
func mountThawed(t *testing.T, dev string) string {
	t.Helper()
	dir := testkit.Mount(t, dev)
	t.Cleanup(func() { _ = freezer(dir, fiThaw) })
	return dir
}

func freezer(dir string, req uint) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.IoctlSetInt(fd, req, 0)
}

// lives writes to a file system and waits for the end of it.
func lives(t *testing.T, dir string) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		file, err := os.Create(filepath.Join(dir, "lives"))
		if err == nil {
			_, err = file.WriteString(time.Now().String())
			err = errors.Join(err, file.Sync(), file.Close())
		}
		done <- err
	}()
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(patience):
		t.Fatalf("%s is still frozen", dir)
	}
}

// frozen says whether a file system is, by trying: it must be still, or frozen for good.
func frozen(t *testing.T, dir string) bool {
	t.Helper()
	err := freezer(dir, fiFreeze)
	if errors.Is(err, unix.EBUSY) {
		return true
	}
	if err == nil {
		err = freezer(dir, fiThaw)
	}
	if err != nil {
		t.Fatal(err)
	}
	return false
}

// consistent puts a file-system-consistent bookmark and holds it to its word.
func (f *freezing) consistent(name string) {
	f.t.Helper()
	f.d.Run("bookmark", "g", name, "--consistency", "filesystem")
	f.d.Settle("g")
	for _, disk := range f.d.Group("g").Disks {
		file := f.d.Restored("g", disk.Name, name)
		testkit.Run(f.t, "e2fsck", "-fn", file)
		os.Remove(file)
	}
	lives(f.t, f.mnt)
}

// absent sees that a bookmark that failed is none, and leaves its name free.
func (f *freezing) absent(name string) {
	f.t.Helper()
	f.d.Settle("g")
	if slices.ContainsFunc(f.d.Points("g"), func(p program.Point) bool { return p.Bookmark == name }) {
		f.t.Errorf("bookmark %s failed, and is listed", name)
	}
}

// hookFolder has executables of given names that note each call, then run a script.
func hookFolder(t *testing.T, scripts map[string]string) (dir string, calls func() string) {
	t.Helper()
	dir = t.TempDir()
	log := filepath.Join(t.TempDir(), "calls")
	for name, script := range scripts {
		text := fmt.Sprintf("#!/bin/sh\necho %s $1 >>%s\n%s\n", name, log, script)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return dir, func() string {
		b, _ := os.ReadFile(log)
		return strings.ReplaceAll(strings.TrimSpace(string(b)), "\n", ", ")
	}
}

// TestHooks: they run around the freeze; where one fails the bookmark does, and
// everything that was begun is undone in reverse.
func TestHooks(t *testing.T) {
	f := newFreezing(t)
	fails := filepath.Join(t.TempDir(), "fails")
	dir, calls := hookFolder(t, map[string]string{"1-first": "exit 0", "2-second": "[ $1 = thaw ] || ! test -e " + fails, "3-third": "exit 0"})
	f.protect("--hook-dir", dir)
	f.d.Run("bookmark", "g", "application", "--consistency", "application")
	all := "1-first freeze, 2-second freeze, 3-third freeze, 3-third thaw, 2-second thaw, 1-first thaw"
	if got := calls(); got != all {
		t.Errorf("calls %s, want %s", got, all)
	}
	if err := os.WriteFile(fails, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, consistency := range []string{"filesystem", "application"} {
		text := f.d.Refused(exitRefused, "bookmark", "g", "failed", "--consistency", consistency)
		if !strings.Contains(text, "2-second") {
			t.Errorf("which hook failed is not said: %s", text)
		}
		lives(t, f.mnt)
	}
	failed := ", 1-first freeze, 2-second freeze, 2-second thaw, 1-first thaw"
	if got, want := calls(), all+failed+failed; got != want {
		t.Errorf("calls %s, want %s", got, want)
	}
	f.absent("failed")
	if err := os.Remove(fails); err != nil {
		t.Fatal(err)
	}
	f.consistent("failed") // the name is free
}

// TestHookHangs: nobody has to wait for it. Whoever asked goes away, the hook is
// ended with all that it started, and the next bookmark is a bookmark.
func TestHookHangs(t *testing.T) {
	f := newFreezing(t)
	pids := filepath.Join(t.TempDir(), "pids")
	hangs := filepath.Join(t.TempDir(), "hangs")
	dir, calls := hookFolder(t, map[string]string{"hangs": fmt.Sprintf("[ $1 = thaw ] && exit 0\ntest -e %s || exit 0\nsleep 600 &\necho $! >%s.new && mv %s.new %s\nwait", hangs, pids, pids, pids)})
	if err := os.WriteFile(hangs, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	f.protect("--hook-dir", dir)
	verb := f.d.Background("bookmark", "g", "hung", "--consistency", "filesystem")
	var child string
	program.Eventually(t, patience, "the hook runs", func() error {
		b, err := os.ReadFile(pids)
		child = strings.TrimSpace(string(b))
		return err
	})
	f.d.Group("g") // status answers meanwhile
	if err := verb.Process.Signal(unix.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := verb.Wait(); err == nil {
		t.Error("the bookmark came to be")
	}
	program.Eventually(t, patience, "the hook's child is gone", func() error {
		b, err := os.ReadFile("/proc/" + child + "/stat")
		if err == nil && !bytes.Contains(b, []byte(") Z ")) {
			return program.ErrNotYet
		}
		return nil
	})
	program.Eventually(t, patience, "its thaw is called", func() error {
		if calls() != "hangs freeze, hangs thaw" {
			return errors.New(calls())
		}
		return nil
	})
	lives(t, f.mnt)
	f.absent("hung")
	if err := os.Remove(hangs); err != nil {
		t.Fatal(err)
	}
	f.consistent("next")
}

// TestForeignFreeze: somebody else's freeze is theirs. A bookmark that needs one
// fails; a crash-consistent one does not.
func TestForeignFreeze(t *testing.T) {
	f := newFreezing(t)
	f.protect()
	if err := freezer(f.mnt, fiFreeze); err != nil {
		t.Fatal(err)
	}
	text := f.d.Refused(exitInUse, "bookmark", "g", "theirs", "--consistency", "filesystem")
	if !strings.Contains(text, f.mnt) || !strings.Contains(text, "fsfreeze -u") {
		t.Errorf("where, and what to do, is not said: %s", text)
	}
	if !frozen(t, f.mnt) {
		t.Error("their freeze was ended")
	}
	f.d.Run("bookmark", "g", "crash")
	f.absent("theirs")
	if err := freezer(f.mnt, fiThaw); err != nil {
		t.Fatal(err)
	}
	f.consistent("theirs")
}

// stuck is a group of two mounted disks. The freeze of the second does not end,
// because its disk is a file on a third, which somebody else has frozen.
type stuck struct {
	*freezing
	second, third string // where they are mounted
	device        string // that of the second
	verb          *exec.Cmd
	dog           int // the watchdog's process id
}

func newStuck(t *testing.T) *stuck {
	s := &stuck{freezing: newFreezing(t)}
	host := testkit.NewDisk(t, 96*mib)
	testkit.Mkfs(t, host.Path, "ext4")
	s.third = mountThawed(t, host.Path)
	dev := loopOn(t, s.third, 32*mib)
	s.device, s.second = dev, mountThawed(t, dev)
	s.d = program.New(t)
	t.Cleanup(s.release)               // before anything is unmounted
	s.d.Protect("g", s.disk.Path, dev) // frozen in this order
	return s
}

// loopOn makes a loop device, with an ext4, of a file on a mounted file system.
func loopOn(t *testing.T, mnt string, size int64) string {
	t.Helper()
	file := filepath.Join(mnt, "image")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, size); err != nil {
		t.Fatal(err)
	}
	dev, err := loop.Attach(file, loop.Options{})
	if err != nil {
		t.Fatal(err)
	}
	dev.Close()
	t.Cleanup(func() {
		if err := loop.Detach(dev.Path); err != nil {
			t.Error(err)
		}
	})
	testkit.Mkfs(t, dev.Path, "ext4")
	return dev.Path
}

// release ends what hangs: the third's freeze, the daemon, the verb, the watchdog.
func (s *stuck) release() {
	_ = freezer(s.third, fiThaw)
	s.d.Kill()
	if s.verb != nil {
		_ = s.verb.Process.Kill()
	}
	program.Eventually(s.t, patience, "the watchdog has ended", func() error {
		if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.dog)); s.dog != 0 && err == nil && !bytes.Contains(b, []byte(") Z ")) {
			return program.ErrNotYet
		}
		return nil
	})
}

// begin asks for a bookmark, and returns when its freeze hangs at the second
// file system. Somebody's sync can look the same: then it is tried once more.
func (s *stuck) begin() {
	s.t.Helper()
	for range 3 {
		if s.tryBegin(); frozen(s.t, s.mnt) {
			return
		}
		s.release()
		_ = s.verb.Wait() // how it ended does not matter
		s.d.Start()
		s.d.Settle("g")
	}
	s.t.Fatal("the first file system is not frozen")
}

func (s *stuck) tryBegin() {
	s.t.Helper()
	if err := os.WriteFile(filepath.Join(s.second, "dirty"), make([]byte, 2*mib), 0o600); err != nil {
		s.t.Fatal(err)
	}
	testkit.Run(s.t, "sync", "-f", s.third)
	if err := freezer(s.third, fiFreeze); err != nil {
		s.t.Fatal(err)
	}
	s.verb = s.d.Background("bookmark", "g", "stuck", "--consistency", "filesystem")
	waits := 0
	program.Eventually(s.t, patience, "the watchdog waits for the second's freeze", func() error {
		s.dog = waitingDog(s.d.PID())
		if s.dog == 0 || !hasWrites(s.device) {
			waits = 0
			return program.ErrNotYet
		}
		if waits++; waits < 4 {
			return program.ErrNotYet
		}
		return nil
	})
}

// hasWrites says whether writes are on their way to a disk.
func hasWrites(dev string) bool {
	b, _ := os.ReadFile("/sys/class/block/" + filepath.Base(dev) + "/inflight")
	f := strings.Fields(string(b))
	return len(f) == 2 && f[1] != "0"
}

// waitingDog is the watchdog of a process while a thread of it waits in the kernel for a disk, or 0.
func waitingDog(pid int) int {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, task := range tasks {
		children, _ := os.ReadFile(task)
		for _, child := range strings.Fields(string(children)) {
			line, _ := os.ReadFile("/proc/" + child + "/cmdline")
			if !bytes.Contains(line, []byte("freeze-watchdog")) {
				continue
			}
			threads, _ := filepath.Glob("/proc/" + child + "/task/*/stat")
			for _, thread := range threads {
				if b, _ := os.ReadFile(thread); bytes.Contains(b, []byte(") D ")) {
					dog, _ := strconv.Atoi(child)
					return dog
				}
			}
		}
	}
	return 0
}

// over lets the third go; then all must come free.
func (s *stuck) over() {
	s.t.Helper()
	lives(s.t, s.mnt) // while the second still hangs
	if err := freezer(s.third, fiThaw); err != nil {
		s.t.Fatal(err)
	}
	if err := s.verb.Wait(); err == nil {
		s.t.Error("the bookmark came to be")
	}
	lives(s.t, s.second)
	lives(s.t, s.mnt)
	s.absent("stuck")
	s.consistent("stuck")
}

// TestKilledWhileFrozen: the watchdog thaws what a killed daemon had frozen.
func TestKilledWhileFrozen(t *testing.T) {
	s := newStuck(t)
	s.begin()
	s.d.Kill()
	lives(t, s.mnt)
	s.d.Start()
	s.over()
}

// TestFreezeHangs: a freeze that does not end is given up when its time is over,
// and status answers all the while.
func TestFreezeHangs(t *testing.T) {
	s := newStuck(t)
	s.begin()
	if g := s.d.Group("g"); g.State == "offline" {
		t.Errorf("the group is %s during a freeze", g.State)
	}
	s.over()
}

// TestKilledAroundFreezes: kill -9 at any moment of a bookmark leaves nothing frozen.
func TestKilledAroundFreezes(t *testing.T) {
	f := newFreezing(t)
	f.protect()
	for i := range 4 {
		name := fmt.Sprint("killed-", i)
		verb := f.d.Background("bookmark", "g", name, "--consistency", "filesystem")
		time.Sleep(time.Duration(i*i) * 4 * time.Millisecond) // somewhere in it: where does not matter
		f.d.Kill()
		err := verb.Wait()
		lives(t, f.mnt)
		f.d.Start()
		f.d.Settle("g")
		listed := slices.ContainsFunc(f.d.Points("g"), func(p program.Point) bool { return p.Bookmark == name })
		if err == nil && !listed {
			t.Errorf("bookmark %s was promised, and is not listed", name)
		}
	}
	f.consistent("end")
}

// TestStackedLoops: a file system in a file of one on a protected disk. What is
// written to the inner one waits for the outer's thaw, and nothing else does.
func TestStackedLoops(t *testing.T) {
	f := newFreezing(t)
	dev := loopOn(t, f.mnt, 16*mib)
	inner := mountThawed(t, dev)
	f.protect()
	f.d.Refused(exitInUse, "protect", "--vault", f.d.Vault, "--name", "other", dev)
	var stop atomic.Bool
	var all sync.WaitGroup
	for _, dir := range []string{inner, f.mnt} {
		all.Go(func() {
			for i := 0; !stop.Load(); i++ {
				if err := os.WriteFile(filepath.Join(dir, fmt.Sprint("f", i%8)), make([]byte, 200<<10), 0o600); err != nil {
					t.Errorf("writing beside a freeze: %v", err)
					return
				}
			}
		})
	}
	t.Cleanup(func() { stop.Store(true); all.Wait() })
	for i := range 4 {
		f.d.Run("bookmark", "g", fmt.Sprint("at-", i), "--consistency", "filesystem")
		lives(t, inner)
	}
	stop.Store(true)
	all.Wait()
	for i := range 4 {
		f.d.Settle("g")
		file := f.d.Restored("g", "", fmt.Sprint("at-", i))
		testkit.Run(t, "e2fsck", "-fn", file)
	}
	f.consistent("end")
}
