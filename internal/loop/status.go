package loop

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Info is what the kernel says of an attached device.
type Info struct {
	Path      string
	Backing   string // the backing file's path; of a deleted one the last
	Deleted   bool   // the backing file has no name any more
	DiskSeq   uint64 // the kernel's number of this attachment in this boot; 0 where it is not told
	Offset    int64  // bytes
	SizeLimit int64  // bytes; 0 is up to the end
	ReadOnly  bool
	DirectIO  bool
	PartScan  bool
	AutoClear bool
}

// Status describes the device at path; ErrNotAttached where it has no file.
func Status(path string) (Info, error) {
	n, err := Number(path)
	if err != nil {
		return Info{}, err
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return Info{}, err
	}
	defer f.Close()
	st, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if errors.Is(err, unix.ENXIO) {
		return Info{}, fmt.Errorf("%s: %w", path, ErrNotAttached)
	}
	if err != nil {
		return Info{}, fmt.Errorf("status of %s: %w", path, err)
	}
	has := func(flag uint32) bool { return st.Flags&flag != 0 }
	name, deleted := strings.CutSuffix(backing(n), " (deleted)")
	return Info{
		Path: path, Backing: name, Deleted: deleted, DiskSeq: diskSeq(n),
		Offset: int64(st.Offset), SizeLimit: int64(st.Sizelimit),
		ReadOnly: has(unix.LO_FLAGS_READ_ONLY), DirectIO: has(unix.LO_FLAGS_DIRECT_IO),
		PartScan: has(unix.LO_FLAGS_PARTSCAN), AutoClear: has(unix.LO_FLAGS_AUTOCLEAR),
	}, nil
}

// List describes every attached loop device. Those that go meanwhile are left out.
func List() ([]Info, error) {
	paths, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var out []Info
	for _, p := range paths {
		info, err := Status("/dev/" + filepath.Base(filepath.Dir(filepath.Dir(p))))
		if errors.Is(err, ErrNotAttached) || errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		out = append(out, info)
	}
	return out, nil
}

// backing is the backing file as sysfs tells it, or "".
func backing(n int) string { return attribute(n, "loop/backing_file") }

func diskSeq(n int) uint64 {
	seq, _ := strconv.ParseUint(attribute(n, "diskseq"), 10, 64) // kernels before 5.15 have none
	return seq
}

func attribute(n int, name string) string {
	b, err := os.ReadFile(fmt.Sprintf("/sys/block/loop%d/%s", n, name))
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(string(b), "\n")
}
