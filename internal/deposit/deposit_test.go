package deposit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/cbt"
	"tidemark/internal/sim"
	"tidemark/internal/stream"
	"tidemark/internal/timeline"
	"tidemark/internal/vault"
)

// device is a disk with its change map, and what it held at snapshots.
type device struct {
	name    string
	content []byte
	changes *cbt.Map
}

func (d *device) write(off, n int64, fill byte) {
	d.changes.Mark(block.Range{Off: off, Len: n})
	copy(d.content[off:], bytes.Repeat([]byte{fill}, int(n)))
}

// image is a device at a snapshot, with private changes.
type image struct {
	disk    Disk
	content []byte
	private block.Set
	number  uint64
	busy    bool
}

func (m *image) ReadAt(p []byte, off int64) (int, error) { return copy(p, m.content[off:]), nil }

func (m *image) change(off, n int64, fill byte) {
	copy(m.content[off:], bytes.Repeat([]byte{fill}, int(n)))
	m.private.Add(block.Range{Off: off, Len: n}.Outward(4096).Intersect(block.Range{Len: int64(len(m.content))}))
	m.number++
}

func (d *device) snapshot() *image {
	c := d.changes.Take()
	m := &image{content: slices.Clone(d.content)}
	m.disk = Disk{Name: d.name, Size: int64(len(d.content)), SectorSize: 512, BlockSize: 4096, Image: m,
		Generation: c.Info().Generation.String(), Number: c.Info().Number,
		Since: func(generation string, number uint8) (iter.Seq[block.Range], error) {
			g, err := cbt.ParseGeneration(generation)
			if err != nil {
				return nil, err
			}
			since, err := c.Since(g, number)
			if err != nil {
				return nil, err
			}
			return since.Ranges(), nil
		},
		Private: func() ([]block.Range, uint64, bool) { return slices.Clone(m.private.Ranges()), m.number, !m.busy }}
	return m
}

// taken is a snapshot of all devices.
type taken struct {
	id     string
	at     time.Time
	images []*image
}

func (s taken) request(t *testing.T) Request {
	r := Request{Group: "g", Point: "point " + s.id, Snapshot: s.id, Time: s.at, Consistency: stream.Filesystem, Folder: t.TempDir(), Segment: 4 << 10,
		Holder: vault.Holder{Host: "here", PID: os.Getpid(), Instance: "test"}}
	for _, m := range s.images {
		r.Disks = append(r.Disks, m.disk)
	}
	return r
}

type bench struct {
	t       *testing.T
	rng     *rand.Rand
	devices []*device
	vault   *vault.Vault
	clock   time.Time
	n       int
}

func newBench(t *testing.T, seed uint64, sizes ...int64) *bench {
	b := &bench{t: t, rng: rand.New(rand.NewPCG(seed, 1)), clock: time.Unix(1e9, 0)}
	for i, size := range sizes {
		b.devices = append(b.devices, &device{fmt.Sprintf("d%d", i), make([]byte, size), cbt.New(size)})
	}
	var err error
	if b.vault, err = vault.Create(t.Context(), t.TempDir()); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *bench) take() taken {
	b.n++
	b.clock = b.clock.Add(time.Minute)
	s := taken{id: fmt.Sprint(b.n), at: b.clock}
	for _, d := range b.devices {
		s.images = append(s.images, d.snapshot())
	}
	return s
}

func (b *bench) scribble(size int64, do func(off, n int64, fill byte)) {
	for range b.rng.IntN(12) {
		off := b.rng.Int64N(size)
		n := 1 + b.rng.Int64N(min(size-off, int64(1)<<b.rng.IntN(17)))
		do(off, n, byte(b.rng.IntN(4))) // zeroes too
	}
}

