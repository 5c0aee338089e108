package serve

import (
	"context"
	"slices"
	"strings"
	"time"

	"tidemark/internal/disk"
)

// What the kernel does not tell of, the coming of a file for example, is looked
// for all the same, so often.
const (
	lookForArrivals = time.Second
	lookForTheRest  = 5 * time.Second
	// afterArrival is how long nothing is looked for after a device did not come
	// back: where udev runs, to open and close a disk is an event of its own.
	afterArrival = 250 * time.Millisecond
)

// hint is a wish to look, one at most.
type hint chan struct{}

func (h hint) give() {
	select {
	case h <- struct{}{}:
	default: // there is one
	}
}

// listen makes hints of what the kernel tells of block devices, until ctx ends.
func (s *Server) listen(ctx context.Context) {
	disk.Listen(ctx, func(e disk.Uevent) {
		if e.Name == "" || e.Resumed {
			s.resumed(e)
		}
		if e.Name == "" || e.Action == "remove" || strings.HasPrefix(e.Name, "dm-") {
			s.changed.give()
		}
		if e.Name == "" || e.Action == "add" || e.Action == "change" {
			s.arrived.give()
		}
	})
}

// watch looks at the spliced volumes, and at the disks behind devices, whenever
// the kernel tells of one, and every few seconds in case it does not.
func (s *Server) watch(ctx context.Context) {
	tick := time.NewTicker(s.every(lookForTheRest))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.changed:
		case <-tick.C:
		}
		s.checkBackings()
		if slices.ContainsFunc(s.list(), func(d *Device) bool { return d.now().spec.Splice != nil }) {
			s.checkSplices(ctx)
		}
	}
}

// watchLate brings back devices whose backing comes later than the daemon.
func (s *Server) watchLate(ctx context.Context) {
	tick := time.NewTicker(s.every(lookForArrivals))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.arrived:
		case <-tick.C:
		}
		if !slices.ContainsFunc(s.list(), func(d *Device) bool { return d.now().served == nil }) {
			continue
		}
		s.changes.Lock() // by whom a device is just being made or removed: the hint is not to be lost
		s.late(ctx)
		s.changes.Unlock()
		select {
		case <-ctx.Done():
		case <-time.After(afterArrival):
		}
	}
}

func (s *Server) every(d time.Duration) time.Duration {
	if s.env.Look > 0 {
		return s.env.Look
	}
	return d
}
