package spool

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"tidemark/internal/block"
	"tidemark/internal/segment"
	"tidemark/internal/sim"
	"tidemark/internal/stream"
)

// TestModel compares the spool with a list and a number for each consumer.
func TestModel(t *testing.T) {
	names := []string{"vault", "involflt", "drain"}
	rapid.Check(t, func(rt *rapid.T) {
		const most = 20000
		fs := sim.New(1)
		s, _, err := Open("/a/spool", Options{MaxBytes: most, FS: fs})
		if err != nil {
			rt.Fatal(err)
		}
		var sizes []int64 // of segment i+1
		next := map[string]int{}
		removed := 0
		waiting := func() (n int64) {
			from := len(sizes)
			for _, at := range next {
				from = min(from, at)
			}
			if len(next) == 0 {
				from = removed
			}
			for _, size := range sizes[from:] {
				n += size
			}
			return n
		}
		kept := func() int { // segments removed so far
			from := len(sizes) - 1
			for _, at := range next {
				from = min(from, at)
			}
			if len(next) == 0 {
				from = 0
			}
			return max(from, 0)
		}
		rt.Repeat(map[string]func(*rapid.T){
			"append": func(rt *rapid.T) {
				g := sealedOf(uint64(len(sizes)+1), rapid.IntRange(1, 12).Draw(rt, "sectors"))
				err := s.Append(g)
				if fits := waiting() == 0 || waiting()+g.Summary.Size <= most; fits != (err == nil) || !fits && !errors.Is(err, ErrFull) {
					rt.Fatalf("append of %d bytes with %d waiting: %v", g.Summary.Size, waiting(), err)
				}
				if err == nil {
					sizes = append(sizes, g.Summary.Size)
				}
			},
			"wrong": func(rt *rapid.T) {
				n := rapid.Uint64Range(0, 40).Draw(rt, "sequence")
				if n != uint64(len(sizes)+1) && len(sizes) > 0 {
					if err := s.Append(sealedOf(n, 1)); !errors.Is(err, ErrSequence) {
						rt.Fatalf("append of %d behind %d: %v", n, len(sizes), err)
					}
				}
			},
			"commit": func(rt *rapid.T) {
				name := rapid.SampledFrom(names).Draw(rt, "cursor")
				c, err := s.Cursor(name)
				if err != nil {
					rt.Fatal(err)
				}
				if _, ok := next[name]; !ok {
					next[name] = removed
				}
				at := next[name]
				n := rapid.IntRange(at, at+2).Draw(rt, "sequence")
				err = c.Commit(uint64(n))
				if right := n == at+1 && at < len(sizes); right != (err == nil) || !right && !errors.Is(err, ErrCommit) {
					rt.Fatalf("commit of %d at %d of %d: %v", n, at+1, len(sizes), err)
				}
				if err == nil {
					next[name]++
				} else if !strings.Contains(err.Error(), fmt.Sprint(n)) || !strings.Contains(err.Error(), fmt.Sprint(at+1)) {
					rt.Fatalf("commit of %d at %d: the error does not name both: %v", n, at+1, err)
				}
			},
			"forget": func(rt *rapid.T) {
				name := rapid.SampledFrom(names).Draw(rt, "cursor")
				if err := s.Forget(name); err != nil {
					rt.Fatal(err)
				}
				delete(next, name)
			},
			"reopen": func(rt *rapid.T) {
				if err := s.Close(); err != nil {
					rt.Fatal(err)
				}
				var r Report
				if s, r, err = Open("/a/spool", Options{MaxBytes: most, FS: fs}); err != nil || len(r.Torn)+len(r.Damaged)+len(r.Cursors) > 0 {
					rt.Fatal(err, r)
				}
			},
			"": func(rt *rapid.T) {
				if len(next) > 0 {
					removed = max(removed, kept())
				}
				var want int64
				for _, size := range sizes[removed:] {
					want += size
				}
				if got := s.Bytes(); got != want {
					rt.Fatalf("%d bytes, want %d", got, want)
				}
				if last, _ := s.Last(); last.Sequence != uint64(len(sizes)) {
					rt.Fatalf("newest %d, want %d", last.Sequence, len(sizes))
				}
				for name, at := range next {
					c, err := s.Cursor(name)
					if err != nil || c.Drained() != (at == len(sizes)) {
						rt.Fatalf("cursor %s at %d of %d: drained is wrong, or %v", name, at, len(sizes), err)
					}
					if at < len(sizes) {
						if i, err := c.Next(context.Background()); err != nil || i.Sequence != uint64(at+1) {
							rt.Fatalf("cursor %s at %d gives %d, %v", name, at, i.Sequence, err)
						}
					}
				}
			},
		})
	})
}

func sealedOf(sequence uint64, sectors int) *segment.Sealed {
	b := segment.NewBuilder(1 << 12)
	p := make([]byte, 512*sectors)
	r := rand.New(rand.NewPCG(sequence, 1))
	for i := range p {
		p[i] = byte(r.Uint32())
	}
	if err := b.Append(&stream.Record{Kind: stream.KindWrite, Op: block.OpWrite, Position: stream.Position(sequence), Range: block.Range{Len: int64(len(p))}, Payload: p}); err != nil {
		panic(err)
	}
	s, err := b.Seal(segment.Header{Group: "g", Sequence: sequence, Disks: testDisks}, segment.State{Last: stream.Position(sequence)})
	if err != nil {
		panic(err)
	}
	return s
}

