package track

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"tidemark/internal/block"
	"tidemark/internal/cbt"
	"tidemark/internal/health"
	"tidemark/internal/sim"
	"tidemark/internal/stack"
)

func served(t *testing.T, disk *sim.Disk, m *cbt.Map) (*stack.System, *stack.Stack) {
	t.Helper()
	y := stack.New(stack.Config{}, &health.Set{})
	t.Cleanup(func() { _ = y.Close() })
	s, err := y.Add("d", disk)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Attach(Name, Altitude, Driver(m)); err != nil {
		t.Fatal(err)
	}
	return y, s
}

// TestMarks: every kind of change, also a failed one, and nothing else.
func TestMarks(t *testing.T) {
	disk := sim.NewDisk(1 << 20)
	m := cbt.New(1 << 20)
	_, s := served(t, disk, m)
	m.Take()
	p := make([]byte, 512)
	bad := errors.New("bad sector")
	disk.Fault = func(op block.Op, r block.Range) error {
		live, err := m.Live(m.Info().Generation, 1)
		if err != nil {
			t.Error(err)
		}
		marked := slices.ContainsFunc(slices.Collect(live.Ranges()), func(have block.Range) bool { return have.Contains(r) })
		if op != block.OpRead && op != block.OpFlush && !marked {
			t.Errorf("%s %s reached the disk before it was marked", op, r)
		}
		if r.Off == 5*4096 {
			return bad
		}
		return nil
	}
	_, e1 := s.WriteAt(p, 0)
	_, e2 := s.WriteFUA(p, 2*4096)
	_, e3 := s.ReadAt(p, 7*4096)
	_, e4 := s.WriteAt(p, 5*4096)
	if err := errors.Join(e1, e2, e3, s.WriteZeroes(block.Range{Off: 9 * 4096, Len: 4097}), s.Discard(block.Range{Off: 20 * 4096, Len: 4096}), s.Flush()); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(e4, bad) {
		t.Errorf("the failed write: %v", e4)
	}
	since, err := m.Take().Since(m.Info().Generation, 1)
	if err != nil {
		t.Fatal(err)
	}
	want := []block.Range{{Off: 0, Len: 4096}, {Off: 2 * 4096, Len: 4096}, {Off: 5 * 4096, Len: 4096}, {Off: 9 * 4096, Len: 8192}, {Off: 20 * 4096, Len: 4096}}
	if got := slices.Collect(since.Ranges()); !slices.Equal(got, want) {
		t.Errorf("marked %v, want %v", got, want)
	}
}

// TestModel: writers side by side, failing requests, snapshots in between. Between
// any two snapshots of a generation the map names every block that differs in the
// shadow of the disk, and none that no request touched; where it may not know it says so.
func TestModel(t *testing.T) {
	const blocks, writers = 512, 4
	for seed := range sim.Seeds(8) {
		rng := rand.New(rand.NewPCG(seed, 5))
		disk := sim.NewDisk(blocks * 4096)
		m := cbt.New(disk.Size())
		_, s := served(t, disk, m)
		bad := errors.New("bad sector")
		disk.Fault = func(op block.Op, r block.Range) error {
			if r.Off/4096%37 == 5 && op != block.OpRead {
				return bad
			}
			return nil
		}
		type instant struct {
			generation cbt.Generation
			number     uint8
			content    []byte
			touched    [blocks]bool // since the instant before
		}
		var taken []instant
		var touched [blocks]atomic.Bool
		for round := range 6 + rng.IntN(6) {
			var all sync.WaitGroup
			for w := range uint64(writers) {
				rng := rand.New(rand.NewPCG(seed, 100+uint64(round)*writers+w))
				all.Go(func() {
					for range rng.IntN(8) {
						change(t, s, rng, bad, &touched)
					}
				})
			}
			all.Wait()
			if rng.IntN(8) == 0 {
				m.Reset()
			}
			c := m.Take()
			now := instant{generation: c.Info().Generation, number: c.Info().Number, content: disk.Bytes()}
			for i := range touched {
				now.touched[i] = touched[i].Swap(false)
			}
			taken = append(taken, now)
			for i, before := range taken[:len(taken)-1] {
				since, err := c.Since(before.generation, before.number)
				if before.generation != now.generation {
					if !errors.Is(err, cbt.ErrFullCopy) {
						t.Fatalf("seed %d: changes over a generation's end: %v", seed, err)
					}
					continue
				}
				if err != nil {
					t.Fatalf("seed %d: %v", seed, err)
				}
				var named [blocks]bool
				for r := range since.Ranges() {
					for b := r.Off / 4096; b*4096 < r.End(); b++ {
						named[b] = true
					}
				}
				for b := range named {
					differs := !bytes.Equal(before.content[b*4096:][:4096], now.content[b*4096:][:4096])
					var was bool
					for _, x := range taken[i+1:] {
						was = was || x.touched[b]
					}
					if differs && !named[b] || named[b] && !was {
						t.Fatalf("seed %d: from %d to %d block %d differs: %v, touched: %v, named: %v", seed, before.number, now.number, b, differs, was, named[b])
					}
				}
			}
		}
	}
}

