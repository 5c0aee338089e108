// Package track is the filter that keeps a device's change map: every request
// that may change content is marked before it goes on. It handles nothing, waits
// for nothing and allocates nothing.
package track

import (
	"fmt"

	"tidemark/internal/cbt"
	"tidemark/internal/stack"
)

// Name and Altitude are where the filter belongs: below cow, so that what is
// written to difference storage on the device itself is marked too.
const (
	Name     = "track"
	Altitude = 200
)

// Filter marks one device's map.
type Filter struct{ changes *cbt.Map }

var (
	_ stack.Sieve   = (*Filter)(nil)
	_ stack.Inline  = (*Filter)(nil)
	_ stack.Resizer = (*Filter)(nil)
)

// Driver gives the filter for a device whose map the caller has, which must be of
// the device's size. When the filter leaves a device that lives on, or fails, the
// map is blind: its generation ends, and it claims nothing about what is written
// from then on. Who attaches the filter again calls the map's Sighted after that.
func Driver(changes *cbt.Map) stack.Driver {
	return stack.DriverFunc(func(below *stack.Below) (stack.Filter, error) {
		if size := changes.Writing().Size; size != below.Size() {
			return nil, fmt.Errorf("the change map is of %d bytes, the device of %d", size, below.Size())
		}
		return &Filter{changes}, nil
	})
}

// Pass marks what changes; everything goes on.
func (f *Filter) Pass(r *stack.Request) bool {
	if r.Writes() {
		f.changes.Mark(r.Range)
	}
	return true
}

// Handle is never needed.
func (f *Filter) Handle(r *stack.Request, next stack.Next) error { return next.Do(r) }

// Inline says that nothing waits here.
func (f *Filter) Inline() {}

// Resized begins a new generation.
func (f *Filter) Resized(size int64) { f.changes.Resize(size) }

// Spoil ends the generation.
func (f *Filter) Spoil(error) string {
	f.changes.Blind()
	return "the change map's generation: the next backup is a full copy"
}

// Detach ends the generation unless the device ends in order.
func (f *Filter) Detach(why stack.Reason) {
	if why == stack.Detached || why == stack.Surprise { // Spoil has said it of a filter that is lost
		f.changes.Blind()
	}
}
