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

// recordsMax bounds the records of one batch.
const recordsMax = 1 << 16

// maker makes batches of a source. What it keeps between them is only there to be
// quick. It is used by one goroutine at a time.
type maker struct {
	in    Source
	names batch.Header // what is the same in every batch
	dry   bool         // payloads are not read: the batch is only to be known of

	segment *segment.File // the one read last; its sequence is that of its summary
	window  *timeline.Window
	of      windowKey
	look    look
	verdict verdict
}

type windowKey struct {
	disk     int
	from, to place
}

// made is a batch and the state of whoever has committed it.
type made struct {
	header  batch.Header
	content batch.Builder
	bytes   int64 // of payload
	size    size
	after   state
}

// next makes the batch that follows a state. ErrNothing says that there is none
// yet, and why; from is then moved over what is nothing to the consumer, which
// changes nothing of what follows.
func (m *maker) next(ctx context.Context, from *state) (*made, error) {
	st := *from
	if st.stage == filling {
		return m.fill(ctx, st)
	}
	for {
		f, err := m.open(ctx, st.place.Sequence)
		if errors.Is(err, ErrNotSealed) {
			*from = st
			return nil, ErrNothing
		}
		if err != nil {
			return nil, err
		}
		for ; st.place.Entry < f.Len(); st.place.Entry++ {
			e := f.Entry(st.place.Entry)
			switch classify(&e, &st) {
			case pass:
				st.pass(&e)
				continue
			case write:
				return m.writes(f, st)
			case mark:
				isMark, err := m.committed(ctx, f, &e, st.place)
				if err != nil {
					return nil, err
				}
				if isMark {
					return m.mark(&e, st), nil
				}
				st.pass(&e)
				continue
			}
			return m.fill(ctx, st.fillFrom(st.place.Sequence))
		}
		st.place = place{Sequence: st.place.Sequence + 1}
	}
}

// class is what a record is to a consumer.
type class uint8

const (
	pass    class = iota // nothing, or known
	write                // to be handed out
	mark                 // to be handed out alone; a prepared one holds up what follows until its verdict
	unknown              // the copy cannot follow record by record from here
)

func classify(e *segment.Entry, st *state) class {
	switch e.Kind {
	case stream.KindWrite:
		if st.disk == allDisks || st.disk == e.Disk {
			return write
		}
	case stream.KindBookmark, stream.KindPrepared:
		return mark
	case stream.KindGap:
		return unknown
	case stream.KindFill:
		// Of a gap that the copy is behind of, unless its rank says otherwise.
		if e.Fill != stream.FillKnown && e.Position > st.at && (st.disk == allDisks || st.disk == e.Disk) {
			return unknown
		}
	}
	return pass
}

func (st *state) pass(e *segment.Entry) {
	if e.Kind.TakesPosition() {
		st.at, st.time = e.Position, e.Time
	}
}

// fillFrom is the state of a consumer that needs a fill from its place on, up to
// the end of a segment at least.
func (st state) fillFrom(until uint64) state {
	st.stage, st.until, st.next, st.off, st.told = filling, until, 0, 0, 0
	return st
}

// errEnd ends a walk over records.
var errEnd = errors.New("enough")

// writes collects the writes from the state's place on.
func (m *maker) writes(f *segment.File, st state) (*made, error) {
	out := &made{header: m.header(batch.Writes, &st)}
	one := func(e *segment.Entry, payload []byte) error {
		switch classify(e, &st) {
		case write:
			n := int64(0)
			if e.HasPayload() {
				n = e.Range.Len
			}
			if out.bytes > 0 && out.bytes+n > st.most || out.content.Records() == recordsMax {
				return errEnd
			}
			out.content.Add(&batch.Record{Op: e.Op, Disk: e.Disk, Position: e.Position, Time: e.Time, Range: e.Range, Payload: payload})
			out.bytes += n
			out.size.add(e.Op, e.Range.Len, e.Time)
		case mark, unknown:
			return errEnd
		}
		st.pass(e)
		st.place.Entry++
		return nil
	}
	err := m.walk(f, st.place.Entry, one)
	if err != nil && !errors.Is(err, errEnd) {
		return nil, fmt.Errorf("segment %d: %w", st.place.Sequence, err)
	}
	return out.end(st, true), nil
}

