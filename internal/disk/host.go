// Package disk says what a block device is: its numbers and sizes, its identity
// across renames and reboots, what is stacked above and below it, who has it
// mounted, whether the tap may be put on it, and when any of that changes.
//
// Everything is read from sysfs, procfs and, for superblocks and mapping
// tables, from the device itself. Nothing is ever written.
package disk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Errors that callers branch on.
var (
	// ErrNotFound: there is no such block device.
	ErrNotFound = errors.New("no such block device")
	// ErrNotBlock: the path names something that is not a block device.
	ErrNotBlock = errors.New("not a block device")
)

// Host is the machine that is looked at. The zero value is this one; Root is
// the folder of a recorded machine, whose sysfs, procfs and dev trees are below
// it. Of a recorded machine no device is opened.
type Host struct{ Root string }

func (h Host) live() bool { return h.Root == "" }

func (h Host) path(p string) string { return h.Root + p }

func (h Host) class(name string) string { return h.path("/sys/class/block/" + name) }

// attr is one attribute of a device without the newline; "" where it is absent.
func (h Host) attr(name, attr string) string {
	b, err := os.ReadFile(h.class(name) + "/" + attr)
	if err != nil {
		return ""
	}
	return strings.TrimRight(string(b), "\n\x00 ")
}

func (h Host) number(name, attr string) int64 {
	n, _ := strconv.ParseInt(h.attr(name, attr), 10, 64)
	return n
}

func (h Host) has(name, attr string) bool {
	_, err := os.Lstat(h.class(name) + "/" + attr)
	return err == nil
}

// list gives the names in one of a device's folders, sorted.
func (h Host) list(name, dir string) []string {
	entries, _ := os.ReadDir(h.class(name) + "/" + dir) // absent: none
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// names are the kernel names of all disks and partitions.
func (h Host) names() []string {
	entries, _ := os.ReadDir(h.path("/sys/class/block"))
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// nameOf is the kernel name of the device with a number, "" where there is none.
func (h Host) nameOf(dev uint32) string {
	link, err := os.Readlink(h.path(fmt.Sprintf("/sys/dev/block/%d:%d", dev>>20, dev&0xfffff)))
	if err != nil {
		return ""
	}
	return filepath.Base(link)
}

// devOf is the number of a device by kernel name, 0 where there is none.
func (h Host) devOf(name string) uint32 {
	dev, _ := parseDev(h.attr(name, "dev"))
	return dev
}

// wholeOf is the kernel name of the whole disk that a device is or lies on.
func (h Host) wholeOf(name string) string {
	if !h.has(name, "partition") {
		return name
	}
	dir, err := filepath.EvalSymlinks(h.class(name))
	if err != nil {
		return name
	}
	return filepath.Base(filepath.Dir(dir))
}

// partitions are the kernel names of the partitions of a whole disk.
func (h Host) partitions(whole string) []string {
	var out []string
	for _, n := range h.list(whole, "") {
		if h.has(whole, n+"/partition") {
			out = append(out, n)
		}
	}
	return out
}

// parseDev reads MAJ:MIN into the kernel's device number, major<<20|minor.
func parseDev(s string) (uint32, bool) {
	a, b, ok := strings.Cut(strings.TrimSpace(s), ":")
	major, err1 := strconv.ParseUint(a, 10, 12)
	minor, err2 := strconv.ParseUint(b, 10, 20)
	if !ok || err1 != nil || err2 != nil {
		return 0, false
	}
	return uint32(major<<20 | minor), true
}

// kernelDev turns a device number as stat gives it into the kernel's own form.
func kernelDev(dev uint64) uint32 { return unix.Major(dev)<<20 | unix.Minor(dev) }

func sortedSet(names []string) []string {
	slices.Sort(names)
	return slices.Compact(names)
}
