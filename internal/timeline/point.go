package timeline

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sort"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/segment"
	"tidemark/internal/stream"
	"tidemark/internal/vault"
)

// Point is a moment of the history.
type Point struct {
	Position    stream.Position
	Time        time.Time
	Bookmark    string
	Consistency stream.Consistency
	Stretch     int // number of the stretch it lies in, from 1; 0: inside a gap, so parts of it are fuzzy
}

// Points lists every bookmark that can be recovered and the first and last
// position of each stretch, in order.
func (h *History) Points() []Point {
	out := []Point{}
	marks := h.marks
	for i, s := range h.stretch {
		out = append(out, Point{Position: s.First, Time: s.start, Stretch: i + 1})
		for ; len(marks) > 0 && marks[0].Position <= s.Last; marks = marks[1:] {
			if m := marks[0]; m.Position >= s.First {
				m.Stretch = i + 1
				out = append(out, m)
			}
		}
		if s.Last != s.First {
			out = append(out, Point{Position: s.Last, Time: s.end, Stretch: i + 1})
		}
	}
	return out
}

// Resolve finds the point that a spec names, or says why there is none:
// ErrInsideGap, ErrNoPoint or *DamagedError.
func (h *History) Resolve(s stream.Spec) (Point, error) {
	p, err := h.locate(context.Background(), s)
	switch {
	case err != nil || p.Stretch != 0:
		return p, err
	case h.damage != nil && p.Position >= h.damage.From: // it may have become a point
		return Point{}, h.damage
	}
	return Point{}, h.insideGap(p.Position, s)
}

// ResolveFuzzy is Resolve that takes points inside a gap too. Their Stretch is 0.
func (h *History) ResolveFuzzy(s stream.Spec) (Point, error) {
	return h.locate(context.Background(), s)
}

func (h *History) locate(ctx context.Context, s stream.Spec) (Point, error) {
	switch {
	case s.Latest:
		if h.damage != nil {
			return Point{}, h.damage
		}
		return h.at(ctx, h.newest, s)
	case s.Position != 0:
		return h.at(ctx, s.Position, s)
	case !s.Time.IsZero():
		p, err := h.byTime(ctx, s)
		if err != nil {
			return Point{}, err
		}
		return h.at(ctx, p, s)
	}
	for i := len(h.marks) - 1; i >= 0; i-- {
		if h.marks[i].Bookmark == s.Bookmark {
			p, err := h.at(ctx, h.marks[i].Position, s)
			p.Bookmark, p.Consistency = h.marks[i].Bookmark, h.marks[i].Consistency
			return p, err
		}
	}
	if h.damage != nil {
		return Point{}, h.damage
	}
	return Point{}, fmt.Errorf("bookmark %q in group %s: %w", s.Bookmark, h.group, ErrNoPoint)
}

// byTime is the newest position that is not younger.
func (h *History) byTime(ctx context.Context, s stream.Spec) (stream.Position, error) {
	t := nanoseconds(s.Time)
	if h.damage != nil && t >= h.time {
		return 0, h.damage // what is damaged may be older than t too
	}
	found := -1
	for i, sp := range h.spans {
		if sp.first != 0 && sp.firstTime <= t {
			found = i
		}
	}
	if found < 0 {
		return 0, fmt.Errorf("%s lies before the history of group %s begins: %w", s, h.group, ErrNoPoint)
	}
	if h.spans[found].latest <= t {
		return h.spans[found].last, nil
	}
	var p stream.Position
	err := h.entries(ctx, found, func(e *segment.Entry) {
		if e.Kind.TakesPosition() && e.Time <= t {
			p = e.Position
		}
	})
	return p, err
}

// nanoseconds since 1970. Times that these cannot tell, before 1678 and after
// 2262, become the first and the last that they can: they are older or younger
// than everything.
func nanoseconds(t time.Time) int64 {
	first, last := time.Unix(0, math.MinInt64), time.Unix(0, math.MaxInt64)
	switch {
	case t.Before(first):
		return math.MinInt64
	case t.After(last):
		return math.MaxInt64
	}
	return t.UnixNano()
}