// TestDamage: a damaged or missing file is named to the cursor that comes to it
// and never passed over; the rest stays usable, and so does the newest's summary.
func TestDamage(t *testing.T) {
	damage := map[string]func(path string) error{
		"cut":     func(p string) error { return os.Truncate(p, 100) },
		"missing": os.Remove,
		"index": func(p string) error {
			f, err := os.OpenFile(p, os.O_RDWR, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.WriteAt([]byte{0xff}, 150)
			return err
		},
	}
	for name, harm := range damage {
		for victim := uint64(1); victim <= 4; victim++ {
			t.Run(fmt.Sprint(name, victim), func(t *testing.T) {
				dir := t.TempDir()
				s, _ := open(t, dir, 1<<20)
				for seq := range uint64(4) {
					if err := s.Append(sealedOf(seq+1, 9)); err != nil {
						t.Fatal(err)
					}
				}
				if _, err := s.Cursor("vault"); err != nil {
					t.Fatal(err)
				}
				s.Close()
				if err := harm(s.path(victim)); err != nil {
					t.Fatal(err)
				}
				s, report := open(t, dir, 1<<20)
				c, _ := s.Cursor("vault")
				for seq := uint64(1); seq < victim; seq++ {
					if err := c.Commit(seq); err != nil {
						t.Fatal(err)
					}
				}
				last, _ := s.Last()
				if victim == 4 && name == "missing" {
					return // nothing tells that there was one
				}
				if len(report.Damaged) != 1 && !(name == "missing" && victim == 1) {
					t.Errorf("report %+v", report)
				}
				if victim == 4 && name == "cut" {
					if last.Sequence != 3 || len(report.Torn) != 1 {
						t.Fatalf("newest %d, report %+v", last.Sequence, report)
					}
					return
				}
				var d *DamagedError
				ctx, cancel := context.WithCancel(t.Context())
				cancel()
				if i, err := c.Next(ctx); !errors.As(err, &d) || d.Sequence != victim || !errors.Is(err, segment.ErrDamaged) {
					t.Errorf("next at the damaged segment: %d, %v", i.Sequence, err)
				}
				if err := c.Commit(victim); !errors.Is(err, segment.ErrDamaged) {
					t.Errorf("commit of the damaged segment: %v", err)
				}
				if last.Sequence != 4 || s.Append(sealedOf(5, 1)) != nil {
					t.Errorf("the newest is %d", last.Sequence)
				}
			})
		}
	}
}

// TestDrainedNewestDamaged: where a consumer has had the newest, its number is
// not used again behind its back.
func TestDrainedNewestDamaged(t *testing.T) {
	dir := t.TempDir()
	s, _ := open(t, dir, 1<<20)
	c, _ := s.Cursor("vault")
	if err := errors.Join(s.Append(sealedOf(1, 1)), c.Commit(1), s.Close(), os.Truncate(s.path(1), 9)); err != nil {
		t.Fatal(err)
	}
	var d *DamagedError
	if _, _, err := Open(dir, Options{MaxBytes: 1 << 20}); !errors.As(err, &d) || d.Sequence != 1 {
		t.Fatal(err)
	}
}

// TestConcurrent: one appender and many consumers; each gets everything in order.
func TestConcurrent(t *testing.T) {
	s, _ := open(t, t.TempDir(), 4000)
	const last = 60
	var wg sync.WaitGroup
	for i := range 4 {
		c, err := s.Cursor(fmt.Sprint("c", i))
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			for want := uint64(1); want <= last; want++ {
				item, err := c.Next(t.Context())
				if err != nil || item.Sequence != want {
					t.Errorf("got %d, want %d: %v", item.Sequence, want, err)
					return
				}
				f, err := item.Open()
				if err != nil {
					t.Error(err)
					return
				}
				if err := errors.Join(f.Close(), c.Commit(want)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for seq := uint64(1); seq <= last; seq++ {
		g := sealedOf(seq, 1)
		if err := errors.Join(s.WaitRoom(t.Context(), g.Summary.Size), s.Append(g)); err != nil {
			t.Fatal(err)
		}
	}
	wg.Wait()
	done := make(chan error)
	c, _ := s.Cursor("c0")
	go func() { _, err := c.Next(context.Background()); done <- err }()
	s.Close()
	if err := <-done; !errors.Is(err, ErrClosed) {
		t.Errorf("next of a closed spool: %v", err)
	}
}

func BenchmarkAppendCommit(b *testing.B) {
	dir := b.TempDir()
	s, _, err := Open(dir, Options{MaxBytes: 1 << 30})
	if err != nil {
		b.Fatal(err)
	}
	c, _ := s.Cursor("vault")
	g := sealedOf(1, 8192)
	b.SetBytes(g.Summary.Size)
	seq := uint64(0)
	for b.Loop() {
		seq++
		g.Summary.Sequence = seq // what is in the file does not matter here
		if err := errors.Join(s.Append(g), c.Commit(seq)); err != nil {
			b.Fatal(err)
		}
	}
}