// check holds every point of the vault against what it must be.
func (b *bench) check(want map[string][][]byte) {
	b.t.Helper()
	ctx := b.t.Context()
	h, err := timeline.Load(ctx, b.vault, "g")
	if errors.Is(err, vault.ErrNoGroup) && len(want) == 0 {
		return
	}
	if err != nil || h.Damage() != nil {
		b.t.Fatal(err, h.Damage())
	}
	report, err := timeline.Verify(ctx, b.vault, "g", func(int64, int64) {})
	if err != nil || len(report.Damage) > 0 {
		b.t.Fatal(err, report.Damage)
	}
	if len(h.Bookmarks()) != len(want) {
		b.t.Fatalf("%d points, want %d", len(h.Bookmarks()), len(want))
	}
	for name, disks := range want {
		p, err := h.Resolve(stream.Spec{Bookmark: name})
		if err != nil {
			b.t.Fatal(err)
		}
		for i, content := range disks {
			b.same(h, i, p.Position, content, name)
		}
	}
	if len(want) > 0 { // a copy that was cut off takes nothing away
		if _, err := h.Resolve(stream.Spec{Latest: true}); err != nil {
			b.t.Fatal(err)
		}
	}
}

func (b *bench) same(h *timeline.History, disk int, p stream.Position, want []byte, name string) {
	b.t.Helper()
	v, err := h.View(b.t.Context(), disk, p)
	if err != nil {
		b.t.Fatal(err)
	}
	defer v.Close()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(io.NewSectionReader(v, 0, v.Size()), got); err != nil {
		b.t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		i := 0
		for got[i] == want[i] {
			i++
		}
		b.t.Fatalf("%s, disk %d: byte %d is %d, want %d", name, disk, i, got[i], want[i])
	}
}

// cutOff fails the copy somewhere: its context ends after so many reports of progress.
func cutOff(ctx context.Context, r *Request, after int) context.Context {
	ctx, cancel := context.WithCancel(ctx)
	r.Progress = func(int64, int64) {
		if after--; after < 0 {
			cancel()
		}
	}
	return ctx
}

// TestModel: snapshots of several devices, copied in order with some left out,
// cut off anywhere, images changed before the copy, and generations that end.
// Every point is what the images held, for good, after every step.
func TestModel(t *testing.T) {
	increments, wholes, cuts := 0, 0, 0
	for seed := range sim.Seeds(5) {
		b := newBench(t, seed, 3<<20+512, 130<<10)
		want := map[string][][]byte{}
		var waiting []taken
		for step := range 30 {
			for _, d := range b.devices {
				b.scribble(int64(len(d.content)), d.write)
			}
			switch k := b.rng.IntN(12); {
			case k < 3:
				waiting = append(waiting, b.take())
			case k == 3:
				b.devices[b.rng.IntN(2)].changes.Reset()
			case k < 6 && len(waiting) > 0:
				m := waiting[b.rng.IntN(len(waiting))].images[b.rng.IntN(2)]
				b.scribble(m.disk.Size, m.change)
			case len(waiting) > 0:
				i := b.rng.IntN(len(waiting))
				s := waiting[i]
				r := s.request(t)
				ctx := t.Context()
				cut := b.rng.IntN(3) == 0
				if cut {
					ctx = cutOff(ctx, &r, b.rng.IntN(8))
				}
				got, err := Put(ctx, b.vault, r)
				if err != nil {
					if ctx.Err() == nil || !cut {
						t.Fatalf("seed %d: %v", seed, err)
					}
					cuts++
					break // it may be tried again, or a later one instead
				}
				if got.Already || got.Point != r.Point {
					t.Fatalf("seed %d: %+v", seed, got)
				}
				for _, d := range got.Disks {
					if d.Why == "" {
						increments++
					} else {
						wholes++
					}
				}
				var all [][]byte
				for _, m := range s.images {
					all = append(all, slices.Clone(m.content))
				}
				want[r.Point] = all
				waiting = waiting[i+1:]
			}
			if step%6 == 0 {
				b.check(want)
			}
		}
		b.check(want)
	}
	if increments < 5 || wholes < 5 || cuts < 5 {
		t.Errorf("%d increments, %d wholes, %d cut off: the test tries too little", increments, wholes, cuts)
	}
}

