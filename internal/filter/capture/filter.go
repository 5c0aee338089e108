package capture

import (
	"fmt"
	"sync/atomic"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/source"
	"tidemark/internal/stack"
)

// Altitude is where the filter belongs: below whatever changes what is written.
const Altitude = 100

// Name is what the filter is called in a stack.
const Name = "capture"

// filter records the writes of one device.
type filter struct {
	ring  *Ring
	disk  int
	below *stack.Below
	gone  <-chan struct{}
}

// Driver gives the filter for a disk of the ring, by its index.
func (r *Ring) Driver(disk int) stack.Driver {
	return stack.DriverFunc(func(below *stack.Below) (stack.Filter, error) {
		if d := r.cfg.Disks[disk]; below.Size() != d.Size {
			return nil, fmt.Errorf("%s has %d bytes, and the ring is for one of %d: %w", d.Name, below.Size(), d.Size, ErrConfig)
		}
		f := &filter{ring: r, disk: disk, below: below, gone: below.Gone()}
		if r.over[disk].Swap(f) != nil { // a device was made anew under its name
			r.unseen(disk, fmt.Errorf("the device %s was made anew, and not captured meanwhile", r.cfg.Disks[disk].Name))
		}
		return f, nil
	})
}

// ReadAt reads a disk from right below its filter: it sees nothing that has not
// its place in the ring already. It may be called concurrently.
func (r *Ring) ReadAt(disk int, p []byte, off int64) (int, error) {
	f := r.over[disk].Load()
	if f == nil {
		return 0, fmt.Errorf("%s: %w", r.cfg.Disks[disk].Name, ErrNotServed)
	}
	return f.below.ReadAt(p, off)
}

var (
	_ stack.Sieve  = (*filter)(nil)
	_ stack.Inline = (*filter)(nil)

	_ stack.Resizer = (*filter)(nil)
)

// Inline: it waits only for the ring, within Patience.
func (f *filter) Inline() {}

// Pass lets everything go by that changes nothing.
func (f *filter) Pass(r *stack.Request) bool { return !r.Writes() }

// Handle records a write, then passes it on.
func (f *filter) Handle(r *stack.Request, next stack.Next) error {
	f.ring.inside.Add(1)
	defer f.ring.inside.Add(-1)
	if f.ring.shut.Load() {
		return next.Do(r) // its loss was declared before
	}
	if d := f.ring.cfg.Disks[f.disk]; r.Range.End() > d.Size {
		f.ring.gap(f.disk, r.Range.Intersect(block.Range{Len: d.Size}))
		f.ring.fail(fmt.Errorf("%s is written beyond the %d bytes that it had", d.Name, d.Size))
		return next.Do(r)
	}
	slot := f.ring.submit(f, r)
	err := next.Do(r)
	f.ring.end(f.disk, slot, err)
	return err
}

// Spoil makes the whole device a gap: from here on its writes are not seen.
func (f *filter) Spoil(cause error) string {
	d := f.ring.cfg.Disks[f.disk]
	f.ring.unseen(f.disk, fmt.Errorf("the writes of %s are no longer captured: %w", d.Name, cause))
	return "the stream of " + d.Name + " has a gap: all of it will be compared with the vault"
}

// Resized ends the capture: a history is of disks that keep their sizes.
func (f *filter) Resized(size int64) {
	if d := f.ring.cfg.Disks[f.disk]; size != d.Size {
		f.ring.fail(fmt.Errorf("%s has %d bytes and had %d", d.Name, size, d.Size))
	}
}

// Detach ends the capture of the device. While the ring rests that is in order;
// otherwise writes may go past it from now on.
func (f *filter) Detach(why stack.Reason) {
	if f.ring.resting.Load() || why == stack.Lost { // Spoil has said it
		return
	}
	f.ring.unseen(f.disk, fmt.Errorf("the device %s is gone", f.ring.cfg.Disks[f.disk].Name))
}

// submit gives a write its place among those of the group, and returns the slot
// that says that it is on its way.
func (r *Ring) submit(f *filter, q *stack.Request) int {
	c := &r.counts[f.disk]
	c.submitted.Add(uint64(q.Range.Len))
	payload := q.Data
	if q.Op != block.OpWrite {
		payload = nil
	}
	r.mu.Lock()
	slot := r.slot()
	to, ok := r.reserveFor(f.gone, len(payload))
	s := &r.slots[slot]
	s.Place, s.Offset, s.Disk, s.Dropped = to.pos, q.Range.Off, uint32(f.disk), 0
	if !ok {
		s.Place, s.Dropped = r.head.Producer, 1
	}
	atomic.StoreInt64(&s.Length, q.Range.Len)
	drops := r.Drops()
	r.mu.Unlock()
	if !ok {
		c.lost.Add(1)
		r.gap(f.disk, q.Range) // before it is passed on: whatever comes after it tells of it
		return slot
	}
	r.fill(to, source.Write, f.disk, q.Op, q.Range, drops, 0, 0, payload)
	c.writes.Add(1)
	c.bytes.Add(uint64(q.Range.Len))
	return slot
}

// slot takes a free slot, waiting for one; r.mu is held.
func (r *Ring) slot() int {
	for len(r.free) == 0 {
		r.room.Wait()
	}
	i := r.free[len(r.free)-1]
	r.free = r.free[:len(r.free)-1]
	return i
}

// reserveFor reserves room for n bytes of payload, waiting for it as long as the
// ring's patience lasts and gone is open; r.mu is held, and let go of while it waits.
func (r *Ring) reserveFor(gone <-chan struct{}, n int) (place, bool) {
	if n > payloadMax || next(uint64(recordHead+n)) > uint64(r.cfg.RingBytes) {
		return place{}, false
	}
	to, ok := r.reserve(n)
	if ok || r.cfg.Patience == 0 {
		return to, ok
	}
	over := false
	end := time.AfterFunc(r.cfg.Patience, func() { r.mu.Lock(); over = true; r.mu.Unlock(); r.room.Broadcast() })
	defer end.Stop()
	for !ok && !over && !r.tired && !r.closed && r.lost == nil {
		select {
		case <-gone:
			return place{}, false
		default:
		}
		r.room.Wait()
		to, ok = r.reserve(n)
	}
	if over && !ok { // nobody waits again before something was let go of
		r.tired = true
		r.room.Broadcast()
	}
	return to, ok
}

// end says that a write has ended. One that failed may have changed anything in its range.
func (r *Ring) end(disk, slot int, err error) {
	s, c := &r.slots[slot], &r.counts[disk]
	c.ended.Add(uint64(s.Length))
	if err != nil {
		c.failed.Add(1)
		r.gap(disk, block.Range{Off: s.Offset, Len: s.Length})
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	atomic.StoreInt64(&s.Length, 0)
	r.free = append(r.free, slot)
	r.room.Broadcast()
}
