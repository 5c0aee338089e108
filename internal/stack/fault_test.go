package stack

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/health"
	"tidemark/internal/sim"
)

func condition(set *health.Set, code string) *health.Condition {
	for _, c := range set.List() {
		if c.Code == code {
			return &c
		}
	}
	return nil
}

// TestFaultyFilterIsTakenOut: whatever it does wrong, its loss is declared before
// anything goes past it, the request that met it ends well, and the device lives on.
func TestFaultyFilterIsTakenOut(t *testing.T) {
	never := make(chan struct{})
	faults := map[string]func(f *spy, r *Request, next Next) error{
		"fails":          func(f *spy, r *Request, next Next) error { return fmt.Errorf("table is torn: %w", ErrBroken) },
		"panics":         func(f *spy, r *Request, next Next) error { panic("table is torn") },
		"ends":           func(f *spy, r *Request, next Next) error { runtime.Goexit(); return nil },
		"says so":        func(f *spy, r *Request, next Next) error { f.below.Fail(errors.New("torn")); return errors.New("!") },
		"stalls":         func(f *spy, r *Request, next Next) error { <-never; return nil },
		"panics later":   func(f *spy, r *Request, next Next) error { _ = next.Do(r); panic("late") },
		"stalls later":   func(f *spy, r *Request, next Next) error { _ = next.Do(r); <-never; return nil },
		"fails its own":  func(f *spy, r *Request, next Next) error { _ = next.Read(make([]byte, 512), 0); panic("own") },
		"in many pieces": func(f *spy, r *Request, next Next) error { go next.Do(r); go next.Do(r); go next.Do(r); panic("many") },
	}
	for name, fault := range faults {
		for _, inline := range []bool{false, true} {
			if inline && (strings.HasPrefix(name, "stalls") || name == "ends") {
				continue // on the caller's goroutine: the contract of Inline
			}
			t.Run(fmt.Sprintf("%s/inline=%v", name, inline), func(t *testing.T) {
				never = make(chan struct{})
				synctest.Test(t, func(t *testing.T) {
					y, set := system(t)
					never = make(chan struct{}) // of this bubble
					defer close(never)
					disk := sim.NewDisk(1 << 20)
					j := &journal{}
					var spoiled, early atomic.Bool
					disk.Fault = func(op block.Op, r block.Range) error {
						if !spoiled.Load() && op == block.OpWrite {
							early.Store(true)
						}
						return nil
					}
					s := add(t, y, "d", disk)
					f := &spy{name: "f", j: j, spoil: func(error) { spoiled.Store(true) }}
					f.handle = func(r *Request, next Next) error { return fault(f, r, next) }
					d := f.driver()
					if inline {
						d = DriverFunc(func(b *Below) (Filter, error) { f.below = b; return inlineSpy{f}, nil })
					}
					low := &spy{name: "low", j: &journal{}}
					if _, err := s.Attach("low", 1, low.driver()); err != nil {
						t.Fatal(err)
					}
					if _, err := s.Attach("f", 2, d); err != nil {
						t.Fatal(err)
					}
					for i := range 3 {
						want := []byte{byte(i + 1)}
						if _, err := s.WriteAt(want, int64(i)); err != nil {
							t.Fatalf("write %d: %v", i, err)
						}
					}
					got := make([]byte, 3)
					if _, err := s.ReadAt(got, 0); err != nil || !slices.Equal(got, []byte{1, 2, 3}) {
						t.Errorf("read back %v, %v", got, err)
					}
					passedOn := strings.HasSuffix(name, "later") || name == "in many pieces"
					if early.Load() && !passedOn {
						t.Error("a write went past the filter before its loss was declared")
					}
					c := condition(set, "filter-lost")
					if c == nil || c.Subject != "d/f" || !strings.Contains(c.Detail, "the f history") {
						t.Errorf("condition: %+v", c)
					}
					if got := s.Filters(); !slices.Equal(got, []Info{{"low", 1}}) {
						t.Errorf("filters: %v", got)
					}
					synctest.Wait()
					if lines := j.take(); !slices.Contains(lines, "f: lost") || slices.Index(lines, "f: spoil") > slices.Index(lines, "f: lost") {
						t.Errorf("what the filter was told: %q", lines)
					}
					if _, err := f.below.WriteAt([]byte("x"), 0); !errors.Is(err, ErrExpelled) {
						t.Errorf("an expelled filter still writes: %v", err)
					}
				})
			})
		}
	}
}

