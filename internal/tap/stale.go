package tap

import (
	"sync/atomic"
	"time"

	"tidemark/internal/block"
)

// aging finds bios in the map of those in flight whose end nobody saw. Of
// millions of ends the kernel keeps a few to itself, and no counter tells of
// them. Mostly the same pointer is queued again, which mends it; but the last
// bios of a program that has ended would stay for good, hold Low, and keep a gap
// from being filled on a disk that does nothing any more.
type aging struct {
	was, is map[uint64]lingering // by bio: the scan before, and the one under way
}

type lingering struct {
	place uint64
	left  int64
	whole uint32
	since time.Time // there, unchanged, in every scan since then
	idle  time.Time // and its disk idle; zero: it was not
}

const (
	agingMax = 4096 // so many bios have their age noted; with more in flight there are other worries
	// staleIdle is how long a disk that has nothing in flight keeps an entry; a
	// bio can wait above the driver.
	staleIdle = 2 * time.Second
	// staleBusy is the same for a disk at work: longer than drives are given to answer.
	staleBusy = 2 * time.Minute
)

func (a *aging) see(key uint64, f flight) {
	if a.is == nil {
		a.is = map[uint64]lingering{}
	}
	if len(a.is) < agingMax {
		a.is[key] = lingering{place: f.Place, left: f.Left, whole: f.Whole}
	}
}

// old ends a scan and gives the bios that have been there for too long.
func (a *aging) old(now time.Time, idle func(whole uint32) bool) (stale []uint64) {
	known := map[uint32]bool{}
	for key, s := range a.is {
		if _, ok := known[s.whole]; !ok {
			known[s.whole] = idle(s.whole)
		}
		s.since = now
		if was, ok := a.was[key]; ok && was.place == s.place && was.left == s.left && was.whole == s.whole {
			s.since, s.idle = was.since, was.idle
		}
		switch {
		case !known[s.whole]:
			s.idle = time.Time{}
		case s.idle.IsZero():
			s.idle = now
		}
		a.is[key] = s
		if now.Sub(s.since) >= staleBusy || !s.idle.IsZero() && now.Sub(s.idle) >= staleIdle {
			stale = append(stale, key)
		}
	}
	a.was, a.is = a.is, a.was
	clear(a.is)
	return stale
}

// forgetStale takes those out of the map and makes their ranges gaps: whether
// they ended well is not known. It is safe for one that is still on its way, as
// its end is then unknown, and that is a gap once more.
func (t *Tap) forgetStale() error {
	for _, key := range t.aging.old(time.Now(), diskIdle) {
		f, was, err := t.forget(key)
		if err != nil {
			return err
		}
		if was {
			t.gapAll(f)
		}
	}
	return nil
}

// gapAll does what the programs' function of this name does: bits, then the counter.
func (t *Tap) gapAll(f flight) {
	for i, target := range t.targets {
		on := block.Range{Off: int64(f.Sector)*512 - target.Start, Len: int64(f.Bytes)}.Intersect(block.Range{Len: target.Len})
		if target.Whole != f.Whole || on.Empty() {
			continue
		}
		bs, o := target.BlockSize, t.base[i]
		for b := on.Off / bs; b <= (on.End()-1)/bs; b++ {
			atomic.OrUint64(&t.gaps[o.gap+uint64(b)/64], 1<<(b&63))
		}
	}
	if n := t.countsOf(f.Whole); n != nil {
		atomic.AddUint64(&n.Unknown, 1)
	}
	atomic.AddUint64(&t.state.Drops, 1)
}
