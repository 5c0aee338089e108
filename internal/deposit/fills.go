package deposit

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/segment"
	"tidemark/internal/stream"
)

const (
	readBytes    = 1 << 20  // read of an image at a time
	grain        = 16 << 10 // zeroes and sameness are found in pieces of this size
	segmentBytes = 8 << 20
)

func timeOf(ns int64) time.Time { return time.Unix(0, ns).UTC() }

// point is the position that this copy's bookmark gets.
func (c *copying) point() stream.Position { return c.state.Last + 1 }

// copy appends fills for what there is to do of a disk.
func (c *copying) copy(ctx context.Context, d *disk) error {
	buf := make([]byte, readBytes)
	if d.newest != nil {
		d.scratch = make([]byte, readBytes)
	}
	for _, r := range d.ranges {
		for at := r.Off; at < r.End(); {
			if err := ctx.Err(); err != nil {
				return err
			}
			part := block.Range{Off: at, Len: min(readBytes, r.End()-at)}
			if err := c.fill(d, part, buf[:part.Len]); err != nil {
				return err
			}
			at = part.End()
			d.read += part.Len
			c.done += part.Len
			if c.r.Progress != nil {
				c.r.Progress(c.done, c.total)
			}
			if c.builder.Size() >= cmp.Or(c.r.Segment, segmentBytes) {
				if err := c.ship(ctx); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// fill reads a part of an image and appends what it is made of.
func (c *copying) fill(d *disk, r block.Range, p []byte) error {
	if n, err := d.Image.ReadAt(p, r.Off); n < len(p) {
		return fmt.Errorf("its image at %s: %w", r, err)
	}
	var old []byte
	if d.newest != nil {
		old = d.scratch[:len(p)]
		if n, err := d.newest.ReadAt(old, r.Off); n < len(old) {
			return err
		}
	}
	type state uint8
	const (
		data state = iota
		zero
		same
	)
	judge := func(g block.Range) state {
		now := p[g.Off-r.Off : g.End()-r.Off]
		switch {
		case old != nil && !touches(&d.must, g) && bytes.Equal(now, old[g.Off-r.Off:][:len(now)]):
			return same
		case isZero(now):
			return zero
		}
		return data
	}
	for at := r.Off; at < r.End(); {
		run, is := pieceAt(at, r), judge(pieceAt(at, r))
		for run.End() < r.End() {
			next := pieceAt(run.End(), r)
			if judge(next) != is {
				break
			}
			run.Len += next.Len
		}
		at = run.End()
		rec := stream.Record{Kind: stream.KindFill, Fill: stream.FillData, Disk: d.index, Position: c.point(), ValidFrom: c.point(), Time: c.state.Time, Range: run}
		switch is {
		case same:
			continue
		case zero:
			rec.Fill = stream.FillZero
		case data:
			rec.Payload = p[run.Off-r.Off : run.End()-r.Off]
			d.stored += run.Len
		}
		if err := c.builder.Append(&rec); err != nil {
			return err
		}
	}
	return nil
}

// pieceAt is the piece of a range that begins at a place in it.
func pieceAt(at int64, r block.Range) block.Range {
	return block.Range{Off: at, Len: grain - at%grain}.Intersect(r)
}

func touches(s *block.Set, r block.Range) bool {
	in := s.Ranges()
	i := sort.Search(len(in), func(i int) bool { return in[i].End() > r.Off })
	return i < len(in) && in[i].Overlaps(r)
}

func isZero(b []byte) bool { return len(b) == 0 || b[0] == 0 && bytes.Equal(b[1:], b[:len(b)-1]) }

// ship seals what there is and has the vault store it.
func (c *copying) ship(ctx context.Context) error {
	c.header.Sequence++
	sealed, err := c.builder.Seal(c.header, c.state)
	if err != nil {
		return err
	}
	path := filepath.Join(c.r.Folder, fmt.Sprintf("%016x.seg", c.header.Sequence))
	if err := write(path, sealed); err != nil {
		return fmt.Errorf("a segment on its way to the vault: %w", err)
	}
	sum := sealed.Summary
	if err := c.vault.Put(ctx, c.lock, path, sum); err != nil {
		return err
	}
	c.header.Previous = sum.Digest
	c.builder.Reset()
	return os.Remove(path)
}

func write(path string, sealed *segment.Sealed) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if _, err = sealed.WriteTo(f); err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}
