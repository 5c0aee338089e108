// Package overlay makes any block.Device writable for a while: what is written
// goes to a scratch file and is read back from there; the device below never
// changes.
//
// A block of 4 KiB is in one of three states: below (as it is in the device),
// scratch (in the scratch file, at the same offset) or zero (nowhere). A block
// goes to scratch as a whole: what a write leaves of it is copied up first. It
// changes its state only after the scratch file took it, so that a scratch file
// without room leaves the old content in place.
package overlay

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
)

// blockSize is the unit in which content moves to the scratch file, in bytes.
const blockSize = 4096

// store is the scratch file as the overlay needs it.
type store interface {
	io.ReaderAt
	io.WriterAt
	free(r block.Range) // of whole blocks that are no longer read; may do nothing
}

// Overlay is a writable block.Device. All methods may be called concurrently;
// a write is whole to every reader.
type Overlay struct {
	below   block.Device
	mapper  block.Mapper // below as one, or nil
	scratch store
	size    int64

	locks  stripes // of the states and of the content
	states states
}

var (
	_ block.Device    = (*Overlay)(nil)
	_ block.Mapper    = (*Overlay)(nil)
	_ block.Zeroer    = (*Overlay)(nil)
	_ block.Discarder = (*Overlay)(nil)
)

// New lays a scratch file over a device. What the file held is lost; it becomes
// sparse and as large as the device. The caller closes both after the overlay's
// last use. Memory: 8 KiB for each 128 MiB in which something was written.
func New(below block.Device, scratch *os.File) (*Overlay, error) {
	if err := errors.Join(scratch.Truncate(0), scratch.Truncate(below.Size())); err != nil {
		return nil, fmt.Errorf("scratch file of %d bytes: %w (put it on another file system)", below.Size(), err)
	}
	return over(below, file{scratch}), nil
}

func over(below block.Device, scratch store) *Overlay {
	m, _ := below.(block.Mapper)
	return &Overlay{below: below, mapper: m, scratch: scratch, size: below.Size(), states: newStates(below.Size())}
}

// file is a scratch file that gives back what it does not need.
type file struct{ *os.File }

func (f file) free(r block.Range) {
	// Where the file system knows no holes the room is merely not given back.
	_ = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, r.Off, r.Len)
}

// Size is the device's, in bytes.
func (o *Overlay) Size() int64 { return o.size }

// Flush does nothing: the overlay ends with its process, and so does the need for its content.
func (o *Overlay) Flush() error { return nil }

// ReadAt reads what was written last.
func (o *Overlay) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off > o.size {
		return 0, fmt.Errorf("read at %d of a device of %d bytes: %w", off, o.size, block.ErrBounds)
	}
	var short error
	if int64(len(p)) > o.size-off {
		p, short = p[:o.size-off], io.EOF
	}
	r := block.Range{Off: off, Len: int64(len(p))}
	defer o.locks.read(r)()
	for at := off; at < r.End(); {
		to, state := o.states.run(at, r.End())
		if n, err := o.readRun(p[at-off:to-off], at, state); err != nil {
			return int(at-off) + n, err
		}
		at = to
	}
	return len(p), short
}

