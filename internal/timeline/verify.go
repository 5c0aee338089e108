package timeline

import (
	"context"
	"errors"
	"fmt"

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
	Disk   string          `json:"disk,omitempty"`
	Range  block.Range     `json:"range,omitzero"`
	From   stream.Position `json:"spoils_from"` // points from here on may need it ...
	To     stream.Position `json:"spoils_to"`   // ... up to here
	Detail string          `json:"detail"`
}

func (d Damage) String() string {
	where := d.Object
	if d.Disk != "" {
		where = fmt.Sprintf("%s, disk %s, bytes %s", d.Object, d.Disk, d.Range)
	}
	return fmt.Sprintf("%s: %s; spoils points from seq:%d to seq:%d", where, d.Detail, d.From, d.To)
}

// Verify reads every object of a group and checks every checksum, the chain of
// segments, their names, the order of positions, and that each stretch begins
// only when no block is unknown. progress is told how many of how many bytes
// were read. Damage is not an error.
func Verify(ctx context.Context, v *vault.Vault, group string, progress func(done, total int64)) (Report, error) {
	r := Report{Group: group, Damage: []Damage{}}
	refs, err := v.Segments(ctx, group)
	if err != nil {
		return r, err
	}
	if len(refs) == 0 {
		return r, nil
	}
	newest := refs[len(refs)-1].Last
	c := &checker{report: &r, newest: newest, h: &History{group: group, vault: v, refs: refs}}
	for i, ref := range refs {
		if err := ctx.Err(); err != nil {
			return r, err
		}
		if err := c.object(ctx, i, ref); err != nil {
			return r, err
		}
		progress(int64(i+1), int64(len(refs)))
	}
	return r, nil
}

// checker walks a history as Load does, but goes on behind damage.
type checker struct {
	report *Report
	h      *History
	newest stream.Position
	broken bool // the chain was reported as broken: what follows is known to be spoiled
}

func (c *checker) object(ctx context.Context, i int, ref vault.Ref) error {
	want := uint64(1)
	if i > 0 {
		want = c.h.refs[i-1].Sequence + 1
	}
	if ref.Sequence != want {
		c.add(Damage{Object: ref.Name, From: c.h.newest + 1, To: c.newest, Detail: fmt.Sprintf("segment %d before it is missing", want)})
		c.broken = true
	}
	o, err := c.h.vault.OpenSegment(ctx, c.h.group, ref)
	if errors.Is(err, segment.ErrDamaged) {
		c.add(Damage{Object: ref.Name, From: ref.First, To: c.newest, Detail: err.Error()})
		c.broken = true
		return nil
	}
	if err != nil {
		return err
	}
	defer o.Close()
	c.report.Segments++
	c.report.Bytes += o.Summary().Size
	o.Check(func(from, to uint64, err error) { c.payload(o, from, to, err) })
	if c.broken {
		return nil
	}
	if err := c.h.chain(o); err != nil {
		c.add(Damage{Object: ref.Name, From: ref.First, To: c.newest, Detail: err.Error()})
		c.broken = true
		return nil
	}
	c.entries(o)
	return nil
}

func (c *checker) add(d Damage) { c.report.Damage = append(c.report.Damage, d) }

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
			Range: block.Range{Off: e.Range.Off + int64(lo), Len: int64(hi - lo)}, From: e.Position, To: c.newest, Detail: err.Error()})
	}
}

// entries checks the order of positions and the truth of settled marks.
func (c *checker) entries(o *vault.Object) {
	for i := range o.Len() {
		e := o.Entry(i)
		switch {
		case e.Kind.TakesPosition() && e.Position <= c.h.newest:
			c.add(Damage{Object: o.Ref.Name, From: e.Position, To: c.newest, Detail: fmt.Sprintf("position %d comes after %d", e.Position, c.h.newest)})
		case e.Kind == stream.KindSettled:
			for d := range c.h.unknown {
				if n := c.h.unknown[d].Bytes(); n > 0 {
					c.add(Damage{Object: o.Ref.Name, Disk: o.Header().Disks[d].Name, From: e.Position, To: c.newest, Detail: fmt.Sprintf("%d bytes are unknown where a stretch begins", n)})
				}
			}
		}
		c.note(&e)
	}
	c.h.newest = o.Summary().Last
}

// note follows positions and unknown blocks, entry by entry.
func (c *checker) note(e *segment.Entry) {
	if e.Kind.TakesPosition() {
		c.h.newest = e.Position
	}
	switch e.Kind {
	case stream.KindFill:
		c.h.unknown[e.Disk].Remove(e.Range)
	case stream.KindGap:
		for _, g := range e.Ranges {
			c.h.unknown[g.Disk].Add(g.Range)
		}
	}
}
