package involflt

import (
	"context"
	"syscall"
	"time"

	"tidemark/internal/abi/involflt"
)

// wake ends the waits that are under way on a disk, whatever is pending.
func (d *disk) wake() {
	d.mu.Lock()
	defer d.mu.Unlock()
	close(d.woken)
	d.woken = make(chan struct{})
}

func (s *Server) wakeAll() {
	for _, d := range s.all() {
		d.wake()
	}
}

// wait is for the descriptor's own disk.
func (f *file) wait(ctx context.Context, arg uint64, m memory) error {
	var in involflt.Wait
	if err := get(m, arg, &in); err != nil {
		return err
	}
	d, err := f.ours()
	if err != nil {
		return err
	}
	if name, _ := in.Device.String(); name != d.device && !f.s.system.Same(name, d.device) {
		return syscall.EINVAL
	}
	return d.wait(ctx, in.Seconds)
}

func (s *Server) waitByName(ctx context.Context, arg uint64, m memory) error {
	var in involflt.Wait
	if err := get(m, arg, &in); err != nil {
		return err
	}
	name, _ := in.Device.String()
	d := s.find(name)
	if d == nil {
		return syscall.EINVAL
	}
	return d.wait(ctx, in.Seconds)
}

// wait ends when enough is pending, with a wake, with the time or with a signal;
// then it only counts whether anything is pending.
func (d *disk) wait(ctx context.Context, seconds int32) error {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(max(seconds, 0))*time.Second)
	defer cancel()
	d.mu.Lock()
	woken := d.woken
	d.mu.Unlock()
	enough := make(chan error, 1)
	go func() { enough <- d.queue.Wait(ctx, involflt.NotifyBytes) }()
	var err error
	select {
	case err = <-enough:
	case <-woken:
		cancel()
		<-enough
	}
	if err != nil && ctx.Err() == nil && d.busy.enter(ctx) == nil { // the queue has come to an end: it may just be stopped
		d.busy.leave()
	}
	switch {
	case d.stopped.Load():
		return syscall.EBUSY
	case err == nil && ctx.Err() == nil:
		return nil
	case d.any(ctx):
		return nil
	case err != nil && ctx.Err() == nil: // the queue has come to an end
		return err
	}
	return syscall.ETIMEDOUT
}

// anyMax bounds the look whether anything is pending, when the time of a wait is over.
const anyMax = time.Second

func (d *disk) any(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), anyMax)
	defer cancel()
	p, _ := d.queue.Pending(ctx) // what could not be counted is behind what could
	return p.Any
}

func (s *Server) threshold(arg uint64, m memory) error {
	d, err := s.named(arg, m)
	if err != nil {
		return err
	}
	if d == nil {
		return syscall.ENODEV
	}
	var in involflt.Threshold
	if err := get(m, arg, &in); err != nil {
		return err
	}
	in.Bytes = involflt.NotifyBytes
	return put(m, arg, in)
}

// resync gives the stamps between which a client compares its copy with the
// disk. What is drained after the first one, and everything that may not have
// reached the disk when the client begins to read, is later than the first; what
// the client can have read is not later than the second.
func (s *Server) resync(ctx context.Context, cmd uint32, arg uint64, m memory) error {
	d, err := s.named(arg, m)
	if err != nil {
		return err
	}
	if d == nil {
		return syscall.ENODEV
	}
	var in involflt.Resync
	if err := get(m, arg, &in); err != nil {
		return err
	}
	if cmd == involflt.ResyncEnd {
		in.Time, in.Sequence = stampOf(time.Now()), d.queue.State().Known.Sequence
		return put(m, arg, in)
	}
	if err := d.enter(ctx); err != nil {
		return err
	}
	at := d.prev
	d.busy.leave()
	if err := d.queue.Settle(ctx); err != nil { // what was drained is on the disk now
		return err
	}
	in.Time, in.Sequence = at.Time, at.Sequence
	return put(m, arg, in)
}

// stampOf is a time as the interface counts it.
func stampOf(t time.Time) uint64 { return uint64(t.UnixNano()) / 100 }
