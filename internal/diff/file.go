package diff

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
)

// File is a Source that is a file, written by extent - below its file system, so
// that it may lie on a device whose snapshot it serves - or through it.
//
// By extent it must be on ext2, ext3, ext4 or xfs, whose files stay where they
// are: file systems that move or share what they wrote, and extents that are
// shared, encoded, inline, delayed or not aligned, are refused. The file is
// immutable between growths, so that nobody moves or frees its blocks; it must
// not grow while its file system is frozen. It is never open here: what is done
// to it is a Task, which may wait for a device that this process serves.
type File struct {
	name    string
	through *os.File     // nil: by extent
	dev     block.Device // of the extents
	do      Doer
	inode   uint64 // 0: not known
	made    bool
	limit   int64

	// growing is held while the file grows or is looked at, which may wait for the
	// device whose writers ask for Room: those must not wait for it.
	growing sync.Mutex
	mu      sync.Mutex // of what follows, for a moment; changed with growing held too
	size    int64
	extents []block.Range // of the whole file on dev
}

// Where says how a file is written.
type Where struct {
	// Device is the one that the file's file system lies on, as a filter below the
	// snapshot sees it; nil: the file is written through its file system, which must
	// not lie on a snapshotted device.
	Device block.Device
	// Do does what has to be done to a file by extent; nil: this process.
	Do Doer
}

func (w Where) doer() Doer {
	if w.Do == nil {
		return Do
	}
	return w.Do
}

// OpenFile makes or takes an empty file that grows up to limit bytes.
func OpenFile(path string, limit int64, w Where) (*File, error) {
	d := &File{name: path, dev: w.Device, do: w.doer(), limit: limit / Align * Align}
	if d.limit < Align {
		return nil, fmt.Errorf("%s: a limit of %d bytes is too small: %w", path, limit, ErrRefused)
	}
	if d.dev != nil {
		made, err := d.do(Task{Do: MakeFile, Path: path})
		if err != nil {
			return nil, err
		}
		d.inode, d.made = made.Inode, made.Made
		return d, nil
	}
	f, made, err := openEmpty(path)
	if err != nil {
		return nil, err
	}
	d.through, d.made = f, made
	return d, nil
}

// openEmpty makes a file, or takes one that holds nothing.
func openEmpty(path string) (f *os.File, made bool, err error) {
	made = true
	f, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		made = false
		f, err = os.OpenFile(path, os.O_RDWR, 0)
	}
	if errors.Is(err, unix.EISDIR) {
		return nil, false, fmt.Errorf("%s is a folder: name a file in it: %w", path, ErrRefused)
	}
	if err != nil {
		return nil, false, fmt.Errorf("difference storage: %w", err)
	}
	if err := empty(f); err != nil {
		return nil, false, errors.Join(err, f.Close())
	}
	return f, made, nil
}

// empty refuses what is not an empty file.
func empty(f *os.File) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("%s is not a regular file: %w", f.Name(), ErrRefused)
	}
	if st.Size() != 0 {
		return fmt.Errorf("%s holds %d bytes, which would be lost: name a file that does not exist: %w", f.Name(), st.Size(), ErrRefused)
	}
	return nil
}

// Kept is what has to be known of a file to take it over from a process that was killed.
type Kept struct {
	Path    string
	Limit   int64
	Size    int64
	Inode   uint64        // 0: not known
	Extents []block.Range // of one that is written by extent
}

// ReopenFile takes over a file that OpenFile made. One that is written by extent
// is not touched: its device may not be there for users yet. Check looks at it.
func ReopenFile(k Kept, w Where) (*File, error) {
	d := &File{name: k.Path, dev: w.Device, do: w.doer(), inode: k.Inode, made: true, limit: k.Limit / Align * Align, size: k.Size, extents: k.Extents}
	if d.dev != nil {
		return d, nil
	}
	f, err := os.OpenFile(k.Path, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("difference storage: %w", err)
	}
	d.through = f
	return d, nil
}

// Space is what the file's first size bytes are now, for Recover.
func (d *File) Space(off, size int64) (Space, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.space(off, size)
}

