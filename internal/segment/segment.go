// Package segment is the file format of a sealed run of a group's records: at
// once the unit of drain, of transfer, of storage and of recovery.
//
// A segment is written once and never changed:
//
//	header   magic, version, and as JSON: group, sequence, chain, disks
//	frames   the payloads of all records, one behind the other, cut into
//	         frames of FrameSize bytes, each compressed by itself
//	index    where each frame lies; a fixed entry for every record; names and
//	         ranges of bookmarks and gaps
//	footer   fixed size: where the index is, checksums of header and index, summary
//
// Every part carries a CRC-32C; footers form a chain. docs/formats/segment.md
// has every byte. Builders and Segments are used by one goroutine; ReadPayload
// may be called concurrently.
package segment

import (
	"encoding/binary"
	"errors"
	"hash/crc32"

	"lukechampine.com/blake3"

	"tidemark/internal/stream"
)

// Sizes of the format.
const (
	FrameSize  = 64 << 10 // bytes of payload in a frame, before compression
	version    = 1
	footerSize = 256
	entrySize  = 72
	frameHead  = 16
	headerHead = 16
	indexHead  = 32
	frameRef   = 16
	headerMax  = 1 << 20
)

var (
	magicHeader = [8]byte{'T', 'I', 'D', 'E', 'S', 'E', 'G', '1'}
	magicFrame  = [4]byte{'F', 'R', 'M', '1'}
	magicIndex  = [8]byte{'T', 'I', 'D', 'E', 'I', 'D', 'X', '1'}
	magicFooter = [8]byte{'T', 'I', 'D', 'E', 'E', 'N', 'D', '1'}
)

// Codecs of a frame.
const (
	codecRaw = 0
	codecS2  = 1
)

// ErrDamaged is wrapped by every error about content that is not what was written.
var ErrDamaged = errors.New("damaged")

// ErrVersion: the segment is of a version that this build does not read.
var ErrVersion = errors.New("unknown version of the segment format")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func crc(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

// Disk is one disk of the group as the records' Disk numbers name them.
type Disk struct {
	Name       string `json:"name"`
	Size       int64  `json:"size"`
	SectorSize int64  `json:"sector_size"`
	BlockSize  int64  `json:"block_size"` // of gaps and fills
	Identity   string `json:"identity"`   // for comparison by who wrote it
}

// Digest identifies a segment by its footer, and through it by every byte.
type Digest [16]byte

// Header says whose records these are.
type Header struct {
	Group    string   `json:"group"`
	GroupID  [16]byte `json:"group_id"`
	Sequence uint64   `json:"sequence"` // of segments in the group, from 1
	Previous Digest   `json:"previous"` // of the segment before; zero in the first
	Disks    []Disk   `json:"disks"`
}

// Source says how far the ring has been stored, so that what is read twice
// after a crash is skipped.
type Source struct {
	Ring  [16]byte
	Place uint64 // every ring record before it is in this segment or an earlier one
	Drops uint64 // drops that gap records account for
}

// State is the stream's at the end of a segment.
type State struct {
	Source   Source
	Last     stream.Position // the newest position given out so far
	Settled  stream.Position // consistent since; 0 while a gap is open
	GapSince stream.Position // of the first gap record of the open gap; 0 if none is
	Time     int64           // of the newest record so far
}

// Summary is what the footer says of a segment.
type Summary struct {
	State
	Sequence uint64
	First    stream.Position // the first position given out in it; State.Last+1 where it has none
	Records  int
	Size     int64 // of the whole file, bytes
	Digest   Digest
}

var le = binary.LittleEndian

func digestOf(footer []byte) Digest {
	sum := blake3.Sum256(footer)
	return Digest(sum[:16])
}
