package stack

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/health"
)

// attachment is one filter in its place in a stack.
type attachment struct {
	name     string
	altitude int
	stack    *Stack
	filter   Filter
	sieve    Sieve
	inline   bool
	blind    bool
	slow     atomic.Bool // reported by the watchdog

	end  sync.Once     // of its time in the stack
	out  atomic.Bool   // requests go past it
	gone chan struct{} // closed with out: nobody waits for it any more
}

// Below is what lies below one filter: a block.Device with every ability, for the
// filter's own requests at any time. They enter the stack as it is now, just below
// the filter's altitude. Reads and writes are whole or fail.
type Below struct{ a *attachment }

var (
	_ block.Device    = (*Below)(nil)
	_ block.Zeroer    = (*Below)(nil)
	_ block.Discarder = (*Below)(nil)
	_ block.FUAWriter = (*Below)(nil)
)

// Device is the name of the device that the filter is over.
func (b *Below) Device() string { return b.a.stack.name }

// Size is the device's, in bytes.
func (b *Below) Size() int64 { return b.a.stack.Size() }

// Gone is closed when the filter is out of the stack: who waits for something
// that only the filter's further work can bring stops waiting.
func (b *Below) Gone() <-chan struct{} { return b.a.gone }

// Fail takes the filter out, for a fault that it found by itself. It must not be
// called from Spoil.
func (b *Below) Fail(cause error) { b.a.stack.expel(b.a, cause) }

// Do sends one request of the filter's own.
func (b *Below) Do(r *Request) error {
	if b.a.out.Load() {
		return ErrExpelled
	}
	s := b.a.stack
	if r.Op != block.OpFlush {
		if err := block.CheckBounds(r.Range, s.dev.Size()); err != nil {
			return err
		}
	}
	c := s.calls.Get().(*call)
	c.req = *r
	ch := s.enter(c.shard)
	return s.send(c, ch, ch.below(b.a.altitude))
}

func (b *Below) at(op block.Op, p []byte, off int64, fua bool) (int, error) {
	r := Request{Op: op, FUA: fua, Range: block.Range{Off: off, Len: int64(len(p))}, Data: p}
	if err := b.Do(&r); err != nil {
		return 0, err
	}
	return len(p), nil
}

// ReadAt fills p.
func (b *Below) ReadAt(p []byte, off int64) (int, error) { return b.at(block.OpRead, p, off, false) }

// WriteAt writes all of p.
func (b *Below) WriteAt(p []byte, off int64) (int, error) { return b.at(block.OpWrite, p, off, false) }

// WriteFUA writes all of p and makes it stable.
func (b *Below) WriteFUA(p []byte, off int64) (int, error) { return b.at(block.OpWrite, p, off, true) }

// WriteZeroes makes a range read as zeroes.
func (b *Below) WriteZeroes(r block.Range) error { return b.Do(&Request{Op: block.OpZeroes, Range: r}) }

// Discard tells that a range's content no longer matters.
func (b *Below) Discard(r block.Range) error { return b.Do(&Request{Op: block.OpDiscard, Range: r}) }

// Flush makes stable what was written before.
func (b *Below) Flush() error { return b.Do(&Request{Op: block.OpFlush}) }

// bounded calls what a filter must answer, and waits for no longer than Config.Answer.
func (s *Stack) bounded(f func()) error {
	done := make(chan error, 1)
	go func() {
		defer func() {
			if v := recover(); v != nil {
				done <- panicked(v)
			}
		}()
		f()
		done <- nil
	}()
	t := time.NewTimer(s.system.cfg.Answer)
	defer t.Stop()
	select {
	case err := <-done:
		return err
	case <-t.C:
		return ErrStalled
	}
}

// Attach asks a driver for a filter and puts it into the stack. When it returns
// every request under way passes the filter. It says false where the driver does
// not want the device.
func (s *Stack) Attach(name string, altitude int, d Driver) (bool, error) {
	s.edit.Lock()
	defer s.edit.Unlock()
	a, err := s.ask(name, altitude, d)
	if a == nil || err != nil {
		return false, err
	}
	s.mu.Lock()
	old := s.swap(func(steps []*attachment) []*attachment {
		at := s.chain.Load().below(altitude)
		return slices.Insert(slices.Clone(steps), at, a)
	})
	older := slices.Clone(s.retired)
	s.mu.Unlock()
	if err := s.drain(append(older, old)); err != nil {
		err = fmt.Errorf("attaching filter %s to %s: requests from before do not end: %w", name, s.name, err)
		return false, errors.Join(err, s.detach(a, Detached))
	}
	return true, nil
}

