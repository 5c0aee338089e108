package involflt

import (
	"context"
	"slices"
	"sync"
	"syscall"
	"time"

	"tidemark/internal/abi/involflt"
)

// point is the consistency point that is being made: there is one at a time.
//
//	        FREEZE            TAG
//	none ───────────▶ frozen ──────▶ frozen, tagged ──THAW──▶ tagged ──TAG_COMMIT──▶ none
//	 │    CREATE_BARRIER      TAG                             ▲
//	 ├──────────────▶ held ────────▶ held, tagged ──REMOVE────┤
//	 └──────────────────────────TAG───────────────────────────┘
//
// THAW and REMOVE_BARRIER without a tag lead back to none. Each state has its
// time; when one is over, all is thawed, let go and revoked (dissolve). Only
// those who are in the Server's gate change it.
type point struct {
	guid    involflt.GUID
	epoch   uint64 // of this point; timers of others do nothing
	frozen  map[string]func() error
	release func() error // of the barrier
	tagged  *tagged
	broken  bool // a freeze did not hold

	thawTimer, barrierTimer, verdictTimer *time.Timer

	mu   sync.Mutex
	down chan struct{} // not nil while there is a barrier; closed when it is gone
}

// tagged is a mark that waits for its verdict, and the disks that it is in.
type tagged struct {
	marked Marked
	disks  []*disk
	lost   []uint64 // how often each had lost its blocks by then
}

const (
	endMax      = 10 * time.Second // for ending a point
	verdictTime = time.Minute      // where a client names no time for it
)

func (p *point) none() bool { return len(p.frozen) == 0 && p.release == nil && p.tagged == nil }

// held says whether there is a barrier.
func (s *Server) held() bool {
	s.point.mu.Lock()
	defer s.point.mu.Unlock()
	return s.point.down != nil
}

