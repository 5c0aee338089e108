package timeline

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"tidemark/internal/block"
	"tidemark/internal/segment"
	"tidemark/internal/stream"
	"tidemark/internal/vault"
)

// Report is what a verification found.
type Report struct {
	Group    string   `json:"group"`
	Segments int      `json:"segments"`
	Bytes    int64    `json:"bytes"`
	Damage   []Damage `json:"damage"`
}

// Damage is one damaged part: where it is and what it spoils.
type Damage struct {
	Object string          `json:"object"`
	Disk   string          `json:"disk,omitempty"` // none: all disks of the group
	Range  block.Range     `json:"range,omitzero"` // none: all of them
	From   stream.Position `json:"spoils_from"`    // points from here on may need it ...
	To     stream.Position `json:"spoils_to"`      // ... up to here; 0: it spoils none
	Detail string          `json:"detail"`
}

func (d Damage) String() string {
	where, spoils := d.Object, "spoils no point"
	if d.Disk != "" {
		where = fmt.Sprintf("%s, disk %s, bytes %s", d.Object, d.Disk, d.Range)
	} else if d.To != 0 {
		where += ", all disks"
	}
	if d.To != 0 {
		spoils = fmt.Sprintf("spoils points from seq:%d to seq:%d", d.From, d.To)
	}
	return fmt.Sprintf("%s: %s; %s", where, d.Detail, spoils)
}

// Verify reads every object of a group and checks every checksum, the chain of
// segments, their names, the order of positions, and that each stretch begins
// only when every block is known. progress is told how many of how many bytes
// were read. Damage is not an error.
func Verify(ctx context.Context, v *vault.Vault, group string, progress func(done, total int64)) (Report, error) {
	r := Report{Group: group, Damage: []Damage{}}
	newest, last, err := v.Newest(ctx, group)
	if err != nil {
		return r, err
	}
	refs, strays, err := v.Contents(ctx, group)
	if err != nil {
		return r, err
	}
	c := &checker{report: &r, refs: refs, h: &History{group: group, vault: v}, end: last}
	var done, total int64
	for _, ref := range refs {
		c.end = max(c.end, ref.Last)
		total += ref.Size
	}
	err = eachSegment(ctx, v, group, refs, func(i int, o *vault.Object, err error) (bool, error) {
		err = c.object(i, o, err)
		done += refs[i].Size
		progress(done, total)
		return err == nil, err
	})
	if err != nil {
		return r, err
	}
	if n := len(refs); n == 0 || newest > refs[n-1].Sequence {
		c.cutOff(newest)
	}
	if err := c.strays(ctx, strays); err != nil {
		return r, err
	}
	switch err := v.CheckLock(ctx, group); {
	case errors.Is(err, segment.ErrDamaged):
		c.add(Damage{Object: "lock", Detail: err.Error()})
	case err != nil:
		return r, err
	}
	return r, nil
}

// checker walks a history as Load does, but goes on behind damage.
type checker struct {
	report *Report
	refs   []vault.Ref
	h      *History
	end    stream.Position // the last that any name tells of
	broken bool            // the chain was reported as broken: what follows is known to be spoiled
}

func (c *checker) add(d Damage) { c.report.Damage = append(c.report.Damage, d) }

// object checks one; an error is one of reading.
func (c *checker) object(i int, o *vault.Object, err error) error {
	ref, twice := c.refs[i], false
	if i > 0 {
		twice = c.refs[i-1].Sequence == ref.Sequence
	}
	if i+1 < len(c.refs) {
		twice = twice || c.refs[i+1].Sequence == ref.Sequence
	}
	c.missing(i)
	if err != nil {
		if !errors.Is(err, segment.ErrDamaged) {
			return err
		}
		detail := strings.TrimPrefix(err.Error(), fmt.Sprintf("group %s, object %s: ", c.report.Group, ref.Name)) // both are told already
		d := Damage{Object: ref.Name, From: min(ref.First, c.h.unsettled()), To: c.end, Detail: detail}
		if twice { // the other one may be the true one
			d.To, d.Detail = 0, "there is another object for this segment, and this one is not it: "+d.Detail
		} else {
			c.broken = true
		}
		c.add(d)
		return nil
	}
	c.report.Segments++
	c.report.Bytes += o.Summary().Size
	o.Check(func(from, to uint64, err error) { c.payload(o, from, to, err) })
	if c.broken {
		return nil
	}
	if err := errors.Join(c.h.chain(o), c.h.sound(o)); err != nil {
		c.add(Damage{Object: ref.Name, From: min(ref.First, c.h.unsettled()), To: c.end, Detail: err.Error()})
		c.broken = true
		return nil
	}
	for i := range o.Len() {
		e := o.Entry(i)
		c.entry(o, &e)
		c.h.note(&e)
	}
	c.h.spans = append(c.h.spans, span{})
	return nil
}

