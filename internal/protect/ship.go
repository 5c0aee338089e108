package protect

import (
	"context"
	"errors"
	"sync"
	"time"

	"tidemark/internal/health"
	"tidemark/internal/source"
	"tidemark/internal/stream"
)

// onTheWay lists what is sealed and not yet in the vault, oldest first.
type onTheWay struct {
	mu      sync.Mutex
	items   []parcel
	reached uint64 // sequence up to which the vault holds everything
	durable stream.Position
}

type parcel struct {
	sequence   uint64
	since      time.Time
	restorable stream.Position
}

// push is called when a segment is in the spool: the shipper may have been faster.
func (w *onTheWay) push(sequence uint64, since time.Time, restorable stream.Position) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if sequence <= w.reached {
		w.durable = max(w.durable, restorable)
		return
	}
	w.items = append(w.items, parcel{sequence, since, restorable})
}

// arrived says that the vault holds everything up to the sequence.
func (w *onTheWay) arrived(sequence uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.reached = max(w.reached, sequence)
	for len(w.items) > 0 && w.items[0].sequence <= sequence {
		w.durable = max(w.durable, w.items[0].restorable)
		w.items = w.items[1:]
	}
}

// state gives the durable position and when the oldest parcel still on its way was begun.
func (w *onTheWay) state() (durable stream.Position, oldest time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.items) > 0 {
		oldest = w.items[0].since
	}
	return w.durable, oldest
}

const (
	shipRetryFirst = 200 * time.Millisecond
	shipRetryMax   = 10 * time.Second
)

// ship carries sealed segments from the spool to the vault until ctx ends or
// something fails that waiting cannot mend.
func (s *session) ship(ctx context.Context) error {
	retry := shipRetryFirst
	for {
		item, err := s.cursor.Next(ctx)
		if err != nil {
			return err
		}
		err = s.vault.Put(ctx, s.lock, item.Path, item.Summary)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			s.health.Raise(health.Condition{Code: "vault-unreachable", Severity: health.Warning, Subject: s.cfg.Name,
				Detail: "The vault does not take segments: " + err.Error(),
				Remedy: "Make " + s.cfg.Vault + " reachable and writable; captured data waits in the spool."})
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(retry):
			}
			retry = min(2*retry, shipRetryMax)
			continue
		}
		retry = shipRetryFirst
		s.health.Clear("vault-unreachable", s.cfg.Name)
		s.stored.put(item.Summary)
		if err := s.cursor.Commit(item.Sequence); err != nil {
			return err
		}
		s.pending.arrived(item.Sequence)
		s.stats.arrived(item.Sequence)
	}
}

// drain returns when the vault holds everything that the ring held at the call.
func (s *session) drain(ctx context.Context) error {
	last, err := s.flush(ctx)
	again := time.NewTicker(tick)
	defer again.Stop()
	for err == nil && !s.pending.has(last) {
		select {
		case <-ctx.Done():
			err = ctx.Err()
		case <-s.over:
			err = ErrOffline
		case <-again.C:
		}
	}
	if err != nil && ctx.Err() != nil {
		return errors.New("the vault does not take what is still in the spool: " + ctx.Err().Error())
	}
	return err
}

// Seal returns when everything that was captured before the call is sealed, and
// can be handed to consumers; where the spool is full that takes until it has room.
func (g *Group) Seal(ctx context.Context) error {
	s := g.current()
	if s == nil {
		return g.offlineError()
	}
	_, err := s.flush(ctx)
	return err
}

// flush seals everything that the ring holds at the call, and gives the sequence of
// a segment by which it is. It may be called concurrently.
func (s *session) flush(ctx context.Context) (last uint64, err error) {
	var end source.Place
	err = s.ask(ctx, func() error { end = s.source.Producer(); return nil })
	again := time.NewTicker(tick)
	defer again.Stop()
	for err == nil {
		err = s.ask(ctx, func() (err error) { last, err = s.sealUpTo(end); return err })
		if err != nil || last != 0 {
			break
		}
		select {
		case <-ctx.Done():
			err = ctx.Err()
		case <-s.over:
			err = ErrOffline
		case <-again.C:
		}
	}
	return last, err
}

// sealUpTo gives the sequence of a segment by which everything before a place in
// the ring is sealed; 0: it could not be yet.
func (s *session) sealUpTo(end source.Place) (uint64, error) {
	if s.full {
		return 0, nil // step goes on when there is room
	}
	if err := s.pump(); err != nil || s.place < end {
		return 0, err
	}
	if err := s.seal(); err != nil || s.full || s.place < end {
		return 0, err
	}
	return s.previous.Sequence, nil
}

// has says whether the vault holds everything up to a sequence.
func (w *onTheWay) has(sequence uint64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.items) == 0 || w.items[0].sequence > sequence
}
