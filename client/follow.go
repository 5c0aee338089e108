package client

import (
	"context"
	"errors"
	"time"
)

// Follower is what keeps a copy. Its methods are called by one goroutine.
type Follower interface {
	// Apply puts a batch into the copy. The same batch may come again, with all
	// that followed it.
	Apply(b *Batch) error
	// Sync makes everything applied so far stable: it is committed after that.
	Sync() error
}

const (
	commitEvery = 64 << 20 // bytes of payload, while more is pending
	waitEach    = time.Minute
	retryFirst  = 50 * time.Millisecond
	retryMax    = 2 * time.Second
)

// Follow applies what the consumer gets until ctx ends or something fails that
// waiting does not mend: its error, or that of the follower. A daemon that goes
// away and comes back is waited for. While one batch is applied the next is
// fetched. A bookmark, the end of a fill and a pause are committed at once, and
// nothing is applied before: at a bookmark the copy is just what the source was
// then, also where it comes again.
func (c *Consumer) Follow(ctx context.Context, f Follower) error {
	s := following{c: c, f: f}
	retry := retryFirst
	for {
		err := s.step(ctx)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err == nil:
			retry = retryFirst
			continue
		case errors.Is(err, ErrNotGiven) && s.after != 0:
			s = following{c: c, f: f} // it was cleared, or a power cut made it forgotten: on from what is committed
			continue
		case !errors.Is(err, ErrUnreachable):
			return err
		}
		s.ahead = nil
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(retry):
		}
		retry = min(2*retry, retryMax)
	}
}

// following is the state of one Follow.
type following struct {
	c         *Consumer
	f         Follower
	after     uint64 // newest batch applied; 0: the newest committed
	applied   int64  // bytes that are not committed
	dirty     bool   // something is not committed
	ahead     chan fetched
	unsettled bool // inside a fill
	due       bool // nothing more is applied before what was is committed
}

type fetched struct {
	b   *Batch
	err error
}

// step applies one batch, or waits for one.
func (s *following) step(ctx context.Context) error {
	if s.due { // a bookmark that comes again must find the copy as it left it
		return s.commit(ctx)
	}
	b, err := s.take(ctx)
	if errors.Is(err, ErrNothing) {
		if err := s.commit(ctx); err != nil {
			return err
		}
		if _, err := s.c.Wait(ctx, 0, 0, waitEach); err != nil && !errors.Is(err, ErrNothing) {
			return err
		}
		return nil
	}
	if err != nil {
		return err
	}
	s.fetch(ctx, b.Number)
	if err := s.f.Apply(b); err != nil {
		return err
	}
	s.after, s.applied, s.dirty = b.Number, s.applied+b.Bytes(), true
	ended := s.unsettled && b.Consistent
	s.unsettled = !b.Consistent
	s.due = b.Kind == Bookmark || ended || s.applied >= commitEvery
	return nil
}

// take gives the next batch, which may be on its way already.
func (s *following) take(ctx context.Context) (*Batch, error) {
	if s.ahead == nil {
		return s.c.Next(ctx, s.after)
	}
	got := <-s.ahead
	s.ahead = nil
	return got.b, got.err
}

// fetch asks for the batch behind one. Its goroutine ends with the answer, which
// may be left lying.
func (s *following) fetch(ctx context.Context, after uint64) {
	ahead := make(chan fetched, 1)
	go func() { // "ahead"
		b, err := s.c.Next(ctx, after)
		ahead <- fetched{b, err}
	}()
	s.ahead = ahead
}

// commit makes what was applied stable and commits it.
func (s *following) commit(ctx context.Context) error {
	if !s.dirty {
		return nil
	}
	if err := s.f.Sync(); err != nil {
		return err
	}
	if err := s.c.Commit(ctx, s.after); err != nil {
		return err
	}
	s.applied, s.dirty, s.due = 0, false, false
	return nil
}
