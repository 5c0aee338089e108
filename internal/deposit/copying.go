package deposit

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"

	"tidemark/internal/block"
	"tidemark/internal/segment"
	"tidemark/internal/stream"
	"tidemark/internal/timeline"
	"tidemark/internal/vault"
)

// copying is one call of Put.
type copying struct {
	r       Request
	vault   *vault.Vault
	lock    *vault.Lock
	disks   []*disk
	builder *segment.Builder
	header  segment.Header
	state   segment.State
	fresh   bool // nothing can be recovered from the group yet
	done    int64
	total   int64
}

// disk is one with what there is to do for it.
type disk struct {
	Disk
	index   int
	base    base
	next    base           // when this copy is whole
	why     string         // all of it is read; "": only ranges
	ranges  []block.Range  // to be read
	must    block.Set      // to be stored, whatever the newest point holds there
	newest  *timeline.View // what to compare with; nil: nothing
	number  uint64         // of private changes when it began
	read    int64
	stored  int64
	scratch []byte
}

func (c *copying) run(ctx context.Context) (out Result, err error) {
	h, err := timeline.Load(ctx, c.vault, c.r.Group)
	if errors.Is(err, vault.ErrNoGroup) {
		h, err = nil, nil
	}
	if err != nil {
		return out, err
	}
	if h != nil && h.Damage() != nil {
		return out, fmt.Errorf("%w; give another --name, or repair the vault", h.Damage())
	}
	if h != nil && h.Last().Sequence == 0 {
		h = nil
	}
	if err := c.admit(h); err != nil {
		return out, err
	}
	if p, ok := c.already(h); ok {
		return c.result(p, true), nil
	}
	if err := c.plan(ctx, h); err != nil {
		return out, err
	}
	c.begin(h)
	if c.state.Last == 0 {
		if err := c.open(); err != nil {
			return out, err
		}
	}
	for _, d := range c.disks {
		if err := c.copy(ctx, d); err != nil {
			return out, fmt.Errorf("device %s: %w", d.Name, err)
		}
	}
	return c.finish(ctx)
}

// admit refuses what does not go on with the group's history.
func (c *copying) admit(h *timeline.History) error {
	for i, d := range c.r.Disks {
		c.disks = append(c.disks, &disk{Disk: d, index: i, base: base{Kind: kind}})
	}
	if h == nil {
		return nil
	}
	have := h.Disks()
	for i, d := range c.disks {
		if len(have) != len(c.disks) || have[i].Name != d.Name || have[i].Size != d.Size {
			var names []string
			for _, x := range have {
				names = append(names, fmt.Sprintf("%s of %d bytes", x.Name, x.Size))
			}
			return fmt.Errorf("group %s has %v: %w", c.r.Group, names, ErrOtherDisks)
		}
		var err error
		if d.base, err = parseBase(c.r.Group, have[i].Identity); err != nil {
			return err
		}
		if d.base.older(d.Disk, c.r.Time) {
			return fmt.Errorf("group %s, snapshot %s taken at %s: %w", c.r.Group, d.base.Snapshot, d.base.Time.Format(timeForm), ErrOlder)
		}
	}
	return nil
}

const timeForm = "2006-01-02 15:04:05 MST"

// already finds the point of this snapshot, where nothing was changed in its images.
func (c *copying) already(h *timeline.History) (timeline.Point, bool) {
	if h == nil || len(h.Bookmarks()) == 0 {
		return timeline.Point{}, false
	}
	for _, d := range c.disks {
		private, _, _ := d.Private()
		if d.base.Snapshot != c.r.Snapshot || len(private)+len(d.base.Private) > 0 {
			return timeline.Point{}, false
		}
	}
	return h.Bookmarks()[len(h.Bookmarks())-1], true
}

// plan finds what to read of each disk.
func (c *copying) plan(ctx context.Context, h *timeline.History) error {
	c.fresh = h == nil || len(h.Stretches()) == 0
	if h != nil {
		for _, p := range h.Bookmarks() {
			if p.Bookmark == c.r.Point {
				return fmt.Errorf("point %q in group %s: %w", c.r.Point, c.r.Group, ErrPoint)
			}
		}
	}
	for i, d := range c.disks {
		private, number, quiet := d.Private()
		if !quiet {
			return fmt.Errorf("the image of %s was %w: unmount it, or take another snapshot", d.Name, ErrChanged)
		}
		d.number = number
		d.next = base{kind, c.r.Snapshot, c.r.Time, d.Generation, d.Number, private}
		if len(private) > privateMax {
			d.next.Private, d.next.Generation, d.next.Number = nil, "", 0
		}
		var set block.Set
		for _, r := range append(private, d.base.Private...) {
			set.Add(r)
		}
		if !c.fresh {
			for _, r := range h.Ahead(i) {
				set.Add(r)
				d.must.Add(r)
			}
		}
		if d.why = d.changed(&set, c.fresh); d.why != "" {
			set = block.Set{}
			set.Add(block.Range{Len: d.Size})
			if !c.fresh {
				var err error
				if d.newest, err = h.View(ctx, i, h.Last().Last); err != nil {
					return err
				}
			}
		}
		d.ranges = set.Ranges()
		c.total += set.Bytes()
	}
	return nil
}

