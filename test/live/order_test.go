package live

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/stream"
	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

const (
	orderDisk  = 16 * mib
	orderSlots = 1024 // places of the counter, a block each; noise lies behind them
	slotBytes  = 4096
	ahead      = 100 // steps that the counter may go on by while the test does something else: nobody outruns a busy machine's daemon

	noiseStart  = orderSlots * slotBytes
	noiseMiddle = 8 * mib
	noiseEnd    = 12 * mib
)

// counter writes its number to disk A, waits for the end of that write, writes
// it to disk B, waits, and goes on with the next: a history in which every
// state between two writes is known.
type counter struct {
	seed  uint64
	disks [2]counted
	buf   []byte
	n     atomic.Uint64 // newest number that is on both
}

// counted is a disk that is written to.
type counted interface {
	io.WriterAt
	Name() string // what it is protected by
	Sync() error
}

// slot is where a number goes.
func (c *counter) slot(n uint64) int {
	return rand.New(rand.NewPCG(c.seed, n)).IntN(orderSlots)
}

func (c *counter) step() error {
	n := c.n.Load() + 1
	at := int64(c.slot(n)) * slotBytes
	for i, f := range c.disks {
		testkit.Fill(c.buf, i, at, n)
		if _, err := f.WriteAt(c.buf, at); err != nil {
			return err
		}
	}
	c.n.Store(n)
	return nil
}

// newest is the number that an image of disk i has reached. Every slot must hold
// just what it held when that number was written, not more and not less.
func (c *counter) newest(i int, image []byte) (uint64, error) {
	image = image[:orderSlots*slotBytes]
	if _, err := testkit.Check(image, i, 0); err != nil {
		return 0, err
	}
	var top uint64
	have := make([]uint64, orderSlots)
	for s := range have {
		block := image[s*slotBytes:][:slotBytes]
		have[s] = binary.LittleEndian.Uint64(block[24:])
		for at := 0; at < slotBytes; at += testkit.Sector {
			if n := binary.LittleEndian.Uint64(block[at+24:]); n != have[s] {
				return 0, fmt.Errorf("slot %d holds numbers %d and %d: a write was cut", s, have[s], n)
			}
		}
		top = max(top, have[s])
	}
	want := make([]uint64, orderSlots)
	for n := uint64(1); n <= top; n++ {
		want[c.slot(n)] = n
	}
	for s := range want {
		if have[s] != want[s] {
			return 0, fmt.Errorf("disk %d has number %d but slot %d holds %d, want %d", i, top, s, have[s], want[s])
		}
	}
	return top, nil
}

// order is a group of two disks with a counter and noise on them.
type order struct {
	t        *testing.T
	d        *program.Daemon
	rng      *rand.Rand
	c        *counter
	names    []string
	others   int // disks of the group before the two of the counter
	noise    []noise
	noiseMax int

	limit  atomic.Uint64 // how far the counter may go
	stop   atomic.Bool
	all    sync.WaitGroup
	failed atomic.Pointer[error]
}

// newOrder protects the two disks. One write of noise has noiseMax bytes at most.
func newOrder(t *testing.T, rng *rand.Rand, noiseMax int, args ...string) *order {
	o := newOrderDisks(t, rng, noiseMax)
	o.protect("--wait", args...)
	return o
}

// newOrderDisks makes the disks, and a daemon that does not know them yet.
func newOrderDisks(t *testing.T, rng *rand.Rand, noiseMax int) *order {
	testkit.Need(t, "root", "tap", "loop")
	o := &order{t: t, rng: rng, c: &counter{seed: rng.Uint64(), buf: aligned(t, slotBytes)}, noiseMax: noiseMax}
	for i := range o.c.disks {
		path := testkit.NewDisk(t, orderDisk).Path
		fewRequests(t, path)
		o.c.disks[i] = open(t, path, unix.O_DIRECT)
		o.noise = append(o.noise, noise{open(t, path, unix.O_DIRECT), noiseStart, noiseMiddle}, noise{open(t, path, 0), noiseMiddle, noiseEnd})
	}
	o.d = program.New(t)
	return o
}

// protect makes the disks group g.
func (o *order) protect(wait string, args ...string) {
	o.t.Helper()
	all := append([]string{"protect", "--vault", o.d.Vault, "--name", "g", wait}, args...)
	for _, f := range o.c.disks {
		all = append(all, f.Name())
	}
	o.d.Run(all...)
	o.names = diskNames(o.d.Group("g"))
}

