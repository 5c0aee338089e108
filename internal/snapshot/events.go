package snapshot

import (
	"context"
	"sync"
	"time"

	"tidemark/internal/diff"
)

// Event is something that happened to a snapshot.
type Event struct {
	Time   time.Time `json:"time"`
	Kind   diff.Kind `json:"kind"`             // low-space, overflow or corrupt
	Device string    `json:"device,omitempty"` // corrupt: whose image
	Bytes  int64     `json:"bytes,omitempty"`  // low-space: how much more is wanted
	Error  string    `json:"error,omitempty"`
	Cause  error     `json:"-"` // of Error, for who branches on it
}

// eventsMax bounds what nobody fetches; the oldest goes first.
const eventsMax = 1024

// events is a queue. The zero value is ready.
type events struct {
	mu     sync.Mutex
	queue  []Event
	more   chan struct{} // closed when the queue changed; nil: nobody waits
	closed bool
}

func (q *events) wake() {
	if q.more != nil {
		close(q.more)
		q.more = nil
	}
}

// add never waits: it is called in a write's way.
func (q *events) add(e diff.Event) {
	out := Event{Time: time.Now(), Kind: e.Kind, Device: e.Device, Bytes: e.Bytes}
	if e.Err != nil {
		out.Error, out.Cause = e.Err.Error(), e.Err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.queue) == eventsMax {
		q.queue = q.queue[1:]
	}
	q.queue = append(q.queue, out)
	q.wake()
}

func (q *events) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.wake()
}

// next takes the oldest event, or gives what to wait for.
func (q *events) next() (e Event, ok bool, more <-chan struct{}) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.queue) > 0 {
		e, q.queue = q.queue[0], q.queue[1:]
		return e, true, nil
	}
	if q.closed {
		return e, false, nil
	}
	if q.more == nil {
		q.more = make(chan struct{})
	}
	return e, false, q.more
}

// Events takes what is queued of a snapshot.
func (t *Set) Events(id ID) ([]Event, error) {
	s, err := t.find(id)
	if err != nil {
		return nil, err
	}
	out := []Event{}
	for {
		e, ok, _ := s.events.next()
		if !ok {
			return out, nil
		}
		out = append(out, e)
	}
}

// Wait takes the next event of a snapshot, when there is one. ErrNoSuch: the
// snapshot is destroyed.
func (t *Set) Wait(ctx context.Context, id ID) (Event, error) {
	s, err := t.find(id)
	if err != nil {
		return Event{}, err
	}
	for {
		e, ok, more := s.events.next()
		if ok {
			return e, nil
		}
		if more == nil {
			return e, ErrNoSuch
		}
		select {
		case <-more:
		case <-ctx.Done():
			return e, ctx.Err()
		}
	}
}