// enterQuiet enters the gate when no barrier is up: the disks stay as they are under one.
func (s *Server) enterQuiet(ctx context.Context) error {
	for {
		if err := s.gate.enter(ctx); err != nil {
			return err
		}
		s.point.mu.Lock()
		down := s.point.down
		s.point.mu.Unlock()
		if down == nil {
			return nil
		}
		s.gate.leave()
		select {
		case <-down:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// begin makes a point of a name. Called within the gate.
func (s *Server) begin(guid involflt.GUID) {
	p := &s.point
	p.epoch++
	p.guid, p.frozen, p.release, p.tagged, p.broken = guid, map[string]func() error{}, nil, nil, false
}

// after dissolves the point when a time is over, if it is still that point.
func (s *Server) after(d time.Duration, what string) *time.Timer {
	epoch := s.point.epoch
	return time.AfterFunc(d, func() {
		if s.gate.enter(context.Background()) != nil {
			return
		}
		defer s.gate.leave()
		if s.point.epoch == epoch && !s.point.none() {
			s.dissolve(what)
		}
	})
}

// dissolve ends the point: its tags are revoked. Called within the gate.
func (s *Server) dissolve(why string) {
	p := &s.point
	if p.none() {
		return
	}
	s.trouble("a consistency point is given up", "why", why)
	ctx, cancel := context.WithTimeout(context.Background(), endMax)
	defer cancel()
	for device, thaw := range p.frozen {
		if err := thaw(); err != nil {
			s.trouble("thawing", "device", device, "error", err)
		}
	}
	_ = s.letGo() // it is given up, whether it held or not
	if t := p.tagged; t != nil {
		if err := t.marked.Revoke(ctx); err != nil {
			s.trouble("revoking a mark", "error", err)
		}
		for _, d := range t.disks {
			d.counted(func(c *counters) { c.TagsLost++ })
			d.wake()
		}
	}
	s.over()
}

// over leaves no point. Called within the gate.
func (s *Server) over() {
	p := &s.point
	for _, t := range []*time.Timer{p.thawTimer, p.barrierTimer, p.verdictTimer} {
		if t != nil {
			t.Stop()
		}
	}
	p.thawTimer, p.barrierTimer, p.verdictTimer = nil, nil, nil
	p.epoch++
	p.frozen, p.tagged = nil, nil
}

// letGo takes the barrier away. Its error says that it did not hold until now.
func (s *Server) letGo() error {
	p := &s.point
	if p.release == nil {
		return nil
	}
	err := p.release()
	p.release = nil
	p.mu.Lock()
	defer p.mu.Unlock()
	close(p.down)
	p.down = nil
	return err
}

// volumes reads a list of them.
func volumes(m memory, addr uint64, count int32) ([]involflt.VolumeInfo, error) {
	if count <= 0 || count > volumesMax {
		return nil, syscall.EINVAL
	}
	v := make([]involflt.VolumeInfo, count)
	if err := get(m, addr, v); err != nil {
		return nil, err
	}
	for i := range v {
		v[i].Status = 0
	}
	return v, put(m, addr, v) // what cannot be answered is not begun
}

// freeze freezes the file systems of a list; those that it could stay frozen if others could not.
func (s *Server) freeze(ctx context.Context, arg uint64, m memory) error {
	var in involflt.Freeze
	if err := get(m, arg, &in); err != nil {
		return err
	}
	if in.Timeout < 1 || in.Timeout > involflt.TimeoutMax {
		return syscall.EINVAL
	}
	list, err := volumes(m, in.Array, in.Volumes)
	if err != nil {
		return err
	}
	if err := s.gate.enter(ctx); err != nil {
		return err
	}
	defer s.gate.leave()
	p, fresh := &s.point, s.point.none()
	switch {
	case fresh:
		s.begin(in.GUID)
	case p.release != nil, len(p.frozen) == 0, p.tagged != nil:
		return syscall.EAGAIN
	case p.guid != in.GUID:
		return syscall.EINVAL
	}
	until := time.Now().Add(time.Duration(in.Timeout) * time.Millisecond)
	if fresh {
		p.thawTimer = s.after(time.Until(until), "it was frozen too long")
	}
	var failed error
	for i := range list {
		if err := s.freezeOne(ctx, &list[i], until); err != nil {
			list[i].Status, failed = involflt.StatusFailed, syscall.EPERM
		}
	}
	if p.none() {
		s.over()
	}
	if err := put(m, in.Array, list); err != nil {
		return err
	}
	return failed
}

func (s *Server) freezeOne(ctx context.Context, v *involflt.VolumeInfo, until time.Time) error {
	device, ok := v.Device.String()
	if !ok || s.point.frozen[device] != nil {
		return ErrFrozen
	}
	thaw, err := s.system.Freeze(ctx, device, until)
	if err != nil {
		s.trouble("freezing", "device", device, "error", err)
		return err
	}
	s.point.frozen[device] = thaw
	return nil
}

func (s *Server) thaw(ctx context.Context, arg uint64, m memory) error {
	var in involflt.Thaw
	if err := get(m, arg, &in); err != nil {
		return err
	}
	list, err := volumes(m, in.Array, in.Volumes)
	if err != nil {
		return err
	}
	if err := s.gate.enter(ctx); err != nil {
		return err
	}
	defer s.gate.leave()
	p := &s.point
	if len(p.frozen) == 0 || p.guid != in.GUID {
		return syscall.EINVAL
	}
	var failed error
	for i := range list {
		device, _ := list[i].Device.String()
		thaw := p.frozen[device]
		delete(p.frozen, device)
		if thaw == nil {
			list[i].Status, failed = involflt.StatusFailed, syscall.EPERM
		} else if err := thaw(); err != nil {
			s.trouble("a freeze did not hold", "device", device, "error", err)
			list[i].Status, failed, p.broken = involflt.StatusFailed, syscall.EPERM, true
		}
	}
	if len(p.frozen) == 0 && p.thawTimer != nil {
		p.thawTimer.Stop()
		p.thawTimer = nil
	}
	if p.none() {
		s.over()
	}
	if err := put(m, in.Array, list); err != nil {
		return err
	}
	return failed
}

func (s *Server) createBarrier(ctx context.Context, arg uint64, m memory) error {
	var in involflt.Barrier
	if err := get(m, arg, &in); err != nil {
		return err
	}
	if in.Timeout < 1 || in.Timeout > involflt.BarrierMax {
		return syscall.EINVAL
	}
	if err := s.gate.enter(ctx); err != nil {
		return err
	}
	defer s.gate.leave()
	disks := s.all()
	switch {
	case !s.point.none():
		return syscall.EAGAIN
	case len(disks) == 0:
		return syscall.ENODEV
	case slices.ContainsFunc(disks, func(d *disk) bool { return !d.inOrder() }):
		return syscall.EPERM
	}
	until := time.Now().Add(time.Duration(in.Timeout) * time.Millisecond)
	within, cancel := context.WithDeadline(ctx, until)
	defer cancel()
	release, err := s.system.Hold(within, until)
	if err != nil {
		s.trouble("no barrier", "error", err)
		return syscall.EAGAIN
	}
	s.begin(in.GUID)
	p := &s.point
	p.mu.Lock()
	p.down = make(chan struct{})
	p.mu.Unlock()
	p.release = release
	p.barrierTimer = s.after(time.Until(until), "the barrier was up too long")
	return nil
}

func (s *Server) removeBarrier(ctx context.Context, arg uint64, m memory) error {
	var in involflt.BarrierEnd
	if err := get(m, arg, &in); err != nil {
		return err
	}
	if err := s.gate.enter(ctx); err != nil {
		return err
	}
	defer s.gate.leave()
	p := &s.point
	if p.release == nil || p.guid != in.GUID {
		return syscall.EINVAL
	}
	if err := s.letGo(); err != nil { // its time was just over, say
		s.trouble("a barrier did not hold", "error", err)
		s.dissolve("the barrier did not hold")
		s.over()
		return syscall.EINVAL
	}
	p.barrierTimer.Stop()
	p.barrierTimer = nil
	if p.none() {
		s.over()
	}
	return nil
}

// inOrder says whether a mark that is made now has a place in the order of writes.
func (d *disk) inOrder() bool { return d.queue.State().Order == involflt.OrderData }
