package stack

import (
	"bytes"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/sim"
)

// pages are a request's data where only the kernel sees it.
type pages struct {
	op     block.Op
	kernel []byte
	here   []byte // nil: it has not come into this process
	fail   error
}

func (p *pages) Data() ([]byte, error) {
	if p.fail != nil {
		return nil, p.fail
	}
	p.here = make([]byte, len(p.kernel))
	if p.op == block.OpWrite {
		copy(p.here, p.kernel)
	}
	return p.here, nil
}

func (p *pages) Carry(int, int64) error { return errors.ErrUnsupported }

// carrier is a disk that moves data by itself.
type carrier struct {
	*sim.Disk
	carried atomic.Int64
	hold    chan struct{} // where it is set a request waits until it is closed
}

func (d *carrier) Move(op block.Op, r block.Range, _ bool, l block.Load) error {
	d.carried.Add(1)
	if d.hold != nil {
		<-d.hold
	}
	p := l.(*pages).kernel
	if op == block.OpRead {
		return whole(len(p))(d.ReadAt(p, r.Off))
	}
	return whole(len(p))(d.WriteAt(p, r.Off))
}

// moved sends a request of 4096 bytes, and says whether its data came into this process.
func moved(t *testing.T, s *Stack, op block.Op, off int64, kernel []byte) (here bool) {
	t.Helper()
	p := &pages{op: op, kernel: kernel}
	if err := s.Move(op, block.Range{Off: off, Len: int64(len(kernel))}, false, p); err != nil {
		t.Fatalf("%s at %d: %v", op, off, err)
	}
	if op == block.OpRead && p.here != nil {
		copy(p.kernel, p.here)
	}
	return p.here != nil
}

// readsPass is a spy that needs to see no read.
type readsPass struct{ *spy }

func (readsPass) Pass(r *Request) bool { return !r.Writes() }

// blindSpy looks at no data, and blindly neither, on the caller's goroutine.
type blindSpy struct{ *spy }

func (blindSpy) Blind() {}

type blindly struct{ blindSpy }

func (blindly) Inline() {}

func attach(t *testing.T, s *Stack, altitude int, name string, f Filter) {
	t.Helper()
	if ok, err := s.Attach(name, altitude, DriverFunc(func(*Below) (Filter, error) { return f, nil })); err != nil || !ok {
		t.Fatal(ok, err)
	}
}

// TestMove: data comes into this process for a filter that handles its request, and for no other.
func TestMove(t *testing.T) {
	y, _ := system(t)
	dev := &carrier{Disk: sim.NewDisk(1 << 20)}
	s := add(t, y, "d", dev)
	p, got := bytes.Repeat([]byte{7}, 4096), make([]byte, 4096)
	check := func(what string, wantWrite, wantRead bool) {
		t.Helper()
		p[0]++
		before := dev.carried.Load()
		write := moved(t, s, block.OpWrite, 8192, p)
		read := moved(t, s, block.OpRead, 8192, got)
		if write != wantWrite || read != wantRead {
			t.Errorf("%s: data of the write here %v, of the read %v", what, write, read)
		}
		want := int64(2)
		if write {
			want--
		}
		if read {
			want--
		}
		if n := dev.carried.Load() - before; n != want || !bytes.Equal(got, p) {
			t.Errorf("%s: %d were carried, want %d; the same is read: %v", what, n, want, bytes.Equal(got, p))
		}
	}
	check("no filter", false, false)
	attach(t, s, 10, "sieve", sieving{})
	check("a filter that needs nothing", false, false)
	seen := 0
	attach(t, s, 15, "blind", blindly{blindSpy{&spy{name: "blind", j: &journal{}, handle: func(r *Request, next Next) error {
		seen++
		return next.Do(r)
	}}}})
	if check("a filter that looks at no data", false, false); seen != 2 {
		t.Errorf("it has seen %d requests", seen)
	}
	f := &spy{name: "writes", j: &journal{}, handle: func(r *Request, next Next) error {
		if !bytes.Equal(r.Data, p) {
			t.Error("the filter sees other data")
		}
		return next.Do(r)
	}}
	attach(t, s, 20, "writes", readsPass{f})
	check("a filter of writes", true, false)
	attach(t, s, 30, "all", passing{})
	check("a filter of everything", true, true)
	for _, name := range []string{"all", "writes"} {
		if err := s.Detach(name); err != nil {
			t.Fatal(err)
		}
	}
	check("they are gone", false, false)
	answer := &spy{name: "answer", j: &journal{}, handle: func(r *Request, next Next) error {
		if r.Op == block.OpRead {
			copy(r.Data, p)
			return nil
		}
		return next.Write(r.Data, r.Range.Off) // of its own
	}}
	attach(t, s, 40, "answer", answer)
	check("a filter that answers", true, true)
}

