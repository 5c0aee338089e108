// Package block is the vocabulary of block devices that the rest of Tidemark
// speaks: ranges of bytes, the operations on them, and the Device that a disk,
// an image file, a view at a point and a served device all are. It does no I/O.
package block

import (
	"errors"
	"fmt"
	"io"
)

// SectorSize is the unit of the Linux block layer, in bytes, whatever the
// logical block size of a disk is.
const SectorSize = 512

// Op is what a request or a captured write does to a range.
type Op uint8

// The operations. Their numbers are stored in segments: never renumber.
const (
	OpRead    Op = 0
	OpWrite   Op = 1 // payload replaces the content
	OpZeroes  Op = 2 // the content becomes zero
	OpDiscard Op = 3 // the content is undefined until it is written again
	OpFlush   Op = 4 // what has completed becomes stable
)

func (o Op) String() string {
	switch o {
	case OpRead:
		return "read"
	case OpWrite:
		return "write"
	case OpZeroes:
		return "write-zeroes"
	case OpDiscard:
		return "discard"
	case OpFlush:
		return "flush"
	}
	return fmt.Sprintf("op(%d)", uint8(o))
}

// Range is Len bytes from byte Off of a device.
type Range struct {
	Off int64 `json:"offset"`
	Len int64 `json:"length"`
}

// End is the byte after the range.
func (r Range) End() int64 { return r.Off + r.Len }

// Empty says whether the range holds no byte.
func (r Range) Empty() bool { return r.Len <= 0 }

// Overlaps says whether both ranges share a byte.
func (r Range) Overlaps(o Range) bool { return r.Off < o.End() && o.Off < r.End() }

// Intersect is the part that both ranges share; it is empty where there is none.
func (r Range) Intersect(o Range) Range {
	off, end := max(r.Off, o.Off), min(r.End(), o.End())
	if end <= off {
		return Range{Off: off}
	}
	return Range{Off: off, Len: end - off}
}

// Contains says whether o lies in r as a whole.
func (r Range) Contains(o Range) bool { return r.Off <= o.Off && o.End() <= r.End() }

// Outward is the smallest range of whole blocks of the given size (a power of
// two) that holds r.
func (r Range) Outward(size int64) Range {
	if r.Empty() {
		return Range{Off: r.Off &^ (size - 1)}
	}
	off, end := r.Off&^(size-1), (r.End()+size-1)&^(size-1)
	return Range{Off: off, Len: end - off}
}

// Inward is the largest range of whole blocks of the given size (a power of
// two) inside r; it can be empty.
func (r Range) Inward(size int64) Range {
	off, end := (r.Off+size-1)&^(size-1), r.End()&^(size-1)
	if end <= off {
		return Range{Off: off}
	}
	return Range{Off: off, Len: end - off}
}

// String gives "offset+length" in bytes.
func (r Range) String() string { return fmt.Sprintf("%d+%d", r.Off, r.Len) }

// DiskRange is a range of one disk of a group, by the disk's index in it.
type DiskRange struct {
	Disk int
	Range
}

// Errors that a Device returns whatever it is made of.
var (
	ErrReadOnly = errors.New("device is read-only")
	ErrBounds   = errors.New("beyond the end of the device")
)

// Device is anything with blocks. All methods may be called concurrently.
//
// ReadAt and WriteAt behave as io.ReaderAt and io.WriterAt do; offsets and
// lengths are bytes. A device that cannot be written returns ErrReadOnly from
// WriteAt. Flush returns when everything whose WriteAt returned before is
// stable.
type Device interface {
	io.ReaderAt
	io.WriterAt
	Flush() error
	Size() int64
}

// Zeroer is a Device that can zero a range without being sent the zeroes.
type Zeroer interface {
	WriteZeroes(r Range) error
}

// Discarder is a Device that can be told that the content of a range no longer matters.
type Discarder interface {
	Discard(r Range) error
}

// State says what is known of an extent's content without reading it.
type State uint8

const (
	Data      State = iota // must be read
	Zero                   // reads as zeroes
	Undefined              // discarded and not written since: anything may be read
)

func (s State) String() string {
	return [...]string{"data", "zero", "undefined"}[s]
}

// Extent is a run of bytes in one state.
type Extent struct {
	Range
	State State
}

// Mapper is a Device that knows the state of its extents without reading them.
// Extents returns at least one extent; they are in order and gapless, begin at
// r.Off and end at r.End() or, where there are many, before it.
type Mapper interface {
	Extents(r Range) ([]Extent, error)
}

// CheckBounds returns an error that wraps ErrBounds where r is not inside a
// device of the given size.
func CheckBounds(r Range, size int64) error {
	if r.Off < 0 || r.Len < 0 || r.Off > size || r.Len > size-r.Off {
		return fmt.Errorf("range %s of a device of %d bytes: %w", r, size, ErrBounds)
	}
	return nil
}
