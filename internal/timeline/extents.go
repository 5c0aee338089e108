package timeline

import (
	"slices"
	"sort"

	"tidemark/internal/block"
	"tidemark/internal/stream"
)

// extent is a run of a view with one source: 32 bytes.
type extent struct {
	off, len int64
	at       uint64 // as item.at
	segment  int32
}

func (e *extent) kind() itemKind { return itemKind(e.at >> tagKind & 3) }
func (e *extent) place() uint64  { return e.at & atMask }
func (e *extent) end() int64     { return e.off + e.len }

// extents finds, for each byte of the ranges, the newest item at or below p.
func (s *items) extents(p stream.Position, ranges []block.Range) []extent {
	out := s.sweep(s.sorted(p, ranges), ranges)
	bases := map[stream.Position][]block.Range{}
	for _, e := range out {
		if e.kind() == isSame {
			base := stream.Position(e.place())
			bases[base] = append(bases[base], block.Range{Off: e.off, Len: e.len})
		}
	}
	for base, same := range bases {
		out = replace(out, base, s.extents(min(base, p-1), same)) // bases lie before: it ends
	}
	return out
}

// replace puts what a base holds in place of the extents that say "as at base".
func replace(in []extent, base stream.Position, with []extent) []extent {
	out := make([]extent, 0, len(in)+len(with))
	for _, e := range in {
		if e.kind() != isSame || stream.Position(e.place()) != base {
			out = join(out, e)
			continue
		}
		for len(with) > 0 && with[0].off < e.end() {
			out = join(out, with[0])
			with = with[1:]
		}
	}
	return out
}

// newer orders items as internal/stream says: by position, a fill above the
// write of its rank, and what was appended later above what came before.
func (s *items) newer(a, b int32) bool {
	x, y := s.at(a), s.at(b)
	if x.pos != y.pos {
		return x.pos > y.pos
	}
	if x.fill() != y.fill() {
		return x.fill()
	}
	return a > b
}

// active is a heap of items with the newest on top. It is not container/heap's
// for the sake of its speed: every item goes through it.
type active struct {
	all  *items
	heap []int32
}

func (h *active) push(x int32) {
	h.heap = append(h.heap, x)
	for i := len(h.heap) - 1; i > 0; {
		up := (i - 1) / 2
		if !h.all.newer(h.heap[i], h.heap[up]) {
			return
		}
		h.heap[i], h.heap[up] = h.heap[up], h.heap[i]
		i = up
	}
}

func (h *active) pop() {
	last := len(h.heap) - 1
	h.heap[0] = h.heap[last]
	h.heap = h.heap[:last]
	for i := 0; ; {
		best := i
		for child := 2*i + 1; child <= 2*i+2 && child < last; child++ {
			if h.all.newer(h.heap[child], h.heap[best]) {
				best = child
			}
		}
		if best == i {
			return
		}
		h.heap[i], h.heap[best] = h.heap[best], h.heap[i]
		i = best
	}
}

// top is the newest item that reaches beyond at; nil if there is none.
func (h *active) top(at int64) *item {
	for len(h.heap) > 0 {
		if it := h.all.at(h.heap[0]); it.end() > at {
			return it
		}
		h.pop()
	}
	return nil
}

// sweep walks items, sorted by offset, from left to right with those that cover
// the place in a heap, and keeps what lies in the ranges.
func (s *items) sweep(order []int32, ranges []block.Range) []extent {
	out := make([]extent, 0, len(order)+len(order)/4)
	h := &active{all: s}
	for i, at := 0, int64(0); ; {
		top := h.top(at)
		if top == nil && i == len(order) {
			return out
		}
		if top == nil {
			at = max(at, s.at(order[i]).off)
		}
		for i < len(order) && s.at(order[i]).off <= at {
			h.push(order[i])
			i++
		}
		if top = h.top(at); top == nil {
			continue
		}
		end := top.end()
		if i < len(order) {
			end = min(end, s.at(order[i]).off)
		}
		out = clip(out, &ranges, extent{off: at, len: end - at, at: top.at + h.skipped(top, at), segment: top.segment})
		at = end
	}
}

// skipped is how much of the payload of top lies before at.
func (h *active) skipped(top *item, at int64) uint64 {
	if top.kind() == isData {
		return uint64(at - top.off)
	}
	return 0
}

// clip appends the parts of e that lie in the ranges. Ranges that end before e are dropped.
func clip(out []extent, ranges *[]block.Range, e extent) []extent {
	for len(*ranges) > 0 && (*ranges)[0].End() <= e.off {
		*ranges = (*ranges)[1:]
	}
	for _, r := range *ranges {
		if r.Off >= e.end() {
			break
		}
		out = join(out, cut(e, r.Off, r.End()))
	}
	return out
}

// join appends e, as part of the last extent where it goes on from it.
func join(out []extent, e extent) []extent {
	if n := len(out); n > 0 {
		l := &out[n-1]
		if l.end() == e.off && l.kind() == e.kind() && (e.kind() == isZero || e.kind() == isUndefined ||
			e.kind() == isSame && l.place() == e.place() || e.kind() == isData && l.segment == e.segment && l.place()+uint64(l.len) == e.place()) {
			l.len += e.len
			return out
		}
	}
	return append(out, e)
}

func search(extents []extent, off int64) int {
	return sort.Search(len(extents), func(i int) bool { return extents[i].end() > off })
}

func cut(e extent, from, to int64) extent {
	off, end := max(e.off, from), min(e.end(), to)
	if e.kind() == isData {
		e.at += uint64(off - e.off)
	}
	e.off, e.len = off, end-off
	return e
}

// compact gives extents no more memory than they need where much was set aside.
func compact(extents []extent) []extent {
	if cap(extents) > len(extents)+len(extents)/2 {
		return slices.Clip(slices.Clone(extents))
	}
	return extents
}
