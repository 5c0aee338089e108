package restore

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"tidemark/internal/loop"
)

// deviceInUse looks at a block device (real: not a symbolic link), its
// partitions, and what is stacked on them.
func deviceInUse(real string) error {
	family, err := withPartitions(real)
	if err != nil {
		return err
	}
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		return fmt.Errorf("reading the mount table: %w", err)
	}
	for _, m := range mounts {
		// btrfs shows a number of its own, so its source counts as well.
		if family[unix.Mkdev(uint32(m.Major), uint32(m.Minor))] != "" || family[rdev(m.Source)] != "" {
			return fmt.Errorf("%s: %w: mounted at %s; unmount it first (umount %s)", real, ErrInUse, m.Mountpoint, m.Mountpoint)
		}
	}
	for _, path := range swaps() {
		if family[rdev(path)] != "" {
			return fmt.Errorf("%s: %w: the kernel swaps to %s; end that first (swapoff %s)", real, ErrInUse, path, path)
		}
	}
	for _, name := range family {
		holders, _ := filepath.Glob("/sys/class/block/" + name + "/holders/*")
		if len(holders) > 0 {
			return fmt.Errorf("%s: %w: %s is a part of %s; take that down first", real, ErrInUse, name, filepath.Base(holders[0]))
		}
	}
	return backsLoop(real, func(backing string) bool { return family[rdev(backing)] != "" })
}

// fileInUse looks for loop devices and swap on a regular file.
func fileInUse(path string, st os.FileInfo) error {
	same := func(other string) bool {
		o, err := os.Stat(other)
		return err == nil && os.SameFile(st, o)
	}
	for _, s := range swaps() {
		if same(s) {
			return fmt.Errorf("%s: %w: the kernel swaps to it; end that first (swapoff %s)", path, ErrInUse, s)
		}
	}
	return backsLoop(path, same)
}

func backsLoop(path string, same func(backing string) bool) error {
	loops, err := loop.List()
	if err != nil {
		return fmt.Errorf("looking for loop devices over %s: %w", path, err)
	}
	for _, l := range loops {
		if !l.Deleted && same(l.Backing) {
			return fmt.Errorf("%s: %w: %s is attached to it; detach that first (losetup -d %s)", path, ErrInUse, l.Path, l.Path)
		}
	}
	return nil
}

// withPartitions maps device numbers to kernel names: the device and its partitions.
func withPartitions(real string) (map[uint64]string, error) {
	var st unix.Stat_t
	if err := unix.Stat(real, &st); err != nil {
		return nil, fmt.Errorf("%s: %w", real, err)
	}
	sys, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)))
	if err != nil {
		return nil, fmt.Errorf("%s: the kernel does not know this device: %w", real, err)
	}
	family := map[uint64]string{st.Rdev: filepath.Base(sys)}
	parts, _ := filepath.Glob(sys + "/*/partition")
	for _, p := range parts {
		dir := filepath.Dir(p)
		b, err := os.ReadFile(dir + "/dev")
		if err != nil {
			continue // it has just gone
		}
		var major, minor uint32
		if _, err := fmt.Sscanf(string(b), "%d:%d", &major, &minor); err == nil {
			family[unix.Mkdev(major, minor)] = filepath.Base(dir)
		}
	}
	return family, nil
}

// rdev is the device number of a block device's node, or 0.
func rdev(path string) uint64 {
	var st unix.Stat_t
	if !strings.HasPrefix(path, "/") || unix.Stat(path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return 0
	}
	return st.Rdev
}

func swaps() []string {
	b, _ := os.ReadFile("/proc/swaps") // absent on kernels without swap
	var out []string
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 0 && strings.HasPrefix(f[0], "/") {
			out = append(out, f[0])
		}
	}
	return out
}

// deviceIdentity tells this device, in this boot, from any other.
func deviceIdentity(f *os.File, size int64) (string, error) {
	st, err := f.Stat()
	if err != nil {
		return "", err
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	dev := st.Sys().(*syscall.Stat_t).Rdev
	seq, _ := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/diskseq", unix.Major(dev), unix.Minor(dev))) // partitions have none
	return fmt.Sprintf("device %d:%d seq %s boot %s size %d", unix.Major(dev), unix.Minor(dev), strings.TrimSpace(string(seq)), strings.TrimSpace(string(boot)), size), nil
}

// fileIdentity tells this file from any other; "" for none yet.
func fileIdentity(st os.FileInfo) string {
	if st == nil {
		return ""
	}
	sys := st.Sys().(*syscall.Stat_t)
	return fmt.Sprintf("file %d inode %d", sys.Dev, sys.Ino)
}
