package serve

import (
	"context"
	"fmt"
	"sync"

	"tidemark/internal/snapshot"
)

// eventsKept is how many events of a snapshot are remembered.
const eventsKept = 1000

// Event is something that happened to a snapshot, with its number from 1 on.
type Event struct {
	Sequence uint64
	snapshot.Event
}

// eventLog keeps a snapshot's events for whoever asks, as often as they ask.
type eventLog struct {
	mu    sync.Mutex
	next  uint64
	kept  []Event
	more  chan struct{} // closed and made anew with each event
	ended bool
}

// followEvents keeps the events of a snapshot until it is destroyed.
func (s *Server) followEvents(id snapshot.ID) {
	l := &eventLog{more: make(chan struct{}), next: 1}
	s.mu.Lock()
	s.logs[snapshot.FormatID(id)] = l
	s.mu.Unlock()
	s.watching.Go(func() {
		for {
			e, err := s.set.Wait(s.watch0, id)
			l.add(e, err)
			if err != nil {
				if s.watch0.Err() == nil { // destroyed
					s.mu.Lock()
					delete(s.logs, snapshot.FormatID(id))
					s.mu.Unlock()
				}
				return
			}
			s.env.Log.Warn("snapshot", "id", snapshot.FormatID(id), "event", string(e.Kind), "device", e.Device, "error", e.Error)
		}
	})
}

func (l *eventLog) add(e snapshot.Event, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.ended = true
	} else {
		l.kept = append(l.kept, Event{l.next, e})
		l.next++
		l.kept = l.kept[max(0, len(l.kept)-eventsKept):]
	}
	close(l.more)
	l.more = make(chan struct{})
}

// Events gives the events of a snapshot after a number. Where there are none it
// waits for one until ctx ends, which is no error.
func (s *Server) Events(ctx context.Context, id string, after uint64) ([]Event, error) {
	s.mu.Lock()
	l := s.logs[id]
	s.mu.Unlock()
	if l == nil {
		return nil, fmt.Errorf("%s: %w", id, snapshot.ErrNoSuch)
	}
	for {
		l.mu.Lock()
		out := []Event{}
		for _, e := range l.kept {
			if e.Sequence > after {
				out = append(out, e)
			}
		}
		more, ended := l.more, l.ended
		l.mu.Unlock()
		switch {
		case len(out) > 0:
			return out, nil
		case ended:
			return nil, fmt.Errorf("%s: %w", id, snapshot.ErrNoSuch)
		}
		select {
		case <-more:
		case <-ctx.Done():
			return out, nil
		}
	}
}
