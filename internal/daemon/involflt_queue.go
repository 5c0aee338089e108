package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"syscall"
	"time"

	abi "tidemark/internal/abi/involflt"
	"tidemark/internal/batch"
	"tidemark/internal/block"
	"tidemark/internal/control/api"
	"tidemark/internal/control/involflt"
	"tidemark/internal/drain"
	"tidemark/internal/protect"
)

// involfltQueue is one disk's consumer.
type involfltQueue struct {
	b        *involfltSystem
	m        member
	consumer string
	device   string // where the disk is; "": its path is another disk's now

	mu     sync.Mutex
	mark   string // the tag that is out
	number uint64 // its batch
	order  bool   // the group was consistent ...
	asked  time.Time
}

// queue gives the one there is of a consumer, or makes it. Names of disks may be
// others after a start of the machine: where gives the one of now.
func (b *involfltSystem) queue(m member, consumer string, where func() string) *involfltQueue {
	b.mu.Lock()
	q := b.queues[consumer]
	b.mu.Unlock()
	if q != nil && q.m.group == m.group && q.device != "" {
		return q
	}
	made := &involfltQueue{b: b, m: m, consumer: consumer, device: where()} // which may read from disks
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.queues[consumer] == q {
		b.queues[consumer] = made
	}
	return b.queues[consumer]
}

// consumers are the group's.
func (q *involfltQueue) consumers() (*consumers, error) {
	c, err := q.b.s.consumers(q.m.group.Config().Name)
	return c, again(err)
}

// again gives an error its errno: a group that is away, or just being opened, is worth
// another try; a disk that is just being stopped is none.
func again(err error) error {
	var away *api.Error
	if errors.Is(err, drain.ErrNoConsumer) || errors.As(err, &away) && away.Code == api.CodeNotFound {
		return fmt.Errorf("%w: %w", involflt.ErrNoDevice, err)
	}
	if errors.Is(err, protect.ErrOffline) || errors.Is(err, drain.ErrStopped) || errors.As(err, &away) && away.Code == api.CodeUnreachable {
		return fmt.Errorf("%w: %w", syscall.EAGAIN, err)
	}
	return err
}

func stampOf(nanoseconds int64, number uint64) abi.Stamp {
	return abi.Stamp{Time: uint64(max(nanoseconds, 0)) / 100, Sequence: number}
}

func (q *involfltQueue) Next(ctx context.Context) (involflt.Batch, error) {
	consumers, err := q.consumers()
	if err != nil {
		return involflt.Batch{}, err
	}
	encoded, err := consumers.Next(ctx, q.consumer, 0)
	switch {
	case errors.Is(err, drain.ErrUndecided):
		return involflt.Batch{}, involflt.ErrVerdict
	case errors.Is(err, drain.ErrNothing):
		return involflt.Batch{}, involflt.ErrEmpty
	case err != nil:
		return involflt.Batch{}, again(err)
	}
	var parts []io.Reader
	for _, p := range encoded.Parts() {
		parts = append(parts, bytes.NewReader(p))
	}
	native, err := batch.Read(io.MultiReader(parts...))
	if err != nil {
		return involflt.Batch{}, err
	}
	return q.translate(native), nil
}

// translate makes of a batch what clients of the interface know.
func (q *involfltQueue) translate(n *batch.Batch) involflt.Batch {
	out := involflt.Batch{Number: n.Number, At: stampOf(n.Time, uint64(n.To))}
	switch n.Kind {
	case batch.Bookmark:
		q.bookmark(n, &out)
		return out
	case batch.Fill:
		out.Kind = involflt.Copies
	case batch.Ranges:
		out.Kind = involflt.Ranges
	}
	for _, r := range n.Records {
		at := out.At
		if n.Kind == batch.Writes {
			at = stampOf(r.Time, uint64(r.Position))
		}
		if r.Op == block.OpDiscard {
			continue
		}
		out.Changes = append(out.Changes, involflt.Change{Offset: r.Range.Off, Length: r.Range.Len, At: at, Data: r.Payload})
	}
	return out
}

