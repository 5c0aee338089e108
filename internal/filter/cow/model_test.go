package cow_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/diff"
	"tidemark/internal/filter/cow"
	"tidemark/internal/health"
	"tidemark/internal/sim"
	"tidemark/internal/stack"
	"tidemark/internal/testkit"
)

// device is one served device with a shadow of what was written to it.
type device struct {
	disk  *sim.Disk
	stack *stack.Stack
	gate  *gate
	cow   *cow.Filter
	used  int64 // what lies behind is for difference storage

	mu     sync.RWMutex // writers share it, each with sectors of its own
	shadow []byte
}

// bench is a set of devices.
type bench struct {
	t       *testing.T
	health  *health.Set
	system  *stack.System
	devices []*device
	writes  atomic.Int64
}

func newBench(t *testing.T, n int, used, spare int64) *bench {
	t.Helper()
	b := &bench{t: t, health: &health.Set{}}
	b.system = stack.New(stack.Config{}, b.health)
	t.Cleanup(func() { _ = b.system.Close() })
	for i := range n {
		d := &device{disk: sim.NewDisk(used + spare), used: used, shadow: make([]byte, used)}
		var err error
		if d.stack, err = b.system.Add(fmt.Sprint("d", i), d.disk); err != nil {
			t.Fatal(err)
		}
		d.gate = &gate{}
		if _, err := d.stack.Attach("gate", 400, stack.DriverFunc(func(*stack.Below) (stack.Filter, error) { return d.gate, nil })); err != nil {
			t.Fatal(err)
		}
		if _, err := d.stack.Attach(cow.Name, cow.Altitude, cow.Driver(func(f *cow.Filter) { d.cow = f })); err != nil {
			t.Fatal(err)
		}
		b.devices = append(b.devices, d)
	}
	return b
}

// snap is one snapshot over all devices with what its images must hold.
type snap struct {
	storage *diff.Storage
	pending *diff.Pending
	images  []*cow.Image
	want    [][]byte
	spoiled atomic.Int64
}

// take makes a snapshot at one instant, its storage in space.
func (b *bench) take(cfg diff.Config, buffers int, space diff.Space) *snap {
	b.t.Helper()
	n := &snap{}
	var err error
	if n.storage, err = diff.New(cfg); err != nil {
		b.t.Fatal(err)
	}
	if err := n.storage.Append(space); err != nil {
		b.t.Fatal(err)
	}
	if n.pending, err = diff.NewPending(n.storage, buffers, nil); err != nil {
		b.t.Fatal(err)
	}
	for i, d := range b.devices {
		n.images = append(n.images, cow.New(d.cow, cow.Config{Device: uint32(i), Storage: n.storage, Pending: n.pending, Patience: 8 * time.Second,
			Notify: func(diff.Event) { n.spoiled.Add(1) }}))
		d.gate.mu.Lock() // all of them, before any begins
	}
	for i, d := range b.devices {
		d.cow.Begin(n.images[i])
		d.mu.Lock()
		n.want = append(n.want, bytes.Clone(d.shadow))
		d.mu.Unlock()
	}
	for _, d := range b.devices {
		d.gate.mu.Unlock()
	}
	return n
}

func (b *bench) destroy(n *snap) {
	for _, m := range n.images {
		m.Close()
	}
	n.storage.Close()
	if err := n.pending.Close(); err != nil {
		b.t.Error(err)
	}
}

// write changes a random place of a range that is one writer's own, so that the
// shadow needs no order.
func (d *device) write(t *testing.T, rng *rand.Rand, off, span int64) {
	at := off + rng.Int64N(span)
	r := block.Range{Off: at, Len: 1 + rng.Int64N(min(12000, off+span-at))}
	p := make([]byte, r.Len)
	kind := rng.IntN(10)
	if kind > 0 {
		random(rng, p)
	}
	var err error
	switch kind {
	case 0:
		err = d.stack.WriteZeroes(r)
	case 1:
		_, err = d.stack.WriteFUA(p, at)
	default:
		_, err = d.stack.WriteAt(p, at)
	}
	if err != nil {
		t.Errorf("the origin suffers: %v", err)
	}
}

// gate is a barrier in its simplest form.
type gate struct{ mu sync.RWMutex }

func (g *gate) Handle(r *stack.Request, next stack.Next) error {
	if r.Writes() {
		g.mu.RLock()
		defer g.mu.RUnlock()
	}
	return next.Do(r)
}
func (g *gate) Spoil(error) string  { return "the test" }
func (g *gate) Detach(stack.Reason) {}

// shadowing is a filter right below the gate that keeps the shadow.
type shadowing struct{ d *device }

