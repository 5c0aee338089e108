package drain

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"tidemark/internal/batch"
	"tidemark/internal/block"
	"tidemark/internal/sim"
	"tidemark/internal/stream"
)

// replica is a consumer with its copy, which outlives every crash.
type replica struct {
	t       *testing.T
	s       *tale
	in      *revealed
	g       *Group
	fs      *sim.FS
	r       *rand.Rand
	name    string
	disk    int // allDisks: both
	copy    [2][]byte
	got     map[uint64][]byte // every batch ever given, by number
	applied uint64            // newest batch in the copy
	acked   uint64            // newest batch whose commit returned success
	tried   uint64            // newest batch whose commit was tried
	reached stream.Position   // the copy is right at it
	right   bool              // with what is applied it is
	marks   []stream.Position
	first   stream.Position // end of the first fill
	cleared bool            // the next batch is the first behind a clear
	dropped bool            // some clear dropped bookmarks
}

func (c *replica) open() error {
	disks := []Disk{{Name: "a", Size: testSizes[0], SectorSize: 512}, {Name: "b", Size: testSizes[1], SectorSize: 512}}
	g, err := Open(Config{FS: c.fs, Dir: "/state/drain", Group: "g", ID: testGroup, Disks: disks, Source: func() (Source, error) { return c.in, nil }})
	c.g = g
	return err
}

// begin makes the consumer, with batches smaller than users may have them.
func (c *replica) begin(o Options) {
	if err := errors.Join(c.fs.MkdirAll("/state", 0o700), c.fs.SyncDir("/"), c.open(), c.g.Make(c.t.Context(), c.name, o)); err != nil {
		c.t.Fatal(err)
	}
	k := c.g.consumers[c.name]
	k.saved.most = 512 * (1 + c.r.Int64N(60))
	if err := k.file.save(&k.saved); err != nil {
		c.t.Fatal(err)
	}
}

// take asks for a batch and checks it against all that was ever given, and
// against what was said to be pending.
func (c *replica) take(after uint64) (bool, error) {
	said, _ := c.g.Pending(c.t.Context(), c.name, after, 0) // its error is that of Next
	e, err := c.g.Next(c.t.Context(), c.name, after)
	if errors.Is(err, ErrNothing) && said != (Pending{}) {
		return false, fmt.Errorf("nothing is pending behind %d, and it is said to be %+v", after, said)
	}
	if errors.Is(err, ErrNothing) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	var raw bytes.Buffer
	if _, err := e.WriteTo(&raw); err != nil {
		return false, err
	}
	b, err := batch.Read(bytes.NewReader(raw.Bytes()))
	if err != nil {
		return false, err
	}
	if had, ok := c.got[b.Number]; ok && !bytes.Equal(had, raw.Bytes()) {
		return false, fmt.Errorf("batch %d is another one than before", b.Number)
	}
	c.got[b.Number] = raw.Bytes()
	if is := pendingOf(b); said != is {
		return false, fmt.Errorf("batch %d is %+v, and was said to be %+v", b.Number, is, said)
	}
	if after != 0 && b.Number != after+1 {
		return false, fmt.Errorf("batch %d behind %d", b.Number, after)
	}
	return true, c.apply(b)
}

// pendingOf is what one batch counts for.
func pendingOf(b *batch.Batch) Pending {
	p := Pending{Batches: 1, Bookmark: b.Kind == batch.Bookmark}
	switch {
	case p.Bookmark:
		p.Oldest = time.Unix(0, b.Time)
	case b.Kind == batch.Writes:
		p.Oldest = time.Unix(0, b.Records[0].Time)
	}
	for _, r := range b.Records {
		if r.Op != block.OpDiscard {
			p.Changes, p.Covered = p.Changes+1, p.Covered+r.Range.Len
		}
		p.Bytes += int64(len(r.Payload))
	}
	return p
}

// remembered holds what is said to be pending against what is counted anew.
func (c *replica) remembered() error {
	k := c.g.consumers[c.name]
	after, most := c.acked, c.r.Int64N(100<<10)
	if c.applied > c.acked {
		after += c.r.Uint64N(c.applied - c.acked + 1)
	}
	p, err := c.g.Pending(c.t.Context(), c.name, after, most)
	known := k.ahead
	k.ahead = ahead{}
	anew, failed := c.g.Pending(c.t.Context(), c.name, after, most)
	k.ahead = known
	if p != anew || (err == nil) != (failed == nil) {
		return fmt.Errorf("behind batch %d is pending %+v, %v; counted anew %+v, %v", after, p, err, anew, failed)
	}
	return nil
}

