package fill

import (
	"cmp"
	"slices"
	"sort"

	"tidemark/internal/block"
	"tidemark/internal/stream"
)

// mark says that every ring record before place has a position, the newest of them position.
type mark struct {
	place    Place
	position stream.Position
}

// Checkpoint tells how far the reader has come: every ring record before place
// has its position, and position is the newest one given out, by whatever kind
// of record. At an equal place the newest call counts.
func (e *Engine) Checkpoint(place Place, position stream.Position) {
	if e.unfixed {
		e.unfixed = false
		e.from = max(e.from, position)
	}
	n := len(e.marks)
	switch {
	case n > 0 && place < e.marks[n-1].place:
		return // a reader does not go back
	case n > 0 && place == e.marks[n-1].place:
		if e.fault == faultOldestMark {
			return
		}
		e.marks[n-1].position = position
	case n > 1 && place-e.marks[n-2].place < e.spacing:
		e.marks[n-1] = mark{place, position}
	default:
		if n == e.max.marks {
			e.thin()
		}
		e.marks = append(e.marks, mark{place, position})
	}
	if place <= e.low {
		e.pass()
	}
}

// thin widens the distance between marks so that half of them go, and keeps the
// first and the newest. A rank then lies lower and a ValidFrom higher than it
// could: both are safe.
func (e *Engine) thin() {
	last := len(e.marks) - 1
	e.spacing = (e.marks[last].place-e.marks[0].place)/Place(e.max.marks/2) + 1
	kept := e.marks[:1]
	for _, m := range e.marks[1:last] {
		if m.place-kept[len(kept)-1].place >= e.spacing {
			kept = append(kept, m)
		}
	}
	e.marks = append(kept, e.marks[last])
}

// pass makes the newest mark that the low-water mark has passed the rank of
// fills to come, and forgets those before it.
func (e *Engine) pass() {
	i := sort.Search(len(e.marks), func(i int) bool { return e.marks[i].place > e.low }) - 1
	if i < 0 {
		return
	}
	e.rank = e.marks[i]
	e.version++
	e.marks = slices.Delete(e.marks, 0, i)
	if len(e.marks) <= e.max.marks/4 {
		e.spacing = 0
	}
}

// reader is the newest mark.
func (e *Engine) reader() mark {
	if len(e.marks) == 0 {
		return mark{}
	}
	return e.marks[len(e.marks)-1]
}

// positionAt is the position that covers every record before place, which the reader has passed.
func (e *Engine) positionAt(place Place) stream.Position {
	i := sort.Search(len(e.marks), func(i int) bool { return e.marks[i].place >= place })
	return e.marks[i].position
}

// Scanned takes what a look at the bios in flight found: low is the low-water
// mark (every captured write before it has ended), dropped are the ranges of
// lost writes that have not ended. The look must have begun after the newest
// Open and Cleared returned.
func (e *Engine) Scanned(low Place, dropped []block.DiskRange) {
	e.low = max(e.low, low)
	e.scans++
	e.version++
	for i := range e.disks {
		e.disks[i].dropped = e.disks[i].dropped[:0]
	}
	if e.fault != faultIgnoreDropped {
		for _, r := range dropped {
			if d, a, b := e.outward(r); a < b {
				d.dropped = append(d.dropped, block.Range{Off: a, Len: b - a})
			}
		}
	}
	for i := range e.disks {
		e.disks[i].dropped = apart(e.disks[i].dropped)
	}
	e.pass()
}

// apart sorts ranges and joins those that touch, in place.
func apart(rs []block.Range) []block.Range {
	slices.SortFunc(rs, func(a, b block.Range) int { return cmp.Compare(a.Off, b.Off) })
	out := rs[:0]
	for _, r := range rs {
		if n := len(out); n > 0 && r.Off <= out[n-1].End() {
			out[n-1].Len = max(out[n-1].End(), r.End()) - out[n-1].Off
			continue
		}
		out = append(out, r)
	}
	return out
}

// clear cuts [a, b) to its first part that no lost write in flight touches; empty: there is none.
func (d *diskState) clear(a, b int64) (int64, int64) {
	i := sort.Search(len(d.dropped), func(i int) bool { return d.dropped[i].End() > a })
	for ; i < len(d.dropped) && d.dropped[i].Off <= a; i++ {
		a = d.dropped[i].End()
	}
	if i < len(d.dropped) {
		b = min(b, d.dropped[i].Off)
	}
	return a, b
}

// known is a captured write that closes the blocks it covers once it has ended.
type known struct {
	id       ID
	disk     int
	r        block.Range
	place    Place
	position stream.Position
}

// Captured tells of a captured write, in ring order. One that covers a whole
// unknown block, and was queued after the last drop there, will close the
// block without a read. It costs next to nothing while nothing is unknown.
// Discards leave a block's content undefined: do not pass them.
func (e *Engine) Captured(disk int, r block.Range, place Place, position stream.Position) {
	if e.unknown != 0 {
		e.captured(disk, r, place, position)
	}
}

func (e *Engine) captured(disk int, r block.Range, place Place, position stream.Position) {
	d := &e.disks[disk]
	in := r.Inward(d.BlockSize)
	if r.End() >= d.Size { // the last block may be a short one
		off := (r.Off + d.BlockSize - 1) &^ (d.BlockSize - 1)
		in = block.Range{Off: off, Len: d.Size - off}
	}
	if in.Empty() || d.bytes == 0 || len(e.known) >= e.max.known || e.pieces >= e.max.pieces {
		return
	}
	with, found := e.scratch[:0], false
	d.each(in.Off, in.End(), func(p piece) bool {
		if p.owner == 0 && (p.last <= place || e.fault == faultKnownAnyPlace) {
			p.owner, found = e.lastID+1, true
		}
		with = append(with, p)
		return true
	})
	e.scratch = with
	if !found {
		return
	}
	e.lastID++
	e.splice(d, in.Off, in.End(), with)
	e.known = append(e.known, known{e.lastID, disk, in, place, position})
}