// TestReportsGoWithTheDevice: what was said of a device's filters is not said any
// more when there is no device; of another whose name begins alike it is.
func TestReportsGoWithTheDevice(t *testing.T) {
	for what, end := range map[string]func(y *System) error{
		"removed": func(y *System) error { return y.Remove("d") }, "gone": func(y *System) error { return y.Surprise("d") },
	} {
		y, set := system(t)
		for _, name := range []string{"d", "d2"} {
			f := &spy{name: "f", j: &journal{}, handle: func(*Request, Next) error { return ErrBroken }}
			s := add(t, y, name, sim.NewDisk(1<<20))
			if _, err := s.Attach("f", 1, f.driver()); err != nil {
				t.Fatal(err)
			}
			if err := s.Flush(); err != nil {
				t.Fatal(err)
			}
		}
		if err := end(y); err != nil {
			t.Fatal(err)
		}
		if c := set.List(); len(c) != 1 || c[0].Subject != "d2/f" {
			t.Errorf("%s: %+v", what, c)
		}
	}
}

// TestExpelledFilterLeadsNowhere: a stalled filter that wakes up later cannot
// pass its request on again, over what was written since.
func TestExpelledFilterLeadsNowhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		y, _ := system(t)
		disk := sim.NewDisk(1 << 20)
		s := add(t, y, "d", disk)
		wake, late := make(chan struct{}), make(chan error, 2)
		f := &spy{name: "f", j: &journal{}, handle: func(r *Request, next Next) error {
			<-wake
			late <- next.Do(r)
			late <- next.Write([]byte("old"), 0)
			return nil
		}}
		if _, err := s.Attach("f", 1, f.driver()); err != nil {
			t.Fatal(err)
		}
		if _, err := s.WriteAt([]byte("old"), 0); err != nil {
			t.Fatal(err)
		}
		if _, err := s.WriteAt([]byte("new"), 0); err != nil {
			t.Fatal(err)
		}
		close(wake)
		for range 2 {
			if err := <-late; !errors.Is(err, ErrExpelled) {
				t.Errorf("a late request: %v", err)
			}
		}
		if got := string(disk.Bytes()[:3]); got != "new" {
			t.Errorf("the device has %q", got)
		}
	})
}

// TestWaitingBelowIsNoStall: a slow device, or a slow filter below, is not held
// against a filter; a filter that waits for the device is not taken out.
func TestWaitingBelowIsNoStall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		y, set := system(t)
		disk := sim.NewDisk(1 << 20)
		disk.Fault = func(block.Op, block.Range) error { time.Sleep(10 * time.Minute); return nil }
		s := add(t, y, "d", disk)
		f := &spy{name: "f", j: &journal{}}
		if _, err := s.Attach("f", 1, f.driver()); err != nil {
			t.Fatal(err)
		}
		if err := s.Flush(); err != nil {
			t.Error(err)
		}
		if c := set.List(); len(c) != 0 {
			t.Errorf("conditions: %+v", c)
		}
	})
}

