package tap

import (
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/cilium/ebpf"

	"tidemark/internal/block"
)

// SetEnds switches the tracking of bios in flight. Off, new ones are not
// tracked; those in the map are still seen to end until ForgetInFlight.
func (t *Tap) SetEnds(on bool) error {
	if on {
		atomic.StoreUint32(&t.state.Ends, endsOn)
	} else if atomic.CompareAndSwapUint32(&t.state.Ends, endsOn, endsDrain) {
		t.rest = rest{}
	}
	return nil
}

// Ends says whether bios in flight are tracked. The programs switch it on when they lose a write.
func (t *Tap) Ends() bool { return atomic.LoadUint32(&t.state.Ends) == endsOn }

// ScanInFlight looks through the map of bios in flight. The producer's place is
// noted first: a bio that was queued later cannot pull Low below it, and one
// that was queued before is in the map or has ended.
func (t *Tap) ScanInFlight() (Scan, error) {
	s := Scan{Producer: t.Producer(), Outstanding: make([]int64, len(t.targets))}
	s.Low = s.Producer
	byWhole := map[uint32]int{}
	m := t.maps["inflight"]
	keys, values := make([]uint64, 4096), make([]flight, 4096)
	var cursor ebpf.MapBatchCursor
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		for i, f := range values[:n] {
			byWhole[f.Whole]++
			t.add(&s, f)
			t.aging.see(keys[i], f)
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			break
		}
		if err != nil {
			return s, fmt.Errorf("reading the bios in flight: %w", err)
		}
	}
	s.OldKnownEnded = t.oldKnownEnded(byWhole)
	return s, t.forgetStale()
}

// ForgetInFlight empties the map of bios in flight, but for disks whose bios are
// always tracked. Call it while tracking is off: an entry whose end was not
// seen would hold Low for good. Removing the entry of a bio that is still on
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
	for _, key := range stale {
		if _, _, err := t.forget(key); err != nil {
			return err
		}
	}
	atomic.CompareAndSwapUint32(&t.state.Ends, endsDrain, endsOff)
	return nil
}

// forget takes one bio out of the map. From now on it counts as never tracked.
func (t *Tap) forget(key uint64) (f flight, was bool, err error) {
	err = t.maps["inflight"].LookupAndDelete(key, &f)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return f, false, nil
	}
	if err != nil {
		return f, false, fmt.Errorf("forgetting a bio in flight: %w", err)
	}
	if n := t.countsOf(f.Whole); n != nil && f.Left > 0 {
		atomic.AddUint64(&n.Tracked, -uint64(f.Left))
	}
	return f, true, nil
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
