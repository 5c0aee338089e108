package protect

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/stream"
	"tidemark/internal/timeline"
)

// liveRounds bounds how often what differed is looked at again at once.
const liveRounds = 20

// VerifyLive takes a difference for one when it has lasted for holdStill: a write
// is captured before the disk has it, and waits its turn on a busy one; a page
// that changed on its way to the disk is written again, by the kernel's own
// time-table (vm.dirty_expire_centisecs and dirty_writeback_centisecs).
func holdStill() time.Duration {
	wait := 10 * time.Second
	for _, name := range []string{"dirty_expire_centisecs", "dirty_writeback_centisecs"} {
		b, err := os.ReadFile("/proc/sys/vm/" + name)
		n, failed := strconv.Atoi(strings.TrimSpace(string(b)))
		if err != nil || failed != nil {
			return time.Minute
		}
		wait += time.Duration(n) * 10 * time.Millisecond
	}
	return min(wait, 5*time.Minute)
}

// LiveDisk is the result of comparing one disk with the vault; sizes are bytes.
type LiveDisk struct {
	Disk           string
	Position       stream.Position
	Compared       int64
	Different      int64
	FirstDifferent int64 // offset; -1 where all is equal
	Settled        bool  // false: the disk never held still for the comparison
}

// VerifyLive compares the vault with the disks themselves. What differs is
// looked at again with what was written meanwhile; a range that nobody wrote to
// between two looks, holdStill apart, and that differs in both, is different.
func (g *Group) VerifyLive(ctx context.Context) ([]LiveDisk, error) {
	s := g.current()
	if s == nil {
		return nil, g.offlineError()
	}
	var out []LiveDisk
	for i := range s.cfg.Disks {
		d, err := s.compareDisk(ctx, i)
		if err != nil {
			return nil, err
		}
		out = append(out, d)
	}
	return out, nil
}

func (s *session) compareDisk(ctx context.Context, i int) (LiveDisk, error) {
	var f reader
	if err := s.ask(ctx, func() (err error) { f, err = s.disks[i].open(); return err }); err != nil {
		return LiveDisk{}, err
	}
	defer f.Close()
	c := comparison{disk: f, view: func() (pointView, error) { return s.durableView(ctx, i) }, wait: func() error {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.over:
			return ErrOffline
		case <-time.After(holdStill()):
			return nil
		}
	}}
	out, err := c.run(ctx, s.cfg.Disks[i].Size)
	out.Disk = s.cfg.Disks[i].Name
	return out, err
}

// pointView is a timeline.View.
type pointView interface {
	io.ReaderAt
	Extents(block.Range) ([]block.Extent, error)
	Position() stream.Position
	Close() error
}

// comparison is one disk against views of it, newer and newer.
type comparison struct {
	disk io.ReaderAt
	view func() (pointView, error)
	wait func() error // until what was on its way to the disk is there
}

// run looks at everything, then at once and again at what differs while that
// becomes less for having been written to, and a last time after the wait.
func (c *comparison) run(ctx context.Context, size int64) (out LiveDisk, err error) {
	out = LiveDisk{FirstDifferent: -1, Settled: true}
	todo := []block.Range{{Len: size}}
	var before pointView
	defer func() {
		if before != nil {
			err = errors.Join(err, before.Close())
		}
	}()
	for round, last := 0, false; len(todo) > 0; round++ {
		view, err := c.view()
		if err != nil {
			return out, err
		}
		out.Position = view.Position()
		differ, n, err := differing(ctx, c.disk, view, before, todo)
		out.Compared += n
		if before != nil {
			err = errors.Join(err, before.Close())
		}
		before = view
		if err != nil {
			return out, err
		}
		if last {
			out.count(differ.unwritten)
			out.Settled = len(differ.written) == 0
			return out, nil
		}
		todo = append(differ.written, differ.unwritten...)
		if len(todo) > 0 && (len(differ.written) == 0 || round == liveRounds) {
			last = true
			if err := c.wait(); err != nil {
				return out, err
			}
		}
	}
	return out, nil
}

// count adds what is different for certain.
func (d *LiveDisk) count(ranges []block.Range) {
	for _, r := range ranges {
		d.Different += r.Len
		if d.FirstDifferent < 0 || r.Off < d.FirstDifferent {
			d.FirstDifferent = r.Off
		}
	}
}

// durableView waits until the vault holds all that is captured now, and opens it.
func (s *session) durableView(ctx context.Context, i int) (*timeline.View, error) {
	var want stream.Position
	if err := s.ask(ctx, func() error {
		if err := s.pump(); err != nil {
			return err
		}
		if s.gapOpen {
			return fmt.Errorf("group %s: %w", s.cfg.Name, ErrInsideGap)
		}
		want = s.position
		return s.seal()
	}); err != nil {
		return nil, err
	}
	for {
		if durable, _ := s.pending.state(); durable >= want {
			break
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-s.over:
			return nil, ErrOffline
		case <-time.After(tick):
		}
	}
	h, err := timeline.Load(ctx, s.vault, s.cfg.Name)
	if err != nil {
		return nil, err
	}
	p, err := h.Resolve(stream.Spec{Latest: true})
	if err != nil {
		return nil, err
	}
	return h.View(ctx, i, p.Position)
}

// difference are ranges that differ: written to since the look before, or not.
// At the first look all of them pass for written.
type difference struct {
	written, unwritten []block.Range
}

// differing compares ranges of a disk with a view; before is that of the look before, or nil.
func differing(ctx context.Context, f io.ReaderAt, view, before pointView, todo []block.Range) (d difference, n int64, err error) {
	disk, stored, old := aligned(jobBytes), make([]byte, jobBytes), make([]byte, jobBytes)
	for _, r := range todo {
		for off := r.Off; off < r.End(); {
			if err := ctx.Err(); err != nil {
				return d, n, err
			}
			part := block.Range{Off: off, Len: min(jobBytes, r.End()-off)}
			off = part.End()
			extents, err := view.Extents(part)
			if err != nil {
				return d, n, err
			}
			last := extents[len(extents)-1]
			off = min(off, last.End())
			part.Len = off - part.Off
			a, b, c := disk[:part.Len], stored[:part.Len], old[:part.Len]
			if _, err := f.ReadAt(a, part.Off); err != nil {
				return d, n, err
			}
			if _, err := view.ReadAt(b, part.Off); err != nil {
				return d, n, err
			}
			n += part.Len
			if bytes.Equal(a, b) {
				continue
			}
			if before != nil {
				if _, err := before.ReadAt(c, part.Off); err != nil {
					return d, n, err
				}
			}
			for _, e := range extents {
				if e.State != block.Undefined {
					d.sort(e.Range, part.Off, a, b, c, before != nil)
				}
			}
		}
	}
	return d, n, nil
}

const liveGrain = 4096

// sort puts the differing pieces of one extent where they belong.
func (d *difference) sort(r block.Range, base int64, disk, stored, old []byte, compared bool) {
	for off := r.Off; off < r.End(); off += liveGrain {
		from, to := off-base, min(off+liveGrain, r.End())-base
		if bytes.Equal(disk[from:to], stored[from:to]) {
			continue
		}
		piece := block.Range{Off: off, Len: to - from}
		if compared && bytes.Equal(stored[from:to], old[from:to]) {
			d.unwritten = append(d.unwritten, piece)
			continue
		}
		d.written = append(d.written, piece)
	}
}
