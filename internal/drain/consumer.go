package drain

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"tidemark/internal/batch"
	"tidemark/internal/stream"
)

// outstandingMax bounds the batches that are given and not committed.
const outstandingMax = 256

// Batch is what a consumer is given.
type Batch = batch.Encoded

// consumer is one of a group's. Its methods may be called concurrently; batches
// of one consumer are made one at a time.
type consumer struct {
	name string
	mu   sync.Mutex
	file file
	m    maker

	saved state   // durable, but for records passed that are nothing to it
	given []state // behind each batch that was given and not committed, in order
	noted uint64  // the newest batch that a daemon before this one gave
	ahead ahead
	gone  atomic.Bool

	told    atomic.Pointer[told] // for who must not wait until a batch is made
	counter counter
}

// told is what status needs.
type told struct {
	saved state
	given int
}

// unlock tells how it is now, and lets others at the consumer.
func (c *consumer) unlock() {
	c.told.Store(&told{c.saved, len(c.given)})
	if c.gone.Load() {
		c.m.drop()
	}
	c.mu.Unlock()
}

// newest is the number of the newest batch given.
func (c *consumer) newest() uint64 { return c.saved.number + uint64(len(c.given)) }

// next makes the batch behind the newest committed one or, where after is not 0,
// behind that batch, which must have been given.
func (c *consumer) next(ctx context.Context, in Source, after uint64) (*Batch, error) {
	c.mu.Lock()
	defer c.unlock()
	if c.gone.Load() {
		return nil, ErrStopped
	}
	c.m.in = in
	from, err := c.behind(ctx, after)
	if err != nil {
		return nil, err
	}
	if from.number-c.saved.number >= outstandingMax {
		return nil, fmt.Errorf("%d batches are outstanding: commit some first: %w", outstandingMax, ErrOptions)
	}
	b, err := c.m.next(ctx, from)
	if err != nil {
		return nil, fmt.Errorf("consumer %s: %w", c.name, err)
	}
	if b.header.Number > max(c.newest(), c.noted) {
		if err := c.file.note(b.header.Number); err != nil {
			return nil, err
		}
	}
	if b.header.Number > c.newest() {
		c.given = append(c.given, b.after)
	}
	return b.content.Encode(b.header)
}

// behind is the state behind a batch that was given; 0: behind the newest committed one.
func (c *consumer) behind(ctx context.Context, number uint64) (*state, error) {
	if number == 0 || number == c.saved.number {
		return &c.saved, nil
	}
	if err := c.recall(ctx, number); err != nil {
		return nil, err
	}
	if number < c.saved.number || number > c.newest() {
		return nil, &CommitError{c.name, number, c.saved.number, max(c.newest(), c.noted), c.saved.leapt}
	}
	return &c.given[number-c.saved.number-1], nil
}

// recall finds the states behind batches that a daemon before this one gave.
func (c *consumer) recall(ctx context.Context, upTo uint64) error {
	if upTo > c.noted {
		return nil
	}
	c.m.dry = true
	defer func() { c.m.dry = false }()
	for c.newest() < upTo {
		from := &c.saved
		if n := len(c.given); n > 0 {
			from = &c.given[n-1]
		}
		b, err := c.m.next(ctx, from)
		if errors.Is(err, ErrNothing) {
			return nil
		}
		if err != nil {
			return err
		}
		c.given = append(c.given, b.after)
	}
	return nil
}

// commit makes durable that the consumer has everything up to a batch.
func (c *consumer) commit(ctx context.Context, in Source, number uint64) error {
	c.mu.Lock()
	defer c.unlock()
	switch {
	case c.gone.Load():
		return ErrStopped
	case number == c.saved.number && number > 0 && !c.saved.leapt:
		return nil // again: the answer to the first may have been lost
	}
	if in != nil {
		c.m.in = in
		if err := c.recall(ctx, number); err != nil {
			return err
		}
	}
	if number <= c.saved.number || number > c.newest() {
		return &CommitError{c.name, number, c.saved.number, c.newest(), c.saved.leapt}
	}
	n := number - c.saved.number
	if err := c.file.save(&c.given[n-1]); err != nil {
		return fmt.Errorf("consumer %s: commit of batch %d: %w", c.name, number, err)
	}
	c.saved, c.given = c.given[n-1], c.given[n:]
	c.ahead.passed(n)
	return nil
}

// clear drops what is pending: it comes as one fill or, where skip is set, not at all.
// Batches that were given before cannot be committed any more.
func (c *consumer) clear(in Source, skip bool) error {
	c.mu.Lock()
	defer c.unlock()
	if c.gone.Load() {
		return ErrStopped
	}
	newest, ok := in.Newest()
	if !ok {
		return fmt.Errorf("consumer %s: %w: nothing is sealed", c.name, ErrNothing)
	}
	st := c.saved
	switch {
	case skip:
		st = st.recordsFrom(end{newest.Last, newest.Time, place{Sequence: newest.Sequence + 1}})
		if newest.Settled == 0 { // what the open gap brings is not skipped
			st = st.fillFrom(newest.Sequence)
		}
	default:
		st = st.fillFrom(max(st.until, newest.Sequence))
		st.asked, st.mixed = true, newest.Last
	}
	// Beyond what was ever given, also by a daemon that a power cut made forget it.
	st.number, st.leapt = max(c.newest(), c.noted)+outstandingMax+1, true
	if err := c.file.save(&st); err != nil {
		return fmt.Errorf("consumer %s: clear: %w", c.name, err)
	}
	c.saved, c.given, c.noted, c.ahead = st, nil, 0, ahead{}
	c.m.drop()
	return nil
}

// Status is how a consumer is.
type Status struct {
	Name        string
	Disk        string // empty: all of the group
	BatchBytes  int64
	Ranges      bool
	Committed   uint64          // number of the newest committed batch
	Outstanding int             // given since and not committed
	Position    stream.Position // its copy is, or was last, right at
	Filling     bool            // it is not now: what is missing comes as a fill
	Cleared     bool            // because what was pending was cleared
	Behind      stream.Position // positions that are sealed and that it has not
	Lag         time.Duration   // between its position and the newest one sealed
	Err         error           // its state is damaged: everything else is unknown
}

func (c *consumer) status(in Source) Status {
	now := c.told.Load()
	v := &now.saved
	out := Status{Name: c.name, BatchBytes: v.most, Ranges: v.ranges, Committed: v.number, Outstanding: now.given,
		Position: v.at, Filling: v.stage == filling, Cleared: v.asked}
	if v.disk != allDisks {
		out.Disk = c.m.names.Disks[v.disk].Name
	}
	if in == nil {
		return out
	}
	if newest, ok := in.Newest(); ok && newest.Last > v.at {
		out.Behind = newest.Last - v.at
		if v.time > 0 {
			out.Lag = time.Duration(newest.Time - v.time)
		}
	}
	return out
}

// close ends the consumer. It does not wait for a batch that is being made: a
// vault that hangs must not keep the daemon from ending.
func (c *consumer) close() {
	c.gone.Store(true)
	if c.mu.TryLock() {
		c.m.drop()
		c.mu.Unlock()
	}
}

// remove ends the consumer and takes its state away.
func (c *consumer) remove() error {
	c.mu.Lock()
	defer c.unlock()
	c.gone.Store(true)
	return c.file.remove()
}
