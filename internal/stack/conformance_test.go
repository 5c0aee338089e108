package stack

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/health"
	"tidemark/internal/sim"
	"tidemark/internal/testkit"
)

// The tests of this file are named after the requirements of the block filter
// API that the project started from.

// system gives a system whose end the test checks.
func system(t *testing.T) (*System, *health.Set) {
	t.Helper()
	set := &health.Set{}
	y := New(Config{}, set)
	t.Cleanup(func() {
		if err := y.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return y, set
}

func add(t *testing.T, y *System, name string, dev block.Device) *Stack {
	t.Helper()
	s, err := y.Add(name, dev)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// journal is what happened, in order.
type journal struct {
	mu    sync.Mutex
	lines []string
}

func (j *journal) add(format string, args ...any) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = append(j.lines, fmt.Sprintf(format, args...))
}

func (j *journal) take() []string {
	j.mu.Lock()
	defer j.mu.Unlock()
	out := j.lines
	j.lines = nil
	return out
}

func (j *journal) want(t *testing.T, what string, lines ...string) {
	t.Helper()
	if got := j.take(); !slices.Equal(got, lines) {
		t.Errorf("%s:\n got %q\nwant %q", what, got, lines)
	}
}

// spy is a filter that notes what it sees; its functions replace what it does.
type spy struct {
	name   string
	j      *journal
	below  *Below
	handle func(r *Request, next Next) error
	spoil  func(cause error)
	detach func(why Reason)
}

func (f *spy) Handle(r *Request, next Next) error {
	if f.handle != nil {
		return f.handle(r, next)
	}
	f.j.add("%s: %s %s fua=%v", f.name, r.Op, r.Range, r.FUA)
	err := next.Do(r)
	f.j.add("%s: done", f.name)
	return err
}

func (f *spy) Spoil(cause error) string {
	if f.spoil != nil {
		f.spoil(cause)
	}
	f.j.add("%s: spoil", f.name)
	return "the " + f.name + " history"
}

func (f *spy) Detach(why Reason) {
	if f.detach != nil {
		f.detach(why)
	}
	f.j.add("%s: %s", f.name, why)
}

func (f *spy) driver() Driver {
	return DriverFunc(func(b *Below) (Filter, error) {
		f.j.add("%s: asked about %s", f.name, b.Device())
		f.below = b
		return f, nil
	})
}

type inlineSpy struct{ *spy }

func (inlineSpy) Inline() {}

// TestInterceptionOfAnyRequest: every kind reaches the filter as it is, and then the device.
func TestInterceptionOfAnyRequest(t *testing.T) {
	testkit.NoLeaks(t)
	for _, inline := range []bool{false, true} {
		y, _ := system(t)
		j := &journal{}
		disk := sim.NewDisk(1 << 20)
		disk.Fault = func(op block.Op, r block.Range) error { j.add("disk: %s %s", op, r); return nil }
		s := add(t, y, "d", disk)
		f := &spy{name: "f", j: j}
		d := f.driver()
		if inline {
			d = DriverFunc(func(b *Below) (Filter, error) { return inlineSpy{f}, nil })
		}
		if _, err := s.Attach("f", 1, d); err != nil {
			t.Fatal(err)
		}
		j.take()
		p, r := make([]byte, 4096), block.Range{Off: 8192, Len: 4096}
		for _, c := range []struct {
			do   func() error
			want string
			fua  bool
		}{
			{func() error { _, err := s.ReadAt(p, r.Off); return err }, "read 8192+4096", false},
			{func() error { _, err := s.WriteAt(p, r.Off); return err }, "write 8192+4096", false},
			{func() error { _, err := s.WriteFUA(p, r.Off); return err }, "write 8192+4096", true},
			{func() error { return s.Discard(r) }, "discard 8192+4096", false},
			{func() error { return s.WriteZeroes(r) }, "write-zeroes 8192+4096", false},
			{func() error { return s.Flush() }, "flush 0+0", false},
		} {
			if err := c.do(); err != nil {
				t.Fatalf("%s: %v", c.want, err)
			}
			j.want(t, c.want, fmt.Sprintf("f: %s fua=%v", c.want, c.fua), "disk: "+c.want, "f: done")
		}
	}
}

// plain hides what a device can do beyond block.Device.
type plain struct{ block.Device }

// TestDeviceWithoutAbilities: FUA becomes write and flush, zeroes are written, a discard is dropped.
func TestDeviceWithoutAbilities(t *testing.T) {
	y, _ := system(t)
	j := &journal{}
	disk := sim.NewDisk(1 << 20)
	if _, err := disk.WriteAt(slices.Repeat([]byte{7}, 1<<20), 0); err != nil {
		t.Fatal(err)
	}
	disk.Fault = func(op block.Op, r block.Range) error { j.add("%s %s", op, r); return nil }
	s := add(t, y, "d", plain{disk})
	if _, err := s.WriteFUA(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	j.want(t, "FUA", "write 0+512", "flush 0+0")
	if err := s.Discard(block.Range{Off: 4096, Len: 4096}); err != nil {
		t.Fatal(err)
	}
	j.want(t, "discard")
	if err := s.WriteZeroes(block.Range{Off: 512, Len: 100000}); err != nil {
		t.Fatal(err)
	}
	for i, b := range disk.Bytes() {
		if (b == 0) != (i < 100512) {
			t.Fatalf("byte %d is %d", i, b)
		}
	}
}

// TestSeveralFiltersAtTheirAltitudes: whatever the order in which they came, a
// request descends from the highest, its completion ascends from the lowest.
func TestSeveralFiltersAtTheirAltitudes(t *testing.T) {
	y, _ := system(t)
	s := add(t, y, "d", sim.NewDisk(1<<20))
	j := &journal{}
	for _, altitude := range []int{200, 400, 100, 300} {
		f := &spy{name: fmt.Sprint(altitude), j: j}
		if _, err := s.Attach(f.name, altitude, f.driver()); err != nil {
			t.Fatal(err)
		}
	}
	j.take()
	if err := s.Flush(); err != nil {
		t.Fatal(err)
	}
	j.want(t, "order", "400: flush 0+0 fua=false", "300: flush 0+0 fua=false", "200: flush 0+0 fua=false", "100: flush 0+0 fua=false",
		"100: done", "200: done", "300: done", "400: done")
	for _, other := range []struct {
		name     string
		altitude int
	}{{"300", 301}, {"new", 300}} {
		f := &spy{name: "new", j: j}
		if _, err := s.Attach(other.name, other.altitude, f.driver()); !errors.Is(err, ErrExists) {
			t.Errorf("%s at %d beside 300 at 300: %v", other.name, other.altitude, err)
		}
	}
}

// TestOwnRequestsSeenOnlyBelow: those that a filter makes while it handles a
// request, and those that it makes at any time.
func TestOwnRequestsSeenOnlyBelow(t *testing.T) {
	y, _ := system(t)
	s := add(t, y, "d", sim.NewDisk(1<<20))
	j := &journal{}
	high, low := &spy{name: "high", j: j}, &spy{name: "low", j: j}
	mid := &spy{name: "mid", j: j, handle: func(r *Request, next Next) error {
		j.add("mid: %s %s", r.Op, r.Range)
		return errors.Join(next.Read(make([]byte, 512), 0), next.Write(make([]byte, 512), 512), next.Do(r))
	}}
	for i, f := range []*spy{low, mid, high} {
		if _, err := s.Attach(f.name, i, f.driver()); err != nil {
			t.Fatal(err)
		}
	}
	j.take()
	if err := s.Flush(); err != nil {
		t.Fatal(err)
	}
	j.want(t, "while handling", "high: flush 0+0 fua=false", "mid: flush 0+0", "low: read 0+512 fua=false", "low: done",
		"low: write 512+512 fua=false", "low: done", "low: flush 0+0 fua=false", "low: done", "high: done")
	if _, err := mid.below.WriteAt(make([]byte, 512), 1024); err != nil {
		t.Fatal(err)
	}
	j.want(t, "at any time", "low: write 1024+512 fua=false", "low: done")
	if err := low.below.Discard(block.Range{Len: 512}); err != nil {
		t.Fatal(err)
	}
	j.want(t, "of the lowest")
	if _, err := high.below.WriteAt(make([]byte, 512), 1<<20); !errors.Is(err, block.ErrBounds) {
		t.Errorf("beyond the end: %v", err)
	}
}

// TestPassCompleteHold are the three things to do with a request.
func TestPassCompleteHold(t *testing.T) {
	y, _ := system(t)
	disk := sim.NewDisk(1 << 20)
	s := add(t, y, "d", disk)
	release, holds := make(chan struct{}), make(chan struct{})
	bad := errors.New("not today")
	f := &spy{name: "f", j: &journal{}, handle: func(r *Request, next Next) error {
		switch {
		case r.Range.Off == 0: // completed here, well
			copy(r.Data, "from the filter")
			return nil
		case r.Range.Off == 512: // completed here, badly
			return bad
		case r.Range.Off == 1024: // held
			holds <- struct{}{}
			<-release
		}
		return next.Do(r)
	}}
	if _, err := s.Attach("f", 1, f.driver()); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 512)
	if _, err := s.ReadAt(p, 0); err != nil || string(p[:15]) != "from the filter" {
		t.Errorf("completed: %q, %v", p[:15], err)
	}
	if _, err := s.WriteAt(p, 512); !errors.Is(err, bad) {
		t.Errorf("completed with an error: %v", err)
	}
	ended := make(chan error)
	go func() { _, err := s.WriteAt(p, 1024); ended <- err }()
	<-holds
	if _, err := s.WriteAt(p, 2048); err != nil { // others go on
		t.Error(err)
	}
	if got := disk.Bytes()[1024]; got != 0 {
		t.Errorf("a held write reached the device")
	}
	close(release)
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if got := disk.Bytes()[1024]; got != 'f' {
		t.Errorf("a released write did not reach the device: %q", got)
	}
}

// TestNewDeviceAskedLowestFirst: every registered filter is asked before the
// first request; one may decline, one may fail, and the device comes all the same.
func TestNewDeviceAskedLowestFirst(t *testing.T) {
	y, set := system(t)
	j := &journal{}
	for _, altitude := range []int{30, 10, 20} {
		f := &spy{name: fmt.Sprint(altitude), j: j}
		if err := y.Register(f.name, altitude, f.driver()); err != nil {
			t.Fatal(err)
		}
	}
	decline := DriverFunc(func(b *Below) (Filter, error) { j.add("decline"); return nil, nil })
	fail := DriverFunc(func(b *Below) (Filter, error) {
		j.add("fail")
		_, err := b.ReadAt(make([]byte, 512), 0) // it may look at the device first
		return nil, errors.Join(err, errors.New("no licence"))
	})
	explode := DriverFunc(func(b *Below) (Filter, error) { panic("oh") })
	if err := errors.Join(y.Register("decline", 15, decline), y.Register("fail", 5, fail), y.Register("explode", 1, explode)); err != nil {
		t.Fatal(err)
	}
	s := add(t, y, "new", sim.NewDisk(1<<20))
	j.want(t, "arrival", "fail", "10: asked about new", "decline", "20: asked about new", "30: asked about new")
	if got := s.Filters(); !slices.Equal(got, []Info{{"30", 30}, {"20", 20}, {"10", 10}}) {
		t.Errorf("filters %v", got)
	}
	if c := set.List(); len(c) != 2 || c[0].Code != "filter-not-attached" || c[1].Code != c[0].Code {
		t.Errorf("conditions %+v", c)
	}
	if err := s.Flush(); err != nil {
		t.Error(err)
	}
	if _, err := y.Add("new", sim.NewDisk(512)); !errors.Is(err, ErrExists) {
		t.Errorf("the same name again: %v", err)
	}
}

// TestRemovalFromTheTop: each filter can still finish its work with all below it.
func TestRemovalFromTheTop(t *testing.T) {
	y, _ := system(t)
	j := &journal{}
	disk := sim.NewDisk(1 << 20)
	s := add(t, y, "d", disk)
	for i := range 3 {
		f := &spy{name: fmt.Sprint(i), j: j}
		f.detach = func(Reason) {
			if _, err := f.below.WriteAt([]byte{byte(i + 1)}, int64(i)); err != nil {
				t.Errorf("last work of %d: %v", i, err)
			}
		}
		if err := y.Register(f.name, i, f.driver()); err != nil {
			t.Fatal(err)
		}
	}
	j.take()
	if err := y.Remove("d"); err != nil {
		t.Fatal(err)
	}
	j.want(t, "removal", "1: write 2+1 fua=false", "0: write 2+1 fua=false", "0: done", "1: done", "2: removed",
		"0: write 1+1 fua=false", "0: done", "1: removed", "0: removed")
	if got := disk.Bytes()[:3]; !slices.Equal(got, []byte{1, 2, 3}) {
		t.Errorf("the last writes: %v", got)
	}
	if _, err := s.WriteAt(make([]byte, 1), 0); !errors.Is(err, ErrGone) {
		t.Errorf("a write to a removed device: %v", err)
	}
	if err := y.Remove("d"); !errors.Is(err, ErrNoSuch) {
		t.Errorf("removed twice: %v", err)
	}
}

// TestSurpriseRemovalFromTheBottom: what is held higher fails quickly when it is
// let go, and reaches nothing.
func TestSurpriseRemovalFromTheBottom(t *testing.T) {
	testkit.NoLeaks(t)
	y, _ := system(t)
	j := &journal{}
	disk := sim.NewDisk(1 << 20)
	s := add(t, y, "d", disk)
	held, let := make(chan struct{}), make(chan struct{})
	low := &spy{name: "low", j: j}
	top := &spy{name: "top", j: j, handle: func(r *Request, next Next) error {
		held <- struct{}{}
		<-let
		return next.Do(r)
	}}
	low.detach = func(Reason) {
		if err := low.below.Flush(); !errors.Is(err, ErrGone) {
			t.Errorf("the device still answers: %v", err)
		}
	}
	top.detach = func(Reason) { close(let) }
	for i, f := range []*spy{low, top} {
		if err := y.Register(f.name, i, f.driver()); err != nil {
			t.Fatal(err)
		}
	}
	ended := make(chan error)
	go func() { _, err := s.WriteAt([]byte("x"), 0); ended <- err }()
	<-held
	j.take()
	if err := y.Surprise("d"); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !errors.Is(err, ErrGone) {
		t.Errorf("the held write: %v", err)
	}
	j.want(t, "surprise", "low: surprise", "top: surprise")
	if disk.Bytes()[0] != 0 {
		t.Error("the held write reached the device")
	}
}

// TestRegisterAndDeleteOnTheFly: filters come and go under load; each sees either
// all of a request or nothing, none is lost, and after Detach a filter sees nothing.
func TestRegisterAndDeleteOnTheFly(t *testing.T) {
	testkit.NoLeaks(t)
	y, set := system(t)
	s := add(t, y, "d", sim.NewDisk(1<<20))
	var stop atomic.Bool
	var done atomic.Int64
	var load sync.WaitGroup
	for i := range 4 {
		load.Go(func() {
			p, q := make([]byte, 512), make([]byte, 512)
			for n := byte(1); !stop.Load(); n++ {
				for k := range p {
					p[k] = n
				}
				off := int64(i) * 4096
				if _, err := s.WriteAt(p, off); err != nil {
					t.Error(err)
				}
				if _, err := s.ReadAt(q, off); err != nil || !slices.Equal(p, q) {
					t.Errorf("read back %d after %d, %v", q[0], n, err)
				}
				done.Add(1)
			}
		})
	}
	for round := range 8 {
		var seen [3]struct {
			open atomic.Int64
			over atomic.Bool
			all  atomic.Int64
		}
		for i := range seen {
			w := &seen[i]
			f := &spy{name: fmt.Sprint(i), j: &journal{}, handle: func(r *Request, next Next) error {
				if w.over.Load() {
					t.Error("a request after Detach")
				}
				w.open.Add(1)
				defer w.open.Add(-1)
				w.all.Add(1)
				return next.Do(r)
			}}
			f.detach = func(Reason) {
				if n := w.open.Load(); n != 0 {
					t.Errorf("detached with %d requests inside", n)
				}
				w.over.Store(true)
			}
			if err := y.Register(f.name, (i*7+round)%5, f.driver()); err != nil {
				t.Fatal(err)
			}
		}
		for before := done.Load(); done.Load() < before+20; {
			time.Sleep(50 * time.Microsecond)
		}
		for i := range seen {
			if err := y.Unregister(fmt.Sprint((i + round) % 3)); err != nil {
				t.Fatal(err)
			}
		}
		for i := range seen {
			if seen[i].all.Load() == 0 {
				t.Errorf("filter %d saw nothing", i)
			}
		}
	}
	stop.Store(true)
	load.Wait()
	if c := set.List(); len(c) != 0 {
		t.Errorf("conditions: %+v", c)
	}
}

// TestAttachCoversWhatIsUnderWay: when Attach returns no request is left that
// does not pass the filter.
func TestAttachCoversWhatIsUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		y, _ := system(t)
		disk := sim.NewDisk(1 << 20)
		let := make(chan struct{})
		disk.Fault = func(block.Op, block.Range) error { <-let; return nil }
		s := add(t, y, "d", disk)
		go func() { _ = s.Flush() }()
		synctest.Wait()
		var attached atomic.Bool
		f := &spy{name: "f", j: &journal{}}
		go func() {
			if _, err := s.Attach("f", 1, f.driver()); err != nil {
				t.Error(err)
			}
			attached.Store(true)
		}()
		synctest.Wait()
		if attached.Load() {
			t.Error("attached while a request from before is under way")
		}
		close(let)
		synctest.Wait()
		if !attached.Load() {
			t.Error("not attached although nothing is under way")
		}
	})
}

