package testkit

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/loop"
)

// Disk is a loop device over a sparse file.
type Disk struct {
	Path string // /dev/loopN
	File string // in memory where /dev/shm is there
	Size int64  // bytes
}

// prefix marks our folders of backing files; the owner's process id follows it.
const prefix = "tidemark-test-"

var sweep sync.Once

// NewDisk gives a loop device of a size in bytes, with partition scanning,
// detached when the test ends. Devices that a killed test run left behind are
// unmounted and detached first.
func NewDisk(t testing.TB, size int64) *Disk {
	t.Helper()
	return NewDiskOf(t, size, 512)
}

// NewDiskOf is NewDisk with a logical sector size in bytes, which divides size.
func NewDiskOf(t testing.TB, size int64, sector int) *Disk {
	t.Helper()
	Need(t, "root", "loop")
	sweep.Do(func() { sweepLeftovers(t, orphaned); sweepDirs(OrphanedDirs()) })
	d := &Disk{File: filepath.Join(MemoryDir(t), "disk"), Size: size}
	f, err := os.Create(d.File)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		t.Fatal(err)
	}
	dev, err := loop.Attach(d.File, loop.Options{PartScan: true, BlockSize: sector})
	if err != nil {
		t.Fatal(err)
	}
	d.Path = dev.Path
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { detachAll(t, d.File) })
	return d
}

// Reattach makes a loop device of the file of a Disk whose own was detached,
// under whatever number is free. It is detached when that Disk is.
func Reattach(t testing.TB, file string) (path string) {
	t.Helper()
	dev, err := loop.Attach(file, loop.Options{PartScan: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	return dev.Path
}

// MemoryDir is a folder that carries our name and process id, on tmpfs where there is one.
func MemoryDir(t testing.TB) string {
	parent := "/dev/shm"
	if st, err := os.Stat(parent); err != nil || !st.IsDir() {
		parent = os.TempDir()
	}
	dir, err := os.MkdirTemp(parent, fmt.Sprintf("%s%d-", prefix, os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// detachAll detaches every loop device of a file.
func detachAll(t testing.TB, file string) {
	devices, err := loop.List()
	if err != nil {
		t.Error(err)
	}
	for _, d := range devices {
		if d.Backing != file {
			continue
		}
		if err := loop.Detach(d.Path); err != nil {
			t.Error(err)
		}
	}
}

// owner is the process id in the path of one of our backing files, or 0.
func owner(path string) int {
	var pid int
	for part := range strings.SplitSeq(path, "/") {
		if n, err := fmt.Sscanf(part, prefix+"%d-", &pid); n == 1 && err == nil {
			return pid
		}
	}
	return 0
}

func orphaned(path string) bool {
	pid := owner(path)
	return pid != 0 && errors.Is(unix.Kill(pid, 0), unix.ESRCH)
}

// sweepLeftovers unmounts and detaches the loop devices of backing files that nobody needs any more.
func sweepLeftovers(t testing.TB, orphaned func(file string) bool) {
	devices, err := loop.List()
	if err != nil {
		t.Logf("looking for leftovers: %v", err)
	}
	for _, d := range devices {
		if !orphaned(d.Backing) {
			continue
		}
		parts, _ := filepath.Glob(d.Path + "p[0-9]*")
		for _, p := range append(parts, d.Path) {
			_ = exec.Command("umount", "-A", p).Run() // mostly not mounted
		}
		if err := loop.Detach(d.Path); err != nil {
			t.Logf("left by a test run that was killed: %v", err)
		}
	}
}

// OrphanedDirs are the folders of test processes that no longer live.
func OrphanedDirs() (orphans []string) {
	for _, parent := range []string{"/dev/shm/", os.TempDir() + "/"} {
		dirs, _ := filepath.Glob(parent + prefix + "*")
		orphans = append(orphans, slices.DeleteFunc(dirs, func(dir string) bool { return !orphaned(dir) })...)
	}
	return orphans
}

// DaemonPID is the file that a daemon's folder has from package program, which
// alone knows what goes with the folder: taps, loop devices, memory.
const DaemonPID = "daemon.pid"

// sweepDirs removes orphaned folders, but for those of daemons.
func sweepDirs(orphans []string) {
	for _, dir := range orphans {
		if _, err := os.Lstat(filepath.Join(dir, DaemonPID)); err == nil {
			continue
		}
		os.RemoveAll(dir)
	}
}

// Dir is a folder on disk that goes when the test ends, or, where that is
// killed, when another begins.
func Dir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", fmt.Sprintf("%s%d-", prefix, os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// Mkfs makes a file system on a device.
func Mkfs(t testing.TB, dev, fstype string, extra ...string) {
	t.Helper()
	Need(t, fstype)
	args := map[string][]string{"ext4": {"-q", "-F"}, "xfs": {"-q", "-f"}, "btrfs": {"-q", "-f"}}[fstype]
	Run(t, "mkfs."+fstype, append(append(args, extra...), dev)...)
}

// Mount mounts a device until the test ends, and gives the folder.
func Mount(t testing.TB, dev string, options ...string) string {
	t.Helper()
	dir := t.TempDir()
	args := []string{dev, dir}
	if len(options) > 0 {
		args = append([]string{"-o", strings.Join(options, ",")}, args...)
	}
	Run(t, "mount", args...)
	t.Cleanup(func() { Unmount(t, dir) })
	return dir
}

// Unmount unmounts a folder; one that is not mounted is left as it is.
func Unmount(t testing.TB, dir string) {
	t.Helper()
	if err := unix.Unmount(dir, 0); err != nil && !errors.Is(err, unix.EINVAL) {
		t.Errorf("umount %s: %v", dir, err)
	}
}

// OnePartition writes a partition table (MBR) with one partition, from 1 MiB
// to the end, and waits for its node, which is d.Path + "p1".
func OnePartition(t testing.TB, d *Disk) {
	t.Helper()
	const first = 2048
	mbr := make([]byte, 512)
	mbr[446+4] = 0x83 // Linux
	binary.LittleEndian.PutUint32(mbr[446+8:], first)
	binary.LittleEndian.PutUint32(mbr[446+12:], uint32(d.Size/512-first))
	mbr[510], mbr[511] = 0x55, 0xaa
	f, err := os.OpenFile(d.Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	_, err = f.WriteAt(mbr, 0)
	if err := errors.Join(err, f.Sync()); err != nil {
		t.Fatal(err)
	}
	// The kernel may know no partition tables; it takes partitions from us all the same.
	Run(t, "partx", "--update", "--nr", "1", d.Path)
	if err := loop.WaitNode(d.Path+"p1", 5*time.Second); err != nil {
		t.Fatal(err)
	}
}
