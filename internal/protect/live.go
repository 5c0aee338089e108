package protect

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/stream"
	"tidemark/internal/timeline"
)

// liveRounds bounds how often what differed is looked at again.
const liveRounds = 20

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
// between two looks, and that differs in both, is different.
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
	cfg := s.cfg.Disks[i]
	out := LiveDisk{Disk: cfg.Name, FirstDifferent: -1, Settled: true}
	f, err := openDirect(s.disks[i].Path)
	if err != nil {
		return out, err
	}
	defer f.Close()
	todo := []block.Range{{Len: cfg.Size}}
	var before *timeline.View
	defer func() {
		if before != nil {
			before.Close()
		}
	}()
	for round := 0; len(todo) > 0; round++ {
		view, err := s.durableView(ctx, i)
		if err != nil {
			return out, err
		}
		out.Position = view.Position()
		differ, n, err := differing(ctx, f, view, before, todo)
		out.Compared += n
		if before != nil {
			before.Close()
		}
		before = view
		if err != nil {
			return out, err
		}
		for _, d := range differ.certain {
			out.Different += d.Len
			if out.FirstDifferent < 0 || d.Off < out.FirstDifferent {
				out.FirstDifferent = d.Off
			}
		}
		todo = differ.again
		if round == liveRounds && len(todo) > 0 {
			out.Settled = false
			return out, nil
		}
	}
	return out, nil
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

type difference struct {
	certain, again []block.Range
}

// differing compares ranges of a disk with a view. What differs is certain
// where an earlier view says that nobody wrote to it since the last look.
func differing(ctx context.Context, f *os.File, view, before *timeline.View, todo []block.Range) (d difference, n int64, err error) {
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
			d.certain = append(d.certain, piece)
			continue
		}
		d.again = append(d.again, piece)
	}
}
