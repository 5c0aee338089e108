package tap

import (
	"fmt"
	"sync/atomic"

	"tidemark/internal/source"
)

// Counters reads them all. It may be called concurrently.
func (t *Tap) Counters() (Counters, error) {
	c := Counters{LostRanges: atomic.LoadUint64(&t.state.LostRanges), Disks: make([]source.DiskCounters, len(t.targets))}
	for i, target := range t.targets {
		n := t.countsOf(target.Whole)
		c.Disks[i] = source.DiskCounters{
			Traced: atomic.LoadUint64(&n.Traced), Ended: atomic.LoadUint64(&n.Ended), Writes: atomic.LoadUint64(&n.Writes),
			Bytes: atomic.LoadUint64(&n.Bytes), Lost: atomic.LoadUint64(&n.Lost), Failed: atomic.LoadUint64(&n.Failed),
			Unknown: atomic.LoadUint64(&n.Unknown), Foreign: atomic.LoadUint64(&n.Foreign), Passthrough: atomic.LoadUint64(&n.Passthrough),
			Unreadable: atomic.LoadUint64(&n.Unreadable), Blind: atomic.LoadUint64(&n.Blind),
		}
		if target.Pass.Kind == PassNVMe {
			c.Disks[i].Passthrough += atomic.LoadUint64(&t.state.Admin)
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
