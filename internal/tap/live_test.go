package tap

import (
	"bufio"
	"crypto/rand"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/testkit"
)

// writer makes at most a thousand writes a second until stop is closed: random sizes and places, only inside its own part of the disk.
func writer(t testing.TB, path string, off, size int64, stop <-chan struct{}) error {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	buf, err := unix.Mmap(-1, 0, 256<<10, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	defer unix.Munmap(buf)
	pace := time.NewTicker(time.Millisecond)
	defer pace.Stop()
	for {
		select {
		case <-stop:
			return nil
		case <-pace.C:
		}
		n := int64(512) << mrand.IntN(7)
		_, _ = rand.Read(buf[:n])
		if _, err := f.WriteAt(buf[:n], off+mrand.Int64N((size-n)/512+1)*512); err != nil {
			return err
		}
	}
}

// load runs writers, each on its own quarter of each disk, until the returned function is called.
func load(t testing.TB, disks ...*testkit.Disk) (stop func()) {
	t.Helper()
	var all sync.WaitGroup
	done := make(chan struct{})
	for _, d := range disks {
		for q := range int64(4) {
			all.Go(func() {
				if err := writer(t, d.Path, q*d.Size/4, d.Size/4, done); err != nil {
					t.Error(err)
				}
			})
		}
	}
	return sync.OnceFunc(func() { close(done); all.Wait() })
}

func (r *replica) same(disks ...*testkit.Disk) {
	r.t.Helper()
	for i, d := range disks {
		if bad := r.differ(i, d); len(bad) > 0 {
			r.t.Errorf("disk %d: %d blocks differ, the first at %d; %d records, read to %d", i, len(bad), bad[0], r.n, r.place)
		}
	}
}

// report tells what the tap itself knows, where a test has failed.
func report(t testing.TB, tp *Tap) {
	t.Helper()
	if t.Failed() {
		c, err := tp.Counters()
		t.Logf("producer %d, consumer %d, state %+v, %+v, %v", tp.Producer(), tp.Consumer(), *tp.state, c, err)
	}
}

// TestSeveralDisks: writers on three disks at once, one ring.
func TestSeveralDisks(t *testing.T) {
	disks := []*testkit.Disk{testkit.NewDisk(t, 16<<20), testkit.NewDisk(t, 8<<20), testkit.NewDisk(t, 4<<20)}
	tp := start(t, 64<<20, Options{}, disks...)
	r := newReplica(t, tp, disks...)
	stop := load(t, disks...)
	defer stop()
	for end := time.Now().Add(time.Second); time.Now().Before(end); {
		r.pull(tp)
	}
	stop()
	r.pull(tp)
	if tp.Drops() != 0 {
		t.Fatalf("%d drops: the test's ring is too small", tp.Drops())
	}
	r.same(disks...)
	report(t, tp)
}

// TestUpgradeUnderLoad: programs replaced again and again miss no write.
func TestUpgradeUnderLoad(t *testing.T) {
	d := testkit.NewDisk(t, 16<<20)
	tp := start(t, 64<<20, Options{}, d)
	r := newReplica(t, tp, d)
	stop := load(t, d)
	defer stop()
	upgraded := make(chan error)
	go func() {
		defer close(upgraded)
		for range 2 {
			forgetPrograms(t, tp)
			again, err := Adopt("test", fmt.Sprintf("t%d", os.Getpid()))
			if err == nil && again.Identity() != tp.Identity() {
				err = errors.New("another ring")
			}
			if err == nil {
				err = again.Close()
			}
			upgraded <- err
		}
	}()
	for running := true; running; r.pull(tp) {
		select {
		case err, ok := <-upgraded:
			if err != nil {
				t.Error(err)
			}
			running = ok
		default:
		}
	}
	stop()
	r.pull(tp)
	if tp.Drops() != 0 {
		t.Fatalf("%d drops: the test's ring is too small", tp.Drops())
	}
	r.same(d)
	report(t, tp)
}

// forgetPrograms has the next Adopt take the tap's programs for another build's.
func forgetPrograms(t *testing.T, tp *Tap) {
	m, err := tp.pins.meta()
	if err == nil {
		m.Programs = "another build's"
		err = tp.pins.replaceMeta(m)
	}
	if err != nil {
		t.Error(err)
	}
}

// TestSamePrograms: a tap is given programs only where it has others.
func TestSamePrograms(t *testing.T) {
	tp := start(t, 1<<20, Options{}, testkit.NewDisk(t, 8<<20))
	programs := func() (ids [2]uint32) {
		again, err := Adopt("test", fmt.Sprintf("t%d", os.Getpid()))
		if err != nil {
			t.Fatal(err)
		}
		defer again.Close()
		if err := again.maps["to_queue"].Lookup(uint32(0), &ids[0]); err != nil {
			t.Fatal(err)
		}
		info, err := again.mark.Info()
		if err != nil {
			t.Fatal(err)
		}
		id, _ := info.ID()
		ids[1] = uint32(id)
		if _, err := again.Bookmark(Mark{Name: "b", Token: 1}); err != nil {
			t.Error(err)
		}
		return ids
	}
	first := programs()
	if again := programs(); again != first {
		t.Errorf("the same programs were loaded again: %v, were %v", again, first)
	}
	forgetPrograms(t, tp)
	newer := programs()
	if newer[0] == first[0] || newer[1] == first[1] {
		t.Errorf("another build's programs stay: %v", newer)
	}
	if again := programs(); again != newer {
		t.Errorf("an upgrade is made twice: %v, was %v", again, newer)
	}
}

// TestHolderProcess is the process that TestKilledHolder kills.
func TestHolderProcess(t *testing.T) {
	path := os.Getenv("TIDEMARK_TEST_HOLD")
	if path == "" {
		return
	}
	target := targetFor(t, &testkit.Disk{Path: path, Size: 16 << 20})
	tp, err := Start(Config{Instance: "test", Group: os.Getenv("TIDEMARK_TEST_GROUP"), RingBytes: 256 << 20, Targets: []Target{target}})
	if err != nil {
		t.Fatal(err)
	}
	fmt.Println("holding")
	for { // reads and never commits, as a daemon whose spool is slow
		_, _ = tp.Read(tp.Consumer(), func(*Record) error { return nil })
	}
}

// TestKilledHolder: kill -9 of the process that started the tap, while writes
// go on: whoever adopts it finds every write.
func TestKilledHolder(t *testing.T) {
	testkit.Need(t, "tap")
	d := testkit.NewDisk(t, 16<<20)
	group := fmt.Sprintf("k%d", os.Getpid())
	holder := exec.Command(os.Args[0], "-test.run=^TestHolderProcess$", "-test.v")
	holder.Env = append(os.Environ(), "TIDEMARK_TEST_HOLD="+d.Path, "TIDEMARK_TEST_GROUP="+group)
	out, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = Discard("test", group) })
	for lines := bufio.NewScanner(out); lines.Scan() && lines.Text() != "holding"; {
	}
	stop := load(t, d)
	defer stop()
	time.Sleep(100 * time.Millisecond) // with its holder
	if err := holder.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = holder.Wait()
	time.Sleep(100 * time.Millisecond) // with nobody
	tp, err := Adopt("test", group)
	if err != nil {
		t.Fatal(err)
	}
	defer tp.Close()
	r := newReplica(t, tp, d)
	clear(r.disks[0]) // what it began as
	stop()
	r.pull(tp)
	if tp.Drops() != 0 {
		t.Fatalf("%d drops: the test's ring is too small", tp.Drops())
	}
	r.same(d)
	report(t, tp)
}

