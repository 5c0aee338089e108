package serve

import (
	"bytes"
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
		text, err := os.ReadFile(p + "/dev")
		if err != nil {
			continue
		}
		major, minor, _ := strings.Cut(strings.TrimSpace(string(text)), ":")
		x, _ := strconv.ParseUint(major, 10, 32)
		y, _ := strconv.ParseUint(minor, 10, 32)
		nodes[unix.Mkdev(uint32(x), uint32(y))] = "/dev/" + filepath.Base(p)
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