// write lets counter and noise run while do runs. What the page cache has kept
// is on the disks when it returns.
func (o *order) write(do func()) {
	o.t.Helper()
	o.stop.Store(false)
	o.limit.Store(o.c.n.Load() + ahead)
	var follow []chan struct{}
	for _, n := range o.noise {
		rng, buf, next := fork(o.rng), aligned(o.t, o.noiseMax), make(chan struct{}, 1)
		follow = append(follow, next)
		o.all.Go(func() {
			for range next {
				o.note(n.scribble(rng, buf))
			}
		})
	}
	o.all.Go(func() { o.count(follow) })
	do()
	o.stop.Store(true)
	o.all.Wait()
	if err := o.failed.Load(); err != nil {
		o.t.Fatal("a write to a protected disk failed: ", *err)
	}
	for _, n := range o.noise {
		if err := n.file.Sync(); err != nil {
			o.t.Fatal(err)
		}
	}
}

// restart kills the daemon, lets the writers go on, and starts another, which
// takes over the tap.
func (o *order) restart(steps uint64) {
	o.t.Helper()
	o.d.Kill()
	o.counted(steps)
	o.d.Start()
	o.d.Await("g", "taken over", online)
}

// count moves the counter on as far as it may, and the noise with it.
func (o *order) count(follow []chan struct{}) {
	for !o.stop.Load() && o.failed.Load() == nil {
		if o.c.n.Load() >= o.limit.Load() {
			time.Sleep(time.Millisecond)
			continue
		}
		o.note(o.c.step())
		for _, f := range follow {
			select {
			case f <- struct{}{}:
			default: // busy with an earlier one
			}
		}
	}
	for _, f := range follow {
		close(f)
	}
}

func (o *order) note(err error) {
	if err != nil {
		o.failed.Store(&err)
	}
}

// noise is a writer of anything in a part of a disk that is its own: writes
// that overlap and are in flight together have no order on any disk.
type noise struct {
	file       counted
	first, end int64
}

func (n noise) scribble(rng *rand.Rand, buf []byte) error {
	size := (1 + rng.Int64N(int64(len(buf)/testkit.Sector))) * testkit.Sector
	binary.LittleEndian.PutUint64(buf, rng.Uint64())
	_, err := n.file.WriteAt(buf[:size], n.first+rng.Int64N((n.end-n.first-size)/testkit.Sector)*testkit.Sector)
	return err
}

// counted waits until the counter has gone on by some steps.
func (o *order) counted(steps uint64) {
	o.t.Helper()
	want := o.c.n.Load() + steps
	o.limit.Store(want + ahead)
	program.Eventually(o.t, patience, fmt.Sprintf("the counter reaches %d", want), func() error {
		if n := o.c.n.Load(); n < want && o.failed.Load() == nil {
			return fmt.Errorf("it is %d", n)
		}
		return nil
	})
}

// obeys checks one point: B has A's number, or the one before. It gives A's.
func (o *order) obeys(at string) uint64 {
	o.t.Helper()
	var n [2]uint64
	for i := range n {
		var err error
		if n[i], err = o.c.newest(i, image(o.t, o.d, "g", o.names[i], at)); err != nil {
			o.t.Fatalf("at %s: %v", at, err)
		}
	}
	if n[1] != n[0] && n[1]+1 != n[0] {
		o.t.Fatalf("at %s disk A has number %d and disk B %d", at, n[0], n[1])
	}
	return n[0]
}

// everywhere checks every bookmark and some positions of every stretch.
func (o *order) everywhere() {
	o.t.Helper()
	for _, p := range o.d.Points("g") {
		if p.Bookmark == "" {
			continue
		}
		var want uint64
		if _, err := fmt.Sscanf(p.Bookmark, "at-%d", &want); err != nil {
			o.t.Fatal(err)
		}
		if n := o.obeys(p.Bookmark); n < want {
			o.t.Errorf("bookmark %s was put after number %d was written, and has only %d", p.Bookmark, want, n)
		}
	}
	var before uint64
	all := stretches(o.t, o.d, "g")
	for i, s := range all {
		for _, p := range s.positions(o.rng, 3) {
			o.obeys(seq(p))
		}
		if i > 0 && s.first <= before {
			o.t.Errorf("stretch %d begins at %d, the one before ends at %d", i+1, s.first, before)
		}
		before = s.last
	}
	o.alternates(all)
}