// TestEndsUnderLoad: once the level is known, bios from before the tracking are
// known to have ended without the disk ever being idle. The kernel keeps one end
// in some 100,000 to itself; then, and only then, a pause of the load may be needed.
func TestEndsUnderLoad(t *testing.T) {
	d := testkit.NewDisk(t, 16<<20)
	tp := start(t, 64<<20, Options{}, d)
	scan := func() Scan {
		t.Helper()
		s, err := tp.ScanInFlight()
		if err != nil {
			t.Fatal(err)
		}
		tp.Commit(tp.Producer())
		return s
	}
	await := func(limit time.Duration, what func(Scan) bool) (s Scan, ok bool) {
		t.Helper()
		for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
			if s = scan(); what(s) {
				return s, true
			}
		}
		return s, false
	}
	oldEnded := func(s Scan) bool { return s.OldKnownEnded }
	if scan().OldKnownEnded {
		t.Fatal("known at once what was on its way before the tap")
	}
	if s, ok := await(20*time.Second, oldEnded); !ok || s.InFlight != 0 || s.Low != s.Producer {
		t.Errorf("at rest: %+v", s)
	}
	stop, pauses := load(t, d), 0
	defer func() { stop() }()
	underLoad := func(what func(Scan) bool) {
		t.Helper()
		s, ok := await(3*time.Second, what)
		if ok {
			return
		}
		pauses++
		stop()
		if _, ok := await(idleTimeAgainst+10*time.Second, what); !ok || pauses > 2 {
			c, err := tp.Counters()
			t.Fatalf("not under load, %d times, and at rest %v: %+v, counters %+v, %v, %+v", pauses, ok, s, c, err, tp.counts[0])
		}
		stop = load(t, d)
	}
	for range 5 {
		if err := tp.SetEnds(false); err != nil {
			t.Fatal(err)
		}
		if tp.Drops() == 0 && tp.Ends() {
			t.Error("tracking is still on")
		}
		if err := tp.ForgetInFlight(); err != nil {
			t.Fatal(err)
		}
		tp.Commit(tp.Producer())
		time.Sleep(50 * time.Millisecond)
		if err := tp.SetEnds(true); err != nil {
			t.Fatal(err)
		}
		underLoad(oldEnded)
	}
	before := tp.Producer()
	underLoad(func(s Scan) bool { return s.Low > before || s.InFlight == 0 && s.Low >= before })
	stop()
	if s, ok := await(staleIdle+10*time.Second, func(s Scan) bool { return s.InFlight == 0 && s.Low == tp.Producer() }); !ok {
		t.Errorf("the writers have stopped: %+v", s)
	}
}

// TestRest: what the counters alone say, and what a disk's idleness adds.
func TestRest(t *testing.T) {
	c, r, now := &counters{Traced: 100, Ended: 40}, &restOfDisk{}, time.Unix(1000, 0)
	look := func(idle bool, after time.Duration) bool {
		now = now.Add(after)
		return r.ended(c, idle, now)
	}
	for i, want := range []struct {
		idle  bool
		after time.Duration
		ended bool
	}{{true, 0, false}, {true, 900 * time.Millisecond, false}, {false, 50 * time.Millisecond, false}, {true, time.Hour, false}, {true, time.Second, true}, {false, 0, true}} {
		if got := look(want.idle, want.after); got != want.ended {
			t.Fatalf("look %d: %v", i, got)
		}
	}
	c.Traced += 4096
	if look(true, 0) || look(true, 2*time.Second) {
		t.Error("believed an idle disk against the counters")
	}
	c.Ended += 4096
	if !look(false, 0) {
		t.Error("the counters are level")
	}
	c.Traced += 512
	if look(true, 0) || look(true, 29*time.Second) || !look(true, time.Second) {
		t.Error("an end that nobody counted")
	}
}
