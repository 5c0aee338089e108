// Package timeline answers what a disk held at a point. It reads the indexes of
// a group's segments, never their data, and presents a point as a read-only
// block.Device.
//
// What makes a point: see internal/stream. A position is offered only inside a
// stretch, and only if every segment up to it is sound; damage later in the
// history spoils nothing before it.
package timeline

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/segment"
	"tidemark/internal/stream"
	"tidemark/internal/vault"
)

// Errors that callers branch on.
var (
	ErrInsideGap = errors.New("inside a gap")
	ErrNoPoint   = errors.New("no such point")
	ErrNoDisk    = errors.New("no such disk in the group")
)

// DamagedError says that a point needs an object that is damaged or missing.
type DamagedError struct {
	Group  string
	From   stream.Position // the first position that needs it
	Newest stream.Position // the newest sound point before it; 0 if there is none
	Err    error
}

func (e *DamagedError) Error() string {
	newest := "there is no sound point before it"
	if e.Newest != 0 {
		newest = fmt.Sprintf("the newest sound point is seq:%d", e.Newest)
	}
	return fmt.Sprintf("positions of group %s from %d on need what is damaged (%v); %s", e.Group, e.From, e.Err, newest)
}

func (e *DamagedError) Unwrap() error { return e.Err }

// Stretch is an unbroken run of positions that can be recovered.
type Stretch struct {
	First, Last stream.Position
}

// Point is a moment that can be recovered.
type Point struct {
	Position    stream.Position
	Time        time.Time
	Bookmark    string
	Consistency stream.Consistency
	Stretch     int // number of the stretch it lies in, from 1
}

// item is a write or fill of one disk, as little of it as a view needs.
type item struct {
	off, len int64
	pos      stream.Position
	at       uint64 // of the payload
	base     stream.Position
	segment  int32
	kind     itemKind
	fill     bool
}

type itemKind uint8

const (
	isData itemKind = iota
	isZero
	isUndefined
	isSame
)

type moment struct {
	pos  stream.Position
	time int64
}

// History is a group's history as its indexes tell it. It is not changed after Load.
type History struct {
	group   string
	vault   *vault.Vault
	refs    []vault.Ref
	header  segment.Header
	last    segment.Summary
	disks   [][]item // in stream order
	moments []moment
	marks   []Point
	stretch []Stretch
	unknown []block.Set
	open    bool // the last stretch goes on
	damage  *DamagedError
	newest  stream.Position
}

// Load reads the indexes of a group's segments. Objects that are damaged or
// missing are no error here, but spoil the points that need them.
func Load(ctx context.Context, v *vault.Vault, group string) (*History, error) {
	refs, err := v.Segments(ctx, group)
	if err != nil {
		return nil, err
	}
	h := &History{group: group, vault: v, refs: refs}
	for i, ref := range refs {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if want := uint64(i + 1); ref.Sequence != want {
			h.spoil(fmt.Errorf("segment %d is missing: %w", want, segment.ErrDamaged))
			break
		}
		o, err := v.OpenSegment(ctx, group, ref)
		if err == nil {
			err = h.chain(o)
			if err == nil {
				h.read(i, o)
			}
			o.Close()
		}
		if errors.Is(err, segment.ErrDamaged) {
			h.spoil(err)
			break
		}
		if err != nil {
			return nil, err
		}
	}
	if h.open {
		h.stretch[len(h.stretch)-1].Last = h.newest
	}
	if h.damage != nil && len(h.stretch) > 0 {
		h.damage.Newest = h.stretch[len(h.stretch)-1].Last
	}
	return h, nil
}

func (h *History) spoil(err error) {
	h.damage = &DamagedError{Group: h.group, From: h.newest + 1, Err: err}
}

// chain checks that a segment follows the one before.
func (h *History) chain(o *vault.Object) error {
	head := o.Header()
	if h.header.Sequence != 0 && (head.Previous != h.last.Digest || head.GroupID != h.header.GroupID) {
		return fmt.Errorf("segment %d does not follow segment %d: %w", head.Sequence, h.last.Sequence, segment.ErrDamaged)
	}
	if h.disks == nil {
		h.disks, h.unknown = make([][]item, len(head.Disks)), make([]block.Set, len(head.Disks))
	}
	if len(head.Disks) != len(h.disks) {
		return fmt.Errorf("segment %d has %d disks, the one before %d: %w", head.Sequence, len(head.Disks), len(h.disks), segment.ErrDamaged)
	}
	h.header, h.last = head, o.Summary()
	return nil
}

func (h *History) read(index int, o *vault.Object) {
	for i := range o.Len() {
		e := o.Entry(i)
		if e.Kind.TakesPosition() {
			h.newest = e.Position
			h.moments = append(h.moments, moment{e.Position, e.Time})
		}
		switch e.Kind {
		case stream.KindWrite:
			kind := [...]itemKind{block.OpWrite: isData, block.OpZeroes: isZero, block.OpDiscard: isUndefined}[min(e.Op, block.OpDiscard)]
			h.add(&e, index, kind)
		case stream.KindFill:
			h.unknown[e.Disk].Remove(e.Range)
			switch e.Fill {
			case stream.FillData:
				h.add(&e, index, isData)
			case stream.FillZero:
				h.add(&e, index, isZero)
			case stream.FillSame:
				h.add(&e, index, isSame)
			}
		case stream.KindBookmark:
			h.marks = append(h.marks, Point{Position: e.Position, Time: time.Unix(0, e.Time).UTC(), Bookmark: e.Name, Consistency: e.Consistency})
		case stream.KindGap:
			for _, g := range e.Ranges {
				h.unknown[g.Disk].Add(g.Range)
			}
			if h.open {
				h.stretch[len(h.stretch)-1].Last = e.Position - 1
				h.open = false
			}
		case stream.KindSettled:
			h.stretch = append(h.stretch, Stretch{First: e.Position})
			h.open = true
		}
	}
}

