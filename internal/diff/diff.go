// Package diff is the difference storage of a snapshot: where the old content of
// chunks goes before it is overwritten.
//
// It consists of areas, each a linear space made of ranges of a device or of the
// extents of a file, and is added to while the snapshot is held:
//
//	header 4 KiB | table, 128 entries to a block of 4 KiB | slots of one chunk each
//
// A slot's entry says whose old content it holds, with a checksum; it is written
// after the content. Entries are bound to the snapshot's id, so an area needs no
// clearing before it is used. The header says whose area it is and whether the
// snapshot is spoiled. All of it can be read back after the process was killed
// and, where the storage is durable (each step stable before the next begins),
// after the power failed.
//
// Slots are reserved before anything is overwritten: that the storage is full is
// known in time, and then the snapshot is spoiled, never the origin. Nobody waits
// for room. Sources are asked for more ahead of need, one at a time.
package diff

import (
	"errors"
	"fmt"
	"syscall"

	"tidemark/internal/block"
)

// Errors that callers branch on.
var (
	ErrFull    = fmt.Errorf("difference storage is full: %w", syscall.ENOSPC)
	ErrCorrupt = errors.New("difference storage is damaged")
	ErrRefused = errors.New("not fit for difference storage")
	ErrSpoiled = errors.New("the snapshot is spoiled")
)

// Align is what ranges, chunks and areas are multiples of, in bytes.
const Align = 4096

// ID is a snapshot's.
type ID [16]byte

// Key says whose old content a slot holds.
type Key struct {
	Device uint32 // index in the snapshot
	Chunk  int64
}

// Slot is a place in the storage.
type Slot int64

// Kind tells events apart.
type Kind string

const (
	LowSpace Kind = "low-space" // room is running out; Bytes more are wanted
	Overflow Kind = "overflow"  // there was none left
	Corrupt  Kind = "corrupt"   // an image can no longer be read right
)

// Event is something that whoever holds the snapshot should know.
type Event struct {
	Kind   Kind
	Bytes  int64  // low-space: how much more is wanted
	Device string // corrupt: whose image
	Err    error  // corrupt, overflow: why; low-space: why a source gives no more, if one failed
}

// Source gives more room on request.
type Source interface {
	// Grow adds about so many bytes, or what is left of its limit. It may be slow.
	Grow(bytes int64) (Space, error)
	// Room is how many bytes it can still give. It never waits, not for Grow either.
	Room() int64
}

// Space is the linear space that an area is laid out in: its own bytes from 0.
type Space interface {
	block.Device
	block.FUAWriter
}

// Stats is an exact account, in bytes.
type Stats struct {
	Chunk    int64 // of one slot
	Capacity int64 // slots there are
	Used     int64 // slots with content or reserved for it
	Overhead int64 // headers, tables and what is too small for a slot
	Room     int64 // that sources can still give
}
