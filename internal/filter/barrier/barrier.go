// Package barrier is the filter that holds writes for a moment, so that several
// devices have one instant: when it is up, every write that entered before has
// ended and none that came later has begun. Reads and flushes go on.
//
// It is the highest filter of a stack. What a device's own filters write, below
// it, goes on too.
package barrier

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"tidemark/internal/stack"
)

// Name and Altitude are where the filter belongs.
const (
	Name     = "barrier"
	Altitude = 400
)

// Errors that callers branch on.
var (
	ErrUp      = errors.New("a barrier is up already")
	ErrExpired = errors.New("the barrier was held too long, and writes went on")
	ErrLost    = errors.New("the barrier's filter is no longer in the stack")
)

// Filter is the barrier of one device.
type Filter struct {
	below *stack.Below
	in    [stack.Lanes]lane
	gate  atomic.Pointer[gate]
	lost  atomic.Bool
}

type lane struct {
	n atomic.Int64
	_ [56]byte
}

// gate is one time that writes are held.
type gate struct {
	open chan struct{} // closed when they go on
	left chan struct{} // a write ended; room for one
	once sync.Once
}

var (
	_ stack.Sieve  = (*Filter)(nil)
	_ stack.Inline = (*Filter)(nil)
)

// Driver gives the filter, and hands it to made as well.
func Driver(made func(f *Filter)) stack.Driver {
	return stack.DriverFunc(func(below *stack.Below) (stack.Filter, error) {
		f := &Filter{below: below}
		made(f)
		return f, nil
	})
}

// Pass lets go what changes nothing.
func (f *Filter) Pass(r *stack.Request) bool { return !r.Writes() }

// Blind says that a write is held whatever it writes.
func (f *Filter) Blind() {}

// Inline says that Handle waits for no longer than until its Below.Gone.
func (f *Filter) Inline() {}

// Handle counts a write, or has it wait while the barrier is up.
func (f *Filter) Handle(r *stack.Request, next stack.Next) error {
	n := &f.in[r.Lane()].n
	for {
		n.Add(1)
		g := f.gate.Load()
		if g == nil {
			break
		}
		f.leave(n)
		select {
		case <-g.open:
			f.gate.CompareAndSwap(g, nil) // it may have opened by itself
		case <-f.below.Gone(): // nothing holds it any more
			return next.Do(r)
		}
	}
	err := next.Do(r)
	f.leave(n)
	return err
}

func (f *Filter) leave(n *atomic.Int64) {
	n.Add(-1)
	if g := f.gate.Load(); g != nil {
		select {
		case g.left <- struct{}{}:
		default:
		}
	}
}

func (f *Filter) empty() bool {
	for i := range f.in {
		if f.in[i].n.Load() != 0 {
			return false
		}
	}
	return true
}

// Spoil lets go what is held; whoever has the barrier up hears of it.
func (f *Filter) Spoil(error) string {
	f.Detach(stack.Lost)
	return "the snapshot or mark that is being taken, and those to come"
}

// Detach lets go what is held.
func (f *Filter) Detach(stack.Reason) {
	f.lost.Store(true)
	if g := f.gate.Load(); g != nil {
		g.pull()
	}
}

func (g *gate) pull() { g.once.Do(func() { close(g.open) }) }

// Barrier is up over some devices, until Release or its bound.
type Barrier struct {
	filters []*Filter
	gate    *gate
	timer   *time.Timer
	expired atomic.Bool
}

// Raise holds the writes of all the devices and returns when those under way
// have ended. Where that takes until ctx ends, or a barrier is up over one of
// them, nothing is held. After max, counted from the call, writes go on whether
// Release was called or not.
func Raise(ctx context.Context, max time.Duration, filters ...*Filter) (*Barrier, error) {
	b := &Barrier{gate: &gate{open: make(chan struct{}), left: make(chan struct{}, 1)}}
	b.timer = time.AfterFunc(max, func() {
		b.expired.Store(true)
		b.gate.pull()
	})
	for _, f := range filters { // all of them before any is waited for: one instant
		if !f.gate.CompareAndSwap(nil, b.gate) {
			return nil, errors.Join(fmt.Errorf("%s: %w", f.below.Device(), ErrUp), b.undo())
		}
		b.filters = append(b.filters, f)
	}
	for _, f := range filters {
		for !f.empty() {
			select {
			case <-b.gate.left:
			case <-b.gate.open:
				return nil, fmt.Errorf("writes of %s do not end: %w", f.below.Device(), b.Release())
			case <-ctx.Done():
				return nil, errors.Join(fmt.Errorf("writes of %s do not end: %w", f.below.Device(), ctx.Err()), b.undo())
			}
		}
	}
	if err := b.Check(); err != nil {
		return nil, errors.Join(err, b.undo())
	}
	return b, nil
}

// undo releases a barrier that never was up as a whole.
func (b *Barrier) undo() error {
	_ = b.Release() // what it could say is that nothing was held
	return nil
}

// Check says whether writes are held still.
func (b *Barrier) Check() error {
	for _, f := range b.filters {
		if f.lost.Load() {
			return fmt.Errorf("%s: %w", f.below.Device(), ErrLost)
		}
	}
	if b.expired.Load() {
		return ErrExpired
	}
	return nil
}

// Release lets the writes go on. An error says that some went on before: what was
// done under the barrier is not of one instant.
func (b *Barrier) Release() error {
	b.timer.Stop()
	err := b.Check()
	for _, f := range b.filters {
		f.gate.CompareAndSwap(b.gate, nil)
	}
	b.gate.pull()
	return err
}
