package cbt

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"tidemark/internal/block"
	"tidemark/internal/sim"
	"tidemark/internal/vfs"
)

// TestLargerAndSame compares the arithmetic on words with bytes.
func TestLargerAndSame(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for a := range 256 {
		for b := range 256 {
			x, y := rng.Uint64(), rng.Uint64()
			lane := 8 * rng.IntN(8)
			x, y = x&^(0xff<<lane)|uint64(a)<<lane, y&^(0xff<<lane)|uint64(b)<<lane
			got := larger(x, y)
			dirty, all := same(x, uint8(b))
			wantDirty, wantAll := false, true
			for i := 0; i < 64; i += 8 {
				if p, q := uint8(x>>i), uint8(y>>i); uint8(got>>i) != max(p, q) {
					t.Fatalf("larger(%x, %x) = %x", x, y, got)
				}
				above := uint8(x>>i) > uint8(b)
				wantDirty = wantDirty || above
			}
			for i := 0; i < 64; i += 8 {
				wantAll = wantAll && uint8(x>>i) > uint8(b) == wantDirty
			}
			if dirty != wantDirty || all != wantAll {
				t.Fatalf("same(%x, %d) = %v, %v", x, b, dirty, all)
			}
		}
	}
}

func TestBlockSize(t *testing.T) {
	for _, c := range []struct{ size, want int64 }{{0, 4096}, {64 << 30, 4096}, {64<<30 + 1, 8192}, {1 << 40, 65536}, {1 << 50, 64 << 20}} {
		if got := BlockSize(c.size); got != c.want {
			t.Errorf("of %d: %d, want %d", c.size, got, c.want)
		}
	}
}

// shadow is what a map must say: every change with the snapshot before which it was.
type shadow struct {
	changed []int // per byte: index of the next snapshot at its last change; 0: never
	taken   int
}

// TestModel marks at random, takes snapshots through the wrap, resets and resizes,
// and compares every answer about every pair of snapshots of a generation.
func TestModel(t *testing.T) {
	wraps := 0
	for seed := range sim.Seeds(20) {
		rng := rand.New(rand.NewPCG(seed, 1))
		size := int64(1 + rng.IntN(60*4096))
		endless := seed%5 == 0 // nothing ends its generations but the wrap
		m := New(size)
		var sh shadow
		begin := func() {
			sh = shadow{changed: make([]int, (size+4095)/4096)}
		}
		begin()
		type mark struct {
			g  Generation
			n  uint8
			at int // taken
		}
		var marks []mark
		last := map[Generation]uint8{}
		for range 900 {
			r := block.Range{Off: rng.Int64N(size)}
			r.Len = min(size-r.Off, rng.Int64N(20000))
			switch k := rng.IntN(100); {
			case k < 2 && endless:
			case k == 0:
				m.Reset()
				begin()
				marks = nil
			case k == 1:
				size = int64(1 + rng.IntN(60*4096))
				before := m.write.Load().size
				m.Resize(size)
				if size != before {
					begin()
					marks = nil
				}
			case k < 50:
				sh.taken++
				c := m.Take()
				i := c.Info()
				if i != m.Info() || i.Number == 0 || i.Number <= last[i.Generation] {
					t.Fatalf("seed %d: %+v after number %d of its generation, the map says %+v", seed, i, last[i.Generation], m.Info())
				}
				last[i.Generation] = i.Number
				marks = append(marks, mark{i.Generation, i.Number, sh.taken})
				for _, old := range marks {
					check(t, seed, c, &sh, old.g, old.n, old.at)
				}
				if i.Number == 255 {
					wraps++
					// what follows is another generation: it knows nothing of these
					marks = nil
					sh.taken = 0
					clear(sh.changed)
				}
			default:
				m.Mark(r)
				for b := r.Off / 4096; b*4096 < r.End() && r.Len > 0; b++ {
					sh.changed[b] = sh.taken + 1
				}
			}
		}
	}
	if wraps == 0 {
		t.Error("no generation came to its last number")
	}
}