func (f shadowing) Handle(r *stack.Request, next stack.Next) error {
	err := next.Do(r)
	if err == nil && r.Writes() {
		f.d.mu.Lock()
		defer f.d.mu.Unlock()
		if r.Op == block.OpWrite {
			copy(f.d.shadow[r.Range.Off:], r.Data)
		} else {
			clear(f.d.shadow[r.Range.Off:r.Range.End()])
		}
	}
	return err
}
func (f shadowing) Spoil(error) string  { return "the test" }
func (f shadowing) Detach(stack.Reason) {}

func (b *bench) shadows() {
	b.t.Helper()
	for _, d := range b.devices {
		if _, err := d.stack.Attach("shadow", 350, stack.DriverFunc(func(*stack.Below) (stack.Filter, error) { return shadowing{d}, nil })); err != nil {
			b.t.Fatal(err)
		}
	}
}

// load writes to every device, from several writers, until the function that it gives is called.
func (b *bench) load(seed uint64) (stop func()) {
	b.t.Helper()
	var over atomic.Bool
	var all sync.WaitGroup
	const writers = 3
	for i, d := range b.devices {
		for w := range int64(writers) {
			rng := rand.New(rand.NewPCG(seed, uint64(i)<<8|uint64(w)))
			span := d.used / writers
			all.Go(func() {
				for !over.Load() {
					d.write(b.t, rng, w*span, span)
					b.writes.Add(1)
				}
			})
		}
	}
	stop = func() { over.Store(true); all.Wait() }
	b.t.Cleanup(stop)
	return stop
}

// compare reads a random part of a random image.
func (n *snap) compare(t *testing.T, rng *rand.Rand, seed uint64) {
	t.Helper()
	i := rng.IntN(len(n.images))
	m, want := n.images[i], n.want[i]
	off := rng.Int64N(int64(len(want)))
	p := make([]byte, 1+rng.IntN(min(40000, len(want)-int(off))))
	if _, err := m.ReadAt(p, off); err != nil {
		if n.spoiled.Load() == 0 && m.Err() == nil {
			t.Fatalf("seed %d: read of %d+%d: %v", seed, off, len(p), err)
		}
		return
	}
	if !bytes.Equal(p, want[off:][:len(p)]) {
		t.Fatalf("seed %d: image %d differs at %d", seed, i, off+int64(firstDifference(p, want[off:])))
	}
}

func random(rng *rand.Rand, p []byte) {
	for len(p) >= 8 {
		binary.LittleEndian.PutUint64(p, rng.Uint64())
		p = p[8:]
	}
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
}