// bookmark gives the tags of a mark that a client made for this disk; of another
// client's disks nothing; of a bookmark that was made by other means its name.
func (q *involfltQueue) bookmark(n *batch.Batch, out *involflt.Batch) {
	if !isTagMark(n.Bookmark) {
		out.Kind, out.Tags = involflt.Tags, [][]byte{[]byte(n.Bookmark)}
		return
	}
	tags, consumers := q.b.tags.find(n.Bookmark)
	if slices.Contains(consumers, q.consumer) {
		out.Kind, out.Tags = involflt.Tags, tags
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.mark, q.number = n.Bookmark, n.Number
}

func (q *involfltQueue) Commit(ctx context.Context, number, _ uint64) error {
	if number == 0 {
		return nil // there is never a reason for a resync: what is lost comes as copies
	}
	consumers, err := q.consumers()
	if err == nil {
		err = again(consumers.Commit(ctx, q.consumer, number))
	}
	if err != nil {
		return err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.number == number && q.mark != "" {
		q.b.tags.drained(q.mark, q.consumer)
		q.mark = ""
	}
	return nil
}

func (q *involfltQueue) Wait(ctx context.Context, n int64) error {
	for {
		consumers, err := q.consumers()
		if err != nil {
			return err
		}
		_, woken, err := consumers.Wait(ctx, q.consumer, 0, n)
		if err != nil || !woken { // a native wake is not for us
			return again(err)
		}
	}
}

func (q *involfltQueue) Clear(context.Context) error {
	consumers, err := q.consumers()
	if err == nil {
		err = consumers.Clear(q.consumer, true)
	}
	if errors.Is(err, drain.ErrNothing) {
		err = nil
	}
	if err == nil {
		q.b.tags.dropConsumer(q.consumer)
	}
	return err
}

// quietMax bounds how long somebody waits for writes to end.
const quietMax = time.Minute

func (q *involfltQueue) Settle(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, quietMax, syscall.EAGAIN)
	defer cancel()
	if err := q.m.group.Quiet(ctx); err != nil {
		return fmt.Errorf("%w: %w", context.Cause(ctx), err)
	}
	return nil
}

const (
	pendingMax  = 64 << 20               // bytes of payload that Pending counts
	orderedTime = 100 * time.Millisecond // for which State believes what the group said
)

func (q *involfltQueue) State() involflt.State {
	out := involflt.State{Order: abi.OrderUnknown}
	consumers, err := q.consumers()
	if err != nil {
		return out
	}
	st, ok := q.status(consumers)
	if !ok {
		return out
	}
	out.Order = abi.OrderBitmap
	if !st.Filling && q.ordered() {
		out.Order = abi.OrderData
	}
	sealed, err := q.m.group.Sealed()
	if err != nil {
		return out
	}
	newest, ok := sealed.Newest()
	if !ok {
		return out
	}
	out.Known = stampOf(newest.Time, uint64(newest.Last))
	out.Committed = stampOf(newest.Time-st.Lag.Nanoseconds(), uint64(st.Position))
	return out
}

func (q *involfltQueue) status(c *consumers) (drain.Status, bool) {
	for _, st := range c.List() {
		if st.Name == q.consumer {
			return st, st.Err == nil
		}
	}
	return drain.Status{}, false
}

func (q *involfltQueue) Pending(ctx context.Context) (out involflt.Pending, err error) {
	consumers, err := q.consumers()
	if err != nil {
		return out, err
	}
	p, err := consumers.Pending(ctx, q.consumer, 0, pendingMax)
	if p.Batches > 0 {
		out = involflt.Pending{Any: true, Bytes: p.Covered, Changes: p.Changes, Oldest: stampOf(p.Oldest.UnixNano(), 0).Time}
		if p.Oldest.IsZero() { // nobody knows when it was changed: after the copy was right last
			out.Oldest = q.State().Committed.Time
		}
	}
	return out, again(err)
}

// ordered says whether the newest position of the group is a point.
func (q *involfltQueue) ordered() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if time.Since(q.asked) > orderedTime {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		q.order, q.asked = q.m.group.Status(ctx).State == protect.Protected, time.Now()
	}
	return q.order
}
