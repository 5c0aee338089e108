package timeline

import (
	"cmp"
	"context"
	"slices"

	"tidemark/internal/block"
	"tidemark/internal/segment"
	"tidemark/internal/stream"
	"tidemark/internal/vault"
)

// item is a write or fill of a disk, as little of it as a view needs: 32 bytes,
// as there can be many millions. One longer than its field is several items.
type item struct {
	off     int64
	pos     stream.Position
	at      uint64 // of the payload; of isSame the base; see tag
	len     uint32
	segment int32
}

// The upper bits of item.at and extent.at.
const (
	tagKind = 60 // two bits: itemKind
	tagFill = 62 // one bit: it is a fill
	atMask  = 1<<tagKind - 1
)

type itemKind uint8

const (
	isData itemKind = iota
	isZero
	isUndefined
	isSame
)

func (it *item) end() int64     { return it.off + int64(it.len) }
func (it *item) kind() itemKind { return itemKind(it.at >> tagKind & 3) }
func (it *item) fill() bool     { return it.at>>tagFill != 0 }

const (
	chunkItems = 1 << 15
	itemMax    = 1 << 31 // bytes, a multiple of every sector size
)

// items are kept in chunks, so that growing copies nothing.
type items struct {
	chunks [][]item
	n      int
}

func (s *items) at(i int32) *item { return &s.chunks[i/chunkItems][i%chunkItems] }

func (s *items) add(e *segment.Entry, index int, kind itemKind) {
	if s.n%chunkItems == 0 {
		s.chunks = append(s.chunks, make([]item, 0, chunkItems))
	}
	it := item{off: e.Range.Off, len: uint32(e.Range.Len), pos: e.Position, at: e.At, segment: int32(index)}
	if kind == isSame {
		it.at = uint64(e.Base)
	}
	it.at = it.at&atMask | uint64(kind)<<tagKind
	if e.Kind == stream.KindFill {
		it.at |= 1 << tagFill
	}
	c := &s.chunks[len(s.chunks)-1]
	*c = append(*c, it)
	s.n++
}

// take adds what an entry says of a disk's content up to position p.
func (s *items) take(e *segment.Entry, index int, p stream.Position) {
	kind := isUndefined
	switch {
	case e.Position > p || e.Range.Empty():
		return
	case e.Kind == stream.KindWrite && e.Op == block.OpWrite, e.Kind == stream.KindFill && e.Fill == stream.FillData:
		s.add(e, index, isData) // bounded by segment.RecordMax
		return
	case e.Kind == stream.KindWrite && e.Op == block.OpZeroes, e.Kind == stream.KindFill && e.Fill == stream.FillZero:
		kind = isZero
	case e.Kind == stream.KindFill && e.Fill == stream.FillSame:
		kind = isSame
	case e.Kind != stream.KindWrite: // known already, or no content
		return
	}
	for whole := e.Range; !whole.Empty(); {
		e.Range = block.Range{Off: whole.Off, Len: min(whole.Len, itemMax)}
		s.add(e, index, kind)
		whole = block.Range{Off: e.Range.End(), Len: whole.Len - e.Range.Len}
	}
}

// collect reads what a disk was made of at a position: from all segments that
// can say something of it. Behind a stretch's settled mark and the position
// itself nothing does.
func (h *History) collect(ctx context.Context, disk int, p stream.Position) (*items, []*segment.Frames, error) {
	upTo := len(h.refs) - 1
	if n := h.stretchOf(p); n != 0 {
		upTo = h.stretch[n-1].settled
		for upTo+1 < len(h.refs) && h.refs[upTo].Last < p {
			upTo++
		}
	}
	out, tables := &items{}, make([]*segment.Frames, len(h.refs))
	err := eachSegment(ctx, h.vault, h.group, h.refs[:upTo+1], func(i int, o *vault.Object, err error) (bool, error) {
		if err != nil {
			return false, h.damagedAt(h.refs[i].First, err)
		}
		before := out.n
		for j := range o.Len() {
			if e := o.Entry(j); e.Disk == disk {
				out.take(&e, i, p)
			}
		}
		if out.n > before {
			tables[i] = o.Frames()
		}
		return true, nil
	})
	return out, tables, err
}

// sorted gives the items at or below p that touch some of the ranges (sorted,
// apart), by offset.
func (s *items) sorted(p stream.Position, ranges []block.Range) []int32 {
	type key struct {
		off int64
		i   int32
	}
	keys := make([]key, 0, s.n)
	for i := range int32(s.n) {
		it := s.at(i)
		if it.pos <= p && touches(ranges, it.off, it.end()) {
			keys = append(keys, key{it.off, i})
		}
	}
	slices.SortFunc(keys, func(a, b key) int { return cmp.Compare(a.off, b.off) })
	out := make([]int32, len(keys))
	for i, k := range keys {
		out[i] = k.i
	}
	return out
}

func touches(ranges []block.Range, off, end int64) bool {
	i, _ := slices.BinarySearchFunc(ranges, off, func(r block.Range, off int64) int {
		if r.End() <= off {
			return -1
		}
		return 1
	})
	return i < len(ranges) && ranges[i].Off < end
}
