package loop

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
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
// It asks sysfs: so nobody's permission is needed, and the device is not opened,
// which would end one that detaches itself with its last user.
func Status(path string) (Info, error) {
	n, err := Number(path)
	if err != nil {
		return Info{}, err
	}
	file := backing(n)
	if file == "" {
		return Info{}, fmt.Errorf("%s: %w", path, ErrNotAttached)
	}
	name, deleted := strings.CutSuffix(file, " (deleted)")
	flag := func(name string) bool { return attribute(n, name) == "1" }
	return Info{
		Path: path, Backing: name, Deleted: deleted, DiskSeq: diskSeq(n),
		Offset: int64(number(n, "loop/offset")), SizeLimit: int64(number(n, "loop/sizelimit")),
		ReadOnly: flag("ro"), DirectIO: flag("loop/dio"), PartScan: flag("loop/partscan"), AutoClear: flag("loop/autoclear"),
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

func diskSeq(n int) uint64 { return number(n, "diskseq") } // kernels before 5.15 have none

func number(n int, name string) uint64 {
	v, _ := strconv.ParseUint(attribute(n, name), 10, 64)
	return v
}

func attribute(n int, name string) string {
	b, err := os.ReadFile(fmt.Sprintf("/sys/block/loop%d/%s", n, name))
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(string(b), "\n")
}
