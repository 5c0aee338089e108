package stack

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/health"
)

// Config bounds what a filter may take. Zero values mean the defaults.
type Config struct {
	Report time.Duration // after which a request that a filter keeps is reported; 5 s
	Stall  time.Duration // after which the filter is taken out; 30 s
	Answer time.Duration // for a filter to answer Attach, Detach and Spoil; 10 s
}

// System is the registered filters and the devices that they are over. All
// methods may be called concurrently, but not from a filter.
type System struct {
	cfg    Config
	health *health.Set
	clock  atomic.Int64 // the watchdog's, in nanoseconds, from 1
	cancel context.CancelFunc
	done   chan struct{}

	order   sync.Mutex // one arrival, removal or registration at a time
	mu      sync.Mutex // of the maps
	drivers map[string]registered
	stacks  map[string]*Stack
}

type registered struct {
	name     string
	altitude int
	driver   Driver
}

// New gives a system without filters and devices; Close ends its watchdog.
func New(cfg Config, set *health.Set) *System {
	cfg.Report = cmp.Or(cfg.Report, 5*time.Second)
	cfg.Stall = cmp.Or(cfg.Stall, 30*time.Second)
	cfg.Answer = cmp.Or(cfg.Answer, 10*time.Second)
	ctx, cancel := context.WithCancel(context.Background())
	y := &System{cfg: cfg, health: set, cancel: cancel, done: make(chan struct{}), drivers: map[string]registered{}, stacks: map[string]*Stack{}}
	y.clock.Store(1)
	go y.watch(ctx)
	return y
}

// Close removes every device, in order, and ends the watchdog.
func (y *System) Close() error {
	var errs []error
	for _, s := range y.Stacks() {
		errs = append(errs, y.Remove(s.name))
	}
	y.cancel()
	<-y.done
	return errors.Join(errs...)
}