func (c *replica) apply(b *batch.Batch) error {
	if b.Number > c.applied+1 && !c.cleared {
		return fmt.Errorf("batch %d follows %d", b.Number, c.applied)
	}
	if b.Number <= c.applied { // as who has crashed: what came behind it is applied once more too
		for n := b.Number; n <= c.applied; n++ {
			if again, err := batch.Read(bytes.NewReader(c.got[n])); err != nil {
				return err
			} else if err := c.put(again); err != nil {
				return err
			}
		}
		return nil
	}
	c.applied, c.cleared = b.Number, false
	if err := c.put(b); err != nil {
		return err
	}
	return c.check(b)
}

// put puts a batch's content into the copy.
func (c *replica) put(b *batch.Batch) error {
	for _, r := range b.Records {
		if c.disk != allDisks && r.Disk != c.disk {
			return fmt.Errorf("batch %d has a record of disk %d", b.Number, r.Disk)
		}
		dst := c.copy[r.Disk][r.Range.Off:r.Range.End()]
		switch r.Op {
		case block.OpWrite:
			copy(dst, r.Payload)
		case block.OpZeroes:
			clear(dst)
		case block.OpDiscard:
			for i := range dst {
				dst[i] = undefined
			}
		}
	}
	return nil
}

// check holds the copy against the stream.
func (c *replica) check(b *batch.Batch) error {
	if b.Kind == batch.Bookmark {
		c.marks = append(c.marks, b.To)
	}
	if b.From < c.reached && c.right {
		return fmt.Errorf("batch %d from %d, and the copy is at %d", b.Number, b.From, c.reached)
	}
	if c.right = b.Consistent; !c.right {
		return nil
	}
	if c.reached == 0 {
		c.first = b.To
	}
	c.reached = b.To
	want := c.s.at(b.To)
	for d := range want {
		if (c.disk == allDisks || c.disk == d) && !bytes.Equal(want[d], c.copy[d]) {
			for i := range want[d] {
				if want[d][i] != c.copy[d][i] {
					return fmt.Errorf("batch %d (%s, from %d to %d): disk %d differs at byte %d: has %#x, want %#x", b.Number, b.Kind, b.From, b.To, d, i, c.copy[d][i], want[d][i])
				}
			}
		}
	}
	return nil
}

func (c *replica) commit(n uint64) error {
	c.tried = max(c.tried, n)
	err := c.g.Commit(c.t.Context(), c.name, n)
	if err == nil {
		c.acked = max(c.acked, n)
	}
	return err
}

// restart is a kill -9 of the daemon or, with power, of the machine.
func (c *replica) restart(power bool) error {
	c.g.Close()
	if power {
		c.fs = c.fs.Crash()
	}
	if err := c.open(); err != nil {
		return err
	}
	k := c.g.consumers[c.name]
	if k == nil {
		return fmt.Errorf("the consumer is gone: %v", c.g.damaged[c.name])
	}
	if n := k.saved.number; n < c.acked || n > c.tried {
		return fmt.Errorf("%d batches are committed; %d were acknowledged and %d tried", n, c.acked, c.tried)
	}
	c.acked = k.saved.number
	return nil
}

