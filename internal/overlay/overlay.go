// Package overlay makes any block.Device writable for a while: what is written
// goes to a scratch file and is read back from there; the device below never
// changes.
package overlay

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"tidemark/internal/block"
)

// blockSize is the unit in which content moves to the scratch file, in bytes.
const blockSize = 4096

// Overlay is a writable block.Device. All methods may be called concurrently.
type Overlay struct {
	below   block.Device
	scratch *os.File

	mu   sync.RWMutex // held for writing while blocks move; a write is whole to every reader
	here []uint64     // bit set: the block is in the scratch file
}

var (
	_ block.Device = (*Overlay)(nil)
	_ block.Mapper = (*Overlay)(nil)
	_ block.Zeroer = (*Overlay)(nil)
)

// New lays a scratch file, empty or to be overwritten, over a device. The
// caller closes both after the overlay's last use.
func New(below block.Device, scratch *os.File) (*Overlay, error) {
	if err := scratch.Truncate(below.Size()); err != nil {
		return nil, fmt.Errorf("scratch file: %w", err)
	}
	return &Overlay{below: below, scratch: scratch, here: make([]uint64, (below.Size()/blockSize+64)/64)}, nil
}

// Size is the device's, in bytes.
func (o *Overlay) Size() int64 { return o.below.Size() }

// Flush does nothing: the scratch file ends with its process.
func (o *Overlay) Flush() error { return nil }

func (o *Overlay) has(b int64) bool { return o.here[b/64]>>(b&63)&1 != 0 }

// run gives how far from off the same source serves, at most to end.
func (o *Overlay) run(off, end int64) (to int64, scratch bool) {
	scratch = o.has(off / blockSize)
	for to = (off/blockSize + 1) * blockSize; to < end && o.has(to/blockSize) == scratch; to += blockSize {
	}
	return min(to, end), scratch
}

// ReadAt reads what was written last.
func (o *Overlay) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off > o.Size() {
		return 0, fmt.Errorf("read at %d: %w", off, block.ErrBounds)
	}
	short := int64(len(p)) > o.Size()-off
	if short {
		p = p[:o.Size()-off]
	}
	o.mu.RLock()
	defer o.mu.RUnlock()
	end := off + int64(len(p))
	for at := off; at < end; {
		to, scratch := o.run(at, end)
		var from io.ReaderAt = o.below
		if scratch {
			from = o.scratch
		}
		part := p[at-off : to-off]
		if n, err := from.ReadAt(part, at); n < len(part) {
			return int(at-off) + n, err
		}
		at = to
	}
	if short {
		return len(p), io.EOF
	}
	return len(p), nil
}

// WriteAt writes to the scratch file. Where that has no room nothing of a block
// that was not there before is seen to change.
func (o *Overlay) WriteAt(p []byte, off int64) (int, error) {
	if err := block.CheckBounds(block.Range{Off: off, Len: int64(len(p))}, o.Size()); err != nil {
		return 0, err
	}
	if len(p) == 0 {
		return 0, nil
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	end := off + int64(len(p))
	for _, b := range []int64{off / blockSize, (end - 1) / blockSize} { // partly overwritten: the rest comes up first
		if err := o.lift(b, off, end); err != nil {
			return 0, err
		}
	}
	if n, err := o.scratch.WriteAt(p, off); err != nil {
		return n, fmt.Errorf("scratch file: %w", err)
	}
	for b := off / blockSize; b <= (end-1)/blockSize; b++ {
		o.here[b/64] |= 1 << (b & 63)
	}
	return len(p), nil
}

func (o *Overlay) lift(b, off, end int64) error {
	from := b * blockSize
	to := min(from+blockSize, o.Size())
	if o.has(b) || off <= from && end >= to {
		return nil
	}
	buf := make([]byte, to-from)
	if n, err := o.below.ReadAt(buf, from); n < len(buf) {
		return errors.Join(err, io.ErrUnexpectedEOF)
	}
	if _, err := o.scratch.WriteAt(buf, from); err != nil {
		return fmt.Errorf("scratch file: %w", err)
	}
	o.here[b/64] |= 1 << (b & 63)
	return nil
}

// WriteZeroes writes zeroes.
func (o *Overlay) WriteZeroes(r block.Range) error {
	zero := make([]byte, min(r.Len, 1<<20))
	for r.Len > 0 {
		n, err := o.WriteAt(zero[:min(r.Len, int64(len(zero)))], r.Off)
		if err != nil {
			return err
		}
		r.Off, r.Len = r.Off+int64(n), r.Len-int64(n)
	}
	return nil
}

// Extents are the device's, but data where something was written.
func (o *Overlay) Extents(r block.Range) ([]block.Extent, error) {
	if err := block.CheckBounds(r, o.Size()); err != nil || r.Empty() {
		return []block.Extent{{Range: r}}, err
	}
	o.mu.RLock()
	to, scratch := o.run(r.Off, r.End())
	o.mu.RUnlock()
	part := block.Range{Off: r.Off, Len: to - r.Off}
	if m, ok := o.below.(block.Mapper); ok && !scratch {
		return m.Extents(part)
	}
	return []block.Extent{{Range: part, State: block.Data}}, nil
}
