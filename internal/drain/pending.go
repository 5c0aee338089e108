package drain

import (
	"context"
	"errors"
	"fmt"
	"time"

	"tidemark/internal/batch"
	"tidemark/internal/block"
)

// Pending is what waits for a consumer, as far as it was looked at.
type Pending struct {
	Batches  int
	Bytes    int64     // of payload
	Changes  int64     // writes, runs of fills and ranges to be read, without discards
	Covered  int64     // bytes that these change: with zeroes, which have no payload
	Oldest   time.Time // when the first write or bookmark was made; zero: there is none, or a fill comes first
	Bookmark bool
}

// size is what counts of one batch.
type size struct {
	bytes, changes, covered int64
	oldest                  int64 // nanoseconds since 1970; 0: nobody knows
	mark                    bool
}

func (s *size) add(op block.Op, length, at int64) {
	if op != block.OpDiscard {
		s.changes, s.covered = s.changes+1, s.covered+length
	}
	if s.oldest == 0 {
		s.oldest = at
	}
}

func sizeOf(b *made) size {
	s := b.size
	s.bytes, s.mark = b.bytes, b.header.Kind == batch.Bookmark
	if s.mark {
		s.oldest = b.header.Time
	}
	return s
}

// add counts a batch, and says whether that is enough.
func (p *Pending) add(s size, enough int64) bool {
	if p.Batches == 0 && s.oldest > 0 {
		p.Oldest = time.Unix(0, s.oldest)
	}
	p.Batches, p.Bytes, p.Changes, p.Covered = p.Batches+1, p.Bytes+s.bytes, p.Changes+s.changes, p.Covered+s.covered
	p.Bookmark = p.Bookmark || s.mark
	return p.Bytes >= enough || p.Bookmark
}

// ahead is what was counted before of the batches behind the newest committed
// one, in order. It need not be looked at again: what a batch is depends on
// sealed segments and the state before it alone.
type ahead struct {
	sizes []size
	after state // behind the last of them
}

// aheadMax bounds the batches that are remembered. What lies behind them is
// counted anew each time.
const aheadMax = 1 << 16

// passed forgets the first n, which were committed.
func (a *ahead) passed(n uint64) {
	if n >= uint64(len(a.sizes)) {
		*a = ahead{}
		return
	}
	a.sizes = a.sizes[n:]
}

// pending says how much there is behind a batch, at most until bytes of it, and
// whether a bookmark is in that. With an error it is what was counted before that.
func (c *consumer) pending(ctx context.Context, in Source, after uint64, bytes int64) (p Pending, err error) {
	c.mu.Lock()
	defer c.unlock()
	if c.gone.Load() {
		return p, ErrStopped
	}
	c.m.in = in
	if _, err := c.behind(ctx, after); err != nil {
		return p, err
	}
	skip := uint64(0) // batches before the first that counts
	if after != 0 {
		skip = after - c.saved.number
	}
	known := c.ahead.sizes
	for n := skip; n < uint64(len(known)); n++ {
		if p.add(known[n], bytes) {
			return p, nil
		}
	}
	c.m.dry = true
	defer func() { c.m.dry = false }()
	from := &c.saved
	if len(known) > 0 {
		from = &c.ahead.after
	}
	for n := uint64(len(known)); ; n++ {
		b, err := c.m.next(ctx, from)
		if errors.Is(err, ErrNothing) {
			return p, nil
		}
		if err != nil {
			return p, fmt.Errorf("consumer %s: %w", c.name, err)
		}
		s := sizeOf(b)
		if len(c.ahead.sizes) < aheadMax {
			c.ahead.sizes, c.ahead.after = append(c.ahead.sizes, s), b.after
			from = &c.ahead.after
		} else {
			from = &b.after
		}
		if n >= skip && p.add(s, bytes) {
			return p, nil
		}
	}
}