// TestReplicas: whatever the history, the cuts into segments and batches, and
// what is killed when, each consistent batch leaves the copy as the stream says,
// a batch given again is the same one, and no bookmark is lost or comes twice.
func TestReplicas(t *testing.T) {
	for seed := range sim.Seeds(20) {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 5))
			s := tell(seed, 150)
			c := &replica{t: t, s: s, r: r, in: reveal(s, r.IntN(3)), fs: sim.New(seed), name: "c", disk: allDisks, got: map[uint64][]byte{}, copy: nothing()}
			o := Options{Ranges: r.IntN(4) == 0}
			if r.IntN(3) == 0 {
				c.disk = r.IntN(2)
				o.Disk = string(rune('a' + c.disk))
			}
			c.begin(o)
			for c.in.n < len(s.segments) {
				if err := errors.Join(c.act(), c.counted(), c.remembered()); err != nil {
					t.Fatal(err)
				}
			}
			for {
				more, err := c.take(0)
				if err == nil && more {
					err = c.commit(c.acked + 1)
				}
				if err != nil {
					t.Fatal(err)
				}
				if !more {
					break
				}
			}
			if !c.right {
				t.Error("the copy is not right at the end")
			}
			if want := slices.DeleteFunc(slices.Clone(s.Marks), func(p stream.Position) bool { return p <= c.first }); !c.dropped && !slices.Equal(want, c.marks) {
				t.Errorf("bookmarks at %v, want %v", c.marks, want)
			}
			c.g.Close()
			if c.in.opened != 0 {
				t.Errorf("%d segments are still open", c.in.opened)
			}
		})
	}
}

// clear drops what is pending, after which nothing of it can be committed.
// With skip the copy is made right by other means.
func (c *replica) clear(skip bool) error {
	if c.in.n == 0 {
		return nil
	}
	given := c.applied
	if err := c.g.Clear(c.name, skip); err != nil {
		return err
	}
	if err := c.g.Commit(c.t.Context(), c.name, given); given > 0 && !errors.Is(err, ErrCommit) {
		return fmt.Errorf("commit of batch %d, which was cleared: %v", given, err)
	}
	c.acked = c.g.consumers[c.name].saved.number
	c.tried, c.applied = c.acked, c.acked
	c.cleared, c.dropped, c.right = true, true, false
	if now := c.g.consumers[c.name].saved; skip {
		newest, _ := c.in.Newest()
		if now.at != newest.Last {
			return fmt.Errorf("a clear that skips goes to %d, and %d is sealed", now.at, newest.Last)
		}
		c.copy, c.reached, c.right = images(c.s.at(newest.Last)), newest.Last, newest.Settled != 0
	}
	clear(c.got)
	return nil
}

// images are copies of two disks.
func images(of [2][]byte) [2][]byte { return [2][]byte{slices.Clone(of[0]), slices.Clone(of[1])} }

// counted holds what is said to be pending against the stream.
func (c *replica) counted() error {
	now := c.g.consumers[c.name].saved
	n, ok := c.g.Count(c.t.Context())[c.name]
	if want := c.in.n > 0 && now.stage == records; ok != want {
		return fmt.Errorf("%d segments are sealed, the consumer is in stage %d, and counted is %t", c.in.n, now.stage, ok)
	}
	if !ok {
		return nil
	}
	newest, _ := c.in.Newest()
	for _, r := range c.s.Records {
		if r.Kind == stream.KindWrite && r.Position > now.at && r.Position <= newest.Last && (c.disk == allDisks || c.disk == r.Disk) {
			n -= int64(len(r.Payload))
		}
	}
	if n != 0 {
		return fmt.Errorf("behind position %d, up to %d, %d bytes too many are pending", now.at, newest.Last, n)
	}
	return nil
}

func (c *replica) act() error {
	switch k := c.r.IntN(40); {
	case k < 8:
		c.in.more(1 + c.r.IntN(3))
	case k < 20:
		_, err := c.take(0)
		return err
	case k < 28:
		if c.applied > c.acked {
			_, err := c.take(c.acked + 1 + c.r.Uint64N(c.applied-c.acked))
			var wrong *CommitError
			if errors.As(err, &wrong) { // only after a power cut: it is not known any more that it was given
				return nil
			}
			return err
		}
	case k < 36:
		if c.applied > c.acked {
			n := c.acked + 1 + c.r.Uint64N(c.applied-c.acked)
			err := c.commit(n)
			var wrong *CommitError
			if errors.As(err, &wrong) {
				return nil
			}
			return err
		}
	case k == 36:
		return c.restart(false)
	case k == 37:
		return c.restart(true)
	case k == 39 && c.r.IntN(3) == 0:
		return c.clear(c.r.IntN(2) == 0)
	case k == 38:
		if err := c.g.Commit(c.t.Context(), c.name, c.applied+1); !errors.Is(err, ErrCommit) {
			return fmt.Errorf("commit of batch %d, which was never given: %v", c.applied+1, err)
		}
	}
	return nil
}
