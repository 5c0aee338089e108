// Package cow is the filter that keeps images of a device as it was: before a
// chunk is overwritten for the first time since an image began, its old content
// is copied into the difference storage of that image's snapshot.
//
// A device has any number of images, each with a chunk size and storage of its
// own. For each of them a chunk is
//
//	untouched ──▶ being copied ──▶ settled (in memory, then in a slot)
//
// A writer waits until the chunks that it touches are settled, which means for
// the read of the old content, by itself or by whoever came first, and not for
// the storage - unless the storage is durable: then it waits for that too. What
// cannot be copied, or not in time, spoils the image, never the write.
//
// Whoever reads an image takes untouched chunks from the device and looks again
// afterwards: a writer that came in between has settled the chunk first.
package cow

import (
	"slices"
	"sync"
	"sync/atomic"

	"tidemark/internal/block"
	"tidemark/internal/stack"
)

// Name and Altitude are where the filter belongs: below the barrier, above all
// that should see what it writes to difference storage on the device itself.
const (
	Name     = "cow"
	Altitude = 300
)

// Filter keeps the images of one device.
type Filter struct {
	below  *stack.Below
	images atomic.Pointer[[]*Image] // those that writers have to mind
	mu     sync.Mutex               // changes of images
}

var _ stack.Sieve = (*Filter)(nil)

// Driver gives the filter, and hands it to made as well.
func Driver(made func(f *Filter)) stack.Driver {
	return stack.DriverFunc(func(below *stack.Below) (stack.Filter, error) {
		f := &Filter{below: below}
		f.images.Store(new([]*Image))
		made(f)
		return f, nil
	})
}

// Below is what lies below the filter: the device for difference storage that
// lies on the snapshotted device itself.
func (f *Filter) Below() *stack.Below { return f.below }

// Device is the device's name.
func (f *Filter) Device() string { return f.below.Device() }

// Begin makes an image that of this moment: no write may be under way, nor any
// begin until Begin has been called for all that share the moment.
func (f *Filter) Begin(m *Image) {
	f.mu.Lock()
	defer f.mu.Unlock()
	next := append(slices.Clone(*f.images.Load()), m)
	f.images.Store(&next)
}

// end has writers mind an image no longer.
func (f *Filter) end(m *Image) {
	f.mu.Lock()
	defer f.mu.Unlock()
	next := slices.DeleteFunc(slices.Clone(*f.images.Load()), func(o *Image) bool { return o == m })
	f.images.Store(&next)
}

// Pass lets go what overwrites only settled chunks.
func (f *Filter) Pass(r *stack.Request) bool {
	if !r.Writes() {
		return true
	}
	for _, m := range *f.images.Load() {
		if !m.minds(r.Range) {
			continue
		}
		return false
	}
	return true
}

// Handle settles what a write is about to change, then passes it on.
func (f *Filter) Handle(r *stack.Request, next stack.Next) error {
	if r.Writes() {
		for _, m := range *f.images.Load() {
			m.settleAll(r.Range, next)
		}
	}
	return next.Do(r)
}

// Spoil spoils every image.
func (f *Filter) Spoil(cause error) string {
	images := *f.images.Load()
	for _, m := range images {
		m.Spoil(cause)
	}
	if len(images) == 0 {
		return "nothing: no snapshot was held"
	}
	return "every snapshot that is held of the device"
}

// Detach spoils the images, unless the device ends in order: what they do not
// hold themselves they could not read any more, or not right.
func (f *Filter) Detach(why stack.Reason) {
	if why == stack.Removed {
		return
	}
	for _, m := range *f.images.Load() {
		m.Spoil(stack.ErrExpelled)
	}
}

// bits is a set of chunks that only grows; all may use it at once.
type bits []atomic.Uint64

func newBits(n int64) bits { return make(bits, (n+63)/64) }

func (b bits) has(i int64) bool { return b[i/64].Load()>>(i%64)&1 != 0 }

func (b bits) set(i int64) { b[i/64].Or(1 << (i % 64)) }

// all says whether the chunks from first to last are in the set.
func (b bits) all(first, last int64) bool {
	for i := first; i <= last; {
		mask := ^uint64(0) << (i % 64)
		end := i | 63
		if end > last {
			mask &= ^uint64(0) >> (63 - last%64)
		}
		if b[i/64].Load()&mask != mask {
			return false
		}
		i = end + 1
	}
	return true
}

// chunks gives the first and the last chunk of a range.
func chunks(r block.Range, size int64) (first, last int64) {
	return r.Off / size, (r.End() - 1) / size
}