// missing reports the segments that no object before number i and no later one holds.
func (c *checker) missing(i int) {
	want := uint64(1)
	if i > 0 {
		want = c.refs[i-1].Sequence + 1
	}
	if next := c.refs[i].Sequence; next > want || twiceBroken(c, i) {
		detail := fmt.Sprintf("segments %d to %d before it are missing", want, next-1)
		if next <= want {
			detail = fmt.Sprintf("no object holds segment %d before it", want-1)
		}
		c.add(Damage{Object: c.refs[i].Name, From: c.h.unsettled(), To: c.end, Detail: detail})
		c.broken = true
	}
}

// cutOff reports that the writer stored more than there is.
func (c *checker) cutOff(newest uint64) {
	have := uint64(0)
	if n := len(c.refs); n > 0 {
		have = c.refs[n-1].Sequence
	}
	if newest > have {
		c.add(Damage{Object: fmt.Sprintf("segment %d", newest), From: c.h.unsettled(), To: c.end, Detail: fmt.Sprintf("segments %d to %d were stored and are missing", have+1, newest)})
	}
}

// twiceBroken: of several objects for the segment before, none was it.
func twiceBroken(c *checker, i int) bool {
	return !c.broken && i > 0 && c.refs[i].Sequence == c.refs[i-1].Sequence+1 && c.h.last.Sequence < c.refs[i-1].Sequence
}

// payload reports the records whose content lies in a damaged frame. A record
// spoils the points from its own on, until something newer covers it: the whole
// rest is named, which may be more.
func (c *checker) payload(o *vault.Object, from, to uint64, err error) {
	for i := range o.Len() {
		e := o.Entry(i)
		if !e.HasPayload() || e.At >= to || e.At+uint64(e.Range.Len) <= from {
			continue
		}
		lo, hi := max(from, e.At)-e.At, min(to, e.At+uint64(e.Range.Len))-e.At
		c.add(Damage{Object: o.Ref.Name, Disk: o.Header().Disks[e.Disk].Name,
			Range: block.Range{Off: e.Range.Off + int64(lo), Len: int64(hi - lo)}, From: e.Position, To: c.end, Detail: err.Error()})
	}
}

// entry checks one against all before it: positions, ranks, and the truth of settled marks.
func (c *checker) entry(o *vault.Object, e *segment.Entry) {
	wrong := func(disk string, format string, args ...any) {
		c.add(Damage{Object: o.Ref.Name, Disk: disk, Range: e.Range, From: e.Position, To: c.end, Detail: fmt.Sprintf(format, args...)})
	}
	h := c.h
	switch {
	case e.Kind.TakesPosition() && e.Position != h.newest+1:
		wrong("", "position %d comes after %d", e.Position, h.newest)
	case e.Kind == stream.KindFill && e.Fill != stream.FillKnown && !h.open && len(h.stretch) > 0 && e.Position <= h.stretch[len(h.stretch)-1].Last:
		wrong(o.Header().Disks[e.Disk].Name, "a fill of rank %d reaches into the stretch that ended at %d", e.Position, h.stretch[len(h.stretch)-1].Last)
	case e.Kind == stream.KindFill && e.Fill != stream.FillKnown && h.open && e.Position <= h.newest:
		wrong(o.Header().Disks[e.Disk].Name, "a fill of rank %d where nothing is unknown", e.Position)
	case e.Kind == stream.KindVerdict:
		if _, ok := h.waiting[e.Position]; !ok {
			wrong("", "a verdict on position %d, where no prepared mark waits for one", e.Position)
		}
	case e.Kind == stream.KindSettled && !h.open:
		if e.Position < h.valid {
			wrong("", "a stretch begins at %d, before all its blocks were known at %d", e.Position, h.valid)
		}
		for d := range h.unknown {
			if r := h.unknown[d].Ranges(); len(r) > 0 {
				c.add(Damage{Object: o.Ref.Name, Disk: o.Header().Disks[d].Name, Range: r[0], From: e.Position, To: c.end,
					Detail: fmt.Sprintf("%d bytes are unknown where a stretch begins", h.unknown[d].Bytes())})
			}
		}
	}
}

// strays reports objects that no segment is called like.
func (c *checker) strays(ctx context.Context, names []string) error {
	for _, name := range names {
		d := Damage{Object: name, Detail: "it has no segment's name"}
		switch sum, err := c.h.vault.Stray(ctx, c.report.Group, name); {
		case err == nil && sum.Sequence > c.h.last.Sequence && !c.broken:
			d.From, d.To = c.h.unsettled(), max(c.end, sum.Last)
			d.Detail = fmt.Sprintf("it is segment %d under a wrong name", sum.Sequence)
		case err == nil:
			d.Detail = fmt.Sprintf("it is segment %d under a wrong name", sum.Sequence)
		case !errors.Is(err, segment.ErrDamaged) && !errors.Is(err, segment.ErrVersion):
			return err
		}
		c.add(d)
	}
	return nil
}
