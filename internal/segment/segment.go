// Package segment is the file format of a sealed run of a group's records: at
// once the unit of drain, of transfer, of storage and of recovery.
//
// A segment is written once, from front to back, and never changed:
//
//	header   whose records these are: group, sequence, chain, disks
//	index    where each frame lies; every record without its payload; marks
//	frames   the payloads, packed into frames of at most FrameSize bytes,
//	         each compressed by itself
//	footer   fixed size: lengths and checksums of header and index, summary
//
// The index stands before the frames so that a torn file tells what is missing:
// see Recover. Every part carries a CRC-32C; footers form a chain.
// docs/formats/segment.md has every byte.
//
// # Places of payloads
//
// A payload's place (Entry.At) is its frame's number times FrameSize plus its
// offset in that frame. A payload that fits into one frame lies in one; a longer
// one begins at the start of a frame and fills it and those after it, so any
// aligned 64 KiB of it are one frame. Frames may be shorter than FrameSize, so
// places have holes, but never inside a payload.
package segment

import (
	"encoding/binary"
	"errors"
	"hash/crc32"

	"lukechampine.com/blake3"

	"tidemark/internal/stream"
)

// Sizes of the format, in bytes where nothing else is said.
const (
	FrameSize = 64 << 10 // most payload in a frame, before compression

	version      = 1
	headerHead   = 76
	headerMax    = 1 << 20
	indexHead    = 48
	frameRef     = 16
	markSize     = 72
	footerSize   = 256
	restartEvery = 64 // entries between two that can be decoded without those before
	sumSize      = 4
)

var (
	magicHeader = [8]byte{'T', 'I', 'D', 'E', 'S', 'E', 'G', '1'}
	magicIndex  = [8]byte{'T', 'I', 'D', 'E', 'I', 'D', 'X', '1'}
	magicFooter = [8]byte{'T', 'I', 'D', 'E', 'E', 'N', 'D', '1'}
)

// flagTwoPhase of an index says that there are prepared marks or verdicts: who does
// not know them must not read the segment as if they were nothing.
const flagTwoPhase = 1

// Codecs of a frame.
const (
	codecRaw = 0
	codecS2  = 1
)

// ErrDamaged is wrapped by every error about content that is not what was written.
var ErrDamaged = errors.New("damaged")

// ErrVersion: the segment is of a version, or has a flag, that this build does not read.
var ErrVersion = errors.New("unknown version of the segment format")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func crc(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

// Disk is one disk of the group as the records' Disk numbers name them.
type Disk struct {
	Name       string `json:"name"`
	Size       int64  `json:"size"` // bytes
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

// State is the stream's at the end of a segment, or at a mark inside one.
type State struct {
	Source   Source
	Last     stream.Position // the newest position given out so far
	Settled  stream.Position // consistent since; 0 while a gap is open
	GapSince stream.Position // of the first gap record of the open gap; 0 if none is
	Time     int64           // of the newest record so far, nanoseconds since 1970
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

// appendState adds 64 bytes.
func appendState(b []byte, s *State) []byte {
	b = append(b, s.Source.Ring[:]...)
	b = le.AppendUint64(b, s.Source.Place)
	b = le.AppendUint64(b, s.Source.Drops)
	b = le.AppendUint64(b, uint64(s.Last))
	b = le.AppendUint64(b, uint64(s.Settled))
	b = le.AppendUint64(b, uint64(s.GapSince))
	return le.AppendUint64(b, uint64(s.Time))
}

func readState(b []byte) (s State) {
	copy(s.Source.Ring[:], b)
	s.Source.Place, s.Source.Drops = le.Uint64(b[16:]), le.Uint64(b[24:])
	s.Last, s.Settled = stream.Position(le.Uint64(b[32:])), stream.Position(le.Uint64(b[40:]))
	s.GapSince, s.Time = stream.Position(le.Uint64(b[48:])), int64(le.Uint64(b[56:]))
	return s
}
