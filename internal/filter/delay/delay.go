// Package delay is a filter for tests: requests wait before they go on.
package delay

import (
	"time"

	"tidemark/internal/stack"
)

// Driver gives a filter that holds each request for what wait says, on every device.
func Driver(wait func(r *stack.Request) time.Duration) stack.Driver {
	return stack.DriverFunc(func(below *stack.Below) (stack.Filter, error) {
		return &filter{below, wait}, nil
	})
}

type filter struct {
	below *stack.Below
	wait  func(r *stack.Request) time.Duration
}

// Handle holds a request, but not longer than the filter is in the stack.
func (f *filter) Handle(r *stack.Request, next stack.Next) error {
	if d := f.wait(r); d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-t.C:
		case <-f.below.Gone():
		}
	}
	return next.Do(r)
}

func (f *filter) Spoil(error) string  { return "nothing" }
func (f *filter) Detach(stack.Reason) {}
