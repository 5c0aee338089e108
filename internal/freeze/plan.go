package freeze

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"tidemark/internal/disk"
)

// target is one file system to freeze, held open from before the first freeze.
type target struct {
	mount disk.Mount
	file  *os.File
}

func closeAll(targets []target) {
	for _, t := range targets {
		t.file.Close()
	}
}

// plan opens each file system of a request once, in the order of freezing.
func plan(r Request) ([]target, error) {
	mounts, err := wanted(r.Mounts)
	if err != nil {
		return nil, err
	}
	if mounts, err = innerFirst(mounts, r.Own); err != nil {
		return nil, err
	}
	var targets []target
	for _, m := range mounts {
		t, err := open(m)
		if err != nil {
			closeAll(targets)
			return nil, err
		}
		targets = append(targets, t)
	}
	if err := refuseOpenFiles(mounts); err != nil {
		closeAll(targets)
		return nil, err
	}
	return targets, nil
}

// wanted finds the mounts at the given points, one for each file system.
func wanted(points []string) ([]disk.Mount, error) {
	all, err := disk.Mounts()
	if err != nil {
		return nil, err
	}
	var out []disk.Mount
	for _, p := range points {
		at := slices.IndexFunc(all, func(m disk.Mount) bool { return m.Point == filepath.Clean(p) })
		if at < 0 {
			return nil, fmt.Errorf("freezing %s: %w: nothing is mounted there", p, os.ErrNotExist)
		}
		for i := at + 1; i < len(all); i++ { // the last one is the one that can be seen
			if all[i].Point == all[at].Point {
				at = i
			}
		}
		m := all[at]
		if !slices.ContainsFunc(out, func(o disk.Mount) bool { return o.Dev == m.Dev }) {
			out = append(out, m)
		}
	}
	if len(out) > mountsMax {
		return nil, fmt.Errorf("%d file systems to freeze: at most %d", len(out), mountsMax)
	}
	return out, nil
}

// unreplayed are options under which a mounted file system's journal waits on the disk.
var unreplayed = []string{"noload", "norecovery", "rescue=nologreplay", "rescue=all"}

func open(m disk.Mount) (target, error) {
	for _, o := range unreplayed {
		if slices.Contains(m.Options, o) {
			return target{}, fmt.Errorf("freezing %s: mounted with %s, so it is not clean whatever is done: %w", m.Point, o, ErrUnsupported)
		}
	}
	f, err := os.OpenFile(m.Point, os.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return target{}, fmt.Errorf("freezing %s: %w", m.Point, err)
	}
	if id := mountOf(strconv.Itoa(int(f.Fd()))); id != m.ID {
		f.Close()
		return target{}, fmt.Errorf("freezing %s: something else was mounted over it just now: %w", m.Point, os.ErrNotExist)
	}
	return target{mount: m, file: f}, nil
}

// innerFirst orders mounts so that what is stored in a file of another file
// system comes before that one. It refuses those that hold the caller's folders.
func innerFirst(mounts []disk.Mount, own []string) ([]disk.Mount, error) {
	above := make([][]string, len(mounts)) // devices above those of each mount
	for i, m := range mounts {
		for _, d := range m.Devices {
			info, err := disk.Glance(d)
			if err != nil {
				return nil, fmt.Errorf("freezing %s: %w", m.Point, err)
			}
			for _, dir := range own {
				if disk.Holds(info, dir) {
					return nil, fmt.Errorf("freezing %s: %w: it holds %s; keep that on a disk of another group", m.Point, ErrOwn, dir)
				}
			}
			for _, n := range info.Stack.Above {
				above[i] = append(above[i], n.Name)
			}
		}
	}
	var out []disk.Mount
	seen := make([]bool, len(mounts))
	var visit func(i int)
	visit = func(i int) {
		if seen[i] {
			return
		}
		seen[i] = true
		for j, m := range mounts {
			if slices.ContainsFunc(m.Devices, func(d string) bool { return slices.Contains(above[i], d) }) {
				visit(j)
			}
		}
		out = append(out, mounts[i])
	}
	for i := range mounts {
		visit(i)
	}
	return out, nil
}

// refuseOpenFiles finds what this process has open for writing on the mounts:
// the first write there would wait for a thaw that then never comes from us.
func refuseOpenFiles(mounts []disk.Mount) error {
	all, err := disk.Mounts()
	if err != nil {
		return err
	}
	frozen := map[int]disk.Mount{} // every mount of the file systems, by its id
	for _, m := range all {
		for _, f := range mounts {
			if f.Dev == m.Dev {
				frozen[m.ID] = f
			}
		}
	}
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return fmt.Errorf("own open files: %w", err)
	}
	for _, e := range entries {
		m, ok := frozen[mountOf(e.Name())]
		if !ok || !writable(e.Name()) {
			continue
		}
		name, err := os.Readlink("/proc/self/fd/" + e.Name())
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		return fmt.Errorf("freezing %s: %w: it has %s open; keep that on a disk of another group", m.Point, ErrOwn, name)
	}
	return nil
}

// fdinfo is one value of what the kernel says of an open descriptor, "" where it is closed by now.
func fdinfo(fd, key string) string {
	b, _ := os.ReadFile("/proc/self/fdinfo/" + fd)
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, key+":"); ok {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

func mountOf(fd string) int {
	id, err := strconv.Atoi(fdinfo(fd, "mnt_id"))
	if err != nil {
		return -1
	}
	return id
}

// writable says whether a regular file is open for writing; nodes, pipes and sockets write elsewhere.
func writable(fd string) bool {
	flags, err := strconv.ParseInt(fdinfo(fd, "flags"), 8, 64)
	n, _ := strconv.Atoi(fd)
	var st unix.Stat_t
	return err == nil && flags&unix.O_ACCMODE != unix.O_RDONLY && unix.Fstat(n, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG
}
