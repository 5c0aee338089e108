package tap

import (
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/cilium/ebpf"

	"tidemark/internal/block"
)

// Scan is what was on its way at one look.
type Scan struct {
	Low      Place // every captured write before it has ended
	InFlight int
	Dropped  []block.DiskRange // ranges of lost writes that have not ended
	// Outstanding is, for each disk, how many bytes queued there and not ended
	// are in the map.
	Outstanding []int64
}

// ScanInFlight looks through the map of bios in flight. The producer's place is
// noted first: a bio that was queued later cannot pull Low below it, and one
// that was queued before is in the map or has ended.
func (t *Tap) ScanInFlight() (Scan, error) {
	s := Scan{Low: t.Producer(), Outstanding: make([]int64, len(t.targets))}
	m := t.maps["inflight"]
	keys, values := make([]uint64, 4096), make([]flight, 4096)
	var cursor ebpf.MapBatchCursor
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		for _, f := range values[:n] {
			t.add(&s, f)
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return s, nil
		}
		if err != nil {
			return s, fmt.Errorf("reading the bios in flight: %w", err)
		}
	}
}

// ForgetInFlight empties the map of bios in flight, but for disks whose bios are
// always tracked. Call it while tracking is off: an entry whose end was not
// tracked would hold Low for good. Removing the entry of a bio that is still on
// its way is safe: its end is then unknown, and unknown ends become gaps.
func (t *Tap) ForgetInFlight() error {
	always := map[uint32]bool{}
	for _, target := range t.targets {
		always[target.Whole] = always[target.Whole] || target.BioBased
	}
	var key uint64
	var f flight
	var stale []uint64
	it := t.maps["inflight"].Iterate()
	for it.Next(&key, &f) {
		if !always[f.Whole] {
			stale = append(stale, key)
		}
	}
	if err := it.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return fmt.Errorf("reading the bios in flight: %w", err)
	}
	for _, k := range stale {
		if err := t.maps["inflight"].Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("forgetting a bio in flight: %w", err)
		}
	}
	return nil
}

func (t *Tap) add(s *Scan, f flight) {
	s.InFlight++
	s.Low = min(s.Low, Place(f.Place))
	for i, target := range t.targets {
		if target.Whole != f.Whole {
			continue
		}
		on := block.Range{Off: int64(f.Sector)*512 - target.Start, Len: int64(f.Bytes)}.Intersect(block.Range{Len: target.Len})
		if on.Empty() {
			continue
		}
		s.Outstanding[i] += f.Left
		if f.Flags&flightDropped != 0 {
			s.Dropped = append(s.Dropped, block.DiskRange{Disk: i, Range: on})
		}
	}
}

// DiskCounters are what the programs count of one disk, since the tap started.
type DiskCounters struct {
	Traced      uint64 // bytes queued as writes anywhere on the whole disk
	Ended       uint64 // bytes that ended
	Writes      uint64 // captured
	Bytes       uint64 // captured
	Lost        uint64 // writes that are gaps
	Failed      uint64 // writes that ended in an error
	Unknown     uint64 // ends of writes that were older than the tracking
	Foreign     uint64 // writes to what is now another disk under this number
	Passthrough uint64 // commands past the block layer that may have written
	Unreadable  uint64 // payloads that could not be read
	Blind       uint64 // ends of writes whose range could not be told
}

// Counters are all of a tap's counters.
type Counters struct {
	Disks             []DiskCounters // those of one whole disk stand at each of its partitions
	LostRanges        uint64         // lost writes that left their range in the ring
	MissedQueue       uint64         // programs that the kernel skipped when a bio was queued: writes nobody saw
	MissedCompletions uint64
}

// Counters reads them all. It may be called concurrently.
func (t *Tap) Counters() (Counters, error) {
	c := Counters{LostRanges: atomic.LoadUint64(&t.state.LostRanges), Disks: make([]DiskCounters, len(t.targets))}
	slot := map[uint32]int{}
	for i, target := range t.targets {
		if _, ok := slot[target.Whole]; !ok {
			slot[target.Whole] = i
		}
		n := &t.counts[slot[target.Whole]]
		c.Disks[i] = DiskCounters{
			Traced: atomic.LoadUint64(&n.Traced), Ended: atomic.LoadUint64(&n.Ended), Writes: atomic.LoadUint64(&n.Writes),
			Bytes: atomic.LoadUint64(&n.Bytes), Lost: atomic.LoadUint64(&n.Lost), Failed: atomic.LoadUint64(&n.Failed),
			Unknown: atomic.LoadUint64(&n.Unknown), Foreign: atomic.LoadUint64(&n.Foreign), Passthrough: atomic.LoadUint64(&n.Passthrough),
			Unreadable: atomic.LoadUint64(&n.Unreadable), Blind: atomic.LoadUint64(&n.Blind),
		}
	}
	for i, p := range t.stubs {
		s, err := p.Stats()
		if err != nil {
			return c, fmt.Errorf("statistics of %s: %w", hooks[i], err)
		}
		if hooks[i] == "queue" {
			c.MissedQueue = s.RecursionMisses
		} else {
			c.MissedCompletions += s.RecursionMisses
		}
	}
	return c, nil
}