// TestMoveBelow: what cannot be moved is read and written; errors are the request's.
func TestMoveBelow(t *testing.T) {
	y, set := system(t)
	s := add(t, y, "d", sim.NewDisk(1<<20))
	p, got := bytes.Repeat([]byte{9}, 4096), make([]byte, 4096)
	if !moved(t, s, block.OpWrite, 4096, p) || !moved(t, s, block.OpRead, 4096, got) || !bytes.Equal(got, p) {
		t.Error("a device that moves nothing")
	}
	failed := errors.New("no data")
	r := block.Range{Off: 4096, Len: 4096}
	if err := s.Move(block.OpWrite, r, false, &pages{op: block.OpWrite, kernel: p, fail: failed}); !errors.Is(err, failed) {
		t.Error(err)
	}
	if err := s.Move(block.OpRead, block.Range{Off: 1 << 20, Len: 4096}, false, &pages{op: block.OpRead, kernel: got}); !errors.Is(err, block.ErrBounds) {
		t.Error(err)
	}
	// A filter that breaks has brought the data here, and it goes on from there.
	dev := &carrier{Disk: sim.NewDisk(1 << 20)}
	s = add(t, y, "e", dev)
	attach(t, s, 10, "broken", &spy{name: "broken", j: &journal{}, handle: func(*Request, Next) error { panic("at once") }})
	if !moved(t, s, block.OpWrite, 0, p) || moved(t, s, block.OpRead, 0, got) || !bytes.Equal(got, p) || dev.carried.Load() != 1 {
		t.Errorf("after a panic: %d carried", dev.carried.Load())
	}
	set.Clear("filter-lost", "e/broken")
}

// TestMoveTaken: a request that is taken from a filter which looks at no data goes on without
// it, its data still where it was, and is done once.
func TestMoveTaken(t *testing.T) {
	for name, fault := range map[string]func(next Next, r *Request, never chan struct{}){
		"panics":       func(Next, *Request, chan struct{}) { panic("at once") },
		"panics later": func(next Next, r *Request, _ chan struct{}) { _ = next.Do(r); panic("later") },
		"stalls":       func(_ Next, _ *Request, never chan struct{}) { <-never },
		"stalls later": func(next Next, r *Request, never chan struct{}) { _ = next.Do(r); <-never },
		"goes on late": func(next Next, r *Request, never chan struct{}) { <-never; _ = next.Do(r) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				y, _ := system(t)
				dev := &carrier{Disk: sim.NewDisk(1 << 20)}
				s := add(t, y, "d", dev)
				never := make(chan struct{})
				attach(t, s, 10, "low", sieving{})
				attach(t, s, 20, "f", blindSpy{&spy{name: "f", j: &journal{}, handle: func(r *Request, next Next) error {
					fault(next, r, never)
					return nil
				}}})
				p := bytes.Repeat([]byte{5}, 4096)
				if moved(t, s, block.OpWrite, 4096, p) {
					t.Error("its data came into this process")
				}
				close(never)
				synctest.Wait()
				got := make([]byte, 4096)
				if _, err := dev.ReadAt(got, 4096); err != nil || !bytes.Equal(got, p) || dev.carried.Load() != 1 {
					t.Errorf("carried %d times; what was written is there: %v, %v", dev.carried.Load(), bytes.Equal(got, p), err)
				}
				if len(s.Filters()) != 1 {
					t.Errorf("filters: %v", s.Filters())
				}
			})
		})
	}
}

// TestMoveHoldsAttach: a filter is attached only when what went past it has ended.
func TestMoveHoldsAttach(t *testing.T) {
	y, _ := system(t)
	dev := &carrier{Disk: sim.NewDisk(1 << 20), hold: make(chan struct{})}
	s := add(t, y, "d", dev)
	ended := make(chan error, 1)
	go func() {
		ended <- s.Move(block.OpWrite, block.Range{Len: 4096}, false, &pages{op: block.OpWrite, kernel: make([]byte, 4096)})
	}()
	for dev.carried.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	attached := make(chan error, 1)
	go func() {
		_, err := s.Attach("late", 10, DriverFunc(func(*Below) (Filter, error) { return passing{}, nil }))
		attached <- err
	}()
	for len(s.Filters()) == 0 {
		time.Sleep(time.Millisecond)
	}
	select {
	case err := <-attached:
		t.Errorf("attached while a request is under way that it did not see: %v", err)
	default:
	}
	close(dev.hold)
	if err := errors.Join(<-ended, <-attached); err != nil {
		t.Error(err)
	}
}