func firstDifference(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// change writes to an image, and to what it must hold.
func (n *snap) change(t *testing.T, rng *rand.Rand) {
	i := rng.IntN(len(n.images))
	m, want := n.images[i], n.want[i]
	off := rng.Int64N(int64(len(want)))
	p := make([]byte, 1+rng.IntN(min(20000, len(want)-int(off))))
	var err error
	if rng.IntN(4) == 0 {
		err = m.WriteZeroes(block.Range{Off: off, Len: int64(len(p))})
	} else {
		random(rng, p)
		_, err = m.WriteAt(p, off)
	}
	if err == nil {
		copy(want[off:], p)
		return
	}
	if m.Err() == nil && !errors.Is(err, diff.ErrFull) {
		t.Errorf("change: %v", err)
	}
	// A part of it may have been done: what it must hold is what it holds now.
	if q := make([]byte, len(p)); m.Err() == nil {
		if _, err := m.ReadAt(q, off); err == nil {
			copy(want[off:], q)
		}
	}
}

func whole(t *testing.T, dev block.Device, r block.Range) diff.Space {
	t.Helper()
	l, err := diff.NewLinear(dev, []block.Range{r})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// TestModel: writers over several devices, snapshots one after the other and side
// by side, their storage on a disk of its own or on the first device itself,
// private changes; every image is what the device was, byte for byte.
func TestModel(t *testing.T) {
	testkit.NoLeaks(t)
	for seed := range sim.Seeds(4) {
		rng := rand.New(rand.NewPCG(seed, 77))
		const spare = 3 << 20
		b := newBench(t, 2, 192<<10+int64(rng.IntN(3))*512, spare)
		b.shadows()
		stop := b.load(seed)
		type living struct {
			*snap
			own bool // its storage lies on the first device
		}
		var live []living
		own := false
		for step := range 30 {
			switch k := rng.IntN(10); {
			case k < 3 && len(live) < 3:
				cfg := diff.Config{ID: diff.ID{byte(seed), byte(step)}, Chunk: int64(4096 << rng.IntN(4)), Durable: rng.IntN(4) == 0}
				space := whole(t, sim.NewDisk(3<<20), block.Range{Len: 3 << 20})
				here := !own && rng.IntN(2) == 0
				if here {
					off := (b.devices[0].used + 4095) &^ 4095
					space = whole(t, b.devices[0].cow.Below(), block.Range{Off: off, Len: (spare - 4096) &^ 4095})
				}
				own = own || here
				live = append(live, living{b.take(cfg, 2+rng.IntN(8), space), here})
			case k == 3 && len(live) > 0:
				i := rng.IntN(len(live))
				b.destroy(live[i].snap)
				own = own && !live[i].own
				live = append(live[:i], live[i+1:]...)
			case len(live) > 0:
				n := live[rng.IntN(len(live))].snap
				for range 10 {
					n.compare(t, rng, seed)
					if rng.IntN(3) == 0 {
						n.change(t, rng)
					}
				}
			}
		}
		stop()
		for _, n := range live {
			for i, m := range n.images {
				p := make([]byte, len(n.want[i]))
				if m.Size() < int64(len(p)) {
					t.Fatalf("image of %d bytes", m.Size())
				}
				if _, err := m.ReadAt(p, 0); err != nil || !bytes.Equal(p, n.want[i]) {
					t.Errorf("seed %d: at the end image %d differs at %d, %v", seed, i, firstDifference(p, n.want[i]), err)
				}
			}
			b.destroy(n.snap)
		}
		for i, d := range b.devices {
			if got := d.disk.Bytes()[:d.used]; !bytes.Equal(got, d.shadow) {
				t.Errorf("seed %d: device %d differs from what was written at %d", seed, i, firstDifference(got, d.shadow))
			}
		}
		if c := b.health.List(); len(c) != 0 {
			t.Errorf("conditions: %+v", c)
		}
		if err := b.system.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestFaultsSpoilOnlyTheImage: errors of the storage, of reads of old content, and
// a full storage. A reader gets the right bytes or an error; the origin never
// differs and never fails but by its own errors.
func TestFaultsSpoilOnlyTheImage(t *testing.T) {
	testkit.NoLeaks(t)
	var spoiledSome, sound int
	for seed := range sim.Seeds(6) {
		rng := rand.New(rand.NewPCG(seed, 78))
		b := newBench(t, 2, 192<<10, 0)
		b.shadows()
		// The devices have 96 chunks: the load comes to all of them.
		kind := int(seed % 3)
		store := sim.NewDisk([]int64{200, 200, 20 + rng.Int64N(60)}[kind] << 12)
		var left atomic.Int64
		left.Store([]int64{rng.Int64N(120), rng.Int64N(30), 0}[kind])
		store.Fault = func(op block.Op, _ block.Range) error {
			if kind == 0 && left.Add(-1) < 0 {
				return sim.ErrInjected
			}
			return nil
		}
		n := b.take(diff.Config{ID: diff.ID{byte(seed)}, Chunk: 4096, Durable: rng.IntN(2) == 0}, 4, whole(t, store, block.Range{Len: store.Size()}))
		if kind == 1 {
			b.devices[0].disk.Fault = func(op block.Op, r block.Range) error {
				if op == block.OpRead && left.Add(-1) < 0 {
					return sim.ErrInjected
				}
				return nil
			}
		}
		stop := b.load(seed)
		for b.writes.Load() < 400 {
			if kind == 1 && n.images[0].Err() == nil {
				// the reader itself meets the bad disk
				i := 1
				p := make([]byte, 5000)
				if _, err := n.images[i].ReadAt(p, 8192); err == nil && !bytes.Equal(p, n.want[i][8192:13192]) {
					t.Fatalf("seed %d: image %d differs", seed, i)
				}
				continue
			}
			n.compare(t, rng, seed)
		}
		stop()
		for i, m := range n.images {
			if m.Err() == nil {
				sound++
				continue
			}
			spoiledSome++
			if _, err := m.ReadAt(make([]byte, 512), 0); !errors.Is(err, diff.ErrSpoiled) {
				t.Errorf("seed %d: a spoiled image %d answers %v", seed, i, err)
			}
		}
		b.destroy(n)
		for i, d := range b.devices {
			if got := d.disk.Bytes()[:d.used]; !bytes.Equal(got, d.shadow) {
				t.Errorf("seed %d: device %d differs from what was written at %d", seed, i, firstDifference(got, d.shadow))
			}
		}
		if err := b.system.Close(); err != nil {
			t.Error(err)
		}
	}
	if spoiledSome == 0 || sound == 0 {
		t.Errorf("%d images were spoiled and %d not: the test tries too little", spoiledSome, sound)
	}
}
