package drain

import (
	"context"

	"tidemark/internal/stream"
)

// counter knows the payload of the writes in a run of the stream that begins
// where its consumer stands. What it has counted it does not read again. It is
// used by whoever has put something into busy.
type counter struct {
	busy     chan struct{} // of one
	from, to place
	bytes    int64
}

// Count says how many bytes of payload of writes are sealed and not committed,
// by consumer: of those that get writes as they are, and that could be counted
// before ctx ended. Counting goes on behind that, for the next call. What a gap
// will bring is not known before its fill is made, and is not counted.
func (g *Group) Count(ctx context.Context) map[string]int64 {
	in, err := g.cfg.Source()
	if err != nil {
		return nil
	}
	newest, ok := in.Newest()
	if !ok {
		return nil
	}
	all := g.all()
	counts := make([]<-chan int64, len(all))
	for i, c := range all {
		counts[i] = c.count(ctx, g.counting, in, place{Sequence: newest.Sequence + 1})
	}
	out := map[string]int64{}
	for i, c := range all {
		select {
		case <-ctx.Done():
			select {
			case n, ok := <-counts[i]:
				note(out, c.name, n, ok)
			default:
			}
		case n, ok := <-counts[i]:
			note(out, c.name, n, ok)
		}
	}
	return out
}

func note(out map[string]int64, name string, n int64, ok bool) {
	if ok {
		out[name] = n
	}
}

// count begins to count what lies between a consumer and a place, and gives the
// channel that tells it; closed: it cannot be told. asked bounds how long it
// waits until nobody else counts, work the counting itself.
func (c *consumer) count(asked, work context.Context, in Source, to place) <-chan int64 {
	out := make(chan int64, 1)
	go func() { // "count": ends with work, if not before
		defer close(out)
		select {
		case c.counter.busy <- struct{}{}:
			defer func() { <-c.counter.busy }()
		case <-asked.Done():
			return
		case <-work.Done():
			return
		}
		now := c.told.Load().saved
		m := maker{in: in, names: c.m.names}
		if now.stage == records && c.counter.count(work, &m, now.disk, now.place, to) == nil {
			out <- c.counter.bytes
		}
	}()
	return out
}

// count moves the run: it is from one place to another then, or empty where the
// consumer is beyond. After an error it goes on from where it has come to.
func (k *counter) count(ctx context.Context, m *maker, disk int, from, to place) error {
	if before(from, k.from) || before(k.to, from) {
		k.from, k.to, k.bytes = from, from, 0
	}
	if err := m.payload(ctx, disk, &k.from, from, func(n int64) { k.bytes -= n }); err != nil {
		return err
	}
	return m.payload(ctx, disk, &k.to, to, func(n int64) { k.bytes += n })
}

func before(a, b place) bool {
	return a.Sequence < b.Sequence || a.Sequence == b.Sequence && a.Entry < b.Entry
}

// payload tells how much payload the writes have from one place to another, and
// moves the first there, segment by segment.
func (m *maker) payload(ctx context.Context, disk int, at *place, to place, tell func(int64)) error {
	for before(*at, to) {
		if err := ctx.Err(); err != nil {
			return err
		}
		f, err := m.fetch(ctx, at.Sequence)
		if err != nil {
			return err
		}
		end, next := f.Len(), place{Sequence: at.Sequence + 1}
		if at.Sequence == to.Sequence {
			end, next = min(end, to.Entry), to
		}
		var n int64
		for i := at.Entry; i < end; i++ {
			if e := f.Entry(i); e.Kind == stream.KindWrite && (disk == allDisks || disk == e.Disk) && e.HasPayload() {
				n += e.Range.Len
			}
		}
		f.Close() // it was only read
		*at = next
		tell(n)
	}
	return nil
}
