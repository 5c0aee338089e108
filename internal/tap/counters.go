package tap

import (
	"fmt"
	"sync/atomic"
)

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
	for i, target := range t.targets {
		n := t.countsOf(target.Whole)
		c.Disks[i] = DiskCounters{
			Traced: atomic.LoadUint64(&n.Traced), Ended: atomic.LoadUint64(&n.Ended), Writes: atomic.LoadUint64(&n.Writes),
			Bytes: atomic.LoadUint64(&n.Bytes), Lost: atomic.LoadUint64(&n.Lost), Failed: atomic.LoadUint64(&n.Failed),
			Unknown: atomic.LoadUint64(&n.Unknown), Foreign: atomic.LoadUint64(&n.Foreign), Passthrough: atomic.LoadUint64(&n.Passthrough),
			Unreadable: atomic.LoadUint64(&n.Unreadable), Blind: atomic.LoadUint64(&n.Blind),
		}
	}
	for hook, p := range t.stubs {
		s, err := p.Stats()
		if err != nil {
			return c, fmt.Errorf("statistics of %s: %w", hook, err)
		}
		if hook == "queue" {
			c.MissedQueue = s.RecursionMisses
		} else {
			c.MissedCompletions += s.RecursionMisses
		}
	}
	return c, nil
}

// countsOf are the counters of a whole disk; nil where it is not of the group.
// Its slot is that of its first target.
func (t *Tap) countsOf(whole uint32) *counters {
	for i, target := range t.targets {
		if target.Whole == whole {
			return &t.counts[i]
		}
	}
	return nil
}
