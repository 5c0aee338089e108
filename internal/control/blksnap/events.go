package blksnap

import (
	"context"
	"errors"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/abi/blksnap"
)

// waitEvent gives each event to one waiter. The time is in milliseconds (the
// module takes the number for jiffies). A snapshot that ends wakes its waiters.
func (s *Server) waitEvent(ctx context.Context, arg uint64, m memory) error {
	var in blksnap.Event
	if err := get(m, arg, &in, syscall.EINVAL); err != nil {
		return err
	}
	if err := put(m, arg, in, syscall.EINVAL); err != nil { // while no event is lost by it
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, time.Duration(in.TimeoutMs)*time.Millisecond, syscall.ENOENT)
	defer cancel()
	e, err := s.next(ctx, in.ID)
	if err != nil {
		return to(err, nil)
	}
	out := blksnap.Event{ID: in.ID, TimeoutMs: in.TimeoutMs, Code: e.Code, Time: monotonic(e.Time)}
	switch e.Code {
	case blksnap.EventLowFreeSpace:
		copy(out.Data[:], blksnap.Bytes(blksnap.LowFreeSpace{Sectors: uint64(e.Bytes / blksnap.Sector)}))
	case blksnap.EventCorrupted:
		copy(out.Data[:], blksnap.Bytes(blksnap.Corrupted{Original: e.Original, Error: int32(e.Errno)}))
	}
	return put(m, arg, out, syscall.EINVAL)
}

// next takes the next event of a snapshot. Its first is that storage is wanted:
// clients append what that says, before they take the snapshot.
func (s *Server) next(ctx context.Context, id blksnap.ID) (Event, error) {
	s.mu.Lock()
	made := s.made[id]
	first := made != nil && !made.asked
	if first {
		made.asked = true
	}
	s.mu.Unlock()
	if first {
		return Event{Code: blksnap.EventLowFreeSpace, Time: made.at, Bytes: minimum}, nil
	}
	if gone := s.ended(id); gone != nil {
		select {
		case <-gone:
			return Event{}, ErrNoSnapshot
		case <-ctx.Done():
			return Event{}, context.Cause(ctx)
		}
	}
	for {
		s.mu.Lock()
		after := s.read[id]
		s.mu.Unlock()
		e, err := s.system.Event(ctx, id, after)
		if errors.Is(err, ErrNoSnapshot) {
			return e, err
		}
		if ctx.Err() != nil && err != nil {
			return e, context.Cause(ctx)
		}
		if err != nil {
			return e, err
		}
		s.mu.Lock()
		mine := s.read[id] < e.Sequence
		if mine {
			s.read[id] = e.Sequence
		}
		if made != nil && e.Code == blksnap.EventLowFreeSpace && !e.Time.After(made.at) {
			mine = false // that was asked for when it was made
		}
		s.mu.Unlock()
		if mine { // otherwise another waiter has it
			return e, nil
		}
	}
}

// monotonic is what CLOCK_MONOTONIC said at a time.
func monotonic(at time.Time) int64 {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) != nil {
		return 0
	}
	return ts.Nano() - int64(time.Since(at))
}