// TestWatchdogReports: a filter that keeps a request is reported before it is
// taken out, and the report goes when the request does.
func TestWatchdogReports(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		y, set := system(t)
		s := add(t, y, "d", sim.NewDisk(1<<20))
		f := &spy{name: "f", j: &journal{}, handle: func(r *Request, next Next) error { time.Sleep(20 * time.Second); return next.Do(r) }}
		if _, err := s.Attach("f", 1, f.driver()); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- s.Flush() }()
		time.Sleep(10 * time.Second)
		if c := condition(set, "filter-slow"); c == nil || c.Subject != "d/f" {
			t.Errorf("after 10 s: %+v", set.List())
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
		time.Sleep(2 * time.Second)
		if c := set.List(); len(c) != 0 {
			t.Errorf("after the request: %+v", c)
		}
	})
}

// TestAnswersAreBounded: a filter that never answers keeps nothing up.
func TestAnswersAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		y, set := system(t)
		s := add(t, y, "d", sim.NewDisk(1<<20))
		never := make(chan struct{})
		defer close(never)
		if _, err := s.Attach("mute", 1, DriverFunc(func(*Below) (Filter, error) { <-never; return nil, nil })); !errors.Is(err, ErrStalled) {
			t.Errorf("attach: %v", err)
		}
		f := &spy{name: "f", j: &journal{}, detach: func(Reason) { <-never }, spoil: func(error) { <-never }}
		if _, err := s.Attach("f", 1, f.driver()); err != nil {
			t.Fatal(err)
		}
		if err := s.Detach("f"); !errors.Is(err, ErrStalled) {
			t.Errorf("detach: %v", err)
		}
		g := &spy{name: "g", j: &journal{}, spoil: func(error) { <-never }, handle: func(*Request, Next) error { panic("g") }}
		if _, err := s.Attach("g", 1, g.driver()); err != nil {
			t.Fatal(err)
		}
		if err := s.Flush(); err != nil {
			t.Error(err)
		}
		if c := set.List(); len(c) != 2 || !strings.Contains(c[1].Detail, "did not say in time") {
			t.Errorf("conditions: %+v", c)
		}
	})
}

// TestDetachOfAStalledFilter: its requests are taken from it, and end.
func TestDetachOfAStalledFilter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		y, _ := system(t)
		disk := sim.NewDisk(1 << 20)
		s := add(t, y, "d", disk)
		never := make(chan struct{})
		defer close(never)
		f := &spy{name: "f", j: &journal{}, handle: func(*Request, Next) error { <-never; return nil }}
		if _, err := s.Attach("f", 1, f.driver()); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { _, err := s.WriteAt([]byte("x"), 0); ended <- err }()
		synctest.Wait()
		if err := s.Detach("f"); !errors.Is(err, ErrStalled) {
			t.Errorf("detach: %v", err)
		}
		if err := <-ended; err != nil || disk.Bytes()[0] != 'x' {
			t.Errorf("the write: %v, the device has %q", err, disk.Bytes()[0])
		}
	})
}

// TestChaos: filters that delay, fail, panic, complete and split, coming and
// going under load, against a shadow of every byte. The device never suffers.
func TestChaos(t *testing.T) {
	const workers, area = 4, 16 << 10
	for seed := range sim.Seeds(6) {
		y := New(Config{Report: time.Hour}, &health.Set{})
		disk := sim.NewDisk(workers * area)
		s, err := y.Add("d", disk)
		if err != nil {
			t.Fatal(err)
		}
		var load sync.WaitGroup
		var stop atomic.Bool
		shadows := make([][]byte, workers)
		for w := range workers {
			load.Go(func() { shadows[w] = write(t, s, rand.New(rand.NewPCG(seed, uint64(w))), int64(w*area), area, &stop) })
		}
		rng := rand.New(rand.NewPCG(seed, 99))
		for n := range 60 {
			name := fmt.Sprint(n)
			if _, err := s.Attach(name, rng.IntN(1<<30), DriverFunc(func(b *Below) (Filter, error) { return &imp{below: b, kind: rng.IntN(5)}, nil })); err != nil {
				t.Fatal(err)
			}
			if n >= 3 {
				if err := s.Detach(fmt.Sprint(n - 3)); err != nil && !errors.Is(err, ErrNoSuch) {
					t.Fatal(err)
				}
			}
		}
		stop.Store(true)
		load.Wait()
		if err := y.Close(); err != nil {
			t.Error(err)
		}
		if !slices.Equal(disk.Bytes(), slices.Concat(shadows...)) {
			t.Errorf("seed %d: the device differs from what was written", seed)
		}
	}
}

