package restore

import (
	"bytes"
	"context"
	"fmt"
	"sync"

	"golang.org/x/sync/errgroup"

	"tidemark/internal/block"
)

// CompareOptions of Compare. The zero value compares all and gives up to 16 ranges.
type CompareOptions struct {
	Grain    int64                       // bytes, a power of two: differing ranges are whole blocks of this size; 0 is 4096
	Max      int                         // ranges after which it stops; 0 is 16
	Parallel int                         // as in Options
	Skip     func(block.Range) bool      // blocks (of Grain) that are not compared; nil compares all
	Progress func(compared, total int64) // bytes; from one goroutine at a time
}

// Compare gives the first ranges in which a and b differ, in order, up to
// o.Max of them; none means that they are the same. What either of them maps as
// undefined is not compared. Different sizes are an error.
func Compare(ctx context.Context, a, b block.Device, o CompareOptions) ([]block.Range, error) {
	if a.Size() != b.Size() {
		return nil, fmt.Errorf("devices of %d and %d bytes cannot be the same", a.Size(), b.Size())
	}
	if o.Grain == 0 {
		o.Grain = 4096
	}
	if o.Max == 0 {
		o.Max = 16
	}
	workers := parallel(o.Parallel)
	pool := sync.Pool{New: func() any { return new([2][unitBytes]byte) }}
	var out []block.Range
	size, window := a.Size(), int64(workers)*unitBytes
	for off := int64(0); off < size; off += window {
		found := make([][]block.Range, workers)
		g, ctx := errgroup.WithContext(ctx)
		for i := range workers {
			r := block.Range{Off: off + int64(i)*unitBytes, Len: unitBytes}.Intersect(block.Range{Len: size})
			if r.Empty() {
				break
			}
			g.Go(func() (err error) {
				if err := ctx.Err(); err != nil {
					return err
				}
				buf := pool.Get().(*[2][unitBytes]byte)
				defer pool.Put(buf)
				found[i], err = compareUnit(a, b, r, buf[0][:r.Len], buf[1][:r.Len], o)
				return err
			})
		}
		if err := g.Wait(); err != nil {
			return out, err
		}
		for _, ranges := range found {
			out = merge(out, ranges)
		}
		if o.Progress != nil {
			o.Progress(min(off+window, size), size)
		}
		if len(out) > o.Max {
			return out[:o.Max], nil
		}
	}
	return out, ctx.Err()
}

func compareUnit(a, b block.Device, r block.Range, pa, pb []byte, o CompareOptions) ([]block.Range, error) {
	if err := readAll(a, pa, r); err != nil {
		return nil, err
	}
	if err := readAll(b, pb, r); err != nil {
		return nil, err
	}
	if bytes.Equal(pa, pb) {
		return nil, nil
	}
	for _, d := range []block.Device{a, b} { // only now: most units are equal
		err := eachExtent(d, r, func(e block.Extent) error {
			if e.State == block.Undefined {
				clear(pa[e.Off-r.Off : e.End()-r.Off])
				clear(pb[e.Off-r.Off : e.End()-r.Off])
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	var out []block.Range
	for at := int64(0); at < r.Len; at += o.Grain {
		n := min(o.Grain, r.Len-at)
		here := block.Range{Off: r.Off + at, Len: n}
		if !bytes.Equal(pa[at:at+n], pb[at:at+n]) && (o.Skip == nil || !o.Skip(here)) {
			out = merge(out, []block.Range{here})
		}
	}
	return out, nil
}

func readAll(d block.Device, p []byte, r block.Range) error {
	if n, err := d.ReadAt(p, r.Off); n < len(p) {
		return fmt.Errorf("reading range %s: %w", r, err)
	}
	return nil
}

// merge appends ranges, joining those that touch.
func merge(out, ranges []block.Range) []block.Range {
	for _, r := range ranges {
		if n := len(out); n > 0 && out[n-1].End() == r.Off {
			out[n-1].Len += r.Len
		} else {
			out = append(out, r)
		}
	}
	return out
}