// changed adds what the change map names, or says why that is not known.
func (d *disk) changed(set *block.Set, fresh bool) (why string) {
	switch {
	case fresh:
		return "the vault holds no point of it yet"
	case d.Generation == "":
		return "its changes are not tracked"
	case d.base.Generation == "":
		return "it is not known what was changed in the image that the vault's newest point was made from"
	}
	ranges, err := d.Since(d.base.Generation, d.base.Number)
	if err != nil {
		return err.Error()
	}
	for r := range ranges {
		set.Add(r)
	}
	return ""
}

// begin sets up what segments say. Until the copy is whole they name the base as it was.
func (c *copying) begin(h *timeline.History) {
	c.builder = segment.NewBuilder(cmp.Or(c.r.Segment, segmentBytes))
	c.header = segment.Header{Group: c.r.Group}
	if h != nil {
		c.header.GroupID = h.GroupID()
		c.header.Previous, c.header.Sequence = h.Last().Digest, h.Last().Sequence
		c.state = segment.State{Last: h.Last().Last, Settled: h.Last().Settled, GapSince: h.Last().GapSince, Time: h.Last().Time}
	} else {
		_, _ = rand.Read(c.header.GroupID[:]) // never fails
	}
	c.state.Time = max(c.state.Time, c.r.Time.UnixNano())
	for _, d := range c.disks {
		c.header.Disks = append(c.header.Disks, segment.Disk{Name: d.Name, Size: d.Size, SectorSize: d.SectorSize, BlockSize: d.BlockSize, Identity: d.base.encode()})
	}
}

// open begins a history: nothing is known yet.
func (c *copying) open() error {
	gap := stream.Record{Kind: stream.KindGap, Cause: stream.CauseInitial, Position: 1, Time: c.state.Time}
	for _, d := range c.disks {
		gap.Ranges = append(gap.Ranges, block.DiskRange{Disk: d.index, Range: block.Range{Len: d.Size}})
	}
	c.state.Last, c.state.GapSince = 1, 1
	return c.builder.Append(&gap)
}

// finish makes the point, if all images still are what was copied.
func (c *copying) finish(ctx context.Context) (Result, error) {
	for _, d := range c.disks {
		if _, number, _ := d.Private(); number != d.number {
			return Result{}, fmt.Errorf("the image of %s was %w, and no point was made: unmount it, or take another snapshot", d.Name, ErrChanged)
		}
		c.header.Disks[d.index].Identity = d.next.encode()
	}
	mark := stream.Record{Kind: stream.KindBookmark, Position: c.point(), Time: c.state.Time, Name: c.r.Point, Consistency: c.r.Consistency}
	if err := c.builder.Append(&mark); err != nil {
		return Result{}, err
	}
	c.state.Last = mark.Position
	if c.fresh {
		if err := c.builder.Append(&stream.Record{Kind: stream.KindSettled, Position: mark.Position, Time: c.state.Time}); err != nil {
			return Result{}, err
		}
		c.state.Settled, c.state.GapSince = mark.Position, 0
	}
	if err := c.ship(ctx); err != nil {
		return Result{}, err
	}
	return c.result(timeline.Point{Position: mark.Position, Time: timeOf(mark.Time), Bookmark: mark.Name, Consistency: mark.Consistency}, false), nil
}

func (c *copying) result(p timeline.Point, already bool) Result {
	out := Result{Group: c.r.Group, Point: p.Bookmark, Position: p.Position, Time: p.Time, Consistency: p.Consistency, Already: already}
	for _, d := range c.disks {
		out.Disks = append(out.Disks, DiskResult{d.Name, d.why, d.read, d.stored})
	}
	return out
}

// close lets go of everything.
func (c *copying) close() error {
	var errs []error
	for _, d := range c.disks {
		if d.newest != nil {
			errs = append(errs, d.newest.Close())
		}
	}
	return errors.Join(append(errs, c.lock.Unlock())...)
}
