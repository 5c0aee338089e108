// Package example is the filter of docs/filters.md: it keeps the first sector of
// every device from being written.
package example

import (
	"fmt"
	"sync/atomic"

	"tidemark/internal/block"
	"tidemark/internal/stack"
)

// Guard is the filter over one device.
type Guard struct {
	below   *stack.Below
	refused atomic.Int64
}

// Attach is asked about each device. It may look at it first.
func Attach(below *stack.Below) (stack.Filter, error) {
	var sector [512]byte
	if _, err := below.ReadAt(sector[:], 0); err != nil {
		return nil, fmt.Errorf("the first sector cannot be read: %w", err)
	}
	if sector == [512]byte{} {
		return nil, nil // nothing there to guard: not this device
	}
	return &Guard{below: below}, nil
}

// Pass lets everything else go at a glance: it costs no more than this.
func (g *Guard) Pass(r *stack.Request) bool {
	return !r.Writes() || !r.Range.Overlaps(block.Range{Len: 512})
}

// Handle refuses a change of the first sector.
func (g *Guard) Handle(r *stack.Request, next stack.Next) error {
	g.refused.Add(1)
	return fmt.Errorf("%s %s of %s: the first sector is guarded: %w", r.Op, r.Range, g.below.Device(), block.ErrReadOnly)
}

// Spoil says what is lost with the filter.
func (g *Guard) Spoil(error) string { return "the guard of the first sector of " + g.below.Device() }

// Detach has nothing to let go of.
func (g *Guard) Detach(stack.Reason) {}