// Register makes a filter known: it is asked about every device there is and
// every one that comes. Devices on which it fails are named by the error and go
// on without it.
func (y *System) Register(name string, altitude int, d Driver) error {
	y.order.Lock()
	defer y.order.Unlock()
	y.mu.Lock()
	for _, o := range y.drivers {
		if o.name == name || o.altitude == altitude {
			y.mu.Unlock()
			return fmt.Errorf("filter %s is registered at altitude %d: %w", o.name, o.altitude, ErrExists)
		}
	}
	y.drivers[name] = registered{name, altitude, d}
	y.mu.Unlock()
	var errs []error
	for _, s := range y.Stacks() {
		_, err := s.Attach(name, altitude, d)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Unregister takes a filter off every device and forgets it.
func (y *System) Unregister(name string) error {
	y.order.Lock()
	defer y.order.Unlock()
	y.mu.Lock()
	_, ok := y.drivers[name]
	delete(y.drivers, name)
	y.mu.Unlock()
	if !ok {
		return fmt.Errorf("filter %s: %w", name, ErrNoSuch)
	}
	var errs []error
	for _, s := range y.Stacks() {
		if err := s.Detach(name); !errors.Is(err, ErrNoSuch) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Add puts a device under the registered filters: they are asked one after the
// other, the lowest first, before the stack takes a request. A filter that fails
// at that is reported and left out.
func (y *System) Add(name string, dev block.Device) (*Stack, error) {
	y.order.Lock()
	defer y.order.Unlock()
	y.mu.Lock()
	_, taken := y.stacks[name]
	drivers := slices.SortedFunc(maps.Values(y.drivers), func(a, b registered) int { return cmp.Compare(a.altitude, b.altitude) })
	y.mu.Unlock()
	if taken {
		return nil, fmt.Errorf("device %s: %w", name, ErrExists)
	}
	s := newStack(name, dev, y)
	for _, d := range drivers {
		if _, err := s.Attach(d.name, d.altitude, d.driver); err != nil {
			y.health.Raise(health.Condition{Code: "filter-not-attached", Severity: health.Error, Subject: name + "/" + d.name,
				Detail: fmt.Sprintf("The new device %s is served without the filter %s: %v.", name, d.name, err),
				Remedy: "Mend the reason and start the daemon again: it attaches the filters anew."})
		}
	}
	y.mu.Lock()
	y.stacks[name] = s
	y.mu.Unlock()
	return s, nil
}

// take takes a device out of the list; nil: it is not there.
func (y *System) take(name string) *Stack {
	y.mu.Lock()
	defer y.mu.Unlock()
	s := y.stacks[name]
	delete(y.stacks, name)
	return s
}

// Remove ends a device in order: no request enters any more, those under way end,
// and the filters are detached from the highest down, each with everything below
// it at work.
func (y *System) Remove(name string) error {
	y.order.Lock()
	defer y.order.Unlock()
	s := y.take(name)
	if s == nil {
		return fmt.Errorf("device %s: %w", name, ErrNoSuch)
	}
	s.closed.Store(true)
	s.edit.Lock()
	defer s.edit.Unlock()
	var errs []error
	for _, a := range s.chain.Load().steps {
		errs = append(errs, s.detach(a, Removed))
	}
	s.mu.Lock()
	last := s.swap(func([]*attachment) []*attachment { return nil })
	s.mu.Unlock()
	errs = append(errs, s.drain([]*chain{last}))
	s.dead.Store(true)
	y.forget(s)
	return errors.Join(errs...)
}

// Surprise ends a device that is gone: everything fails from now on, and the
// filters are told from the lowest up, so that requests held higher fail quickly
// when they are let go.
func (y *System) Surprise(name string) error {
	s := y.take(name)
	if s == nil {
		return fmt.Errorf("device %s: %w", name, ErrNoSuch)
	}
	s.closed.Store(true)
	s.dead.Store(true)
	s.edit.Lock()
	defer s.edit.Unlock()
	var errs []error
	for _, a := range slices.Backward(s.chain.Load().steps) {
		errs = append(errs, s.detach(a, Surprise))
	}
	y.forget(s)
	return errors.Join(errs...)
}

// forget clears what was said of a device's filters: it is gone, and they with it.
func (y *System) forget(s *Stack) {
	for _, c := range y.health.List() {
		if strings.HasPrefix(c.Subject, s.name+"/") && slices.Contains([]string{"filter-slow", "filter-lost", "filter-not-attached"}, c.Code) {
			y.health.Clear(c.Code, c.Subject)
		}
	}
}

// Stack gives a device by name; nil: it is not there.
func (y *System) Stack(name string) *Stack {
	y.mu.Lock()
	defer y.mu.Unlock()
	return y.stacks[name]
}

// Stacks lists the devices by name.
func (y *System) Stacks() []*Stack {
	y.mu.Lock()
	defer y.mu.Unlock()
	return slices.SortedFunc(maps.Values(y.stacks), func(a, b *Stack) int { return cmp.Compare(a.name, b.name) })
}

// watch is the watchdog: it moves the clock and looks at what filters keep. It
// ends with ctx.
func (y *System) watch(ctx context.Context) {
	defer close(y.done)
	start := time.Now()
	t := time.NewTicker(max(y.cfg.Report/8, time.Millisecond))
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		now := time.Since(start).Nanoseconds() + 1
		y.clock.Store(now)
		for _, s := range y.Stacks() {
			s.inspect(now)
		}
	}
}

// inspect reports the filters that keep a request for long, and takes those out
// that stall.
func (s *Stack) inspect(now int64) {
	slow := map[*attachment]time.Duration{}
	s.mu.Lock()
	live := s.frames[:0]
	for _, w := range s.frames {
		f := w.Value()
		if f == nil {
			continue
		}
		live = append(live, w)
		since, a := f.since.Load(), f.owner.Load()
		if since != 0 && a != nil && !a.out.Load() {
			slow[a] = max(slow[a], time.Duration(now-since))
		}
	}
	clear(s.frames[len(live):])
	s.frames = live
	s.mu.Unlock()
	for a, held := range slow {
		switch {
		case held >= s.system.cfg.Stall:
			go s.expel(a, fmt.Errorf("it keeps a request for %v: %w", held.Round(time.Second), ErrStalled))
		case held >= s.system.cfg.Report:
			a.slow.Store(true)
			s.system.health.Raise(health.Condition{Code: "filter-slow", Severity: health.Warning, Subject: a.subject(),
				Detail: fmt.Sprintf("The filter %s on %s keeps a request for %v. It is taken out after %v.", a.name, s.name, held.Round(time.Second), s.system.cfg.Stall),
				Remedy: "See what it waits for. It is taken out by itself, and the device goes on without it."})
		}
	}
	for _, a := range s.chain.Load().steps {
		if slow[a] < s.system.cfg.Report && a.slow.Swap(false) {
			s.system.health.Clear("filter-slow", a.subject())
		}
	}
}