// TestResized: filters hear of more room before anybody can use it.
func TestResized(t *testing.T) {
	y, _ := system(t)
	disk := sim.NewDisk(1 << 20)
	s := add(t, y, "d", disk)
	r := &resizer{spy: &spy{name: "r", j: &journal{}}, told: func(size int64) {
		if _, err := s.WriteAt([]byte("x"), size-1); size > 1<<20 && !errors.Is(err, block.ErrBounds) {
			t.Errorf("the new room was there before the filter knew: %v", err)
		}
	}}
	if _, err := s.Attach("r", 1, DriverFunc(func(*Below) (Filter, error) { return r, nil })); err != nil {
		t.Fatal(err)
	}
	for _, size := range []int64{2 << 20, 1 << 19} {
		disk.Resize(size)
		s.Resized()
		if r.size != size || s.Size() != size {
			t.Errorf("of %d: the filter knows %d, the stack %d", size, r.size, s.Size())
		}
	}
}

type resizer struct {
	*spy
	told func(size int64)
	size int64
}

func (r *resizer) Resized(size int64) { r.told(size); r.size = size }

// TestNothingAfterDetach: a filter comes and goes thousands of times beside
// requests that need no time; none of them meets it before or after.
func TestNothingAfterDetach(t *testing.T) {
	testkit.NoLeaks(t)
	y, _ := system(t)
	s := add(t, y, "d", null{})
	var stop atomic.Bool
	var load sync.WaitGroup
	for range 3 {
		load.Go(func() {
			for !stop.Load() {
				if err := s.Flush(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	var late atomic.Int64
	for range 300 {
		f := &passer{late: &late}
		if _, err := s.Attach("f", 1, DriverFunc(func(*Below) (Filter, error) { return f, nil })); err != nil {
			t.Fatal(err)
		}
		if err := s.Detach("f"); err != nil {
			t.Fatal(err)
		}
		f.over.Store(true)
	}
	stop.Store(true)
	load.Wait()
	if n := late.Load(); n != 0 {
		t.Errorf("%d requests after Detach", n)
	}
}

// passer notes requests that come too late.
type passer struct {
	passing
	over atomic.Bool
	late *atomic.Int64
}

func (p *passer) Pass(*Request) bool {
	if p.over.Load() {
		p.late.Add(1)
	}
	return true
}
