// Package fill holds the rules by which the blocks of a gap become known again
// while writes go on. It is pure: it does no I/O, knows no clock and starts no
// goroutine; its caller tells it what happened and does what it says.
//
// Two orders meet here. A Place is a byte position in the ring: it orders what
// the kernel saw. A stream.Position orders what the history holds. Checkpoints
// tie them together: at a place, everything before has got its position.
//
// The low-water place Q says that every captured write before it has ended. A
// block may be read once Q has passed the last drop on it and no dropped write
// on it is still in flight; its content then ranks just above the last position
// before Q, and is true from the position that the reader reached after the
// read. docs/decisions/gap-and-fill.md tells why each of these is needed.
package fill

import (
	"slices"

	"tidemark/internal/block"
	"tidemark/internal/stream"
)

// Place is a position in the ring, in bytes.
type Place uint64

// Never is a drop place that no low-water mark passes.
const Never = ^Place(0)

// Disk is what the rules need to know of one.
type Disk struct {
	Size, BlockSize int64
}

// Job is a range to be read from a disk now.
type Job struct {
	ID    uint64
	Disk  int
	Range block.Range
	Rank  stream.Position
	low   Place
}

// Result is a fill to be appended to the stream. Its Range can be a part of its
// job's: the rest was dropped again, or is known from writes.
type Result struct {
	ID        uint64
	Disk      int
	Range     block.Range
	Rank      stream.Position
	ValidFrom stream.Position
	Known     bool // captured writes cover it: nothing was read
}

type checkpoint struct {
	place Place
	pos   stream.Position
}

// known is a captured write over whole unknown blocks that has not been seen to end.
type known struct {
	disk  int
	r     block.Range
	place Place
	pos   stream.Position
}

const (
	checkpointsMax = 4096
	knownMax       = 1 << 16
)

// Engine is the state of one group's gaps. It is used by one goroutine.
type Engine struct {
	disks       []Disk
	unknown     []set // by disk
	checkpoints []checkpoint
	low         Place // rounded down to a checkpoint
	rank        stream.Position
	dropped     []block.DiskRange
	out         []Job // handed out, not done
	done        []doneJob
	known       []known
	next        struct {
		disk int
		off  int64
	}
	jobs  uint64
	valid stream.Position // largest ValidFrom since the gap was opened
	open  bool
	ready []Result
}

type doneJob struct {
	Job
	end Place
}

// New gives an engine that knows every block.
func New(disks []Disk) *Engine {
	return &Engine{disks: disks, unknown: make([]set, len(disks))}
}

// Open makes blocks unknown whose last drop lies before a place (Never: not yet
// known where; Cleared says it later). Ranges grow to whole blocks.
func (e *Engine) Open(ranges []block.DiskRange, lastDrop Place) {
	if !e.open {
		e.open, e.valid = true, 0
	}
	for _, r := range ranges {
		e.unknown[r.Disk].add(e.whole(r), lastDrop)
	}
}

// Cleared says where the last drop on ranges opened with Never lies.
func (e *Engine) Cleared(ranges []block.DiskRange, lastDrop Place) {
	for _, r := range ranges {
		e.unknown[r.Disk].setDrop(e.whole(r), lastDrop)
	}
}

func (e *Engine) whole(r block.DiskRange) block.Range {
	d := e.disks[r.Disk]
	return r.Outward(d.BlockSize).Intersect(block.Range{Len: d.Size})
}

// Checkpoint says that everything before a place has its position, pos being the last.
func (e *Engine) Checkpoint(p Place, pos stream.Position) {
	if n := len(e.checkpoints); n > 0 && e.checkpoints[n-1].place == p {
		e.checkpoints[n-1].pos = pos
		return
	}
	e.checkpoints = append(e.checkpoints, checkpoint{p, pos})
	if len(e.checkpoints) > checkpointsMax {
		e.thin()
	}
}

// thin drops every other checkpoint but the newest: rounding further down is
// safe, as a block's drop is held against the rounded mark too.
func (e *Engine) thin() {
	last := e.checkpoints[len(e.checkpoints)-1]
	kept := e.checkpoints[:0]
	for i := 0; i < len(e.checkpoints)-1; i += 2 {
		kept = append(kept, e.checkpoints[i])
	}
	e.checkpoints = append(kept, last)
}

// Scanned tells the low-water place and which dropped writes are still in flight.
func (e *Engine) Scanned(low Place, dropped []block.DiskRange) {
	e.dropped = append(e.dropped[:0], dropped...)
	at, found := slices.BinarySearchFunc(e.checkpoints, low, func(c checkpoint, p Place) int {
		switch {
		case c.place < p:
			return -1
		case c.place > p:
			return 1
		}
		return 0
	})
	if !found {
		at--
	}
	if at < 0 {
		return
	}
	if c := e.checkpoints[at]; c.place >= e.low {
		e.low, e.rank = c.place, c.pos
	}
	e.checkpoints = append(e.checkpoints[:0], e.checkpoints[at:]...)
}

// Captured tells of a captured write with content (not a discard). One that
// covers whole unknown blocks makes them known by itself once it has ended.
func (e *Engine) Captured(disk int, r block.Range, p Place, pos stream.Position) {
	u := &e.unknown[disk]
	if len(u.spans) == 0 || len(e.known) >= knownMax {
		return
	}
	d := e.disks[disk]
	in := r.Inward(d.BlockSize)
	if r.End() == d.Size { // the last block of a disk can be short
		in.Len = r.End() - in.Off
	}
	if in.Len <= 0 {
		return
	}
	for _, s := range u.within(in) {
		if s.drop <= p {
			e.known = append(e.known, known{disk, block.Range{Off: s.off, Len: s.end - s.off}, p, pos})
		}
	}
}