// walk calls one for the records of a segment from one on, with their payloads
// unless the maker is dry.
func (m *maker) walk(f *segment.File, from int, one func(*segment.Entry, []byte) error) error {
	if !m.dry {
		return f.RecordsFrom(from, func(r *stream.Record) error { return one(&segment.Entry{Record: *r}, r.Payload) })
	}
	for i := from; i < f.Len(); i++ {
		e := f.Entry(i)
		if err := one(&e, nil); err != nil {
			return err
		}
	}
	return nil
}

// committed says whether a mark is a bookmark: a prepared one is once its verdict
// says so. ErrNothing: it has none yet.
func (m *maker) committed(ctx context.Context, f *segment.File, e *segment.Entry, at place) (bool, error) {
	if e.Kind == stream.KindBookmark {
		return true, nil
	}
	if m.verdict.of != e.Position {
		m.verdict = verdict{of: e.Position, next: at.Sequence}
	}
	for v := &m.verdict; !v.found; v.next++ {
		g := f
		if v.next != at.Sequence {
			var err error
			if g, err = m.fetch(ctx, v.next); errors.Is(err, ErrNotSealed) {
				return false, fmt.Errorf("%w: bookmark %q: %w", ErrNothing, e.Name, ErrUndecided)
			} else if err != nil {
				return false, err
			}
		}
		v.look(g)
		if g != f {
			g.Close() // it was only read
		}
	}
	return m.verdict.commit, nil
}

// verdict is how far the search for one has come.
type verdict struct {
	of            stream.Position // the prepared mark's
	next          uint64          // segment to look at next
	found, commit bool
}

func (v *verdict) look(f *segment.File) {
	for i := range f.Len() {
		if e := f.Entry(i); e.Kind == stream.KindVerdict && e.Position == v.of {
			v.found, v.commit = true, e.Commit
		}
	}
}

// mark is a bookmark's batch.
func (m *maker) mark(e *segment.Entry, st state) *made {
	out := &made{header: m.header(batch.Bookmark, &st)}
	out.header.Bookmark, out.header.Consistency = e.Name, e.Consistency
	st.pass(e)
	st.place.Entry++
	return out.end(st, true)
}

func (m *maker) header(k batch.Kind, st *state) batch.Header {
	h := m.names
	h.Kind, h.Number, h.From = k, st.number+1, st.at
	return h
}

// end finishes a batch; right: with it the copy is what the source was at st.at.
func (b *made) end(st state, right bool) *made {
	st.number, st.leapt = st.number+1, false
	b.after = st
	b.header.To, b.header.Time, b.header.Consistent = st.at, st.time, right
	return b
}

// open opens a segment, or finds it open, and holds what it is against what was asked for.
func (m *maker) open(ctx context.Context, sequence uint64) (*segment.File, error) {
	if m.segment != nil && m.segment.Summary().Sequence == sequence {
		return m.segment, nil
	}
	f, err := m.fetch(ctx, sequence)
	if err != nil {
		return nil, err
	}
	m.dropSegment()
	m.segment = f
	return f, nil
}

// fetch opens a segment for who closes it himself.
func (m *maker) fetch(ctx context.Context, sequence uint64) (*segment.File, error) {
	f, err := m.in.Open(ctx, sequence)
	if err != nil {
		return nil, err
	}
	if h := f.Header(); h.Sequence != sequence || h.GroupID != m.names.GroupID {
		f.Close() // it was only read
		return nil, fmt.Errorf("segment %d of group %x stands in for segment %d of %x: %w", h.Sequence, h.GroupID, sequence, m.names.GroupID, segment.ErrDamaged)
	}
	return f, nil
}

func (m *maker) dropSegment() {
	if m.segment != nil {
		m.segment.Close() // it was only read
		m.segment = nil
	}
}

// drop lets go of everything that is kept to be quick.
func (m *maker) drop() {
	m.dropSegment()
	m.dropWindow()
	m.look, m.verdict = look{}, verdict{}
}

func (m *maker) dropWindow() {
	if m.window != nil {
		_ = m.window.Close() // it was only read
		m.window, m.of = nil, windowKey{}
	}
}

// content adds a run of a fill.
func (m *maker) content(out *made, disk int, r timeline.Run) error {
	rec := batch.Record{Op: r.Op, Disk: disk, Range: r.Range}
	out.size.add(r.Op, r.Range.Len, 0)
	if r.Op != block.OpWrite {
		out.content.Add(&rec)
		return nil
	}
	out.bytes += r.Range.Len
	if m.dry {
		out.content.Add(&rec)
		return nil
	}
	return out.content.AddFrom(&rec, func(dst []byte) error { return m.window.Read(r.Range, dst) })
}
