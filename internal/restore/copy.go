package restore

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"lukechampine.com/blake3"

	"tidemark/internal/block"
)

const (
	unitBytes  = 4 << 20 // one buffer, one entry of the state
	batchUnits = 32      // written, flushed and read back together
)

// job is one run of Write.
type job struct {
	view     block.Device
	target   *target
	size     int64
	parallel int
	force    bool
	progress func(Progress)

	buffers chan []byte // parallel of them, page-aligned

	mu     sync.Mutex // guards what follows
	report Report
	at     Progress
}

func (j *job) run(ctx context.Context) error {
	free, err := j.allocate()
	if err != nil {
		return err
	}
	defer free()
	j.at.Total = j.size
	sound, err := j.recheck(ctx)
	if err != nil {
		return err
	}
	units := (j.size + unitBytes - 1) / unitBytes
	batch := make([]int64, 0, batchUnits)
	for u := range units {
		if !sound[u] {
			batch = append(batch, u)
		}
		if len(batch) == batchUnits || u == units-1 {
			if err := j.batch(ctx, batch); err != nil {
				return err
			}
			batch = batch[:0]
		}
	}
	return ctx.Err()
}

// allocate maps the buffers: page-aligned, as direct I/O needs them.
func (j *job) allocate() (free func(), err error) {
	mem, err := unix.Mmap(-1, 0, j.parallel*unitBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("buffers of %d bytes: %w", j.parallel*unitBytes, err)
	}
	j.buffers = make(chan []byte, j.parallel)
	for i := range j.parallel {
		j.buffers <- mem[i*unitBytes : (i+1)*unitBytes : (i+1)*unitBytes]
	}
	return func() { _ = unix.Munmap(mem) }, nil
}

// recheck reads back what an earlier run noted as done. Where that has changed,
// somebody has used the target meanwhile: it is refused, or with force written again.
func (j *job) recheck(ctx context.Context) (map[int64]bool, error) {
	var mu sync.Mutex
	sound := map[int64]bool{}
	units := make([]int64, 0, len(j.target.state.done))
	for u := range maps.Keys(j.target.state.done) {
		if u >= 0 && u*unitBytes < j.size {
			units = append(units, u)
		}
	}
	err := j.each(ctx, units, func(u int64, buf []byte) error {
		if j.skipReadBack(j.target.state.done[u], len(buf)) {
			j.advance(func(r *Report, p *Progress) { r.Resumed += int64(len(buf)) }, len(buf), len(buf))
		} else {
			if err := j.target.readBack(buf, u*unitBytes); err != nil {
				return fmt.Errorf("reading back what the earlier run wrote: %w", err)
			}
			if sum(buf) != j.target.state.done[u] {
				if !j.force {
					return j.target.notEmpty("it was changed since the restore was interrupted")
				}
				return nil
			}
			j.advance(func(r *Report, p *Progress) { r.Resumed += int64(len(buf)); r.Verified += int64(len(buf)) }, len(buf), len(buf))
		}
		mu.Lock()
		sound[u] = true
		mu.Unlock()
		return nil
	})
	return sound, err
}

// batch writes units, flushes, reads them back, and notes them.
func (j *job) batch(ctx context.Context, units []int64) error {
	var mu sync.Mutex
	sums := make(map[int64]digest, len(units))
	err := j.each(ctx, units, func(u int64, buf []byte) error {
		d, err := j.writeUnit(u*unitBytes, buf)
		mu.Lock()
		sums[u] = d
		mu.Unlock()
		return err
	})
	if err != nil {
		return err
	}
	if err := j.target.flush(); err != nil {
		return fmt.Errorf("%s: flushing: %w", j.target.path, err)
	}
	err = j.each(ctx, units, func(u int64, buf []byte) error {
		if j.skipReadBack(sums[u], len(buf)) {
			j.advance(nil, 0, len(buf))
			return nil
		}
		if err := j.target.readBack(buf, u*unitBytes); err != nil {
			return fmt.Errorf("%s: reading back: %w", j.target.path, err)
		}
		if sum(buf) != sums[u] {
			r := block.Range{Off: u * unitBytes, Len: int64(len(buf))}
			return fmt.Errorf("%s: %w, in range %s: do not trust this disk; look at the kernel's log (dmesg) and choose another", j.target.path, ErrVerify, r)
		}
		j.advance(func(r *Report, _ *Progress) { r.Verified += int64(len(buf)) }, 0, len(buf))
		return nil
	})
	if err != nil {
		return err
	}
	return j.target.state.add(sums)
}

// each runs fn on units, several at a time, each with a buffer of the unit's length.
func (j *job) each(ctx context.Context, units []int64, fn func(u int64, buf []byte) error) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(j.parallel)
	for _, u := range units {
		g.Go(func() error {
			if err := ctx.Err(); err != nil {
				return err
			}
			buf := <-j.buffers // as many as goroutines: never waits
			defer func() { j.buffers <- buf }()
			return fn(u, buf[:min(unitBytes, j.size-u*unitBytes)])
		})
	}
	return g.Wait()
}

// writeUnit brings one unit from the view to the target.
func (j *job) writeUnit(off int64, buf []byte) (digest, error) {
	var data, zero, undefined int64
	err := eachExtent(j.view, block.Range{Off: off, Len: int64(len(buf))}, func(e block.Extent) error {
		if e.State != block.Data {
			clear(buf[e.Off-off : e.End()-off]) // the unit before has left something
		}
		switch e.State {
		case block.Zero:
			zero += e.Len
			return nil
		case block.Undefined: // anything may be there: zeroes betray nothing of what was
			undefined += e.Len
			return nil
		}
		data += e.Len
		p := buf[e.Off-off : e.End()-off]
		if n, err := j.view.ReadAt(p, e.Off); n < len(p) {
			return fmt.Errorf("reading range %s of the view: %w", e.Range, err)
		}
		return nil
	})
	if err != nil {
		return digest{}, err
	}
	empty := data == 0 || firstNonZero(buf) < 0
	if err := j.target.write(buf, off, empty); err != nil {
		return digest{}, fmt.Errorf("%s: writing range %s: %w", j.target.path, block.Range{Off: off, Len: int64(len(buf))}, err)
	}
	j.advance(func(r *Report, _ *Progress) { r.Data += data; r.Zero += zero; r.Undefined += undefined }, len(buf), 0)
	if empty {
		return zeroSum(len(buf)), nil
	}
	return sum(buf), nil
}

// skipReadBack is true for the holes of a fresh file: nothing was written there.
func (j *job) skipReadBack(d digest, n int) bool {
	return !j.target.device && d == zeroSum(n)
}

// advance adds to the report and tells the caller.
func (j *job) advance(add func(*Report, *Progress), written, verified int) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if add != nil {
		add(&j.report, &j.at)
	}
	j.at.Written += int64(written)
	j.at.Verified += int64(verified)
	if j.progress != nil {
		j.progress(j.at)
	}
}

func sum(p []byte) digest {
	h := blake3.Sum256(p)
	return digest(h[:16])
}

var zeroes [unitBytes]byte

var zeroUnit = sync.OnceValue(func() digest { return sum(zeroes[:]) })

func zeroSum(n int) digest {
	if n == unitBytes {
		return zeroUnit()
	}
	return sum(zeroes[:n])
}

// firstNonZero is the index of the first byte that is not zero, or -1.
func firstNonZero(p []byte) int {
	for at := 0; at < len(p); at += unitBytes {
		part := p[at:min(at+unitBytes, len(p))]
		if bytes.Equal(part, zeroes[:len(part)]) {
			continue
		}
		for i, b := range part {
			if b != 0 {
				return at + i
			}
		}
	}
	return -1
}

// eachExtent visits the extents of r in order; a device that knows none is all data.
func eachExtent(d block.Device, r block.Range, fn func(block.Extent) error) error {
	m, ok := d.(block.Mapper)
	for ok && !r.Empty() {
		extents, err := m.Extents(r)
		if err != nil {
			return err
		}
		if len(extents) == 0 {
			return fmt.Errorf("the view names no extent at %s", r)
		}
		end := r.Off
		for _, e := range extents {
			if e.Off != end || e.Len <= 0 || e.End() > r.End() {
				return fmt.Errorf("the view names the extent %s where one from %d on is due", e.Range, end)
			}
			if err := fn(e); err != nil {
				return err
			}
			end = e.End()
		}
		r = block.Range{Off: end, Len: r.End() - end}
	}
	if r.Empty() {
		return nil
	}
	return fn(block.Extent{Range: r, State: block.Data})
}