// Next gives a range of at most max bytes that may be read now.
func (e *Engine) Next(max int64) (Job, bool) {
	for range len(e.disks) + 1 {
		if r, ok := e.eligible(e.next.disk, e.next.off, max); ok {
			e.jobs++
			j := Job{ID: e.jobs, Disk: e.next.disk, Range: r, Rank: e.rank, low: e.low}
			e.out = append(e.out, j)
			e.next.off = r.End()
			return j, true
		}
		e.next.disk, e.next.off = (e.next.disk+1)%len(e.disks), 0
	}
	return Job{}, false
}

// eligible finds the first range from off on that may be read.
func (e *Engine) eligible(disk int, off, most int64) (block.Range, bool) {
	u := &e.unknown[disk]
	for i := u.search(off); i < len(u.spans); i++ {
		s := u.spans[i]
		if s.drop > e.low {
			continue
		}
		from := max(s.off, off)
		for from < s.end {
			hit, blocked := e.blocked(disk, block.Range{Off: from, Len: min(most, s.end-from)})
			if !blocked {
				r := block.Range{Off: from, Len: min(most, s.end-from)}
				for i++; i < len(u.spans) && u.spans[i].off == r.End() && u.spans[i].drop <= e.low && r.Len < most; i++ {
					more := block.Range{Off: r.End(), Len: min(most-r.Len, u.spans[i].end-u.spans[i].off)}
					if _, blocked := e.blocked(disk, more); blocked {
						break
					}
					r.Len += more.Len
				}
				return r, true
			}
			if hit.Off > from { // free up to the obstacle
				return block.Range{Off: from, Len: hit.Off - from}, true
			}
			from = hit.End()
		}
	}
	return block.Range{}, false
}

// blocked gives the first obstacle in r: a job on its way, or blocks on which a
// dropped write is still in flight.
func (e *Engine) blocked(disk int, r block.Range) (block.Range, bool) {
	first, hit := block.Range{}, false
	see := func(o block.Range) {
		if o.Overlaps(r) && (!hit || o.Off < first.Off) {
			first, hit = o, true
		}
	}
	for _, j := range e.out {
		if j.Disk == disk {
			see(j.Range)
		}
	}
	for _, j := range e.done {
		if j.Disk == disk {
			see(j.Range)
		}
	}
	for _, d := range e.dropped {
		if d.Disk == disk {
			see(e.whole(d))
		}
	}
	return first, hit
}

// Done says that a job was read, and where the ring's producer was after that.
func (e *Engine) Done(id uint64, end Place) {
	if i := e.find(id); i >= 0 {
		e.done = append(e.done, doneJob{e.out[i], end})
		e.out = slices.Delete(e.out, i, i+1)
	}
}

// Failed gives a job back.
func (e *Engine) Failed(id uint64) {
	if i := e.find(id); i >= 0 {
		e.out = slices.Delete(e.out, i, i+1)
	}
}

func (e *Engine) find(id uint64) int {
	return slices.IndexFunc(e.out, func(j Job) bool { return j.ID == id })
}

// Ready gives the fills that may be appended now, and the jobs that are over
// with them. The slices are valid until the next call.
func (e *Engine) Ready() (fills []Result, over []uint64) {
	if len(e.checkpoints) == 0 {
		return nil, nil
	}
	e.ready = e.ready[:0]
	now := e.checkpoints[len(e.checkpoints)-1]
	e.readyKnown()
	e.done = slices.DeleteFunc(e.done, func(j doneJob) bool {
		if j.end > now.place {
			return false
		}
		for _, s := range e.unknown[j.Disk].take(j.Range, j.low) {
			e.emit(Result{ID: j.ID, Disk: j.Disk, Range: s, Rank: j.Rank, ValidFrom: now.pos})
		}
		over = append(over, j.ID)
		return true
	})
	return e.ready, over
}

func (e *Engine) readyKnown() {
	kept := e.known[:0]
	for _, k := range e.known {
		if k.place >= e.low {
			kept = append(kept, k)
			continue
		}
		if slices.ContainsFunc(e.dropped, func(d block.DiskRange) bool { return d.Disk == k.disk && e.whole(d).Overlaps(k.r) }) {
			continue // it will be read
		}
		for _, s := range e.unknown[k.disk].take(k.r, k.place) {
			e.emit(Result{Disk: k.disk, Range: s, Rank: k.pos, ValidFrom: k.pos, Known: true})
		}
	}
	e.known = kept
}

func (e *Engine) emit(r Result) {
	e.valid = max(e.valid, r.ValidFrom)
	e.ready = append(e.ready, r)
}

// Remaining is how many bytes of a disk are unknown.
func (e *Engine) Remaining(disk int) int64 { return e.unknown[disk].bytes() }

// Unknown lists a disk's unknown ranges in order.
func (e *Engine) Unknown(disk int) []block.Range {
	var out []block.Range
	for _, s := range e.unknown[disk].spans {
		out = append(out, block.Range{Off: s.off, Len: s.end - s.off})
	}
	return out
}

// Settled closes the gap where nothing is unknown any more, and gives the
// position from which on the stream is consistent. False: no gap is open, or
// something is still unknown.
func (e *Engine) Settled() (stream.Position, bool) {
	if !e.open {
		return 0, false
	}
	for _, u := range e.unknown {
		if len(u.spans) > 0 {
			return 0, false
		}
	}
	from := e.valid
	if from == 0 && len(e.checkpoints) > 0 {
		from = e.checkpoints[len(e.checkpoints)-1].pos
	}
	e.open = false
	e.known = e.known[:0]
	return from, true
}
