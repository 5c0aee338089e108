// Package stream is the vocabulary of a group's ordered history: records,
// bookmarks, gaps, fills and the positions that order them. It does no I/O.
//
// # Order and meaning
//
// A group has one sequence of records. Writes, bookmarks, prepared marks and gaps
// each take the next Position, beginning at 1; a position never restarts and is
// never used twice in a group. Fills, settled marks and verdicts take none. Records
// stand in the stream in the order in which they were appended; positions never
// decrease in that order, except in the Position field of fills, which is a rank,
// and of verdicts, which is that of the mark.
//
// The content of block b at point S is that of the newest among
//
//   - the writes to b with Position <= S, and
//   - the fills of b with rank (Position) <= S,
//
// where "newest" goes by Position; at equal Position a fill is newer than a
// write, and among fills the one appended later is newer. A fill thus lies just
// above the write whose position is its rank and below the next one.
// FillKnown fills are transparent: they only say that from ValidFrom on the
// writes below them are all there is to know. A FillSame fill stands for the
// content of the same range at the point Base.
//
// A fill may be appended ahead of its position: no point shows it until a record
// with its rank follows, which makes all of them part of the history at once.
// That is how a snapshot's copy comes into a vault (internal/deposit).
//
// A gap at position g says that the content of its ranges is unknown from g
// on. A later fill (in stream order) of a block ends its gap. When no block is
// unknown any more a settled mark says from which position on the stream is
// consistent: the largest ValidFrom of the fills of that gap.
//
// # Two phases
//
// A prepared mark takes a position as a bookmark does, and is none yet. A verdict
// names its position and takes none itself: with Commit the mark is a bookmark from
// then on, in the place where it was prepared; without, or as long as no verdict
// follows, it is nothing, and its name is free for another. There is one verdict at
// the most for a mark. So several groups get one bookmark, or none of them does,
// although each has a stream of its own: see internal/protect/ledger.go.
//
// # Stretches
//
// A stretch begins at the Position of a settled mark and ends just before the
// next gap, or at the newest position. Every position inside it is a
// point that can be recovered; no other is.
package stream

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"tidemark/internal/block"
)

// Position is a place in a group's history: the number of the write or mark.
// The state "at position p" contains every write up to and including p.
type Position uint64

// Kind tells the records of a stream apart. The numbers are stored in segments: never renumber.
type Kind uint8

const (
	KindWrite    Kind = 1
	KindBookmark Kind = 2
	KindGap      Kind = 3
	KindFill     Kind = 4
	KindSettled  Kind = 5
	KindPrepared Kind = 6
	KindVerdict  Kind = 7
)

func (k Kind) String() string {
	switch k {
	case KindWrite:
		return "write"
	case KindBookmark:
		return "bookmark"
	case KindGap:
		return "gap"
	case KindFill:
		return "fill"
	case KindSettled:
		return "settled"
	case KindPrepared:
		return "prepared mark"
	case KindVerdict:
		return "verdict"
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// FillOp is what a fill says about its range. Stored: never renumber.
type FillOp uint8

const (
	FillData  FillOp = 1 // Payload is the content
	FillZero  FillOp = 2 // the content is zero
	FillSame  FillOp = 3 // the content is that of the point Base
	FillKnown FillOp = 4 // captured writes since the gap cover the range: they are the content
)

// Cause says why a gap was opened. Stored: never renumber.
type Cause uint8

const (
	CauseInitial    Cause = 1 // nothing is known yet: first copy
	CauseOverflow   Cause = 2 // records did not fit into the ring, or their payload could not be read
	CauseFailed     Cause = 3 // a write failed, or ended unseen
	CauseContinuity Cause = 4 // tracking was interrupted (reboot, pins lost)
	CauseTerritory  Cause = 5 // the disk changed in a way that writes do not explain
	CauseMetadata   Cause = 6 // payloads cannot be captured on this machine
)

func (c Cause) String() string {
	switch c {
	case CauseInitial:
		return "initial"
	case CauseOverflow:
		return "overflow"
	case CauseFailed:
		return "failed-write"
	case CauseContinuity:
		return "continuity-lost"
	case CauseTerritory:
		return "unknown-territory"
	case CauseMetadata:
		return "metadata-mode"
	}
	return fmt.Sprintf("cause(%d)", uint8(c))
}

// Consistency says what was done so that a bookmark's point is more than a power cut.
// Stored: never renumber.
type Consistency uint8

const (
	Crash       Consistency = 0 // as after a power cut
	Filesystem  Consistency = 1 // every mounted file system was frozen
	Application Consistency = 2 // hooks ran and succeeded too
)

var consistencyNames = [...]string{"crash", "filesystem", "application"}

func (c Consistency) String() string {
	if int(c) < len(consistencyNames) {
		return consistencyNames[c]
	}
	return fmt.Sprintf("consistency(%d)", uint8(c))
}

// MarshalText and UnmarshalText make JSON carry the name.
func (c Consistency) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

func (c *Consistency) UnmarshalText(b []byte) error {
	for i, n := range consistencyNames {
		if n == string(b) {
			*c = Consistency(i)
			return nil
		}
	}
	return fmt.Errorf("consistency %q: want crash, filesystem or application", b)
}

// Record is one entry of a stream. Which fields count depends on Kind:
//
//	write     Position Time Disk Op Range [Payload where Op is block.OpWrite]
//	bookmark  Position Time Name Consistency
//	gap       Position Time Cause Ranges
//	fill      Position (its rank) ValidFrom Time Disk Fill Range [Payload] [Base]
//	settled   Position (consistent from here on) Time
//	prepared  Position Time Name Consistency
//	verdict   Position (of the prepared mark) Time Commit
//
// Ranges are bytes; those of writes are multiples of block.SectorSize. Time is
// nanoseconds since 1970 and never decreases along positions.
type Record struct {
	Kind        Kind
	Op          block.Op
	Fill        FillOp
	Cause       Cause
	Consistency Consistency
	Commit      bool
	Disk        int
	Position    Position
	ValidFrom   Position
	Base        Position
	Time        int64
	Range       block.Range
	Payload     []byte
	Name        string
	Ranges      []block.DiskRange
}

// TakesPosition says whether records of this kind count in the sequence of positions.
func (k Kind) TakesPosition() bool {
	return k == KindWrite || k == KindBookmark || k == KindGap || k == KindPrepared
}

// NameMax is the longest bookmark name, in bytes.
const NameMax = 128

// CheckBookmarkName returns an error where name cannot be a bookmark's: it must
// be 1 to NameMax bytes of printable UTF-8 without surrounding spaces, and none
// of the other forms of a point ("latest", "seq:…", an RFC 3339 time).
func CheckBookmarkName(name string) error {
	switch {
	case name == "":
		return fmt.Errorf("bookmark name is empty: give 1 to %d bytes", NameMax)
	case len(name) > NameMax:
		return fmt.Errorf("bookmark name has %d bytes: at most %d", len(name), NameMax)
	case !utf8.ValidString(name):
		return fmt.Errorf("bookmark name %q is not UTF-8", name)
	case strings.TrimSpace(name) != name:
		return fmt.Errorf("bookmark name %q begins or ends with a space", name)
	case strings.ContainsFunc(name, func(r rune) bool { return !unicode.IsPrint(r) }):
		return fmt.Errorf("bookmark name %q has unprintable characters", name)
	}
	if form := reservedForm(name); form != "" {
		return fmt.Errorf("bookmark name %q reads as %s: choose another", name, form)
	}
	return nil
}
