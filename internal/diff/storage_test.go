package diff

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"testing"

	"tidemark/internal/block"
	"tidemark/internal/sim"
	"tidemark/internal/testkit"
)

func whole(t testing.TB, dev block.Device) *Linear {
	t.Helper()
	l, err := NewLinear(dev, []block.Range{{Len: dev.Size()}})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func storage(t testing.TB, cfg Config, spaces ...Space) *Storage {
	t.Helper()
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, space := range spaces {
		if err := s.Append(space); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(s.Close)
	return s
}

func content(rng *rand.Rand, n int) []byte {
	p := make([]byte, 0, n+8)
	for len(p) < n {
		p = binary.LittleEndian.AppendUint64(p, rng.Uint64())
	}
	return p[:n]
}

// sized is a device of which only the size counts.
type sized struct {
	block.Device
	size int64
}

func (d sized) Size() int64 { return d.size }

// TestLayout: slots and table never overlap, all fit, and little is wasted.
func TestLayout(t *testing.T) {
	for _, chunk := range []int64{4096, 65536, 1 << 20} {
		for pages := int64(1); pages < 1200; pages += 7 {
			space := whole(t, sized{size: pages * Align})
			a := layOut(space, header{chunk: chunk}, false, 0)
			if a == nil {
				if pages*Align >= chunk+2*Align {
					t.Fatalf("%d pages have no slot of %d", pages, chunk)
				}
				continue
			}
			if a.content < Align+(a.slots+entries-1)/entries*Align || a.at(a.slots) > space.Size() {
				t.Fatalf("%d pages, chunks of %d: %d slots from %d", pages, chunk, a.slots, a.content)
			}
			if waste := space.Size() - a.at(a.slots); waste >= chunk+2*Align {
				t.Fatalf("%d pages, chunks of %d: %d bytes are wasted", pages, chunk, waste)
			}
		}
	}
}

// TestModel reserves, stores, reads and releases at random beside a shadow, over
// several areas, some of them of many small ranges; the account is exact throughout.
func TestModel(t *testing.T) {
	for seed := range sim.Seeds(8) {
		rng := rand.New(rand.NewPCG(seed, 1))
		chunk := int64(Align << rng.IntN(3))
		var events []Event
		s := storage(t, Config{ID: ID{byte(seed)}, Chunk: chunk, Low: 4 * chunk, Notify: func(e Event) { events = append(events, e) }})
		type held struct {
			key     Key
			content []byte
		}
		shadow := map[Slot]held{}
		appended := int64(0)
		for step := range 600 {
			switch k := rng.IntN(20); {
			case k == 0 && appended < 1<<21:
				disk := sim.NewDisk(int64(20+rng.IntN(60)) * Align)
				var ranges []block.Range
				for at := int64(0); at < disk.Size(); {
					n := min(int64(1+rng.IntN(9))*Align, disk.Size()-at)
					ranges = append(ranges, block.Range{Off: at, Len: n})
					at += n
				}
				rng.Shuffle(len(ranges), func(i, j int) { ranges[i], ranges[j] = ranges[j], ranges[i] })
				l, err := NewLinear(disk, ranges)
				if err != nil {
					t.Fatal(err)
				}
				if err := s.Append(l); err != nil {
					t.Fatal(err)
				}
				appended += disk.Size()
			case k < 12:
				slot, err := s.Reserve()
				if full := int64(len(shadow))*chunk == s.Stats().Capacity; full != errors.Is(err, ErrFull) {
					t.Fatalf("seed %d, step %d: %d of %d used: %v", seed, step, len(shadow), s.Stats().Capacity/chunk, err)
				}
				if err != nil {
					continue
				}
				if _, ok := shadow[slot]; ok {
					t.Fatalf("seed %d: slot %d is given twice", seed, slot)
				}
				h := held{Key{rng.Uint32N(3), rng.Int64N(1 << 40)}, content(rng, 512*(1+rng.IntN(int(chunk/512))))}
				if err := s.Store(slot, h.key, s.Version(), h.content); err != nil {
					t.Fatal(err)
				}
				shadow[slot] = h
			case k < 15:
				for slot := range shadow {
					s.Release(slot)
					delete(shadow, slot)
					break
				}
			}
			for slot, h := range shadow {
				p := make([]byte, len(h.content))
				if err := s.Load(slot, h.key, p); err != nil || !bytes.Equal(p, h.content) {
					t.Fatalf("seed %d: slot %d: %v", seed, slot, err)
				}
				if err := s.Load(slot, Key{h.key.Device, h.key.Chunk + 1}, p); !errors.Is(err, ErrCorrupt) {
					t.Fatalf("seed %d: slot %d as another chunk: %v", seed, slot, err)
				}
				break
			}
			if st := s.Stats(); st.Used != int64(len(shadow))*chunk || st.Capacity+st.Overhead != appended {
				t.Fatalf("seed %d: %+v with %d chunks in %d bytes", seed, st, len(shadow), appended)
			}
			checkEvents(t, seed, s, &events)
		}
	}
}

// checkEvents: an event is there whenever room has run low since the last append, once.
func checkEvents(t *testing.T, seed uint64, s *Storage, events *[]Event) {
	st := s.Stats()
	var low int
	for _, e := range *events {
		if e.Kind == LowSpace {
			low++
			if e.Bytes <= 0 {
				t.Fatalf("seed %d: %+v", seed, e)
			}
		}
	}
	if low > 1 {
		t.Fatalf("seed %d: %d low-space events in one step", seed, low)
	}
	if st.Capacity > 0 && st.Capacity-st.Used <= s.cfg.Low && !s.quiet {
		t.Fatalf("seed %d: %+v, and no low-space event", seed, st)
	}
	*events = nil
}

// TestDamageIsFound: a flipped bit anywhere in a chunk, and content of elsewhere.
func TestDamageIsFound(t *testing.T) {
	disk := sim.NewDisk(1 << 20)
	s := storage(t, Config{Chunk: 4096}, whole(t, disk))
	rng := rand.New(rand.NewPCG(1, 1))
	var slots []Slot
	for i := range int64(2) {
		slot, err := s.Reserve()
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Store(slot, Key{0, i}, s.Version(), content(rng, 4096)); err != nil {
			t.Fatal(err)
		}
		slots = append(slots, slot)
	}
	a := s.areas[0]
	p := make([]byte, 4096)
	at := a.at(int64(slots[0])) + 777
	b := disk.Bytes()[at]
	if _, err := disk.WriteAt([]byte{b ^ 16}, at); err != nil {
		t.Fatal(err)
	}
	if err := s.Load(slots[0], Key{0, 0}, p); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a flipped bit: %v", err)
	}
	if err := s.Load(slots[1], Key{0, 1}, p); err != nil {
		t.Errorf("the other chunk: %v", err)
	}
	if err := s.Load(99999, Key{0, 1}, p); !errors.Is(err, ErrCorrupt) {
		t.Errorf("no slot: %v", err)
	}
}

// TestRefusals: ranges that would destroy something or cannot be written.
func TestRefusals(t *testing.T) {
	disk := sim.NewDisk(1 << 20)
	for what, ranges := range map[string][]block.Range{
		"not aligned":    {{Off: 512, Len: 8192}},
		"an odd length":  {{Off: 0, Len: 8191}},
		"overlapping":    {{Off: 0, Len: 8192}, {Off: 4096, Len: 4096}},
		"in it, before":  {{Off: 65536, Len: 4096}, {Off: 8192, Len: 4096}, {Off: 0, Len: 16384}},
		"twice":          {{Off: 4096, Len: 4096}, {Off: 65536, Len: 4096}, {Off: 4096, Len: 4096}},
		"beyond the end": {{Off: 1<<20 - 4096, Len: 8192}},
		"empty":          {{Off: 4096}},
	} {
		if _, err := NewLinear(disk, ranges); !errors.Is(err, ErrRefused) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for _, chunk := range []int64{0, 512, 12288, 2 << 30} {
		if _, err := New(Config{Chunk: chunk}); !errors.Is(err, ErrRefused) {
			t.Errorf("chunks of %d: %v", chunk, err)
		}
	}
	s := storage(t, Config{Chunk: 65536})
	if err := s.Append(whole(t, sim.NewDisk(65536))); !errors.Is(err, ErrRefused) {
		t.Errorf("too small: %v", err)
	}
}

// large is a device that has nothing but a size.
type large struct{ block.Device }

func (large) Size() int64 { return 1 << 50 }

// TestManyRanges: a client of /dev/blksnap may give a million, in the worst order,
// and nobody can take another snapshot meanwhile: it must not take n times n.
func TestManyRanges(t *testing.T) {
	const n = 1 << 18
	var ranges []block.Range
	for i := int64(n); i > 0; i-- {
		ranges = append(ranges, block.Range{Off: i * 2 * Align, Len: Align})
	}
	l, err := NewLinear(large{}, ranges)
	if err != nil || l.Size() != n*Align {
		t.Fatalf("%v, %v", l, err)
	}
	ranges[n/2].Off = ranges[0].Off
	if _, err := NewLinear(large{}, ranges); !errors.Is(err, ErrRefused) {
		t.Errorf("two are the same: %v", err)
	}
}

// supply is a Source of memory.
type supply struct {
	mu    sync.Mutex
	room  int64
	err   error
	calls int
	gate  chan struct{} // if set, Grow waits for it
}

func (u *supply) Room() int64 { u.mu.Lock(); defer u.mu.Unlock(); return u.room }

func (u *supply) Grow(n int64) (Space, error) {
	if u.gate != nil {
		<-u.gate
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.calls++
	if u.err != nil {
		return nil, u.err
	}
	n = min(n, u.room)
	u.room -= n
	return NewLinear(sim.NewDisk(n), []block.Range{{Len: n}})
}

func idle(s *Storage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.growing {
		s.idle.Wait()
	}
}

// TestGrowsByItself ahead of need up to the limit; then the event, then the overflow.
func TestGrowsByItself(t *testing.T) {
	testkit.NoLeaks(t)
	var mu sync.Mutex
	var events []Event
	s := storage(t, Config{Chunk: 4096, Low: 16 * 4096, Notify: func(e Event) { mu.Lock(); events = append(events, e); mu.Unlock() }})
	s.AddSource(&supply{room: 100 * 4096})
	idle(s)
	n := 0
	for ; ; n++ {
		st := s.Stats()
		mu.Lock()
		told := len(events)
		mu.Unlock()
		if low := st.Capacity-st.Used+st.Room <= 16*4096; low != (told > 0) {
			t.Fatalf("after %d chunks: %+v, %d events", n, st, told)
		}
		if _, err := s.Reserve(); err != nil {
			break
		}
		idle(s) // time for it to grow
	}
	if n < 90 || len(events) != 2 || events[0].Kind != LowSpace || events[1].Kind != Overflow {
		t.Errorf("%d chunks of 100 pages, events %+v", n, events)
	}
	// Less than was asked for is appended: it is asked again, and used.
	if err := s.Append(whole(t, sim.NewDisk(5*4096))); err != nil {
		t.Fatal(err)
	}
	if len(events) != 3 || events[2].Kind != LowSpace {
		t.Errorf("events %+v", events)
	}
	if _, err := s.Reserve(); err != nil {
		t.Error(err)
	}
}

// TestNoGrowthWhileHeld: not during a freeze, not even what had begun; afterwards it goes on.
func TestNoGrowthWhileHeld(t *testing.T) {
	s := storage(t, Config{Chunk: 4096, Low: 16 * 4096})
	u := &supply{room: 1 << 20, gate: make(chan struct{})}
	s.AddSource(u) // begins to grow
	held := make(chan func())
	go func() { held <- s.HoldGrowth() }()
	select {
	case <-held:
		t.Fatal("held while it grows")
	case u.gate <- struct{}{}:
	}
	close(u.gate)
	resume := <-held
	calls := u.calls
	for range 40 {
		_, _ = s.Reserve()
	}
	if idle(s); u.calls != calls {
		t.Error("it grew while held")
	}
	resume()
	if idle(s); u.calls == calls {
		t.Error("it does not grow afterwards")
	}
}

// TestSourceThatFails is not asked again, and people are told.
func TestSourceThatFails(t *testing.T) {
	told := make(chan Event, 10)
	s := storage(t, Config{Chunk: 4096, Low: 16 * 4096, Notify: func(e Event) { told <- e }})
	u := &supply{room: 1 << 20, err: errors.New("quota")}
	s.AddSource(u)
	if e := <-told; e.Kind != LowSpace || !errors.Is(e.Err, u.err) {
		t.Errorf("%+v", e)
	}
	if idle(s); u.calls != 1 {
		t.Errorf("asked %d times", u.calls)
	}
}

// TestConcurrentStores share table blocks; every one of them is found again.
func TestConcurrentStores(t *testing.T) {
	disk := sim.NewDisk(4 << 20)
	cfg := Config{ID: ID{9}, Chunk: 4096}
	s := storage(t, cfg, whole(t, disk))
	var all sync.WaitGroup
	for w := range uint32(8) {
		all.Go(func() {
			for i := range int64(60) {
				slot, err := s.Reserve()
				if err == nil {
					err = s.Store(slot, Key{w, i}, s.Version(), bytes.Repeat([]byte{byte(w), byte(i)}, 2048))
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	r, found, err := Recover(cfg, []Space{whole(t, disk)})
	if err != nil || len(found) != 480 {
		t.Fatalf("%d found, %v", len(found), err)
	}
	for key, f := range found {
		p := make([]byte, 4096)
		if err := r.Load(f.Slot, key, p); err != nil || !bytes.Equal(p, bytes.Repeat([]byte{byte(key.Device), byte(key.Chunk)}, 2048)) {
			t.Errorf("%v: %v", key, err)
		}
	}
}

// TestPowerLoss: of a durable storage everything that was stored is found, and a
// spoiled one says so, whatever the cache lost.
func TestPowerLoss(t *testing.T) {
	for seed := range sim.Seeds(30) {
		rng := rand.New(rand.NewPCG(seed, 5))
		disk := sim.NewCrashDisk(seed, 1<<19)
		if _, err := disk.WriteAt(content(rng, 1<<19), 0); err != nil { // what was there before
			t.Fatal(err)
		}
		cfg := Config{ID: ID{byte(seed), 3}, Chunk: 4096, Durable: true}
		s := storage(t, cfg, whole(t, disk))
		left := rng.IntN(150)
		cut := errors.New("cut")
		disk.Fault = func(block.Op, block.Range) error {
			if left--; left < 0 {
				return cut
			}
			return nil
		}
		stored := map[Key][]byte{}
		maybe := map[Key][]byte{}
		slots := map[Key]Slot{}
		for range 60 {
			key := Key{0, rng.Int64N(20)}
			slot, err := s.Reserve()
			if err != nil {
				t.Fatal(err)
			}
			p := content(rng, 4096)
			if err := s.Store(slot, key, s.Version(), p); err != nil {
				maybe[key] = p
				break
			}
			if old, ok := slots[key]; ok {
				s.Release(old)
			}
			stored[key], slots[key] = p, slot
		}
		spoil := rng.IntN(4) == 0
		spoiled := spoil && s.Spoil() == nil
		r, found, err := Recover(cfg, []Space{whole(t, disk.Crash())})
		if spoil && errors.Is(err, ErrSpoiled) {
			continue
		}
		if spoiled || err != nil {
			t.Fatalf("seed %d: spoiled %v: %v", seed, spoiled, err)
		}
		for key, want := range stored {
			p := make([]byte, 4096)
			err := r.Load(found[key].Slot, key, p)
			if err != nil || !bytes.Equal(p, want) && !bytes.Equal(p, maybe[key]) {
				t.Fatalf("seed %d: %v: %v", seed, key, err)
			}
		}
		for key := range found {
			if stored[key] == nil && maybe[key] == nil {
				t.Fatalf("seed %d: %v was never stored", seed, key)
			}
		}
		if st := r.Stats(); st.Used != int64(len(found))*4096 {
			t.Fatalf("seed %d: %+v with %d found", seed, st, len(found))
		}
		slot, err := r.Reserve() // what follows does not disturb what is there
		if err != nil {
			t.Fatal(err)
		}
		for key, f := range found {
			if f.Slot == slot {
				t.Fatalf("seed %d: the slot of %v is given again", seed, key)
			}
		}
	}
}

// TestRecoverRefuses what is not this snapshot's.
func TestRecoverRefuses(t *testing.T) {
	disk := sim.NewDisk(1 << 20)
	cfg := Config{ID: ID{1}, Chunk: 4096}
	if _, _, err := Recover(cfg, []Space{whole(t, disk)}); !errors.Is(err, ErrCorrupt) {
		t.Errorf("an empty disk: %v", err)
	}
	storage(t, cfg, whole(t, disk))
	for what, other := range map[string]Config{"id": {ID: ID{2}, Chunk: 4096}, "chunk": {ID: ID{1}, Chunk: 8192}} {
		if _, _, err := Recover(other, []Space{whole(t, disk)}); !errors.Is(err, ErrCorrupt) {
			t.Errorf("another %s: %v", what, err)
		}
	}
	if _, _, err := Recover(cfg, []Space{whole(t, disk), whole(t, disk)}); !errors.Is(err, ErrCorrupt) {
		t.Errorf("one area twice: %v", err)
	}
}

// TestPendingOutlivesTheProcess: what was sealed and not stored is found, and no more.
func TestPendingOutlivesTheProcess(t *testing.T) {
	disk := sim.NewDisk(1 << 20)
	cfg := Config{ID: ID{7}, Chunk: 4096}
	s := storage(t, cfg, whole(t, disk))
	file, err := os.Create(t.TempDir() + "/pending")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	p, err := NewPending(s, 8, file)
	if err != nil {
		t.Fatal(err)
	}
	fill := func(i int64) *Buffer {
		slot, err := s.Reserve()
		if err != nil {
			t.Fatal(err)
		}
		b, err := p.Take(0)
		if err != nil {
			t.Fatal(err)
		}
		for k := range b.Bytes() {
			b.Bytes()[k] = byte(i)
		}
		b.Seal(slot, Key{0, i}, s.Version(), 4096, i%2 == 1)
		return b
	}
	stored := make(chan error, 2)
	one, two := fill(1), fill(2)
	one.Store(func(err error) { one.Drop(); stored <- err }) // stored and given back
	two.Store(func(err error) { stored <- err })             // stored; its buffer still there
	for range 2 {
		if err := <-stored; err != nil {
			t.Fatal(err)
		}
	}
	fill(3)                              // sealed only
	torn := fill(4)                      // sealed, and then damaged
	torn.Bytes()[100]++                  //
	if _, err := p.Take(0); err != nil { // not sealed
		t.Fatal(err)
	}
	for { // and none is free
		if _, err := p.Take(1); errors.Is(err, ErrBusy) {
			break
		}
	}
	// The process is gone. Another one:
	r, found, err := Recover(cfg, []Space{whole(t, disk)})
	if err != nil || len(found) != 2 {
		t.Fatal(found, err)
	}
	q, sealed, err := RecoverPending(r, 8, file, found)
	if err != nil || len(sealed) != 1 || sealed[0].Key() != (Key{0, 3}) || sealed[0].Len() != 4096 || sealed[0].Bytes()[9] != 3 {
		t.Fatalf("%+v, %v", sealed, err)
	}
	sealed[0].Store(func(err error) { stored <- err })
	if err := <-stored; err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4096)
	if err := r.Load(sealed[0].Slot(), Key{0, 3}, got); err != nil || got[7] != 3 {
		t.Error(err)
	}
	sealed[0].Drop()
	for range 8 {
		if _, err := q.Take(0); err != nil {
			t.Fatalf("a buffer is missing: %v", err)
		}
	}
	if err := errors.Join(q.Close(), p.Close()); err != nil {
		t.Error(err)
	}
}

// FuzzTable: headers and entries of any content are refused or mean what they say.
func FuzzTable(f *testing.F) {
	h := header{ID{1}, 4096, 3, true}.encode()
	f.Add(h)
	b := make([]byte, entrySize)
	entry{Key{1, 2}, 3, 4, 5, true}.put(ID{1}, b)
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, err := decodeHeader(b); err == nil && !bytes.Equal(h.encode()[:36], b[:36]) {
			t.Errorf("%+v", h)
		}
		if len(b) < entrySize {
			return
		}
		if e, ok := getEntry(ID{1}, b); ok {
			again := make([]byte, entrySize)
			if e.put(ID{1}, again); !bytes.Equal(again, b[:entrySize]) {
				t.Errorf("%+v", e)
			}
		}
	})
}

func BenchmarkStore(b *testing.B) {
	for _, chunk := range []int64{4096, 65536, 262144} {
		b.Run(fmt.Sprint(chunk), func(b *testing.B) {
			s := storage(b, Config{Chunk: chunk}, whole(b, sim.NewDisk(64<<20)))
			p := make([]byte, chunk)
			slot, err := s.Reserve()
			if err != nil {
				b.Fatal(err)
			}
			b.SetBytes(chunk)
			for b.Loop() {
				if err := s.Store(slot, Key{}, 1, p); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
