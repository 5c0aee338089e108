// Package fill decides how blocks whose content a group's stream does not know
// become known again: when a block may be read, which rank the fill gets, from
// when on it is true, and what must be read again because it was dropped again.
// It does no I/O, starts no goroutine and reads no clock: its owner tells it
// what happened and asks what to do. docs/decisions/gap-and-fill.md gives the
// rules and the races that they close; the simulation in this package's tests
// plays them.
//
// # What the owner must do
//
//   - A gap: append the gap record, Open(ranges, Held), Checkpoint with the gap
//     record's position, make the record durable, clear the gap bits, note the
//     producer's place, Cleared(ranges, place). After a start, when nothing can
//     be cleared, Open(ranges, producer's place) at once.
//   - A scan must begin after the newest Open and Cleared have returned;
//     a scan that began before one is thrown away. While something is unknown, scan often.
//   - Checkpoint in ring order with the position of the newest record, gap
//     records included, whenever the reader pauses.
//   - A job's read begins after Next. After the read note the producer's place: Done.
//   - Append what Ready returns, in that order, with positions as given.
//   - Before Settled: if the tap's drop counter, read now, is not the one that
//     the newest look at the gap bits accounts for, look at them first (and Open
//     what they name). Otherwise a drop that a fill has already read could be in
//     a point that lacks an earlier one.
//
// An Engine is not safe for concurrent use.
package fill

import (
	"math"

	"tidemark/internal/block"
	"tidemark/internal/stream"
)

// Place is a byte position in the group's ring: everything before it has been put there.
type Place uint64

// Held as lastDrop keeps ranges from being filled until Cleared names them.
const Held Place = math.MaxUint64

// bounds keep the Engine's memory small whatever happens. At pieces and known
// captured writes no longer close blocks by themselves: the sweep reads those
// blocks instead. At marks the reader's progress is kept more coarsely.
type bounds struct{ marks, pieces, known int }

var usual = bounds{marks: 512, pieces: 1 << 19, known: 1 << 16}

// Disk is one disk of the group: its size and the size of its blocks (a power of two), in bytes.
type Disk struct{ Size, BlockSize int64 }

// ID names a job. IDs are never used again by the same Engine.
type ID uint64

// Job is a range to be read from its disk now.
type Job struct {
	ID    ID
	Disk  int
	Range block.Range
	Rank  stream.Position
}

// Result is a fill that is to be appended to the stream now, or a part of one:
// a job comes back in pieces where some of its blocks were dropped again while
// it was under way.
type Result struct {
	ID        ID // of the job; of no job where Known
	Disk      int
	Range     block.Range // empty only where Last: none of the job's blocks was left
	Rank      stream.Position
	ValidFrom stream.Position
	Known     bool // stream.FillKnown: no data; else the part of the job's data that Range says
	Last      bool // nothing more of this job will come: its data can go
}

// diskState is what is unknown of one disk, and where the sweep is.
type diskState struct {
	Disk
	set
	cursor  int64
	noneAt  uint64        // version at which Next found nothing here
	dropped []block.Range // lost writes in flight at the newest scan: outward, sorted, apart
}

// Engine holds the unknown blocks of one group.
type Engine struct {
	disks   []diskState
	unknown int64 // bytes, all disks
	pieces  int
	version uint64 // counts what can make a block eligible
	turn    int

	marks   []mark // reader's progress, thinned; see reader.go
	rank    mark   // newest one that low has passed
	spacing Place  // least distance between marks but the newest
	low     Place
	scans   uint64

	lastID  ID
	jobs    map[ID]*job
	waiting []*job // read; wait for the reader
	known   []known

	open    bool            // a gap since the last Settled
	unfixed bool            // the newest gap's own position is not known yet
	from    stream.Position // largest ValidFrom and gap position since then

	max     bounds
	out     []Result
	scratch []piece
	fault   fault
}

// New makes an Engine in which everything is known.
func New(disks []Disk) *Engine {
	e := &Engine{jobs: map[ID]*job{}, version: 1, max: usual}
	for _, d := range disks {
		e.disks = append(e.disks, diskState{Disk: d})
	}
	return e
}

// Open makes blocks unknown, or unknown again: ranges are rounded outward to
// blocks and cut at the disk's end. No write to them that was dropped so far may
// have been dropped later than when the producer was at lastDrop (Held: not
// known yet). What was being filled there counts for nothing. The next
// Checkpoint must carry the gap record's position, or a later one.
func (e *Engine) Open(ranges []block.DiskRange, lastDrop Place) {
	e.open, e.unfixed = true, true
	e.version++
	for _, r := range ranges {
		if d, a, b := e.outward(r); a < b {
			e.reopen(d, a, b, lastDrop)
		}
	}
}

func (e *Engine) reopen(d *diskState, a, b int64, lastDrop Place) {
	with, at := e.scratch[:0], a
	d.each(a, b, func(p piece) bool {
		if at < p.off {
			with = append(with, piece{off: at, end: p.off, last: lastDrop, scan: e.scans})
		}
		at = p.end
		if e.fault == faultKeepReopened && p.owner != 0 {
			with = append(with, p)
			return true
		}
		with = append(with, piece{off: p.off, end: p.end, last: max(p.last, lastDrop), scan: e.scans})
		return true
	})
	if at < b {
		with = append(with, piece{off: at, end: b, last: lastDrop, scan: e.scans})
	}
	e.splice(d, a, b, with)
}

// Cleared says that the gap bits of ranges were cleared before the producer was
// at place: the blocks that Open held there may be filled.
func (e *Engine) Cleared(ranges []block.DiskRange, place Place) {
	e.version++
	for _, r := range ranges {
		d, a, b := e.outward(r)
		if a >= b {
			continue
		}
		with := e.scratch[:0]
		d.each(a, b, func(p piece) bool {
			if p.last == Held {
				p.last, p.scan = place, e.scans
			}
			with = append(with, p)
			return true
		})
		e.splice(d, a, b, with)
	}
}

func (e *Engine) outward(r block.DiskRange) (d *diskState, a, b int64) {
	d = &e.disks[r.Disk]
	o := r.Outward(d.BlockSize)
	return d, max(o.Off, 0), min(o.End(), d.Size)
}

// splice edits one disk's set and keeps the group's sums.
func (e *Engine) splice(d *diskState, a, b int64, with []piece) {
	bytes, count := d.bytes, d.count
	d.splice(a, b, with)
	e.unknown += d.bytes - bytes
	e.pieces += d.count - count
	e.scratch = with
}

// Remaining is how many bytes of a disk are unknown.
func (e *Engine) Remaining(disk int) int64 { return e.disks[disk].bytes }

// Pieces is how many runs of unknown blocks are kept: what memory goes into.
func (e *Engine) Pieces() int { return e.pieces }

// Unknown gives a disk's unknown ranges, in order.
func (e *Engine) Unknown(disk int) []block.Range {
	var out []block.Range
	d := &e.disks[disk]
	d.each(0, d.Size, func(p piece) bool {
		if n := len(out); n > 0 && out[n-1].End() == p.off {
			out[n-1].Len += p.end - p.off
		} else {
			out = append(out, block.Range{Off: p.off, Len: p.end - p.off})
		}
		return true
	})
	return out
}

// Settled says, once, that nothing is unknown any more, and from which position
// on the stream is consistent. Append what Ready returned before, and see the
// package comment for what must be looked at before.
func (e *Engine) Settled() (stream.Position, bool) {
	if !e.open || e.unfixed || e.unknown != 0 {
		return 0, false
	}
	from := e.from
	e.open, e.from = false, 0
	return from, true
}
