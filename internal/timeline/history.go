// Package timeline answers what a disk held at a point. It reads the indexes of
// a group's segments, never their data, and presents a point as a read-only
// block.Device.
//
// What makes a point: see internal/stream. A position is offered only inside a
// stretch, and only if every segment up to it is sound; damage later in the
// history spoils nothing before it.
//
// Load goes through all indexes once and keeps what it needs to name points:
// memory in proportion to segments, gaps and bookmarks. A view goes through
// those up to its point again and keeps what its disk was made of then.
package timeline

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
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

// stretch is one with what a view in it must read.
type stretch struct {
	Stretch
	start, end time.Time
	settled    int // number of the segment with its settled mark, in refs
}

// span is what a segment says of positions and times.
type span struct {
	first, last       stream.Position // of the records that take positions; 0 where it has none
	firstTime, latest int64
}

// History is a group's history as its indexes tell it. It is not changed after
// Load; its methods may be called concurrently.
type History struct {
	group   string
	vault   *vault.Vault
	refs    []vault.Ref // of the segments that were read, without duplicates
	spans   []span      // of each
	header  segment.Header
	last    segment.Summary
	marks   []Point
	waiting map[stream.Position]Point // prepared marks without a verdict; made with the first
	stretch []stretch
	unknown []block.Set
	ahead   []block.Set     // of fills above the newest position
	reach   stream.Position // the highest rank among those
	open    bool            // the last stretch goes on
	damage  *DamagedError
	newest  stream.Position
	time    int64           // of newest
	valid   stream.Position // largest ValidFrom since the newest gap
}

// Load reads the indexes of a group's segments. Objects that are damaged,
// missing or under a wrong name are no error here, but spoil the points that
// need them.
func Load(ctx context.Context, v *vault.Vault, group string) (*History, error) {
	newest, _, err := v.Newest(ctx, group)
	if err != nil {
		return nil, err
	}
	refs, strays, err := v.Contents(ctx, group)
	if err != nil {
		return nil, err
	}
	h := &History{group: group, vault: v}
	if err := h.load(ctx, refs); err != nil {
		return nil, err
	}
	if h.damage == nil {
		if err := h.lost(ctx, strays); err != nil {
			return nil, err
		}
	}
	if h.damage == nil && newest > h.last.Sequence {
		h.spoil(fmt.Errorf("segments %d to %d are missing: %w", h.last.Sequence+1, newest, segment.ErrDamaged))
	}
	if err := h.finish(ctx); err != nil {
		return nil, err
	}
	return h, nil
}

func (h *History) load(ctx context.Context, refs []vault.Ref) error {
	return eachSegment(ctx, h.vault, h.group, refs, func(i int, o *vault.Object, err error) (bool, error) {
		if next := h.last.Sequence + 1; refs[i].Sequence > next {
			h.spoil(fmt.Errorf("segment %d is missing: %w", next, segment.ErrDamaged))
			return false, nil
		}
		if err == nil {
			err = h.chain(o)
		}
		switch {
		case err == nil:
			if err := h.sound(o); err != nil {
				h.spoil(err)
				return false, nil
			}
			h.refs = append(h.refs, refs[i])
			h.read(o)
			return true, nil
		case !errors.Is(err, segment.ErrDamaged):
			return false, err
		case refs[i].Sequence <= h.last.Sequence, i+1 < len(refs) && refs[i+1].Sequence == refs[i].Sequence:
			return true, nil // another object holds this segment; Verify names this one
		}
		h.spoil(err)
		return false, nil
	})
}

// lost looks whether an object under a wrong name goes on where the history ends.
func (h *History) lost(ctx context.Context, strays []string) error {
	for _, name := range strays {
		sum, err := h.vault.Stray(ctx, h.group, name)
		switch {
		case errors.Is(err, segment.ErrDamaged) || errors.Is(err, segment.ErrVersion): // it is nothing of ours
		case err != nil:
			return err
		case sum.Sequence > h.last.Sequence:
			h.spoil(fmt.Errorf("object %s is segment %d under a wrong name: %w", name, sum.Sequence, segment.ErrDamaged))
			return nil
		}
	}
	return nil
}

// finish ends the last stretch, and finds when each began.
func (h *History) finish(ctx context.Context) error {
	h.close(h.newest, h.time)
	if h.damage != nil {
		h.damage.Newest = h.before(h.damage.From)
	}
	for i := range h.stretch {
		st := &h.stretch[i]
		var err error
		if st.start, err = h.timeOf(ctx, st.First); err != nil {
			return err
		}
	}
	return nil
}

func (h *History) spoil(err error) {
	h.damage = &DamagedError{Group: h.group, From: h.unsettled(), Err: err}
}

// unsettled is the first position that what follows can say anything of: while
// a gap is open, that of the gap, as the mark that makes points there may follow.
func (h *History) unsettled() stream.Position {
	switch n := len(h.stretch); {
	case h.open:
		return h.newest + 1
	case n > 0:
		return h.stretch[n-1].Last + 1
	}
	return 1
}

// before is the newest point before a position; 0 if there is none.
func (h *History) before(p stream.Position) (newest stream.Position) {
	for _, st := range h.stretch {
		if st.First < p {
			newest = min(st.Last, p-1)
		}
	}
	return newest
}