// write writes and reads an area at random until stop, and gives what it must hold.
func write(t *testing.T, s *Stack, rng *rand.Rand, base int64, size int, stop *atomic.Bool) []byte {
	shadow := make([]byte, size)
	for n := 0; !stop.Load() || n < 50; n++ {
		off := rng.IntN(size)
		p := make([]byte, 1+rng.IntN(min(3000, size-off)))
		switch rng.IntN(4) {
		case 0:
			if err := s.WriteZeroes(block.Range{Off: base + int64(off), Len: int64(len(p))}); err != nil {
				t.Error(err)
			}
			clear(shadow[off : off+len(p)])
		case 1:
			if _, err := s.ReadAt(p, base+int64(off)); err != nil || !slices.Equal(p, shadow[off:off+len(p)]) {
				t.Errorf("read of %d+%d differs, %v", off, len(p), err)
			}
		default:
			for i := range p {
				p[i] = byte(rng.Uint32())
			}
			if _, err := s.WriteAt(p, base+int64(off)); err != nil {
				t.Error(err)
			}
			copy(shadow[off:], p)
		}
	}
	return shadow
}

// imp is a filter that does harmless and harmful things.
type imp struct {
	below *Below
	kind  int
	n     atomic.Int64
}

func (i *imp) Handle(r *Request, next Next) error {
	n := i.n.Add(1)
	switch i.kind {
	case 0:
		time.Sleep(20 * time.Microsecond)
	case 1:
		if n == 20 {
			panic("imp")
		}
	case 2:
		if n > 10 {
			return ErrBroken
		}
	case 3:
		if r.Op == block.OpWrite && r.Range.Len > 1 {
			half := r.Range.Len / 2
			return errors.Join(next.Write(r.Data[:half], r.Range.Off), next.Write(r.Data[half:], r.Range.Off+half))
		}
	case 4:
		if n == 15 {
			err := next.Do(r)
			i.below.Fail(errors.New("later"))
			return err
		}
	}
	return next.Do(r)
}

func (i *imp) Spoil(error) string { return "nothing" }
func (i *imp) Detach(Reason)      {}

// glancing is a sieve that counts what it sees, and panics at one of its requests.
type glancing struct {
	passing
	seen, at int
}

func (g *glancing) Pass(*Request) bool {
	if g.seen++; g.seen == g.at {
		panic("at a glance")
	}
	return true
}

// TestSieveThatPanics: that one is taken out, and no other; the request goes on
// below it, past each filter once.
func TestSieveThatPanics(t *testing.T) {
	y, set := system(t)
	s := add(t, y, "d", sim.NewDisk(1<<20))
	high, bad, low := &glancing{}, &glancing{at: 2}, &glancing{}
	for i, f := range []*glancing{low, bad, high} {
		if _, err := s.Attach([]string{"low", "bad", "high"}[i], i, DriverFunc(func(*Below) (Filter, error) { return f, nil })); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 4 {
		if _, err := s.WriteAt([]byte{1}, int64(i)); err != nil {
			t.Fatalf("write %d: %v", i, err)
		}
	}
	if high.seen != 4 || bad.seen != 2 || low.seen != 4 {
		t.Errorf("of 4 requests they saw %d, %d and %d, want 4, 2 and 4", high.seen, bad.seen, low.seen)
	}
	if got := s.Filters(); !slices.Equal(got, []Info{{"high", 2}, {"low", 0}}) {
		t.Errorf("filters: %v", got)
	}
	if c := condition(set, "filter-lost"); c == nil || c.Subject != "d/bad" {
		t.Errorf("condition: %+v", c)
	}
}
