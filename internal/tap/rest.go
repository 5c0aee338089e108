package tap

import (
	"fmt"
	"os"
	"sync/atomic"
	"time"
)

// rest is what is known of bios that were queued while nobody tracked them.
//
// What the programs count gives, for each disk, the bytes that were queued
// untracked and those that ended untracked. While tracking is on the first stands still and
// the second catches up with it, whatever the load: when both are level, every
// such bio has ended. What level means is found out while the disk is idle: bios
// older than the tap ended without having been counted.
type rest struct {
	onSince time.Time              // first scan that saw tracking on
	disks   map[uint32]*restOfDisk // by whole disk
}

type restOfDisk struct {
	since                     time.Time // idle in every scan since then; zero: not idle
	untracked, untrackedEnded uint64    // when it began to be idle
}

const (
	// settleTime bounds how long a program that saw tracking off can take to count its bio.
	settleTime = 100 * time.Millisecond
	// idleTime is for how long a disk has nothing in flight before it is
	// believed: a bio can wait above the driver, where nobody counts it.
	idleTime = time.Second
	// idleTimeAgainst is the same where the counters say that something is
	// still out. The kernel skips a few completions, which nobody counts.
	idleTimeAgainst = 30 * time.Second
)

// oldKnownEnded says whether no untracked bio is on its way, on any disk.
// tracked is how many are in the map, by whole disk.
func (t *Tap) oldKnownEnded(tracked map[uint32]int) bool {
	now := time.Now()
	if !t.Ends() {
		t.rest = rest{}
		return false
	}
	if t.rest.disks == nil {
		t.rest = rest{onSince: now, disks: map[uint32]*restOfDisk{}}
	}
	all := now.Sub(t.rest.onSince) >= settleTime
	for _, target := range t.targets {
		r := t.rest.disks[target.Whole]
		if r == nil {
			r = &restOfDisk{}
			t.rest.disks[target.Whole] = r
		}
		idle := tracked[target.Whole] == 0 && diskIdle(target.Whole)
		if !r.ended(t.countsOf(target.Whole), idle, now) {
			all = false
		}
	}
	return all
}

// ended is one look at one disk.
func (r *restOfDisk) ended(c *counters, idle bool, now time.Time) bool {
	ended, queued := c.untracked()
	if !idle || r.since.IsZero() || ended != r.untrackedEnded || queued != r.untracked {
		r.since, r.untracked, r.untrackedEnded = time.Time{}, queued, ended
		if idle {
			r.since = now
		}
	}
	known := atomic.LoadUint64(&c.LevelKnown) != 0
	if known && ended-queued == atomic.LoadUint64(&c.Level) {
		return true
	}
	need := idleTime
	if known {
		need = idleTimeAgainst
	}
	if r.since.IsZero() || now.Sub(r.since) < need {
		return false
	}
	atomic.StoreUint64(&c.Level, ended-queued)
	atomic.StoreUint64(&c.LevelKnown, 1)
	return true
}

// untracked is how many bytes ended and were queued without being tracked. The
// order of the four looks, against that in which the programs count, makes what
// is missing from ended or too much in queued: in doubt something is out.
func (c *counters) untracked() (ended, queued uint64) {
	ended = atomic.LoadUint64(&c.Ended)
	ended -= atomic.LoadUint64(&c.TrackedEnded)
	tracked := atomic.LoadUint64(&c.Tracked)
	return ended, atomic.LoadUint64(&c.Traced) - tracked
}

// diskIdle asks the disk for what it has issued and not ended. In doubt it is not idle.
func diskIdle(dev uint32) bool {
	b, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/inflight", dev>>20, dev&(1<<20-1)))
	if err != nil {
		return false
	}
	var reads, writes int
	_, err = fmt.Sscan(string(b), &reads, &writes)
	return err == nil && reads == 0 && writes == 0
}
