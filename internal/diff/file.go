package diff

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
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
// not grow while its file system is frozen.
type File struct {
	f     *os.File
	dev   block.Device // nil: through the file system
	made  bool
	limit int64

	// growing is held while the file grows or is looked at, which may wait for the
	// device whose writers ask for Room: those must not wait for it.
	growing sync.Mutex
	mu      sync.Mutex // of what follows, for a moment; changed with growing held too
	size    int64
	extents []block.Range // of the whole file on dev
}

// OpenFile makes or takes an empty file that grows up to limit bytes. dev is the
// device that its file system lies on, as a filter below the snapshot sees it;
// nil: the file is written through its file system, which must not lie on a
// snapshotted device.
func OpenFile(path string, limit int64, dev block.Device) (*File, error) {
	made := true
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		made = false
		f, err = os.OpenFile(path, os.O_RDWR, 0)
	}
	if errors.Is(err, unix.EISDIR) {
		return nil, fmt.Errorf("%s is a folder: name a file in it: %w", path, ErrRefused)
	}
	if err != nil {
		return nil, fmt.Errorf("difference storage: %w", err)
	}
	d := &File{f: f, dev: dev, made: made, limit: limit / Align * Align}
	if err := d.admit(); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// ReopenFile takes a file that OpenFile made, after the process was killed: it is
// of a size, and where it is written by extent these must be its extents.
func ReopenFile(path string, limit, size int64, dev block.Device, extents []block.Range) (*File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY, 0) // an immutable file cannot be opened for writing
	if err == nil && dev == nil {
		err = f.Close()
		if err == nil {
			f, err = os.OpenFile(path, os.O_RDWR, 0)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("difference storage: %w", err)
	}
	d := &File{f: f, dev: dev, made: true, limit: limit, size: size, extents: extents}
	if err := d.Check(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return d, nil
}

func (d *File) admit() error {
	st, err := d.f.Stat()
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("%s is not a regular file: %w", d.f.Name(), ErrRefused)
	}
	if st.Size() != 0 {
		return fmt.Errorf("%s holds %d bytes, which would be lost: name a file that does not exist: %w", d.f.Name(), st.Size(), ErrRefused)
	}
	if d.limit < Align {
		return fmt.Errorf("%s: a limit of %d bytes is too small: %w", d.f.Name(), d.limit, ErrRefused)
	}
	if d.dev == nil {
		return nil
	}
	return byExtent(d.f)
}

// Space is what the file's first size bytes are now, for Recover.
func (d *File) Space(off, size int64) (Space, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.space(off, size)
}

func (d *File) space(off, size int64) (Space, error) {
	if d.dev == nil {
		return NewLinear(through{d.f}, []block.Range{{Off: off, Len: size}})
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

// Size is what it has grown to, Extents where that lies; empty where it is
// written through its file system.
func (d *File) Size() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.size
}

// Extents are those of the whole file.
func (d *File) Extents() []block.Range {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.extents)
}

// Name is the file's path.
func (d *File) Name() string { return d.f.Name() }

// Grow allocates more of the file and gives what came. It is stable when it returns.
func (d *File) Grow(bytes int64) (Space, error) {
	d.growing.Lock()
	defer d.growing.Unlock()
	n := min((bytes+Align-1)/Align*Align, d.limit-d.size)
	if n <= 0 {
		return nil, fmt.Errorf("%s has reached its limit of %d bytes: %w", d.f.Name(), d.limit, ErrFull)
	}
	if d.dev == nil {
		if err := errors.Join(unix.Fallocate(int(d.f.Fd()), 0, d.size, n), d.f.Sync(), syncParent(d.f.Name())); err != nil {
			return nil, fmt.Errorf("growing %s: %w", d.f.Name(), err)
		}
		d.grown(d.size+n, nil)
		return d.space(d.size-n, n)
	}
	if err := d.check(); err != nil {
		return nil, err
	}
	if err := d.extend(n); err != nil {
		return nil, fmt.Errorf("growing %s: %w", d.f.Name(), err)
	}
	return d.space(d.size-n, n)
}

// extend allocates n bytes and learns where they lie.
func (d *File) extend(n int64) error {
	if err := immutable(d.f, false); err != nil {
		return err
	}
	err := d.allocate(n)
	if err = errors.Join(err, immutable(d.f, true)); err != nil {
		return err
	}
	all, err := extentsOf(d.f, d.size+n)
	if err != nil {
		return err
	}
	if got := part(all, 0, d.size); !slices.Equal(joined(got), joined(d.extents)) {
		return fmt.Errorf("the file's blocks moved: %w", ErrCorrupt)
	}
	d.grown(d.size+n, all)
	return nil
}

func (d *File) grown(size int64, extents []block.Range) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.size, d.extents = size, extents
}

// allocate opens the file anew: after a restart it was immutable when it was opened.
func (d *File) allocate(n int64) error {
	f, err := os.OpenFile(d.f.Name(), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	if err = unix.Fallocate(int(f.Fd()), 0, d.size, n); err == nil {
		err = errors.Join(f.Sync(), syncParent(d.f.Name()))
	}
	return errors.Join(err, f.Close())
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

// Check looks again whether the file lies where it did.
func (d *File) Check() error {
	d.growing.Lock()
	defer d.growing.Unlock()
	return d.check()
}

func (d *File) check() error {
	if d.dev == nil || d.size == 0 {
		return nil
	}
	now, err := extentsOf(d.f, d.size)
	if err != nil {
		return err
	}
	if !slices.Equal(joined(now), joined(d.extents)) {
		return fmt.Errorf("%s: the file's blocks moved: %w", d.f.Name(), ErrCorrupt)
	}
	return nil
}

// Close lets go of the file and leaves it.
func (d *File) Close() error {
	if d.made && d.Size() == 0 { // never used
		return errors.Join(os.Remove(d.f.Name()), d.f.Close())
	}
	return d.f.Close()
}

// Remove gives the room back: a file that was made is removed, another emptied. One
// that is not there any more, or another one in its place, is left alone.
func (d *File) Remove() error {
	var err error
	if d.dev != nil {
		err = immutable(d.f, false)
	}
	mine, failed := d.f.Stat()
	there, absent := os.Stat(d.f.Name())
	if failed == nil && (errors.Is(absent, fs.ErrNotExist) || absent == nil && !os.SameFile(mine, there)) {
		return errors.Join(err, d.f.Close())
	}
	if d.made {
		return errors.Join(err, os.Remove(d.f.Name()), d.f.Close())
	}
	return errors.Join(err, os.Truncate(d.f.Name(), 0), d.f.Close())
}

func syncParent(name string) error {
	dir, err := os.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
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
