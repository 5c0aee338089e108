package diff

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
	"tidemark/internal/vfs"
)

// Action is what a Task does.
type Action string

// Actions on a file that is written by extent.
const (
	MakeFile   Action = "make"   // it is made, or is empty
	GrowFile   Action = "grow"   // it has Size bytes allocated afterwards, stable
	CheckFile  Action = "check"  // it is looked at, and immutable afterwards
	RemoveFile Action = "remove" // its room is given back
)

// Task is something that is done to a file through its file system, which may wait
// for writes to the device below. The process that serves that device must not do
// it itself: if it is killed meanwhile, a thread that waits for a request that
// nobody serves any more cannot be killed, and keeps the next process from serving it.
type Task struct {
	Do      Action        `json:"do"`
	Path    string        `json:"path"`
	Inode   uint64        `json:"inode,omitempty"` // that it must have; 0: any
	Made    bool          `json:"made,omitempty"`  // it was not there before
	Size    int64         `json:"size,omitempty"`  // bytes
	Extents []block.Range `json:"extents,omitempty"`
}

// Done is what came of a Task.
type Done struct {
	Inode   uint64        `json:"inode,omitempty"`
	Made    bool          `json:"made,omitempty"`
	Extents []block.Range `json:"extents,omitempty"` // of Size bytes
}

// Doer does tasks, one at a time for each file, within a bounded time. Its errors
// wrap what those of Do wrap.
type Doer func(Task) (Done, error)

// Do does a task in this process. ErrRefused: the file is not fit. ErrCorrupt: its
// blocks are not where they were, or it is another file. os.ErrNotExist: it is not there.
func Do(t Task) (Done, error) {
	switch t.Do {
	case MakeFile:
		return makeFile(t)
	case GrowFile:
		return growFile(t)
	case CheckFile:
		return checkFile(t)
	case RemoveFile:
		return Done{}, removeFile(t)
	}
	return Done{}, fmt.Errorf("no action %q", t.Do)
}

func makeFile(t Task) (Done, error) {
	f, made, err := openEmpty(t.Path)
	if err != nil {
		return Done{}, err
	}
	err = byExtent(f)
	inode, failed := inodeOf(f)
	if err = errors.Join(err, failed, f.Close()); err != nil && made {
		err = errors.Join(err, os.Remove(t.Path))
	}
	return Done{Inode: inode, Made: made}, err
}

func inodeOf(f *os.File) (uint64, error) {
	var st unix.Stat_t
	err := unix.Fstat(int(f.Fd()), &st)
	return st.Ino, err
}

// openTask opens the file that a task is about, which must lie where it did.
// It is immutable, and so cannot be opened for writing.
func openTask(t Task) (*os.File, error) {
	f, err := os.Open(t.Path)
	if err != nil {
		return nil, err
	}
	if err := lies(f, t); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// lies refuses another file, and one whose blocks are not where they were.
func lies(f *os.File, t Task) error {
	inode, err := inodeOf(f)
	if err != nil {
		return err
	}
	if t.Inode != 0 && inode != t.Inode {
		return fmt.Errorf("%s: another file has taken its place: %w", t.Path, ErrCorrupt)
	}
	_, err = moved(f, t, length(t.Extents))
	return err
}

// moved gives the extents of size bytes. ErrCorrupt: those that are known are not the first.
func moved(f *os.File, t Task, size int64) ([]block.Range, error) {
	now, err := extentsOf(f, size)
	if err != nil {
		return nil, err
	}
	if !slices.Equal(joined(part(now, 0, length(t.Extents))), joined(t.Extents)) {
		return nil, fmt.Errorf("%s: the file's blocks moved: %w", t.Path, ErrCorrupt)
	}
	return now, nil
}

func length(all []block.Range) (n int64) {
	for _, r := range all {
		n += r.Len
	}
	return n
}

func growFile(t Task) (Done, error) {
	f, err := openTask(t)
	if err != nil {
		return Done{}, err
	}
	defer f.Close()
	if err := immutable(f, false); err != nil {
		return Done{}, err
	}
	err = allocateAnew(t)
	if err = errors.Join(err, immutable(f, true)); err != nil {
		return Done{}, err
	}
	all, err := moved(f, t, t.Size)
	return Done{Extents: all}, err
}

// allocateAnew opens the file for writing, which it was not when it was immutable.
func allocateAnew(t Task) error {
	f, err := os.OpenFile(t.Path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	have := length(t.Extents)
	return errors.Join(allocate(f, have, t.Size-have), syncParent(t.Path), f.Close())
}

// allocate gives a file n bytes more from off on, stable.
func allocate(f *os.File, off, n int64) error {
	if err := vfs.Allocate(f, off, n); err != nil {
		return fmt.Errorf("allocating %d bytes: %w", n, err)
	}
	return f.Sync()
}

// checkFile also makes a file immutable again that a killed process was growing.
func checkFile(t Task) (Done, error) {
	f, err := openTask(t)
	if err != nil {
		return Done{}, err
	}
	return Done{}, errors.Join(immutable(f, true), f.Close())
}

func removeFile(t Task) error {
	f, err := openTask(t)
	if errors.Is(err, fs.ErrNotExist) && len(t.Extents) == 0 || errors.Is(err, ErrCorrupt) || errors.Is(err, ErrRefused) {
		return nil // never used, or another file
	}
	if err != nil {
		return err
	}
	return errors.Join(immutable(f, false), f.Close(), discard(t.Path, t.Made))
}

// joined merges extents that follow one another on the device too.
func joined(in []block.Range) []block.Range {
	var out []block.Range
	for _, r := range in {
		if n := len(out); n > 0 && out[n-1].End() == r.Off {
			out[n-1].Len += r.Len
			continue
		}
		out = append(out, r)
	}
	return out
}

func syncParent(name string) error {
	dir, err := os.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