func (d *File) space(off, size int64) (Space, error) {
	if d.dev == nil {
		return NewLinear(through{d.through}, []block.Range{{Off: off, Len: size}})
	}
	return NewLinear(d.dev, part(d.extents, off, size))
}

// part cuts the extents that hold size bytes of the file from off on.
func part(extents []block.Range, off, size int64) []block.Range {
	var out []block.Range
	at := int64(0)
	for _, e := range extents {
		in := block.Range{Off: at, Len: e.Len}.Intersect(block.Range{Off: off, Len: size})
		if !in.Empty() {
			out = append(out, block.Range{Off: e.Off + in.Off - at, Len: in.Len})
		}
		at += e.Len
	}
	return out
}

// Room is how much the file may still grow.
func (d *File) Room() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.limit - d.size
}

// Kept is what ReopenFile needs of the file as it is now.
func (d *File) Kept() Kept {
	d.mu.Lock()
	defer d.mu.Unlock()
	return Kept{Path: d.name, Limit: d.limit, Size: d.size, Inode: d.inode, Extents: slices.Clone(d.extents)}
}

// Size is what it has grown to.
func (d *File) Size() int64 { return d.Kept().Size }

// Name is the file's path.
func (d *File) Name() string { return d.name }

// ByExtent says whether it is written below its file system.
func (d *File) ByExtent() bool { return d.dev != nil }

// Grow allocates more of the file and gives what came. It is stable when it returns.
func (d *File) Grow(bytes int64) (Space, error) {
	d.growing.Lock()
	defer d.growing.Unlock()
	n := min((bytes+Align-1)/Align*Align, d.limit-d.size)
	if n <= 0 {
		return nil, fmt.Errorf("%s has reached its limit of %d bytes: %w", d.name, d.limit, ErrFull)
	}
	var extents []block.Range
	var err error
	if d.dev == nil {
		err = errors.Join(allocate(d.through, d.size, n), syncParent(d.name))
	} else {
		extents, err = d.task(GrowFile, d.size+n)
	}
	if err != nil {
		return nil, fmt.Errorf("growing %s: %w", d.name, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.size, d.extents = d.size+n, extents
	return d.space(d.size-n, n)
}

// task has something done to a file by extent, of which as much is known as lies in extents.
func (d *File) task(what Action, size int64) ([]block.Range, error) {
	done, err := d.do(Task{Do: what, Path: d.name, Inode: d.inode, Made: d.made, Size: size, Extents: d.extents})
	return done.Extents, err
}

// Check looks again whether the file lies where it did. ErrCorrupt: it does not.
// os.ErrNotExist: it is not to be found, as where its file system is not mounted.
func (d *File) Check() error {
	d.growing.Lock()
	defer d.growing.Unlock()
	if d.dev == nil || d.size == 0 {
		return nil
	}
	_, err := d.task(CheckFile, d.size)
	return err
}

// Close lets go of the file and leaves it.
func (d *File) Close() error {
	if d.made && d.Size() == 0 { // never used
		return d.Remove()
	}
	if d.through != nil {
		return d.through.Close()
	}
	return nil
}

// Remove gives the room back: a file that was made is removed, another emptied. One
// that is not there any more, or another one in its place, is left alone.
// os.ErrNotExist: one that is written by extent is not to be found, as where its
// file system is not mounted; there it still lies, and is immutable.
func (d *File) Remove() error {
	if d.dev != nil {
		d.growing.Lock()
		defer d.growing.Unlock()
		_, err := d.task(RemoveFile, d.size)
		return err
	}
	mine, failed := d.through.Stat()
	there, absent := os.Stat(d.name)
	if failed == nil && (errors.Is(absent, fs.ErrNotExist) || absent == nil && !os.SameFile(mine, there)) {
		return d.through.Close()
	}
	return errors.Join(discard(d.name, d.made), d.through.Close())
}

func discard(name string, made bool) error {
	if made {
		return os.Remove(name)
	}
	return os.Truncate(name, 0)
}

// through is a file as a device.
type through struct{ *os.File }

func (t through) Flush() error { return unix.Fdatasync(int(t.Fd())) }

func (t through) Size() int64 {
	st, err := t.Stat()
	if err != nil {
		return 0 // every access fails then
	}
	return st.Size()
}
