package drain

import (
	"context"
	"errors"
	"fmt"

	"tidemark/internal/batch"
	"tidemark/internal/block"
	"tidemark/internal/segment"
	"tidemark/internal/stream"
	"tidemark/internal/timeline"
)

// runMax bounds one run of a fill, so that batches are cut near their size.
const runMax = 1 << 20

// look is how far the search for a settled mark has come.
type look struct {
	until, next uint64 // segment of the state that it was for, and to look at next
	from        place  // of the state
	found       end    // where found.place.Sequence is not 0
}

// fill makes the next batch of a fill, once there is a settled mark to fill up to.
func (m *maker) fill(ctx context.Context, st state) (*made, error) {
	if st.ranges {
		if out, err := m.tell(ctx, st); out != nil || err != nil {
			return out, err
		}
	}
	to, err := m.settled(ctx, &st)
	if err != nil {
		return nil, err
	}
	out := &made{header: m.header(batch.Fill, &st)}
	for ; st.next < len(m.names.Disks); st.next, st.off = st.next+1, 0 {
		if st.disk != allDisks && st.disk != st.next {
			continue
		}
		if err := m.view(ctx, &st, to); err != nil {
			return nil, err
		}
		for {
			run, ok := m.window.Next(st.off, min(runMax, st.most))
			if !ok {
				break
			}
			full := out.content.Records() == recordsMax || run.Op == block.OpWrite && out.bytes > 0 && out.bytes+run.Range.Len > st.most
			if full {
				out = out.end(st, false)
				out.header.To, out.header.Time = to.at, to.time
				return out, nil
			}
			if err := m.content(out, st.next, run); err != nil {
				return nil, err
			}
			st.off = run.Range.End()
		}
	}
	st = st.recordsFrom(to)
	m.dropWindow()
	return out.end(st, true), nil
}

// recordsFrom is the state of a consumer whose copy is right at the end of a fill.
func (st state) recordsFrom(to end) state {
	st.stage, st.at, st.time, st.place = records, to.at, to.time, to.place
	st.until, st.next, st.off, st.told, st.mixed, st.asked = 0, 0, 0, 0, 0, false
	return st
}

// view opens the window of the disk that a fill is at, or finds it open.
func (m *maker) view(ctx context.Context, st *state, to end) error {
	key := windowKey{st.next, st.place, to.place}
	if m.window != nil && m.of == key {
		return nil
	}
	m.dropWindow()
	w, err := timeline.OpenWindow(ctx, opener{m}, st.next, timeline.Span{From: st.place, To: to.place, Known: st.at, Mixed: st.mixed, At: to.at})
	if err != nil {
		return err
	}
	m.window, m.of = w, key
	return nil
}

// opener gives a window segments that it closes itself.
type opener struct{ m *maker }

func (o opener) Open(ctx context.Context, n uint64) (*segment.File, error) { return o.m.fetch(ctx, n) }

// settled finds where a fill ends: at the first settled mark behind the gap that
// it is of; where it is of no gap, at the end of its last segment or, with a gap
// open there, at the first mark behind that. ErrNothing: there is none yet.
func (m *maker) settled(ctx context.Context, st *state) (end, error) {
	l := &m.look
	if l.next == 0 || l.until != st.until || l.from != st.place {
		*l = look{until: st.until, from: st.place, next: max(st.until, 1)}
	}
	for ; l.found.place.Sequence == 0; l.next++ {
		f, err := m.open(ctx, l.next)
		if errors.Is(err, ErrNotSealed) {
			return end{}, fmt.Errorf("%w: a gap is open, and what changed comes when it is filled", ErrNothing)
		}
		if err != nil {
			return end{}, err
		}
		sum := f.Summary()
		switch {
		case l.next != st.until:
			l.found = firstMark(f, 0)
		case l.next == st.place.Sequence:
			l.found = firstMark(f, st.place.Entry)
		}
		if l.next == st.until && sum.Settled != 0 && l.found.place.Sequence == 0 {
			l.found = end{sum.Last, sum.Time, place{Sequence: l.next + 1}}
		}
	}
	return l.found, nil
}

// firstMark is the first settled mark of a segment from an entry on: the place
// behind it, and the newest position before it.
func firstMark(f *segment.File, from int) end {
	at, time := f.Summary().First-1, int64(0)
	for i := range f.Len() {
		switch e := f.Entry(i); {
		case e.Kind.TakesPosition():
			at, time = e.Position, e.Time
		case e.Kind == stream.KindSettled && i >= from:
			return end{at, max(time, e.Time), place{Sequence: f.Summary().Sequence, Entry: i + 1}}
		}
	}
	return end{}
}

// tell makes the batch of ranges of the next segment of an open gap; nil: all
// are told up to where the fill will come from, or so far.
func (m *maker) tell(ctx context.Context, st state) (*made, error) {
	stop, err := m.settled(ctx, &st)
	if err != nil && !errors.Is(err, ErrNothing) {
		return nil, err
	}
	for n := max(st.told, st.place.Sequence); stop.place.Sequence == 0 || n < stop.place.Sequence; n++ {
		f, err := m.open(ctx, n)
		if errors.Is(err, ErrNotSealed) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		from := 0
		if n == st.place.Sequence {
			from = st.place.Entry
		}
		if ranges := changed(f, from, st.disk); len(ranges) > 0 {
			out := &made{header: m.header(batch.Ranges, &st)}
			for _, r := range ranges {
				out.content.Add(&batch.Record{Op: block.OpRead, Disk: r.Disk, Range: r.Range})
				out.size.add(block.OpRead, r.Range.Len, 0)
			}
			st.told = n + 1
			return out.end(st, false), nil
		}
	}
	return nil, nil
}

// changed are the ranges that a segment's records, from one on, say anything of.
func changed(f *segment.File, from, disk int) (out []block.DiskRange) {
	sets := make([]block.Set, len(f.Header().Disks))
	add := func(d int, r block.Range) {
		if disk == allDisks || disk == d {
			sets[d].Add(r)
		}
	}
	for i := from; i < f.Len(); i++ {
		switch e := f.Entry(i); e.Kind {
		case stream.KindWrite:
			add(e.Disk, e.Range)
		case stream.KindGap:
			for _, g := range e.Ranges {
				add(g.Disk, g.Range)
			}
		}
	}
	for d := range sets {
		all := sets[d].Ranges()
		if n := len(all); n > recordsMax { // one around all of them is true as well
			all = []block.Range{{Off: all[0].Off, Len: all[n-1].End() - all[0].Off}}
		}
		for _, r := range all {
			out = append(out, block.DiskRange{Disk: d, Range: r})
		}
	}
	return out
}