// at gives the point at a position, inside a stretch or not.
func (h *History) at(ctx context.Context, p stream.Position, s stream.Spec) (Point, error) {
	if p > h.newest || p == 0 {
		if h.damage != nil {
			return Point{}, h.damage
		}
		return Point{}, fmt.Errorf("%s: the history of group %s ends at position %d: %w", s, h.group, h.newest, ErrNoPoint)
	}
	at, err := h.timeOf(ctx, p)
	if err != nil {
		return Point{}, err
	}
	return Point{Position: p, Time: at, Stretch: h.stretchOf(p)}, nil
}

// stretchOf is the number of the stretch that holds a position, 0 if none does.
func (h *History) stretchOf(p stream.Position) int {
	i := sort.Search(len(h.stretch), func(i int) bool { return h.stretch[i].Last >= p })
	if i == len(h.stretch) || p < h.stretch[i].First {
		return 0
	}
	return i + 1
}

func (h *History) insideGap(p stream.Position, s stream.Spec) error {
	before, after := "", ""
	for _, st := range h.stretch {
		if st.Last < p {
			before = fmt.Sprintf("; the newest point before it is seq:%d", st.Last)
		}
		if st.First > p && after == "" {
			after = fmt.Sprintf("; the first after it is seq:%d", st.First)
		}
	}
	return fmt.Errorf("%s is position %d of group %s, %w%s%s", s, p, h.group, ErrInsideGap, before, after)
}

// timeOf reads when a position was given out.
func (h *History) timeOf(ctx context.Context, p stream.Position) (time.Time, error) {
	i := sort.Search(len(h.spans), func(i int) bool { return h.refs[i].Last >= p })
	if i == len(h.spans) {
		i--
	}
	var at int64
	switch sp := h.spans[i]; p {
	case sp.last:
		at = sp.latest
	case sp.first:
		at = sp.firstTime
	default:
		if err := h.entries(ctx, i, func(e *segment.Entry) {
			if e.Kind.TakesPosition() && e.Position <= p {
				at = e.Time
			}
		}); err != nil {
			return time.Time{}, err
		}
	}
	return time.Unix(0, at).UTC(), nil
}

// entries goes through the index of one segment again.
func (h *History) entries(ctx context.Context, i int, fn func(*segment.Entry)) error {
	o, err := h.vault.OpenSegment(ctx, h.group, h.refs[i])
	if err != nil {
		return err
	}
	for j := range o.Len() {
		e := o.Entry(j)
		fn(&e)
	}
	return o.Close()
}

// spoiltFrom is the lowest position of a record whose payload lies in a damaged
// frame of a segment, whichever of them a reader met first; 0: none does.
func (h *History) spoiltFrom(ctx context.Context, i int) (from stream.Position, err error) {
	o, err := h.vault.OpenSegment(ctx, h.group, h.refs[i])
	if err != nil {
		return 0, err
	}
	o.Check(func(lo, hi uint64, _ error) {
		for j := range o.Len() {
			e := o.Entry(j)
			if e.HasPayload() && e.At < hi && lo < e.At+uint64(e.Range.Len) && (from == 0 || e.Position < from) {
				from = e.Position
			}
		}
	})
	return from, o.Close()
}

// Fuzzy lists the blocks of a disk whose content at a position the history does
// not know, or knows only as it was later: none inside a stretch.
func (h *History) Fuzzy(ctx context.Context, disk int, p stream.Position) ([]block.Range, error) {
	if h.stretchOf(p) != 0 {
		return nil, nil
	}
	var unknown block.Set
	err := eachSegment(ctx, h.vault, h.group, h.refs, func(_ int, o *vault.Object, err error) (bool, error) {
		if err != nil {
			return false, err
		}
		for i := range o.Len() {
			switch e := o.Entry(i); {
			case e.Kind == stream.KindGap && e.Position <= p:
				for _, g := range e.Ranges {
					if g.Disk == disk {
						unknown.Add(g.Range)
					}
				}
			case e.Kind == stream.KindFill && e.Disk == disk && e.ValidFrom <= p:
				unknown.Remove(e.Range)
			}
		}
		return true, nil
	})
	return unknown.Ranges(), err
}

// damagedAt turns damage met while a view is read into what it means for points.
func (h *History) damagedAt(from stream.Position, err error) error {
	var known *DamagedError
	if !errors.Is(err, segment.ErrDamaged) || errors.As(err, &known) {
		return err
	}
	return &DamagedError{Group: h.group, From: from, Newest: h.before(from), Err: err}
}