// change does one request of any kind, and notes which blocks it could change.
func change(t *testing.T, s *stack.Stack, rng *rand.Rand, bad error, touched *[512]atomic.Bool) {
	off := rng.Int64N(s.Size())
	r := block.Range{Off: off, Len: 1 + rng.Int64N(min(s.Size()-off, 1<<rng.IntN(17)))}
	p := bytes.Repeat([]byte{byte(rng.IntN(3))}, int(r.Len))
	var err error
	kind := rng.IntN(6)
	switch kind {
	case 0:
		err = s.WriteZeroes(r)
	case 1:
		err = s.Discard(r)
	case 2:
		_, err = s.WriteFUA(p, off)
	case 3:
		_, err = s.ReadAt(p, off)
	default:
		_, err = s.WriteAt(p, off)
	}
	if err != nil && !errors.Is(err, bad) {
		t.Error(err)
	}
	for b := r.Off / 4096; b*4096 < r.End() && kind != 3; b++ {
		touched[b].Store(true)
	}
}

// TestGenerationEnds where the map would miss something, and only there.
func TestGenerationEnds(t *testing.T) {
	for what, c := range map[string]struct {
		do   func(y *stack.System, s *stack.Stack, disk *sim.Disk) error
		ends bool
	}{
		"the filter is detached": {func(y *stack.System, s *stack.Stack, _ *sim.Disk) error { return s.Detach(Name) }, true},
		"the device is removed":  {func(y *stack.System, s *stack.Stack, _ *sim.Disk) error { return y.Remove("d") }, false},
		"the device is gone":     {func(y *stack.System, s *stack.Stack, _ *sim.Disk) error { return y.Surprise("d") }, true},
		"the device grows": {func(y *stack.System, s *stack.Stack, disk *sim.Disk) error {
			disk.Resize(2 << 20)
			s.Resized()
			_, err := s.WriteAt([]byte("x"), 1<<20)
			return err
		}, true},
	} {
		disk := sim.NewDisk(1 << 20)
		m := cbt.New(1 << 20)
		y, s := served(t, disk, m)
		before := m.Take().Info()
		if err := c.do(y, s, disk); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if got := m.Writing().Generation != before.Generation; got != c.ends {
			t.Errorf("%s: the generation ended: %v", what, got)
		}
	}
	f := &Filter{cbt.New(1 << 20)}
	g := f.changes.Writing().Generation
	if f.Spoil(nil); f.changes.Writing().Generation == g {
		t.Error("the filter was lost, and the generation goes on")
	}
	y := stack.New(stack.Config{}, &health.Set{})
	defer y.Close()
	s, err := y.Add("d", sim.NewDisk(1<<20))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Attach(Name, Altitude, Driver(cbt.New(4096))); err == nil {
		t.Error("a map of another size was taken")
	}
}

// TestNothingIsClaimedUnseen: whatever way the filter left a device that lives on,
// no two snapshots afterwards say that what was written between them did not change.
func TestNothingIsClaimedUnseen(t *testing.T) {
	for what, leave := range map[string]func(f *Filter, s *stack.Stack) error{
		"detached": func(_ *Filter, s *stack.Stack) error { return s.Detach(Name) },
		"lost":     func(f *Filter, _ *stack.Stack) error { f.Spoil(nil); f.Detach(stack.Lost); return nil },
	} {
		m := cbt.New(1 << 20)
		_, s := served(t, sim.NewDisk(1<<20), m)
		if err := leave(&Filter{m}, s); err != nil {
			t.Fatal(err)
		}
		before := m.Take().Info()
		if _, err := s.WriteAt([]byte("x"), 0); err != nil {
			t.Fatal(err)
		}
		m.Take()
		if c, err := m.Since(before.Generation, before.Number); !errors.Is(err, cbt.ErrFullCopy) {
			t.Errorf("%s: what changed is said to be %v, %v", what, c, err)
		}
	}
}

// BenchmarkTracked is what tracking adds to a write that costs nothing else.
func BenchmarkTracked(b *testing.B) {
	m := cbt.New(1 << 30)
	f := &Filter{m}
	r := &stack.Request{Op: block.OpWrite, Range: block.Range{Len: 4096}}
	b.ReportAllocs()
	for b.Loop() {
		r.Range.Off = (r.Range.Off + 7919*4096) % (1 << 30)
		f.Pass(r)
	}
}
