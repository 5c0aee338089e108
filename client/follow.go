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
	commitEvery   = 64 << 20 // bytes of payload, while more is pending
	commitBatches = 64       // so many of them, well before too many are given
	waitEach      = time.Minute
	retryFirst    = 50 * time.Millisecond
	retryMax      = 2 * time.Second
)

// Follow applies what the consumer gets until ctx ends or something fails that
// waiting does not mend: its error, or that of the follower. A daemon that goes
// away and comes back is waited for. While one batch is applied the next are on
// their way. A bookmark, the end of a fill and a pause are committed at once, and
// nothing is applied before: at a bookmark the copy is just what the source was
// then, also where it comes again.
func (c *Consumer) Follow(ctx context.Context, f Follower) error {
	s := following{c: c, f: f}
	defer s.stop()
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
			s.stop()
			s = following{c: c, f: f} // it was cleared, or a power cut made it forgotten: on from what is committed
			continue
		case !errors.Is(err, ErrUnreachable):
			return err
		}
		s.stop()
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
	after     uint64             // newest batch applied; 0: the newest committed
	applied   int64              // bytes that are not committed
	open      int                // batches that are not committed
	ahead     <-chan fetched     // what is on its way; nil: nobody fetches
	end       context.CancelFunc // of who fetches
	unsettled bool               // inside a fill
	due       bool               // nothing more is applied before what was is committed
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
	if err := s.f.Apply(b); err != nil {
		return err
	}
	s.after, s.applied, s.open = b.Number, s.applied+b.Bytes(), s.open+1
	ended := s.unsettled && b.Consistent
	s.unsettled = !b.Consistent
	s.due = b.Kind == Bookmark || ended || s.applied >= commitEvery || s.open >= commitBatches
	return nil
}

// take gives the next batch, which may be on its way already.
func (s *following) take(ctx context.Context) (*Batch, error) {
	if s.ahead == nil {
		s.fetch(ctx)
	}
	got, ok := <-s.ahead
	if !ok {
		got.err = ctx.Err()
	}
	if got.err != nil {
		s.stop()
	}
	return got.b, got.err
}

// fetch has the batches behind the newest applied one come. Its goroutine ends
// behind an error, and with stop.
func (s *following) fetch(ctx context.Context) {
	ctx, s.end = context.WithCancel(ctx)
	ahead, after := make(chan fetched), s.after
	go func() { // "ahead"
		defer close(ahead)
		for b, err := range s.c.Batches(ctx, after) {
			select {
			case ahead <- fetched{b, err}:
			case <-ctx.Done():
				return
			}
		}
	}()
	s.ahead = ahead
}

// stop ends the fetching; what has come and was not taken is not applied.
func (s *following) stop() {
	if s.ahead != nil {
		s.end()
		s.ahead = nil
	}
}

// commit makes what was applied stable and commits it.
func (s *following) commit(ctx context.Context) error {
	if s.open == 0 {
		return nil
	}
	if err := s.f.Sync(); err != nil {
		return err
	}
	if err := s.c.Commit(ctx, s.after); err != nil {
		return err
	}
	s.applied, s.open, s.due = 0, 0, false
	return nil
}
