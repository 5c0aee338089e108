// Package source is what every way in gives to a group: records of writes in
// the order in which they were submitted, from a ring that forgets only what was
// committed, and what could not be recorded as bits of a gap map. The tap is
// one, the capture filter of served devices the other; internal/protect takes either.
package source

import (
	"errors"

	"tidemark/internal/block"
	"tidemark/internal/stream"
)

// ErrFull: the ring has no room for a bookmark.
var ErrFull = errors.New("the ring has no room")

// Place is a byte position in a group's ring. It only grows.
type Place uint64

// Kind tells ring records apart.
type Kind uint32

const (
	Write    Kind = 1 // a whole bio; with Payload where its Op is block.OpWrite
	Lost     Kind = 2 // a bio whose payload is not here: its blocks are gap bits
	Bookmark Kind = 3
)

// Record is one entry of the ring. Payload points into the ring and is valid
// until Commit passes End.
type Record struct {
	Place, End  Place
	Kind        Kind
	Disk        int
	Op          block.Op
	Range       block.Range // bytes from the target's start
	MonoTime    int64       // CLOCK_MONOTONIC, nanoseconds
	Drops       uint64      // the group's drop counter when the program began
	Payload     []byte
	Name        string
	Consistency stream.Consistency
	Token       uint64
}

// Mark is a bookmark to be put into the ring. Token comes back in its record.
type Mark struct {
	Name        string
	Consistency stream.Consistency
	Token       uint64
}

// Peek is a copy of the gap bits.
type Peek struct {
	Ranges []block.DiskRange
	Drops  uint64 // all drops counted so far have their bits in Ranges, or had them cleared before
}

// Scan is what was on its way at one look.
type Scan struct {
	Producer Place // noted before the look
	Low      Place // every captured write before it has ended
	InFlight int
	Dropped  []block.DiskRange // ranges of lost writes that have not ended
	// Outstanding is, for each disk, how many bytes queued there and not ended
	// are in the map.
	Outstanding []int64
	// OldKnownEnded: no bio that was queued without being tracked is on its way
	// any more, so SetEnds(false) is safe. False where that cannot be told.
	OldKnownEnded bool
}

// DiskCounters are what the programs count of one disk, since the tap started.
type DiskCounters struct {
	Traced      uint64 // bytes queued as writes anywhere on the whole disk
	Ended       uint64 // bytes that ended
	Writes      uint64 // captured
	Bytes       uint64 // captured
	Lost        uint64 // writes that are gaps
	Failed      uint64 // writes that ended in an error
	Unknown     uint64 // ends of writes that were older than the tracking
	Foreign     uint64 // writes to what is now another disk under this number
	Passthrough uint64 // commands past the block layer that may have written
	Unreadable  uint64 // payloads that could not be read
	Blind       uint64 // ends of writes whose range could not be told
}

// Counters are all of a tap's counters.
type Counters struct {
	Disks             []DiskCounters // those of one whole disk stand at each of its partitions
	LostRanges        uint64         // lost writes that left their range in the ring
	MissedQueue       uint64         // programs that the kernel skipped when a bio was queued: writes nobody saw
	MissedCompletions uint64
}

// Source is a way in for one group of disks. It is used by one goroutine, except
// for Producer, Bookmark, Counters, Drops and Ends.
type Source interface {
	// Identity names the ring: two with one identity hold the same records.
	Identity() [16]byte
	// PayloadCaptured says whether writes come with their content, WhyNoPayload why not.
	PayloadCaptured() bool
	WhyNoPayload() error

	RingSize() int64
	Producer() Place
	Consumer() Place
	// Read calls fn for every record from a place up to the producer, or to a
	// record that is still being written, and returns the place after the last
	// one that fn took; where fn fails, its error and that record's place.
	Read(from Place, fn func(*Record) error) (Place, error)
	// Commit lets everything before p go, once it is on stable storage.
	Commit(p Place)
	// Bookmark puts a mark behind every write that was submitted before the
	// call, and returns the place after it. ErrFull.
	Bookmark(m Mark) (Place, error)

	// Drops counts the writes that are gaps, PeekGaps copies their bits, and
	// ClearGaps clears those of some ranges and returns the producer's place after that.
	Drops() uint64
	PeekGaps() (Peek, error)
	ClearGaps(ranges []block.DiskRange) (Place, error)

	// SetEnds switches the tracking of writes in flight, ScanInFlight looks at
	// them, ForgetInFlight drops what is left of them while the tracking is off.
	SetEnds(on bool) error
	Ends() bool
	ScanInFlight() (Scan, error)
	ForgetInFlight() error

	Counters() (Counters, error)

	// Note and SetNote keep a line of text as long as the source lives.
	Note() string
	SetNote(note string) error

	// Close lets go of the source, which goes on; Remove ends it.
	Close() error
	Remove() error
}