// alternates holds the counter's records to the order in which it wrote, at
// every position of every stretch: A, B, A, B, with no number left out.
func (o *order) alternates(all []stretch) {
	o.t.Helper()
	disk, number := -1, uint64(0) // the write before, if it lies in the same stretch
	checked := 0
	eachRecord(o.t, o.d, "g", func(r *stream.Record) {
		if r.Kind != stream.KindWrite || r.Disk < o.others || r.Range.Off >= noiseStart {
			return
		}
		at := r.Disk - o.others
		for len(all) > 0 && r.Position > stream.Position(all[0].last) {
			all, disk = all[1:], -1
		}
		if len(all) == 0 || r.Position < stream.Position(all[0].first) {
			return
		}
		n := binary.LittleEndian.Uint64(r.Payload[24:])
		if disk == 0 && (at != 1 || n != number) || disk == 1 && (at != 0 || n != number+1) {
			o.t.Errorf("position %d has number %d on disk %d, after number %d on disk %d", r.Position, n, at, number, disk)
		}
		disk, number = at, n
		checked++
	})
	if checked == 0 {
		o.t.Error("no write of the counter is in any stretch")
	}
}

// bookmark names a moment after the number that had been written by then.
func (o *order) bookmark() error {
	_, err := o.d.Verb("bookmark", "g", fmt.Sprintf("at-%d", o.c.n.Load()))
	return err
}

// fewRequests makes writes wait above the disk, where the kernel lets us.
func fewRequests(t testing.TB, dev string) {
	t.Helper()
	if err := os.WriteFile("/sys/block/"+dev[len("/dev/"):]+"/queue/nr_requests", []byte("4"), 0); err != nil {
		t.Logf("nr_requests stays: %v", err)
	}
}

// TestOrder: every point is a prefix of the order in which writes were
// submitted, over both disks, also with the daemon killed in the middle.
func TestOrder(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		o := newOrder(t, rng, 8<<10) // all of it fits the ring, even if no daemon took any
		o.write(func() {
			for range 3 {
				o.counted(rng.Uint64N(300))
				if err := o.bookmark(); err != nil {
					t.Error(err)
				}
				o.counted(rng.Uint64N(300))
				o.restart(rng.Uint64N(100))
			}
		})
		g := identical(t, o.d, "g")
		if n := o.obeys("latest"); n != o.c.n.Load() {
			t.Errorf("latest has number %d, the disks have %d", n, o.c.n.Load())
		}
		o.everywhere()
		if n := len(stretches(t, o.d, "g")); n != 1 || g.Disks[0].Lost+g.Disks[1].Lost > 0 {
			t.Errorf("%d stretches, %d writes lost, with room for everything", n, g.Disks[0].Lost)
		}
	})
}

// TestOrderInTinyRing: the same with a ring that cannot hold the load. No point
// inside a gap is offered, and at all that are order is kept.
func TestOrderInTinyRing(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		o := newOrder(t, rng, 64<<10, "--ring-size", "256K")
		refused, put := 0, 0
		for round := range 4 {
			o.write(func() {
				o.counted(50)
				if round == 1 {
					o.restart(50)
				}
				if err := o.bookmark(); err == nil {
					put++
				} else {
					refused++ // inside a gap: which of the two is up to the machine
				}
				o.counted(50)
			})
			o.d.Settle("g")
			if err := o.bookmark(); err != nil {
				t.Error(err)
			}
			o.calm()
		}
		g := identical(t, o.d, "g")
		o.everywhere()
		o.gapsRefused()
		if g.Disks[0].Lost+g.Disks[1].Lost == 0 || len(stretches(t, o.d, "g")) < 2 {
			t.Error("the ring held everything: this tested nothing")
		}
		t.Logf("%d bookmarks put under load, %d refused; %d stretches", put, refused, len(stretches(t, o.d, "g")))
	})
}

// calm lets the counter alone go on, so that stretches are longer than a moment.
func (o *order) calm() {
	o.t.Helper()
	for range 20 {
		if err := o.c.step(); err != nil {
			o.t.Fatal(err)
		}
	}
}

// gapsRefused tries positions between the stretches.
func (o *order) gapsRefused() {
	o.t.Helper()
	all := stretches(o.t, o.d, "g")
	to := o.d.Dir + "/refused"
	for i := 1; i < len(all); i++ {
		between := stretch{all[i-1].last + 1, all[i].first - 1}
		if between.last < between.first {
			continue
		}
		for _, p := range between.positions(o.rng, 3) {
			o.d.Refused(exitInsideGap, "restore", "--vault", o.d.Vault, "g", "--disk", o.names[0], "--at", seq(p), "--to", to)
		}
	}
	if _, err := os.Stat(to); err == nil {
		o.t.Error("a refused restore left a file behind")
	}
}
