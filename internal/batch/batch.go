// Package batch is the format in which a consumer is handed what it drains: a
// batch of writes, a bookmark, a part of a fill, or ranges to read from a disk.
//
//	header   fixed size: what this is, and the sizes and checksums of the rest
//	names    group, consumer, disks, the bookmark's name
//	table    one entry of fixed size for each record
//	payloads of the records that have one, in order, without anything between
//
// Every part carries a CRC-32C: the header its own, names and table in the
// header, each payload in its record's entry. docs/formats/batch.md has every byte.
package batch

import (
	"errors"
	"fmt"
	"hash/crc32"

	"tidemark/internal/block"
	"tidemark/internal/stream"
)

// Kind is what a batch holds. Stored: never renumber.
type Kind uint8

const (
	Writes   Kind = 1 // in order; at its end the copy is right
	Bookmark Kind = 2 // one, alone
	Fill     Kind = 3 // ranges with their content at position To, in any order
	Ranges   Kind = 4 // to be read from the disk itself; a fill will still bring what is right
)

var kindNames = map[Kind]string{Writes: "writes", Bookmark: "bookmark", Fill: "fill", Ranges: "ranges"}

func (k Kind) String() string {
	if n, ok := kindNames[k]; ok {
		return n
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// Disk is one of the group's, as records number them.
type Disk struct {
	Name       string
	Size       int64 // bytes
	SectorSize int64
}

// Header says what a batch is.
type Header struct {
	Kind       Kind
	Consistent bool // with it applied, and all before it, the copy is the source at position To
	Number     uint64
	From, To   stream.Position // the batch lies behind From, up to To
	Time       int64           // of To, nanoseconds since 1970
	GroupID    [16]byte
	Group      string
	Consumer   string
	Disks      []Disk

	Bookmark    string // of Kind Bookmark
	Consistency stream.Consistency
}

// Record is a write, or a run of a fill, or a range. Op says what becomes of the
// range: block.OpWrite (the payload), OpZeroes, or OpDiscard (undefined);
// block.OpRead in a batch of ranges. Position and Time are those of a write.
type Record struct {
	Op       block.Op
	Disk     int
	Position stream.Position
	Time     int64
	Range    block.Range
	Payload  []byte // Range.Len bytes where Op is OpWrite
}

// Batch is a decoded batch.
type Batch struct {
	Header
	Records []Record
}

// ErrDamaged is wrapped by every error about bytes that are not what was sent.
var ErrDamaged = errors.New("damaged batch")

// ErrVersion: the batch is of a version that this build does not read.
var ErrVersion = errors.New("unknown version of the batch format")

// Bounds of the format.
const (
	RecordsMax = 1 << 20
	PayloadMax = 1 << 30 // bytes of all payloads

	version    = 1
	headerSize = 96
	entrySize  = 40
	namesMax   = 1 << 20
	flagRight  = 1 // Header.Consistent
)

var magic = [8]byte{'T', 'I', 'D', 'E', 'B', 'A', 'T', '1'}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func crc(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }
