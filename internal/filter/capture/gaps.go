package capture

import (
	"sync/atomic"

	"tidemark/internal/block"
	"tidemark/internal/source"
)

// gap sets the bits of a range, then counts the drop: who reads the count first
// and the bits after it finds them.
func (r *Ring) gap(disk int, on block.Range) {
	r.bits(disk, on, func(word *uint64, mask uint64) { atomic.OrUint64(word, mask) })
	atomic.AddUint64(&r.head.Drops, 1)
}

// unseen makes the whole of a disk a gap, before writes go past its filter. A
// ring that was closed takes none.
func (r *Ring) unseen(disk int, cause error) {
	r.inside.Add(1)
	defer r.inside.Add(-1)
	if !r.shut.Load() {
		r.gap(disk, block.Range{Len: r.cfg.Disks[disk].Size})
	}
	r.fail(cause)
}

func (r *Ring) bits(disk int, on block.Range, do func(word *uint64, mask uint64)) {
	bs := r.cfg.Disks[disk].BlockSize
	for b, end := on.Off/bs, (on.End()+bs-1)/bs; b < end; {
		n := min(end-b, 64-b&63)
		do(&r.gaps[r.base[disk]+int(b/64)], (^uint64(0)>>(64-n))<<(b&63))
		b += n
	}
}

// Drops counts the writes that are gaps.
func (r *Ring) Drops() uint64 { return atomic.LoadUint64(&r.head.Drops) }

// PeekGaps copies the gap bits as ranges of whole blocks, cut at the disk's end.
func (r *Ring) PeekGaps() (source.Peek, error) {
	p := source.Peek{Drops: r.Drops()}
	for disk := range r.cfg.Disks {
		d := &r.cfg.Disks[disk]
		open := int64(-1)
		put := func(to int64) {
			off := open * d.BlockSize
			p.Ranges = append(p.Ranges, block.DiskRange{Disk: disk, Range: block.Range{Off: off, Len: min(to*d.BlockSize, d.Size) - off}})
			open = -1
		}
		for b := int64(0); b < d.blocks(); b++ {
			word := atomic.LoadUint64(&r.gaps[r.base[disk]+int(b/64)])
			if b%64 == 0 && b+64 <= d.blocks() && (word == 0 && open < 0 || word == ^uint64(0) && open >= 0) {
				b += 63
				continue
			}
			switch set := word>>(b&63)&1 != 0; {
			case set && open < 0:
				open = b
			case !set && open >= 0:
				put(b)
			}
		}
		if open >= 0 {
			put(d.blocks())
		}
	}
	return p, nil
}

// ClearGaps clears the bits of ranges and returns the producer's place after that.
func (r *Ring) ClearGaps(ranges []block.DiskRange) (source.Place, error) {
	for _, g := range ranges {
		r.bits(g.Disk, g.Range, func(word *uint64, mask uint64) { atomic.AndUint64(word, ^mask) })
	}
	return r.Producer(), nil
}

// SetEnds notes what it is told: writes in flight are always known.
func (r *Ring) SetEnds(on bool) error { r.ends.Store(on); return nil }

// Ends gives what SetEnds was told.
func (r *Ring) Ends() bool { return r.ends.Load() }

// ForgetInFlight has nothing to forget: every end is seen.
func (r *Ring) ForgetInFlight() error { return nil }

// ScanInFlight looks at the writes in flight.
func (r *Ring) ScanInFlight() (source.Scan, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := source.Scan{Producer: r.Producer(), Outstanding: make([]int64, len(r.cfg.Disks)), OldKnownEnded: true}
	s.Low = s.Producer
	for i := range r.slots {
		w := &r.slots[i]
		n := atomic.LoadInt64(&w.Length)
		if n == 0 {
			continue
		}
		s.InFlight++
		s.Low = min(s.Low, source.Place(w.Place))
		s.Outstanding[w.Disk] += n
		if w.Dropped != 0 {
			s.Dropped = append(s.Dropped, block.DiskRange{Disk: int(w.Disk), Range: block.Range{Off: w.Offset, Len: n}})
		}
	}
	return s, nil
}

// Counters are what was counted since Open.
func (r *Ring) Counters() (source.Counters, error) {
	c := source.Counters{Disks: make([]source.DiskCounters, len(r.cfg.Disks))}
	for i := range c.Disks {
		n := &r.counts[i]
		c.Disks[i] = source.DiskCounters{Traced: n.submitted.Load(), Ended: n.ended.Load(), Writes: n.writes.Load(), Bytes: n.bytes.Load(),
			Lost: n.lost.Load(), Failed: n.failed.Load()}
	}
	return c, nil
}
