package disk

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Mount is one mounted file system.
type Mount struct {
	ID      int      `json:"id"` // in this mount namespace, as in /proc/PID/fdinfo
	Point   string   `json:"point"`
	FS      string   `json:"fs"`
	Source  string   `json:"source"`
	Dev     uint32   `json:"dev"`               // as stat would give it, in the kernel's form; of btrfs not a disk's
	Devices []string `json:"devices,omitempty"` // kernel names of what holds it; several for btrfs
	Options []string `json:"options,omitempty"` // of the mount and of the file system
}

// ReadOnly says whether the mount or its file system takes no writes.
func (m Mount) ReadOnly() bool { return slices.Contains(m.Options, "ro") }

func (m Mount) option(key string) string {
	for _, o := range m.Options {
		if v, ok := strings.CutPrefix(o, key+"="); ok {
			return v
		}
	}
	return ""
}

// Mounts lists what is mounted in this mount namespace, in the order of mounting.
func Mounts() ([]Mount, error) {
	v, err := Host{}.survey()
	if err != nil {
		return nil, err
	}
	return v.mounts, nil
}

// survey is the state of the whole machine, read once for one answer.
type survey struct {
	h      Host
	mounts []Mount
	loops  map[string][]string // a loop device and what holds its backing file
	swaps  map[string][]string // a line of /proc/swaps and what holds it
}

func (h Host) survey() (*survey, error) {
	v := &survey{h: h, loops: map[string][]string{}, swaps: map[string][]string{}}
	if err := v.readMounts(); err != nil {
		return nil, err
	}
	for _, name := range h.names() {
		// By the text alone: asking the file system that holds the file could wait for a server that is this process.
		if file := h.attr(name, "loop/backing_file"); file != "" {
			v.loops[name] = v.devicesOfText(strings.TrimSuffix(file, " (deleted)"))
		}
	}
	b, _ := os.ReadFile(h.path("/proc/swaps")) // absent on kernels without swap
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) > 1 && strings.HasPrefix(f[0], "/") {
			file := strings.ReplaceAll(f[0], `\040`, " ")
			v.swaps[file] = v.devicesOfText(strings.TrimSuffix(file, "(deleted)"))
		}
	}
	return v, nil
}

func (v *survey) readMounts() error {
	f, err := os.Open(v.h.path("/proc/self/mountinfo"))
	if errors.Is(err, fs.ErrNotExist) && !v.h.live() {
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading the mount table: %w", err)
	}
	defer f.Close()
	infos, err := mountinfo.GetMountsFromReader(f, nil)
	if err != nil {
		return fmt.Errorf("reading the mount table: %w", err)
	}
	var lost []int // btrfs whose source means nothing here
	claimed := map[string]bool{}
	for _, i := range infos {
		m := Mount{ID: i.ID, Point: i.Mountpoint, FS: i.FSType, Source: i.Source, Dev: uint32(i.Major)<<20 | uint32(i.Minor),
			Options: sortedSet(strings.Split(i.Options+","+i.VFSOptions, ","))}
		m.Devices = v.devicesOfSource(m)
		for _, d := range m.Devices {
			claimed[d] = true
		}
		if m.FS == "btrfs" && len(m.Devices) == 0 {
			lost = append(lost, len(v.mounts))
		}
		v.mounts = append(v.mounts, m)
	}
	for _, at := range lost { // better one mount too many than a mounted disk that looks free
		for _, set := range v.btrfs() {
			if !slices.ContainsFunc(set, func(d string) bool { return claimed[d] }) {
				v.mounts[at].Devices = append(v.mounts[at].Devices, set...)
			}
		}
	}
	return nil
}

// devicesOfSource are the block devices that a file system lies on.
func (v *survey) devicesOfSource(m Mount) []string {
	if name := v.h.nameOf(m.Dev); m.Dev>>20 != 0 && name != "" {
		return []string{name}
	}
	var names []string
	for source := range strings.SplitSeq(m.Source, ":") {
		if !strings.HasPrefix(source, "/dev/") {
			continue
		}
		if name, err := v.h.resolve(source); err == nil {
			names = append(names, name)
		}
	}
	if m.FS == "btrfs" {
		for _, set := range v.btrfs() {
			if len(names) == 1 && slices.Contains(set, names[0]) {
				return set
			}
		}
	}
	return names
}

// btrfs lists the devices of each btrfs file system that is mounted anywhere.
func (v *survey) btrfs() [][]string {
	dirs, _ := filepath.Glob(v.h.path("/sys/fs/btrfs/*/devices"))
	var sets [][]string
	for _, dir := range dirs {
		entries, _ := os.ReadDir(dir)
		var set []string
		for _, e := range entries {
			set = append(set, e.Name())
		}
		if len(set) > 0 {
			sets = append(sets, set)
		}
	}
	return sets
}

// mountOver is the mount that a path is in, by the text of the path alone.
func (v *survey) mountOver(path string) (Mount, bool) {
	best, found := Mount{}, false
	for _, m := range v.mounts {
		if within(path, m.Point) && len(m.Point) >= len(best.Point) { // the later of two on one point covers the earlier
			best, found = m, true
		}
	}
	return best, found
}

func within(path, dir string) bool {
	return path == dir || dir == "/" || strings.HasPrefix(path, dir+"/")
}

// devicesOfText is what holds a file, or the device that the path is the node
// of, found without touching the file.
func (v *survey) devicesOfText(path string) []string {
	if strings.HasPrefix(path, "/dev/") {
		if name := strings.ReplaceAll(path[len("/dev/"):], "/", "!"); v.h.has(name, "dev") {
			return []string{name}
		}
		if v.h.live() {
			var st unix.Stat_t
			if unix.Stat(path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK {
				return []string{v.h.nameOf(kernelDev(st.Rdev))}
			}
		}
	}
	return v.devicesOfPath(path, 0)
}

// overlaysMax bounds how many overlays may lie on one another; the kernel allows two.
const overlaysMax = 4

func (v *survey) devicesOfPath(path string, depth int) []string {
	m, ok := v.mountOver(path)
	if !ok || depth > overlaysMax {
		return nil
	}
	if m.FS != "overlay" {
		return m.Devices
	}
	var names []string
	for _, dir := range append(strings.Split(m.option("lowerdir"), ":"), m.option("upperdir")) {
		if strings.HasPrefix(dir, "/") {
			names = append(names, v.devicesOfPath(dir, depth+1)...)
		}
	}
	return sortedSet(names)
}
