package timeline

import (
	"context"
	"fmt"
	"io"

	"tidemark/internal/block"
	"tidemark/internal/segment"
	"tidemark/internal/stream"
)

// Opener opens the segments of a stream by their sequence, wherever they lie.
type Opener interface {
	Open(ctx context.Context, sequence uint64) (*segment.File, error)
}

// Span is a run of a stream: the records from From up to, and without, To. It
// begins behind position Known, and is looked at as of position At in it. Mixed
// says that what the window is for may already have some content of the span, of
// up to that position.
type Span struct {
	From, To         segment.Place
	Known, Mixed, At stream.Position
}

// Window is what a span changed of a disk: whoever has the disk as it was at
// Known has it as it was at At when he applies the window's runs, in any order.
// It may be used concurrently; Close it.
type Window struct {
	first   uint64 // sequence of the segment that extents number 0
	extents []extent
	store   *store
}

// Run is a part of a window. What becomes of its range is said by Op:
// block.OpWrite, OpZeroes, or OpDiscard where the content is undefined.
type Run struct {
	Range block.Range
	Op    block.Op
}

// OpenWindow reads the indexes of a span, and those of everything before it
// where a fill of the span stands for content of before Known or Mixed.
func OpenWindow(ctx context.Context, in Opener, disk int, s Span) (*Window, error) {
	all, tables, narrow, err := s.collect(ctx, in, disk)
	if err != nil {
		return nil, err
	}
	first, ranges := s.From.Sequence, []block.Range{{Len: 1<<63 - 1}}
	if narrow {
		ranges = all.touched()
		wide := Span{From: segment.Place{Sequence: 1}, To: s.To, At: s.At}
		if all, tables, _, err = wide.collect(ctx, in, disk); err != nil {
			return nil, err
		}
		first = 1
	}
	extents := all.extents(s.At, ranges)
	if narrow {
		extents = undefined(extents, ranges)
	}
	extents = compact(extents)
	open := func(i int32) (io.ReaderAt, io.Closer, error) {
		f, err := in.Open(context.Background(), first+uint64(i))
		if err != nil {
			return nil, nil, err
		}
		return f.Bytes(), f.Closer, nil
	}
	return &Window{first: first, extents: extents, store: newStore(open, needed(tables, extents))}, nil
}

// collect reads what the span's segments say of a disk. narrow: something in it
// stands for what lies before Known or Mixed.
func (s Span) collect(ctx context.Context, in Opener, disk int) (all *items, tables []*segment.Frames, narrow bool, err error) {
	all = &items{}
	for n := s.From.Sequence; n < s.To.Sequence || n == s.To.Sequence && s.To.Entry > 0; n++ {
		f, err := in.Open(ctx, n)
		if err != nil {
			return nil, nil, false, err
		}
		from, to, before := 0, f.Len(), all.n
		if n == s.From.Sequence {
			from = s.From.Entry
		}
		if n == s.To.Sequence {
			to = min(to, s.To.Entry)
		}
		for i := from; i < to; i++ {
			e := f.Entry(i)
			if e.Disk != disk || e.Position <= s.Known { // what a fill of such a rank says is in the content at Known
				continue
			}
			all.take(&e, len(tables), s.At)
			if e.Kind == stream.KindFill && e.Fill == stream.FillSame {
				if e.Base >= e.Position {
					f.Close() // it was only read
					return nil, nil, false, fmt.Errorf("segment %d has a fill at position %d that is to be as position %d: %w", n, e.Position, e.Base, segment.ErrDamaged)
				}
				narrow = narrow || e.Base < max(s.Known, s.Mixed)
			}
		}
		var t *segment.Frames
		if all.n > before {
			t = f.Frames()
		}
		tables = append(tables, t)
		f.Close() // it was only read
	}
	return all, tables, narrow, nil
}

// touched is what the items say anything of.
func (s *items) touched() []block.Range {
	var set block.Set
	for i := range int32(s.n) {
		it := s.at(i)
		set.Add(block.Range{Off: it.off, Len: int64(it.len)})
	}
	return set.Ranges()
}

// undefined closes the holes between extents in the ranges (sorted, apart): they
// stand for content that was never known.
func undefined(in []extent, ranges []block.Range) (out []extent) {
	put := func(off, end int64) {
		if end > off {
			out = join(out, extent{off: off, len: end - off, at: uint64(isUndefined) << tagKind})
		}
	}
	for _, r := range ranges {
		at := r.Off
		for ; len(in) > 0 && in[0].off < r.End(); in = in[1:] {
			put(at, in[0].off)
			out = join(out, in[0])
			at = in[0].end()
		}
		put(at, r.End())
	}
	return out
}

var ops = [...]block.Op{isData: block.OpWrite, isZero: block.OpZeroes, isUndefined: block.OpDiscard, isSame: block.OpDiscard}

// Next gives the first run at or behind an offset, at most max bytes of it where
// it has a payload. false: there is none.
func (w *Window) Next(off, max int64) (Run, bool) {
	i := search(w.extents, off)
	if i == len(w.extents) {
		return Run{}, false
	}
	e := cut(w.extents[i], off, w.extents[i].end())
	out := Run{block.Range{Off: e.off, Len: e.len}, ops[e.kind()]}
	for i++; i < len(w.extents) && w.extents[i].off == out.Range.End() && ops[w.extents[i].kind()] == out.Op; i++ {
		out.Range.Len += w.extents[i].len
		if out.Op == block.OpWrite && out.Range.Len >= max {
			break
		}
	}
	if out.Op == block.OpWrite {
		out.Range.Len = min(out.Range.Len, max)
	}
	return out, true
}

// Read fills dst, which has the length of r, with the content of a run's range.
func (w *Window) Read(r block.Range, dst []byte) error {
	for i := search(w.extents, r.Off); i < len(w.extents) && w.extents[i].off < r.End(); i++ {
		e := cut(w.extents[i], r.Off, r.End())
		if err := w.store.read(e, dst[e.off-r.Off:][:e.len]); err != nil {
			return fmt.Errorf("bytes %d+%d in segment %d: %w", e.off, e.len, w.first+uint64(e.segment), err)
		}
	}
	return nil
}

// Close lets go of what the window has open.
func (w *Window) Close() error { return w.store.close() }