// check compares what a table says of the time since an older snapshot.
func check(t *testing.T, seed uint64, c *Changes, sh *shadow, g Generation, n uint8, at int) {
	t.Helper()
	since, err := c.Since(g, n)
	if err != nil {
		t.Fatalf("seed %d: since %s:%d at %+v: %v", seed, g, n, c.Info(), err)
	}
	size := since.Size()
	got := make([]bool, 0, len(sh.changed))
	var sum int64
	var before *bool
	for length, dirty := range since.Extents(0, size) {
		if length <= 0 || before != nil && *before == dirty {
			t.Fatalf("seed %d: extent of %d beside one alike", seed, length)
		}
		before = &dirty
		for b := sum; b < sum+length; b += 4096 {
			got = append(got, dirty)
		}
		sum += length
	}
	if sum != size {
		t.Fatalf("seed %d: extents of %d bytes of %d", seed, sum, size)
	}
	for b, changed := range sh.changed {
		if got[b] != (changed > at) {
			t.Fatalf("seed %d: block %d since %d of %d: %v, changed before snapshot %d", seed, b, at, sh.taken, got[b], changed)
		}
	}
}

// TestFullCopyWhereContinuityIsGone: everything that cannot be known is refused by name.
func TestFullCopyWhereContinuityIsGone(t *testing.T) {
	m := New(1 << 20)
	if _, ok := m.Newest(); ok {
		t.Error("a table before any snapshot")
	}
	g0 := m.Info().Generation
	if _, err := m.Since(g0, 1); !errors.Is(err, ErrFullCopy) {
		t.Errorf("before the first snapshot: %v", err)
	}
	first := m.Take().Info()
	if first.Number != 1 || first.Generation != g0 {
		t.Errorf("the first snapshot is %+v", first)
	}
	for what, err := range map[string]error{
		"number 0":         second(m.Since(first.Generation, 0)),
		"a number to come": second(m.Since(first.Generation, 2)),
		"live, to come":    second(m.Live(first.Generation, 2)),
		"another":          second(m.Since(newGeneration(), 1)),
	} {
		if !errors.Is(err, ErrFullCopy) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for n := uint8(2); n != 0; n++ {
		m.Mark(block.Range{Off: int64(n) * 4096, Len: 1})
		if i := m.Take().Info(); i.Number != n || i.Generation != g0 {
			t.Fatalf("snapshot %d is %+v", n, i)
		}
	}
	m.Mark(block.Range{Off: 0, Len: 1})
	c, err := m.Since(g0, 254)
	if err != nil || !slices.Equal(slices.Collect(c.Ranges()), []block.Range{{Off: 255 * 4096, Len: 4096}}) {
		t.Errorf("between 254 and 255: %v", err)
	}
	next := m.Take().Info()
	if next.Generation == g0 || next.Number != 1 {
		t.Errorf("after 255: %+v", next)
	}
	if _, err := m.Since(g0, 255); !errors.Is(err, ErrFullCopy) {
		t.Errorf("over the end of a generation: %v", err)
	}
	m.Resize(1 << 20) // the same size
	if m.Info() != next {
		t.Error("the same size began a generation")
	}
	m.Resize(2 << 20)
	if m.Info().Generation == next.Generation || m.Info().Number != 0 {
		t.Errorf("after a resize: %+v", m.Info())
	}
}

func second[T any](_ T, err error) error { return err }

// TestBlind: while nobody marks nothing is claimed, about before, meanwhile or
// after; only from two snapshots on that begin after Sighted something is known again.
func TestBlind(t *testing.T) {
	m := New(1 << 20)
	first := m.Take()
	unknown := func(what string, g Generation) {
		t.Helper()
		for _, ask := range []func(Generation, uint8) (*Changes, error){m.Since, m.Live} {
			if c, err := ask(g, 1); !errors.Is(err, ErrFullCopy) {
				t.Errorf("%s: %+v, %v, want %v", what, c, err, ErrFullCopy)
			}
		}
	}
	m.Blind()
	unknown("blind, since before", first.Info().Generation)
	second, third := m.Take(), m.Take()
	if second.Info().Generation == third.Info().Generation || second.Info().Generation == first.Info().Generation {
		t.Error("snapshots between which nobody marked are of one generation")
	}
	unknown("blind, since meanwhile", third.Info().Generation)
	if _, ok := m.Newest(); ok {
		t.Error("a blind map has a newest table")
	}
	file := filepath.Join(t.TempDir(), "map")
	if err := m.Save(vfs.OS{}, file, "x"); err != nil {
		t.Error(err)
	}
	if _, why, err := Open(vfs.OS{}, file, is("x"), 1<<20); err != nil || why == "" {
		t.Errorf("a blind map was saved, and goes on: %q, %v", why, err)
	}
	m.Sighted()
	unknown("since meanwhile", third.Info().Generation)
	fourth := m.Take()
	m.Mark(block.Range{Off: 8192, Len: 1})
	if got := m.Take(); got.Info().Generation != fourth.Info().Generation {
		t.Error("it does not go on where everything is marked")
	}
	c, err := m.Since(fourth.Info().Generation, fourth.Info().Number)
	if err != nil {
		t.Fatal(err)
	}
	if got := slices.Collect(c.Ranges()); !slices.Equal(got, []block.Range{{Off: 8192, Len: 4096}}) {
		t.Errorf("changed: %v", got)
	}
	m.Sighted()
	if m.Writing().Generation != fourth.Info().Generation {
		t.Error("a map that was never blind begins anew")
	}
}

// TestMarkDirtyShowsAtOnce in the newest snapshot's table and in the next one.
func TestMarkDirtyShowsAtOnce(t *testing.T) {
	m := New(1 << 20)
	if err := m.MarkDirty(block.Range{Len: 1}); err != nil { // before any snapshot
		t.Fatal(err)
	}
	a, b := m.Take(), m.Take()
	r := block.Range{Off: 8192, Len: 4096}
	if err := m.MarkDirty(r); err != nil {
		t.Fatal(err)
	}
	g := a.Info().Generation
	for what, c := range map[string]*Changes{"the newest": b, "the next": m.Take()} {
		got, err := c.Since(g, 1)
		if err != nil || !slices.Equal(slices.Collect(got.Ranges()), []block.Range{r}) {
			t.Errorf("%s: %v, %v", what, slices.Collect(got.Ranges()), err)
		}
	}
	if got, _ := a.Since(g, 1); len(slices.Collect(got.Ranges())) != 0 {
		t.Error("it shows in an older snapshot")
	}
	if err := m.MarkDirty(block.Range{Off: 1 << 20, Len: 1}); !errors.Is(err, block.ErrBounds) {
		t.Errorf("beyond the end: %v", err)
	}
	m.Mark(block.Range{Off: 1<<20 - 1, Len: 4096}) // the part inside counts
	live, err := m.Live(g, 3)
	if err != nil || !slices.Equal(slices.Collect(live.Ranges()), []block.Range{{Off: 1<<20 - 4096, Len: 4096}}) {
		t.Errorf("live: %v", err)
	}
}

// TestReadByOffset gives the table as blksnap's users read it.
func TestReadByOffset(t *testing.T) {
	m := New(5*4096 - 100)
	m.Mark(block.Range{Off: 4096, Len: 1})
	m.Take()
	m.Mark(block.Range{Off: 4 * 4096, Len: 1})
	c := m.Take()
	p := make([]byte, 3)
	n, err := c.Read(p, 0)
	if n != 3 || err != nil || !slices.Equal(p, []byte{0, 1, 0}) {
		t.Errorf("the first blocks: %v, %v", p[:n], err)
	}
	n, err = c.Read(p, 3)
	if n != 2 || err != nil || !slices.Equal(p[:n], []byte{0, 2}) {
		t.Errorf("the last blocks: %v, %v", p[:n], err)
	}
	if n, err := c.Read(p, 5); n != 0 || err != io.EOF {
		t.Errorf("at the end: %d, %v", n, err)
	}
	if _, err := c.Read(p, 6); !errors.Is(err, block.ErrBounds) {
		t.Errorf("beyond the end: %v", err)
	}
	if i := c.Info(); i.Blocks != 5 || i.BlockSize != 4096 || i.Size != 5*4096-100 {
		t.Errorf("%+v", i)
	}
}

// TestExtentsAreCutToTheRange: they begin and end where they were asked to.
func TestExtentsAreCutToTheRange(t *testing.T) {
	m := New(100 * 4096)
	m.Take()
	m.Mark(block.Range{Off: 20 * 4096, Len: 50 * 4096})
	c, err := m.Since(m.Take().Info().Generation, 1)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range []struct {
		off, length int64
		want        string
	}{
		{0, 100 * 4096, "81920- 204800+ 122880- "}, {20*4096 - 1, 2, "1- 1+ "}, {21 * 4096, 100, "100+ "},
		{99 * 4096, 1 << 30, "4096- "}, {100 * 4096, 5, ""}, {7, 0, ""},
	} {
		var got string
		for n, dirty := range c.Extents(w.off, w.length) {
			got += fmt.Sprintf("%d%s ", n, map[bool]string{true: "+", false: "-"}[dirty])
		}
		if got != w.want {
			t.Errorf("%d+%d: %q, want %q", w.off, w.length, got, w.want)
		}
	}
}

// TestConcurrentMarks: many writers to the same words, snapshots between them;
// what differs between two images is what the map says.
func TestConcurrentMarks(t *testing.T) {
	const blocks, writers = 64, 4
	m := New(blocks * 4096)
	var content [blocks]atomic.Uint64
	var stop atomic.Bool
	var load sync.WaitGroup
	var barrier sync.RWMutex
	for w := range writers {
		rng := rand.New(rand.NewPCG(7, uint64(w)))
		load.Go(func() {
			for !stop.Load() {
				first, n := rng.Int64N(blocks), 1+rng.Int64N(3)
				barrier.RLock()
				m.Mark(block.Range{Off: first * 4096, Len: n * 4096})
				for b := first; b < min(first+n, blocks); b++ {
					content[b].Add(1)
				}
				barrier.RUnlock()
			}
		})
	}
	instant := func() (c *Changes, image [blocks]uint64) {
		barrier.Lock()
		defer barrier.Unlock()
		for b := range blocks {
			image[b] = content[b].Load()
		}
		return m.Take(), image
	}
	old, before := instant()
	for range 250 {
		c, after := instant()
		since, err := c.Since(old.Info().Generation, old.Info().Number)
		if err != nil {
			t.Fatal(err)
		}
		var dirty [blocks]bool
		for r := range since.Ranges() {
			for b := r.Off / 4096; b < r.End()/4096; b++ {
				dirty[b] = true
			}
		}
		for b := range blocks {
			if dirty[b] != (after[b] != before[b]) {
				t.Fatalf("block %d: marked %v, written %d and %d", b, dirty[b], before[b], after[b])
			}
		}
		old, before = c, after
	}
	stop.Store(true)
	load.Wait()
}

func TestMarkAllocatesNothing(t *testing.T) {
	m := New(1 << 30)
	if n := testing.AllocsPerRun(100, func() { m.Mark(block.Range{Off: 4096, Len: 1 << 20}) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkMark(b *testing.B) {
	m := New(64 << 30)
	for _, size := range []int64{4096, 1 << 20} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			b.ReportAllocs()
			off := int64(0)
			for b.Loop() {
				m.Mark(block.Range{Off: off, Len: size})
				off = (off + 7919*4096) % (63 << 30)
			}
		})
	}
}
