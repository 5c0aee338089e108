package serve

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"tidemark/internal/disk"
)

// openBy says who has a block device or a partition of it open, "" for nobody
// that can be seen. It never opens the device: this process serves it.
func openBy(kernel string) string {
	name := filepath.Base(kernel)
	nodes := map[uint64]string{}
	parts, _ := filepath.Glob("/sys/class/block/" + name + "/" + name + "*") // a pattern without faults
	for _, p := range append(parts, "/sys/class/block/"+name) {
		number, ok := numberIn(p)
		if !ok {
			continue
		}
		nodes[number] = "/dev/" + filepath.Base(p)
		if held, _ := os.ReadDir(p + "/holders"); len(held) > 0 {
			return held[0].Name()
		}
	}
	if at := mountedAt(nodes); at != "" {
		return "the mount " + at
	}
	if text, err := os.ReadFile("/proc/swaps"); err == nil {
		for _, node := range nodes {
			if bytes.Contains(text, []byte(node+" ")) {
				return "swap"
			}
		}
	}
	return processWith(nodes)
}

// numberIn reads the device number from a block device's folder in sysfs.
func numberIn(folder string) (number uint64, ok bool) {
	text, err := os.ReadFile(folder + "/dev")
	if err != nil {
		return 0, false
	}
	major, minor, _ := strings.Cut(strings.TrimSpace(string(text)), ":")
	x, err1 := strconv.ParseUint(major, 10, 32)
	y, err2 := strconv.ParseUint(minor, 10, 32)
	return unix.Mkdev(uint32(x), uint32(y)), err1 == nil && err2 == nil
}

func mountedAt(nodes map[uint64]string) string {
	mounts, err := disk.Mounts()
	if err != nil {
		return ""
	}
	for _, m := range mounts {
		for _, node := range nodes {
			for _, d := range m.Devices {
				if "/dev/"+d == node {
					return m.Point
				}
			}
		}
	}
	return ""
}

// processWith finds a process that has a node open, as far as it may be seen.
func processWith(nodes map[uint64]string) string {
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*") // a pattern without faults
	self := "/proc/" + strconv.Itoa(os.Getpid()) + "/"
	for _, fd := range fds {
		var st unix.Stat_t
		if strings.HasPrefix(fd, self) || unix.Stat(fd, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
			continue
		}
		if _, ok := nodes[st.Rdev]; ok {
			return "process " + strings.Split(fd, "/")[2]
		}
	}
	return ""
}

// family is a disk's relation to another.
type family uint8

const (
	stranger family = iota
	itself
	above // a partition, or stacked on it
)

// where says how the block device with a number is related to a kernel node.
func where(kernel string, dev uint64) family {
	base := filepath.Base(kernel)
	path, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(dev), unix.Minor(dev)))
	if err != nil {
		return stranger
	}
	if filepath.Base(path) == base {
		return itself
	}
	if liesOn(path, base, 16) {
		return above
	}
	return stranger
}

// liesOn says whether a device of sysfs is a partition of, or stacked on, another.
func liesOn(path, base string, depth int) bool {
	parent := filepath.Dir(path)
	if _, err := os.Stat(filepath.Join(path, "partition")); err == nil && (filepath.Base(parent) == base || liesOn(parent, base, depth-1)) {
		return true
	}
	lower, _ := filepath.Glob(filepath.Join(path, "slaves", "*")) // a pattern without faults
	for _, l := range lower {
		real, err := filepath.EvalSymlinks(l)
		if err == nil && (filepath.Base(real) == base || depth > 0 && liesOn(real, base, depth-1)) {
			return true
		}
	}
	return false
}

// mountsOn lists where file systems on a device, its partitions and what is stacked on it are mounted.
func mountsOn(kernel string) (out []string) {
	mounts, err := disk.Mounts()
	if err != nil {
		return nil
	}
	for _, m := range mounts {
		for _, name := range m.Devices {
			if number, ok := numberIn("/sys/class/block/" + name); ok && where(kernel, number) != stranger {
				out = append(out, m.Point)
				break
			}
		}
	}
	return out
}