// TestOnlyWhatChanged: bytes are counted.
func TestOnlyWhatChanged(t *testing.T) {
	b := newBench(t, 1, 8<<20)
	d := b.devices[0]
	d.write(0, 5<<20, 'a')
	put := func(s taken) DiskResult {
		t.Helper()
		r, err := Put(t.Context(), b.vault, s.request(t))
		if err != nil {
			t.Fatal(err)
		}
		return r.Disks[0]
	}
	if r := put(b.take()); r.Why == "" || r.Read != 8<<20 || r.Stored != 5<<20 {
		t.Errorf("the first: %+v", r)
	}
	d.write(4096, 8192, 'b')
	d.write(7<<20, 100, 'b')
	if r := put(b.take()); r.Why != "" || r.Read != 12288 || r.Stored != 12288 {
		t.Errorf("an increment: %+v", r)
	}
	if r := put(b.take()); r.Why != "" || r.Read != 0 {
		t.Errorf("nothing changed: %+v", r)
	}
	d.changes.Reset()
	d.write(1<<20, 4096, 'c')
	if r := put(b.take()); r.Why == "" || r.Read != 8<<20 || r.Stored != grain {
		t.Errorf("the generation ended: all is read and what differs is stored: %+v", r)
	}
	if r := put(b.take()); r.Why != "" || r.Read != 0 {
		t.Errorf("and goes on from there: %+v", r)
	}
}

// TestRefusals: what is refused leaves the vault as it was.
func TestRefusals(t *testing.T) {
	b := newBench(t, 1, 1<<20)
	b.devices[0].write(0, 1<<20, 'a')
	first, second, third := b.take(), b.take(), b.take()
	if _, err := Put(t.Context(), b.vault, second.request(t)); err != nil {
		t.Fatal(err)
	}
	want := map[string][][]byte{"point 2": {b.devices[0].content}}
	r, err := Put(t.Context(), b.vault, second.request(t))
	if err != nil || !r.Already || r.Point != "point 2" {
		t.Errorf("the same again: %+v, %v", r, err)
	}
	refused := func(what string, is error, r Request) {
		t.Helper()
		if _, err := Put(t.Context(), b.vault, r); !errors.Is(err, is) {
			t.Errorf("%s: %v", what, err)
		}
		if left, _ := filepath.Glob(filepath.Join(r.Folder, "*")); len(left) > 0 {
			t.Errorf("%s leaves %v", what, left)
		}
		b.check(want)
	}
	refused("an older snapshot", ErrOlder, first.request(t))
	taken := third.request(t)
	taken.Point = "point 2"
	refused("a name that is there", ErrPoint, taken)
	taken.Point = "latest"
	if _, err := Put(t.Context(), b.vault, taken); err == nil {
		t.Error("a bookmark called latest")
	}
	other := third.request(t)
	other.Disks[0].Name = "another"
	refused("another device", ErrOtherDisks, other)
	grown := third.request(t)
	grown.Disks[0].Size += 4096
	refused("another size", ErrOtherDisks, grown)
	third.images[0].busy = true
	refused("an image that is written to", ErrChanged, third.request(t))
	third.images[0].busy = false
	changing := third.request(t)
	third.images[0].change(0, 1, 'x')
	changing.Progress = func(int64, int64) { third.images[0].change(0, 1, 'x') }
	refused("an image that is written to meanwhile", ErrChanged, changing)
	lock, err := b.vault.Lock(t.Context(), "g", vault.Holder{Host: "elsewhere"})
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Unlock()
	var held *vault.HeldError
	if _, err := Put(t.Context(), b.vault, third.request(t)); !errors.As(err, &held) {
		t.Errorf("a group that another writes: %v", err)
	}
}

// TestUnreadableImage: a copy that meets an error makes no point.
func TestUnreadableImage(t *testing.T) {
	b := newBench(t, 1, 1<<20)
	s := b.take()
	r := s.request(t)
	r.Disks[0].Image = io.NewSectionReader(bytes.NewReader(nil), 0, 0)
	if _, err := Put(t.Context(), b.vault, r); err == nil {
		t.Error("no error")
	}
	b.check(nil)
	if _, err := Put(t.Context(), b.vault, s.request(t)); err != nil {
		t.Error(err)
	}
	b.check(map[string][][]byte{"point 1": {make([]byte, 1<<20)}})
}