// ask has a driver make its filter; nil: it does not want the device. s.edit is held.
func (s *Stack) ask(name string, altitude int, d Driver) (*attachment, error) {
	if s.closed.Load() {
		return nil, fmt.Errorf("device %s: %w", s.name, ErrGone)
	}
	for _, o := range s.chain.Load().steps {
		if o.name == name || o.altitude == altitude {
			return nil, fmt.Errorf("device %s has filter %s at altitude %d: %w", s.name, o.name, o.altitude, ErrExists)
		}
	}
	a := &attachment{name: name, altitude: altitude, stack: s, gone: make(chan struct{})}
	answer := make(chan Filter, 1)
	var failed error
	err := s.bounded(func() {
		f, err := d.Attach(&Below{a})
		failed = err
		answer <- f
	})
	if err == nil {
		a.filter = <-answer
		err = failed
	}
	if err != nil {
		a.leave()
		return nil, fmt.Errorf("filter %s on %s: %w", name, s.name, err)
	}
	if a.filter == nil {
		return nil, nil
	}
	a.sieve, _ = a.filter.(Sieve)
	_, a.inline = a.filter.(Inline)
	_, a.blind = a.filter.(Blind)
	return a, nil
}

// leave has everybody go past the filter.
func (a *attachment) leave() {
	a.out.Store(true)
	close(a.gone)
}

// drain returns when no request is left in any of the chains.
func (s *Stack) drain(chains []*chain) error {
	t := time.NewTimer(s.system.cfg.Stall)
	defer t.Stop()
	for _, c := range chains {
		select {
		case <-c.drained:
		case <-t.C:
			return ErrStalled
		}
	}
	return nil
}

// remove takes a filter out of the composition; requests in older ones still meet it.
func (s *Stack) remove(a *attachment) []*chain {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.Index(s.chain.Load().steps, a); i >= 0 {
		s.swap(func(steps []*attachment) []*attachment { return slices.Delete(slices.Clone(steps), i, i+1) })
	}
	return slices.Clone(s.retired)
}

// Detach takes a filter out of the live stack and returns when its Detach has. A
// filter whose requests do not end is taken out as one that stalls.
func (s *Stack) Detach(name string) error {
	s.edit.Lock()
	defer s.edit.Unlock()
	for _, a := range s.chain.Load().steps {
		if a.name == name {
			return s.detach(a, Detached)
		}
	}
	return fmt.Errorf("filter %s on %s: %w", name, s.name, ErrNoSuch)
}

// detach lets the requests in the filter end, unless the device is gone, and then
// tells it to let go. s.edit is held.
func (s *Stack) detach(a *attachment, why Reason) error {
	chains := s.remove(a)
	if why != Surprise {
		if err := s.drain(chains); err != nil {
			s.expel(a, fmt.Errorf("requests do not end while it is detached: %w", err))
			return fmt.Errorf("filter %s on %s was taken out: %w", a.name, s.name, err)
		}
	}
	var err error
	a.end.Do(func() {
		if err = s.bounded(func() { a.filter.Detach(why) }); err != nil {
			err = fmt.Errorf("filter %s on %s was told to let go: %w", a.name, s.name, err)
			s.report(a, err, "")
		}
		a.leave()
	})
	return err
}

// expel takes a filter out for its own fault: what its loss spoils is declared
// before anything goes past it. Whoever comes second waits for that.
func (s *Stack) expel(a *attachment, cause error) {
	a.end.Do(func() {
		spoiled := "it did not say in time what that spoils"
		said := make(chan string, 1)
		if err := s.bounded(func() { said <- a.filter.Spoil(cause) }); err == nil {
			spoiled = <-said
		}
		s.report(a, cause, spoiled)
		s.remove(a)
		a.leave()
		go func() {
			defer func() { _ = recover() }() // it has been reported already
			a.filter.Detach(Lost)
		}()
	})
}

func (s *Stack) report(a *attachment, cause error, spoiled string) {
	s.system.health.Clear("filter-slow", a.subject())
	s.system.health.Raise(health.Condition{Code: "filter-lost", Severity: health.Error, Subject: a.subject(),
		Detail: fmt.Sprintf("The filter %s was taken out of the stack of %s, which goes on without it. The reason: %v. What that spoils: %s.", a.name, s.name, cause, spoiled),
		Remedy: fmt.Sprintf("Attach it again: tidemark device filters %s --attach %s. What its loss spoiled has to be made anew.", s.name, a.name)})
}

func (a *attachment) subject() string { return a.stack.name + "/" + a.name }
