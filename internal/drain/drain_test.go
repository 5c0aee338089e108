package drain

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/segment"
	"tidemark/internal/sim"
	"tidemark/internal/stream"
)

// newReplica is a consumer of a story of which nothing is revealed yet.
func newReplica(t *testing.T, seed uint64, o Options) *replica {
	s := tell(seed, 150)
	c := &replica{t: t, s: s, r: rand.New(rand.NewPCG(seed, 5)), in: reveal(s, 0), fs: sim.New(seed), name: "c", disk: allDisks, got: map[uint64][]byte{}, copy: nothing()}
	c.begin(o)
	t.Cleanup(func() { c.g.Close() })
	return c
}

// TestWrongCommits: a commit of what was not given is refused, names both
// numbers, and changes nothing; one that is repeated is none.
func TestWrongCommits(t *testing.T) {
	c := newReplica(t, 1, Options{})
	c.in.more(1000)
	for n := range uint64(3) {
		if _, err := c.take(n); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.commit(1); err != nil {
		t.Fatal(err)
	}
	for _, n := range []uint64{0, 4, 5, 1 << 63} {
		err := c.g.Commit(t.Context(), "c", n)
		var wrong *CommitError
		if !errors.As(err, &wrong) || wrong.Committed != 1 || wrong.Given != 3 || !strings.Contains(err.Error(), fmt.Sprint("batch ", n)) || !strings.Contains(err.Error(), "batches 2 to 3") {
			t.Errorf("commit of %d: %v", n, err)
		}
	}
	if err := c.commit(1); err != nil {
		t.Errorf("the same commit again: %v", err)
	}
	if err := c.commit(3); err != nil {
		t.Fatal(err)
	}
	if err := c.g.Commit(t.Context(), "c", 2); !errors.Is(err, ErrCommit) {
		t.Errorf("commit of one before: %v", err)
	}
	if _, err := c.g.Next(t.Context(), "c", 9); !errors.Is(err, ErrCommit) {
		t.Errorf("next behind one that was not given: %v", err)
	}
}

// TestGivenBefore: what a daemon gave before it was killed can be committed, and
// gone on from, with the next one; batches are what they were.
func TestGivenBefore(t *testing.T) {
	for seed := range uint64(8) {
		c := newReplica(t, seed, Options{})
		c.in.more(1000)
		for n := range uint64(12) {
			if more, err := c.take(n); !more || err != nil {
				t.Fatal(more, err)
			}
		}
		if err := c.restart(false); err != nil {
			t.Fatal(err)
		}
		if err := c.g.Commit(t.Context(), "c", 13); !errors.Is(err, ErrCommit) {
			t.Errorf("commit of one that was not given: %v", err)
		}
		if _, err := c.take(9); err != nil { // which holds it against what it was
			t.Fatal(err)
		}
		if err := c.restart(false); err != nil {
			t.Fatal(err)
		}
		if err := c.commit(10); err != nil {
			t.Fatal(err)
		}
		for n := uint64(10); n < 12; n++ {
			if _, err := c.take(n); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestFromPoint: a consumer whose copy is a point already gets what follows it,
// wherever in its stretch that lies.
func TestFromPoint(t *testing.T) {
	for seed := range sim.Seeds(6) {
		c := newReplica(t, seed, Options{})
		c.in.more(1000)
		all := c.s.Stretches()
		st := all[c.r.IntN(len(all))]
		p := st.First + stream.Position(c.r.Int64N(int64(st.Last-st.First)+1))
		o := Options{From: Start{Position: p}}
		for n := range c.s.segments {
			if s, err := c.in.Open(t.Context(), uint64(n+1)); err != nil {
				t.Fatal(err)
			} else if s.Close(); s.Summary().First <= p && p <= s.Summary().Last {
				o.From.Sequence = uint64(n + 1)
			}
		}
		for d, image := range c.s.at(p) {
			copy(c.copy[d], image)
		}
		c.name, c.reached, c.right, c.first = "other", p, true, p
		if err := c.g.Make(t.Context(), c.name, o); err != nil {
			t.Fatal(err)
		}
		for {
			more, err := c.take(0)
			if err == nil && more {
				err = c.commit(c.acked + 1)
			}
			if err != nil {
				t.Fatalf("seed %d, from %d: %v", seed, p, err)
			}
			if !more {
				break
			}
		}
		if now := c.g.consumers[c.name].saved; !c.right || now.at != c.s.Position {
			t.Errorf("seed %d: from %d to %d, right %t; the stream ends at %d", seed, p, now.at, c.right, c.s.Position)
		}
	}
}

// TestClearedCopyIsAhead: a copy that had more than was committed when it was
// cleared is right after the fill, also where blocks went back to what they were.
func TestClearedCopyIsAhead(t *testing.T) {
	c := newReplica(t, 1, Options{})
	c.s = untold(1)
	c.in.s = c.s
	whole, first := block.Range{Len: testSizes[0]}, block.Range{Len: testBlock}
	add := func(r stream.Record) {
		if r.Kind.TakesPosition() {
			c.s.Position++
		}
		c.s.Add(r)
	}
	add(stream.Record{Kind: stream.KindGap, Position: 1, Ranges: []block.DiskRange{{Disk: 0, Range: whole}}})
	add(stream.Record{Kind: stream.KindFill, Fill: stream.FillData, Position: 1, ValidFrom: 1, Range: whole, Payload: c.s.Payload(whole.Len)})
	c.s.Settled = 1
	add(stream.Record{Kind: stream.KindSettled, Position: 1})
	c.s.seal()
	c.in.more(1000)
	if more, err := c.drain(1); more || err != nil {
		t.Fatal(more, err)
	}
	add(stream.Record{Kind: stream.KindWrite, Op: block.OpWrite, Position: 2, Range: first, Payload: c.s.Payload(testBlock)})
	c.s.seal()
	c.in.more(1000)
	if more, err := c.take(0); !more || err != nil { // it is in the copy, and not committed
		t.Fatal(more, err)
	}
	c.s.Settled, c.s.GapSince = 0, 3
	add(stream.Record{Kind: stream.KindGap, Position: 3, Ranges: []block.DiskRange{{Disk: 0, Range: first}}})
	add(stream.Record{Kind: stream.KindFill, Fill: stream.FillSame, Base: 1, Position: 3, ValidFrom: 3, Range: first})
	c.s.Settled, c.s.GapSince = 3, 0
	add(stream.Record{Kind: stream.KindSettled, Position: 3})
	c.s.seal()
	c.in.more(1000)
	if err := c.clear(false); err != nil {
		t.Fatal(err)
	}
	leapt := c.g.consumers["c"].saved.number
	for range 2 {
		for _, n := range []uint64{1, leapt, leapt + 1} {
			var wrong *CommitError
			if err := c.g.Commit(t.Context(), "c", n); !errors.As(err, &wrong) || !strings.Contains(err.Error(), "cleared") || !strings.Contains(err.Error(), fmt.Sprint("next batch is ", leapt+1)) {
				t.Errorf("commit of %d after a clear to %d: %v", n, leapt, err)
			}
		}
		if err := c.restart(false); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.drain(1000); err != nil || !c.right || c.reached != 3 {
		t.Errorf("right %t at %d: %v", c.right, c.reached, err)
	}
}

// TestClearSkip: what was pending does not come, neither as it was nor as a fill;
// what follows does, on a copy that was made right by other means. Inside a gap
// the copy is right once the gap is closed.
func TestClearSkip(t *testing.T) {
	inside, outside := 0, 0
	for seed := range uint64(12) {
		c := newReplica(t, seed, Options{})
		c.in.more(1 + c.r.IntN(len(c.s.segments)-1))
		if _, err := c.take(0); err != nil { // given, and never committed
			t.Fatal(err)
		}
		if err := c.clear(true); err != nil {
			t.Fatal(err)
		}
		newest, _ := c.in.Newest()
		st := c.g.List()[0]
		if gap := newest.Settled == 0; st.Position != newest.Last || st.Behind != 0 || st.Lag != 0 || st.Cleared || st.Filling != gap {
			t.Errorf("seed %d: with %+v sealed it is %+v", seed, newest.State, st)
		} else if gap {
			inside++
		} else {
			outside++
		}
		if p, err := c.g.consumers[c.name].pending(t.Context(), c.in, 0, 0); err != nil || p.Batches != 0 {
			t.Errorf("seed %d: pending behind what was skipped: %+v, %v", seed, p, err)
		}
		if err := c.restart(c.r.IntN(2) == 0); err != nil {
			t.Fatal(err)
		}
		c.in.more(1000)
		for more := true; more; {
			had := c.reached
			var err error
			if more, err = c.take(0); err == nil && more {
				if c.reached < had || len(c.marks) > 0 && c.marks[0] <= newest.Last {
					t.Errorf("seed %d: %d was skipped, and a batch to %d comes, bookmarks at %v", seed, newest.Last, c.reached, c.marks)
				}
				err = c.commit(c.applied)
			}
			if err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
		}
		if !c.right || c.reached != c.s.Position {
			t.Errorf("seed %d: right %t at %d; the stream ends at %d", seed, c.right, c.reached, c.s.Position)
		}
	}
	if inside == 0 || outside == 0 {
		t.Errorf("%d inside a gap and %d not: this tests too little", inside, outside)
	}
}

// hung is a stream whose segments are not to be had until it is let go.
type hung struct {
	*revealed
	free  chan struct{}
	fails error
}

func (h *hung) Open(ctx context.Context, n uint64) (*segment.File, error) {
	select {
	case <-h.free:
		if h.fails != nil {
			return nil, h.fails
		}
		return h.revealed.Open(ctx, n)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// TestCountDoesNotHang: who asks what is pending while segments cannot be had is
// not kept, and is told once they can. One that is damaged leaves it unknown.
func TestCountDoesNotHang(t *testing.T) {
	c := newReplica(t, 1, Options{})
	c.in.more(1000)
	for c.g.consumers["c"].saved.stage == filling {
		if more, err := c.take(0); !more || err != nil {
			t.Fatal(more, err)
		}
		if err := c.commit(c.applied); err != nil {
			t.Fatal(err)
		}
	}
	h := &hung{revealed: c.in, free: make(chan struct{})}
	c.g.cfg.Source = func() (Source, error) { return h, nil }
	soon, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if got := c.g.Count(soon); len(got) != 0 {
		t.Errorf("counted in segments that cannot be had: %v", got)
	}
	close(h.free)
	if err := c.counted(); err != nil {
		t.Error(err)
	}
	c.g.consumers["c"].counter.to = place{} // as if it had counted nothing
	h.fails = segment.ErrDamaged
	if got := c.g.Count(t.Context()); len(got) != 0 {
		t.Errorf("counted in a segment that is damaged: %v", got)
	}
	h.fails = nil
	if err := c.counted(); err != nil {
		t.Error(err)
	}
}

// TestPendingIsRemembered: what was counted once is not read again, neither to be
// counted once more nor behind a commit; what is new is counted.
func TestPendingIsRemembered(t *testing.T) {
	c := newReplica(t, 1, Options{})
	c.s = untold(1)
	c.in.s = c.s
	for n := range 8 {
		c.s.Position++
		if n == 0 {
			c.s.Add(stream.Record{Kind: stream.KindGap, Position: 1, Ranges: []block.DiskRange{{Disk: 0, Range: block.Range{Len: testSizes[0]}}}})
			c.s.Add(stream.Record{Kind: stream.KindFill, Fill: stream.FillData, Position: 1, ValidFrom: 1, Range: block.Range{Len: testSizes[0]}, Payload: c.s.Payload(testSizes[0])})
			c.s.Settled = 1
			c.s.Add(stream.Record{Kind: stream.KindSettled, Position: 1})
		} else {
			c.s.Add(stream.Record{Kind: stream.KindWrite, Op: block.OpWrite, Position: c.s.Position, Range: block.Range{Len: testBlock}, Payload: c.s.Payload(testBlock)})
		}
		c.s.seal()
	}
	c.in.more(1)
	if _, err := c.drain(1); err != nil {
		t.Fatal(err)
	}
	c.in.more(6)
	pending := func(enough int64) Pending {
		t.Helper()
		p, err := c.g.Pending(t.Context(), "c", 0, enough)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	all := pending(1 << 40)
	if want := (Pending{Batches: 6, Changes: 6, Bytes: 6 * testBlock, Covered: 6 * testBlock, Oldest: time.Unix(0, c.s.Records[3].Time)}); all != want {
		t.Errorf("%+v, want %+v", all, want)
	}
	for range 2 {
		if more, err := c.take(c.applied); !more || err != nil {
			t.Fatal(more, err)
		}
	}
	opens := c.in.opens
	if again := pending(1 << 40); again != all || c.in.opens != opens {
		t.Errorf("%+v with %d segments read, %+v before", again, c.in.opens-opens, all)
	}
	first := pending(0)
	if err := c.commit(c.acked + 1); err != nil {
		t.Fatal(err)
	}
	if rest := pending(1 << 40); rest.Batches != all.Batches-1 || rest.Bytes != all.Bytes-first.Bytes || c.in.opens != opens {
		t.Errorf("%+v behind a commit with %d segments read; %+v before, of it the first %+v", rest, c.in.opens-opens, all, first)
	}
	c.in.more(1)
	if more := pending(1 << 40); more.Batches != all.Batches || c.in.opens != opens+1 {
		t.Errorf("another segment is sealed, and pending is %+v with %d segments read", more, c.in.opens-opens)
	}
}

// drain takes and commits until nothing is pending.
func (c *replica) drain(most int) (more bool, err error) {
	for range most * 1000 {
		if more, err = c.take(0); !more || err != nil {
			return more, err
		}
		if err := c.commit(c.applied); err != nil {
			return false, err
		}
	}
	return more, nil
}

// TestDamagedSegment: it is named, and nothing of it or behind it is given; what
// is before it is.
func TestDamagedSegment(t *testing.T) {
	c := newReplica(t, 2, Options{})
	c.in.more(1000)
	whole := 0
	for {
		more, err := c.take(0)
		if err != nil {
			t.Fatal(err)
		}
		if !more {
			break
		}
		whole++
		if c.right && c.g.consumers["c"].saved.stage == records && whole > 3 {
			break
		}
		if err := c.commit(c.acked + 1); err != nil {
			t.Fatal(err)
		}
	}
	// The first segment from here on with payload enough to be damaged in it.
	st := c.g.consumers["c"].saved
	for n := st.place.Sequence + 1; ; n++ {
		if n > uint64(len(c.s.segments)) {
			t.Fatal("no such segment in this story")
		}
		if len(c.s.segments[n-1]) > 4<<10 {
			c.in.damaged = n
			break
		}
	}
	if err := c.restart(false); err != nil {
		t.Fatal(err)
	}
	for range 1000 {
		more, err := c.take(0)
		if err != nil {
			if !errors.Is(err, segment.ErrDamaged) || !strings.Contains(err.Error(), fmt.Sprintf("segment %d", c.in.damaged)) || !strings.Contains(err.Error(), "consumer c") {
				t.Fatalf("it says %v", err)
			}
			return
		}
		if !more {
			t.Fatalf("segment %d is damaged, and nobody noticed", c.in.damaged)
		}
		if err := c.commit(c.acked + 1); err != nil {
			t.Fatal(err)
		}
	}
}

// TestWait: it ends when there is enough, when it is woken, when the consumers
// are closed, and with its context.
func TestWait(t *testing.T) {
	c := newReplica(t, 4, Options{})
	type result struct {
		p     Pending
		woken bool
		err   error
	}
	wait := func(ctx context.Context, bytes int64) chan result {
		out := make(chan result, 1)
		go func() {
			p, woken, err := c.g.Wait(ctx, "c", 0, bytes)
			out <- result{p, woken, err}
		}()
		return out
	}
	short, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if r := <-wait(short, 0); !errors.Is(r.err, context.DeadlineExceeded) {
		t.Errorf("nothing is pending: %+v", r)
	}
	some := wait(t.Context(), 0)
	for { // as segments are sealed
		select {
		case r := <-some:
			if r.err != nil || r.p.Batches == 0 {
				t.Fatalf("%+v", r)
			}
		default:
			c.in.more(1)
			continue
		}
		break
	}
	c.in.more(1000)
	if more, err := c.drain(1000); more || err != nil { // with no bookmark left, which would end them
		t.Fatal(more, err)
	}
	forever := wait(t.Context(), 0)
	for done := false; !done; {
		select {
		case r := <-forever:
			if r.err != nil || !r.woken || r.p.Batches != 0 {
				t.Errorf("woken: %+v", r)
			}
			done = true
		default:
			c.g.Wake() // it may not wait yet
		}
	}
	again := wait(t.Context(), 1<<40)
	c.g.Close()
	if r := <-again; !errors.Is(r.err, ErrStopped) {
		t.Errorf("closed: %+v", r)
	}
	if err := c.open(); err != nil {
		t.Fatal(err)
	}
}

// TestWaitEndsWithItsConsumer: who waits for a consumer that is removed is told so, and not that it was woken.
func TestWaitEndsWithItsConsumer(t *testing.T) {
	c := newReplica(t, 4, Options{})
	ended := make(chan error, 1)
	go func() {
		_, _, err := c.g.Wait(t.Context(), "c", 0, 1<<40)
		ended <- err
	}()
	time.Sleep(20 * time.Millisecond) // most likely it waits by now; the answer is the same if not
	if err := c.g.Remove(t.Context(), "c", true); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !errors.Is(err, ErrNoConsumer) {
		t.Errorf("%v", err)
	}
}

// TestOptions: what a consumer cannot be is refused, and what it was made with stays.
func TestOptions(t *testing.T) {
	c := newReplica(t, 5, Options{Disk: "b"})
	for name, o := range map[string]Options{"new": {Disk: "z"}, "small": {BatchBytes: 1}, "large": {BatchBytes: BatchMax + 1}} {
		if err := c.g.Make(t.Context(), name, o); !errors.Is(err, ErrOptions) {
			t.Errorf("%+v: %v", o, err)
		}
	}
	for _, name := range []string{"", ".", "../x", "a/b", strings.Repeat("x", 65)} {
		if err := c.g.Make(t.Context(), name, Options{}); !errors.Is(err, ErrName) {
			t.Errorf("%q: %v", name, err)
		}
	}
	if err := c.g.Make(t.Context(), "c", Options{Disk: "a"}); !errors.Is(err, ErrExists) {
		t.Errorf("of another disk: %v", err)
	}
	if err := c.g.Make(t.Context(), "c", Options{}); err != nil {
		t.Errorf("without options: %v", err)
	}
	if _, err := c.g.Next(t.Context(), "none", 0); !errors.Is(err, ErrNoConsumer) {
		t.Errorf("%v", err)
	}
	if list := c.g.List(); len(list) != 1 || list[0].Disk != "b" {
		t.Errorf("listed as %+v", list)
	}
	if err := c.g.Remove(t.Context(), "c", false); !errors.Is(err, ErrPending) {
		t.Errorf("removed while it waits for its first fill: %v", err)
	}
}

// TestMadeNeverAfterTheEnd: once the consumers are closed none is made, also where
// its making was under way: its file would come back in a folder that is gone.
func TestMadeNeverAfterTheEnd(t *testing.T) {
	c := newReplica(t, 6, Options{})
	c.in.more(1000)
	h := &hung{revealed: c.in, free: make(chan struct{})}
	c.g.cfg.Source = func() (Source, error) { return h, nil }
	newest, _ := c.in.Newest()
	ended := make(chan error)
	go func() {
		ended <- c.g.Make(t.Context(), "late", Options{From: Start{Position: newest.Last, Sequence: newest.Sequence}})
	}()
	c.g.Close()
	close(h.free)
	if err := <-ended; !errors.Is(err, ErrStopped) {
		t.Errorf("made while it was closed: %v", err)
	}
	if err := c.g.Make(t.Context(), "later", Options{}); !errors.Is(err, ErrStopped) {
		t.Errorf("made afterwards: %v", err)
	}
	if entries, err := c.fs.ReadDir(c.g.cfg.Dir); err != nil || len(entries) != 1 {
		t.Errorf("there are %v, %v", entries, err)
	}
	if err := c.open(); err != nil {
		t.Fatal(err)
	}
}
