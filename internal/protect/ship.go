package protect

import (
	"context"
	"errors"
	"sync"
	"time"

	"tidemark/internal/health"
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
		if err := s.cursor.Commit(item.Sequence); err != nil {
			return err
		}
		s.pending.arrived(item.Sequence)
	}
}

// drained waits until the vault holds everything that is sealed.
func (s *session) drained(ctx context.Context) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, oldest := s.pending.state(); oldest.IsZero() {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.New("the vault does not take what is still in the spool: " + ctx.Err().Error())
		case <-tick.C:
		}
	}
}