// chain checks that a segment follows the one before.
func (h *History) chain(o *vault.Object) error {
	head, sum := o.Header(), o.Summary()
	switch {
	case head.Sequence != h.last.Sequence+1:
		return fmt.Errorf("segment %d is there twice: %w", head.Sequence, segment.ErrDamaged)
	case head.Previous != h.last.Digest, h.last.Sequence != 0 && head.GroupID != h.header.GroupID:
		return fmt.Errorf("segment %d does not follow segment %d: %w", head.Sequence, h.last.Sequence, segment.ErrDamaged)
	case h.last.Sequence != 0 && len(head.Disks) != len(h.header.Disks):
		return fmt.Errorf("segment %d has %d disks, the one before %d: %w", head.Sequence, len(head.Disks), len(h.header.Disks), segment.ErrDamaged)
	}
	if h.unknown == nil {
		h.unknown, h.ahead = make([]block.Set, len(head.Disks)), make([]block.Set, len(head.Disks))
	}
	h.header, h.last = head, sum
	return nil
}

// read takes in what a segment says of points.
func (h *History) read(o *vault.Object) {
	var s span
	for i := range o.Len() {
		e := o.Entry(i)
		h.note(&e)
		if e.Kind.TakesPosition() {
			if s.first == 0 {
				s.first, s.firstTime = e.Position, e.Time
			}
			s.last, s.latest = e.Position, e.Time
		}
	}
	h.spans = append(h.spans, s)
}

// sound refuses what no writer writes and a view would not end with: a fill
// that stands for a point that is none, or is not before it.
func (h *History) sound(o *vault.Object) error {
	for i := range o.Len() {
		if e := o.Entry(i); e.Kind == stream.KindFill && e.Fill == stream.FillSame && e.Base >= e.Position {
			return fmt.Errorf("segment %d has a fill at position %d that is to be as position %d: %w", o.Header().Sequence, e.Position, e.Base, segment.ErrDamaged)
		}
	}
	return nil
}

// note follows gaps, fills and marks.
func (h *History) note(e *segment.Entry) {
	if e.Kind.TakesPosition() {
		defer func() {
			if h.newest, h.time = e.Position, e.Time; h.reach != 0 && h.newest >= h.reach {
				clear(h.ahead)
				h.reach = 0
			}
		}()
	}
	switch e.Kind {
	case stream.KindFill:
		h.unknown[e.Disk].Remove(e.Range)
		h.valid = max(h.valid, e.ValidFrom)
		if e.Position > h.newest {
			h.ahead[e.Disk].Add(e.Range)
			h.reach = max(h.reach, e.Position)
		}
	case stream.KindBookmark:
		h.marks = append(h.marks, markOf(e))
	case stream.KindPrepared:
		if h.waiting == nil {
			h.waiting = map[stream.Position]Point{}
		}
		h.waiting[e.Position] = markOf(e)
	case stream.KindVerdict:
		h.decide(e)
	case stream.KindGap:
		for _, g := range e.Ranges {
			h.unknown[g.Disk].Add(g.Range)
		}
		h.close(e.Position-1, h.time)
		h.valid = e.Position
	case stream.KindSettled:
		if h.open {
			return // it says again what is known
		}
		// Never before a fill was true, whatever the mark says.
		h.stretch = append(h.stretch, stretch{Stretch: Stretch{First: max(e.Position, h.valid)}, settled: len(h.spans)})
		h.open = true
	}
}

func markOf(e *segment.Entry) Point {
	return Point{Position: e.Position, Time: time.Unix(0, e.Time).UTC(), Bookmark: e.Name, Consistency: e.Consistency}
}

// decide makes a prepared mark a bookmark, in its place among the others, or forgets it.
func (h *History) decide(e *segment.Entry) {
	m, ok := h.waiting[e.Position]
	delete(h.waiting, e.Position)
	if !ok || !e.Commit {
		return
	}
	at, _ := slices.BinarySearchFunc(h.marks, m.Position, func(o Point, p stream.Position) int { return cmp.Compare(o.Position, p) })
	h.marks = slices.Insert(h.marks, at, m)
}

// Undecided are the prepared marks that no verdict follows, in order: they are no points.
func (h *History) Undecided() []Point {
	return slices.SortedFunc(maps.Values(h.waiting), func(a, b Point) int { return cmp.Compare(a.Position, b.Position) })
}

// close ends the open stretch, if there is one; one that has no position is none.
func (h *History) close(last stream.Position, at int64) {
	if !h.open {
		return
	}
	h.open = false
	st := &h.stretch[len(h.stretch)-1]
	if last < st.First {
		h.stretch = h.stretch[:len(h.stretch)-1]
		return
	}
	st.Last, st.end = last, time.Unix(0, at).UTC()
}

// Group, GroupID, Disks and Last say whose history this is and how it ends.
func (h *History) Group() string         { return h.group }
func (h *History) GroupID() [16]byte     { return h.header.GroupID }
func (h *History) Disks() []segment.Disk { return h.header.Disks }
func (h *History) Last() segment.Summary { return h.last }

// Stretches are those of the history, in order.
func (h *History) Stretches() []Stretch {
	out := make([]Stretch, len(h.stretch))
	for i, st := range h.stretch {
		out[i] = st.Stretch
	}
	return out
}

// Unknown lists the blocks of a disk whose content the history does not know at its end.
func (h *History) Unknown(disk int) []block.Range { return h.unknown[disk].Ranges() }

// Ahead lists what a disk was filled with ahead of the newest position: no point
// shows it yet, and every later one will.
func (h *History) Ahead(disk int) []block.Range { return h.ahead[disk].Ranges() }

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