// readRun fills p from the one source that its blocks have.
func (o *Overlay) readRun(p []byte, off int64, s state) (int, error) {
	var from io.ReaderAt = o.below
	switch s {
	case zero:
		clear(p)
		return len(p), nil
	case scratch:
		from = o.scratch
	}
	n, err := from.ReadAt(p, off)
	if n == len(p) {
		return n, nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	if s == scratch {
		err = fmt.Errorf("scratch file: %w", err)
	}
	return n, err
}

// WriteAt writes to the scratch file. Where that fails, blocks that were not in
// it before keep their content; it has room for the others already, and they
// come last.
func (o *Overlay) WriteAt(p []byte, off int64) (int, error) {
	r := block.Range{Off: off, Len: int64(len(p))}
	if err := block.CheckBounds(r, o.size); err != nil || r.Empty() {
		return 0, err
	}
	defer o.locks.write(r)()
	if err := o.write(p, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

// write is WriteAt with the locks held.
func (o *Overlay) write(p []byte, off int64) error {
	end := off + int64(len(p))
	for _, present := range []bool{false, true} {
		for at := off; at < end; {
			to, s := o.states.run(at, end)
			if (s == scratch) == present {
				if err := o.put(p[at-off:to-off], at, s); err != nil {
					o.forget(block.Range{Off: off, Len: end - off})
					return fmt.Errorf("write of %s to the scratch file: %w", block.Range{Off: at, Len: to - at}, err)
				}
			}
			at = to
		}
	}
	o.states.set(block.Range{Off: off, Len: end - off}, scratch)
	return nil
}

// forget gives the room back that a failed write took for blocks that stay where they were.
func (o *Overlay) forget(r block.Range) {
	for at := r.Off; at < r.End(); {
		to, s := o.states.run(at, r.End())
		if s != scratch {
			first, last := o.blockAt(at), o.blockAt(to-1)
			o.scratch.free(block.Range{Off: first.Off, Len: last.End() - first.Off})
		}
		at = to
	}
}

// put writes a run of one state: in place where it is in the scratch file
// already, else as whole blocks, the first and the last with what p leaves of them.
func (o *Overlay) put(p []byte, off int64, s state) error {
	end := off + int64(len(p))
	if s == scratch {
		_, err := o.scratch.WriteAt(p, off)
		return err
	}
	whole := o.whole(block.Range{Off: off, Len: end - off})
	if head := o.blockAt(off); !whole.Contains(head) {
		if err := o.compose(p, off, head, s); err != nil {
			return err
		}
	}
	if tail := o.blockAt(end - 1); !whole.Contains(tail) && tail != o.blockAt(off) {
		if err := o.compose(p, off, tail, s); err != nil {
			return err
		}
	}
	if whole.Empty() {
		return nil
	}
	_, err := o.scratch.WriteAt(p[whole.Off-off:whole.End()-off], whole.Off)
	return err
}

// blocks are buffers of one block.
var blocks = sync.Pool{New: func() any { return new([blockSize]byte) }}

// compose writes block b, with the part of p (at off) that lies in it over what it holds.
func (o *Overlay) compose(p []byte, off int64, b block.Range, s state) error {
	buf := blocks.Get().(*[blockSize]byte)
	defer blocks.Put(buf)
	if _, err := o.readRun(buf[:b.Len], b.Off, s); err != nil {
		return fmt.Errorf("copying the rest of the block up: %w", err)
	}
	part := b.Intersect(block.Range{Off: off, Len: int64(len(p))})
	copy(buf[part.Off-b.Off:part.End()-b.Off], p[part.Off-off:])
	_, err := o.scratch.WriteAt(buf[:b.Len], b.Off)
	return err
}

// blockAt is the block that holds a byte; the last one of a device can be short.
func (o *Overlay) blockAt(off int64) block.Range {
	off &^= blockSize - 1
	return block.Range{Off: off, Len: min(blockSize, o.size-off)}
}

// whole gives the blocks that lie in r as a whole, with a short one at the device's end.
func (o *Overlay) whole(r block.Range) block.Range {
	if r.End() != o.size {
		return r.Inward(blockSize)
	}
	off := min((r.Off+blockSize-1)&^(blockSize-1), r.End())
	return block.Range{Off: off, Len: r.End() - off}
}

// WriteZeroes makes a range read as zeroes. Whole blocks need no room for it, and give theirs back.
func (o *Overlay) WriteZeroes(r block.Range) error {
	if err := block.CheckBounds(r, o.size); err != nil || r.Empty() {
		return err
	}
	defer o.locks.write(r)()
	w := o.whole(r)
	if w.Empty() {
		var zeroes [2 * blockSize]byte // no whole block: less than two
		return o.write(zeroes[:r.Len], r.Off)
	}
	var zeroes [blockSize]byte
	if err := o.edge(zeroes[:w.Off-r.Off], r.Off); err != nil {
		return err
	}
	if err := o.edge(zeroes[:r.End()-w.End()], w.End()); err != nil {
		return err
	}
	o.drop(w)
	return nil
}

// edge zeroes a part of one block; one that reads as zeroes stays as it is.
func (o *Overlay) edge(zeroes []byte, off int64) error {
	if len(zeroes) == 0 || o.states.at(off) == zero {
		return nil
	}
	return o.write(zeroes, off)
}

// Discard makes the whole blocks of a range read as zeroes and gives their room
// back; the rest of the range keeps its content.
func (o *Overlay) Discard(r block.Range) error {
	if err := block.CheckBounds(r, o.size); err != nil || r.Empty() {
		return err
	}
	defer o.locks.write(r)()
	if w := o.whole(r); !w.Empty() {
		o.drop(w)
	}
	return nil
}

// drop makes whole blocks zero.
func (o *Overlay) drop(w block.Range) {
	for at := w.Off; at < w.End(); {
		to, s := o.states.run(at, w.End())
		if s == scratch {
			o.scratch.free(block.Range{Off: at, Len: to - at})
		}
		at = to
	}
	o.states.set(w, zero)
}