func (h *History) add(e *segment.Entry, index int, kind itemKind) {
	h.disks[e.Disk] = append(h.disks[e.Disk], item{
		off: e.Range.Off, len: e.Range.Len, pos: e.Position, at: e.At, base: e.Base,
		segment: int32(index), kind: kind, fill: e.Kind == stream.KindFill,
	})
}

// Group, GroupID, Disks and Last say whose history this is and how it ends.
func (h *History) Group() string         { return h.group }
func (h *History) GroupID() [16]byte     { return h.header.GroupID }
func (h *History) Disks() []segment.Disk { return h.header.Disks }
func (h *History) Last() segment.Summary { return h.last }
func (h *History) Stretches() []Stretch  { return h.stretch }

// Unknown lists the blocks of a disk whose content the history does not know at its end.
func (h *History) Unknown(disk int) []block.Range { return h.unknown[disk].Ranges() }

// Damage says what is wrong with the history; nil if nothing is.
func (h *History) Damage() *DamagedError { return h.damage }

// Bookmarks are all bookmarks ever put, also those that a gap has swallowed.
func (h *History) Bookmarks() []Point { return h.marks }

// Disk finds a disk by name; the empty name is the only disk's.
func (h *History) Disk(name string) (int, error) {
	var names []string
	for i, d := range h.header.Disks {
		if d.Name == name || name == "" && len(h.header.Disks) == 1 {
			return i, nil
		}
		names = append(names, d.Name)
	}
	if name == "" {
		return 0, fmt.Errorf("group %s has disks %v: name one: %w", h.group, names, ErrNoDisk)
	}
	return 0, fmt.Errorf("%q: group %s has disks %v: %w", name, h.group, names, ErrNoDisk)
}

// Points lists every bookmark that can be recovered and the first and last
// position of each stretch, in order.
func (h *History) Points() []Point {
	out := []Point{}
	for i, s := range h.stretch {
		out = append(out, Point{Position: s.First, Time: h.timeOf(s.First), Stretch: i + 1})
		for _, m := range h.marks {
			if m.Position >= s.First && m.Position <= s.Last {
				m.Stretch = i + 1
				out = append(out, m)
			}
		}
		if s.Last != s.First {
			out = append(out, Point{Position: s.Last, Time: h.timeOf(s.Last), Stretch: i + 1})
		}
	}
	return out
}

func (h *History) timeOf(p stream.Position) time.Time {
	i := sort.Search(len(h.moments), func(i int) bool { return h.moments[i].pos > p })
	if i == 0 {
		return time.Time{}
	}
	return time.Unix(0, h.moments[i-1].time).UTC()
}

// Resolve finds the point that a spec names, or says why there is none:
// ErrInsideGap, ErrNoPoint or *DamagedError.
func (h *History) Resolve(s stream.Spec) (Point, error) {
	switch {
	case s.Latest:
		if h.damage != nil {
			return Point{}, h.damage
		}
		return h.at(h.newest, s)
	case s.Position != 0:
		return h.at(s.Position, s)
	case !s.Time.IsZero():
		t := s.Time.UnixNano()
		i := sort.Search(len(h.moments), func(i int) bool { return h.moments[i].time > t })
		if i == 0 {
			return Point{}, fmt.Errorf("%s lies before the history of group %s begins: %w", s, h.group, ErrNoPoint)
		}
		if i == len(h.moments) && h.damage != nil {
			return Point{}, h.damage
		}
		return h.at(h.moments[i-1].pos, s)
	}
	for i := len(h.marks) - 1; i >= 0; i-- {
		if h.marks[i].Bookmark == s.Bookmark {
			p, err := h.at(h.marks[i].Position, s)
			p.Bookmark, p.Consistency = h.marks[i].Bookmark, h.marks[i].Consistency
			return p, err
		}
	}
	if h.damage != nil {
		return Point{}, h.damage
	}
	return Point{}, fmt.Errorf("bookmark %q in group %s: %w", s.Bookmark, h.group, ErrNoPoint)
}

func (h *History) at(p stream.Position, s stream.Spec) (Point, error) {
	for i, st := range h.stretch {
		if p >= st.First && p <= st.Last {
			return Point{Position: p, Time: h.timeOf(p), Stretch: i + 1}, nil
		}
	}
	if p > h.newest || p == 0 {
		if h.damage != nil {
			return Point{}, h.damage
		}
		return Point{}, fmt.Errorf("%s: the history of group %s ends at position %d: %w", s, h.group, h.newest, ErrNoPoint)
	}
	before, after := "", ""
	for _, st := range h.stretch {
		if st.Last < p {
			before = fmt.Sprintf("; the newest point before it is seq:%d", st.Last)
		}
		if st.First > p && after == "" {
			after = fmt.Sprintf("; the first after it is seq:%d", st.First)
		}
	}
	return Point{}, fmt.Errorf("%s is position %d of group %s, %w%s%s", s, p, h.group, ErrInsideGap, before, after)
}
