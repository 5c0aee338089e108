package fill

import (
	"math/rand/v2"
	"slices"
	"testing"

	"tidemark/internal/block"
	"tidemark/internal/stream"
)

const tib = 1 << 40

func on(disk int, off, n int64) []block.DiskRange {
	return []block.DiskRange{{Disk: disk, Range: block.Range{Off: off, Len: n}}}
}

// TestSetModel compares the set with an array of blocks under random edits.
func TestSetModel(t *testing.T) {
	for seed := range uint64(30) {
		rng := rand.New(rand.NewPCG(seed, 2))
		size := []int64{50, 3000}[seed%2]
		var s set
		model := make([]Place, size) // 0: not in the set
		for step := range 600 {
			a := rng.Int64N(size)
			b := min(size, a+1+rng.Int64N(1+size/int64(1+rng.IntN(40))))
			var with []piece
			clear(model[a:b])
			for at := a; at < b; {
				end := min(b, at+1+rng.Int64N(4))
				if v := Place(rng.IntN(3)); v != 0 {
					with = append(with, piece{off: at, end: end, last: v})
					for i := at; i < end; i++ {
						model[i] = v
					}
				}
				at = end
			}
			s.splice(a, b, with)
			checkSet(t, &s, model, seed, step)
		}
	}
}

func checkSet(t *testing.T, s *set, model []Place, seed uint64, step int) {
	t.Helper()
	got := make([]Place, len(model))
	var bytes int64
	count, prev := 0, int64(-1)
	for i, n := range s.nodes {
		if len(n.pieces) == 0 || n.first != n.pieces[0].off || len(n.pieces) > nodeMax {
			t.Fatalf("seed %d step %d: node %d is malformed: %d pieces", seed, step, i, len(n.pieces))
		}
		idle := Held
		for _, p := range n.pieces {
			if p.off < prev || p.end <= p.off {
				t.Fatalf("seed %d step %d: piece %+v after %d", seed, step, p, prev)
			}
			prev = p.end
			for at := p.off; at < p.end; at++ {
				got[at] = p.last
			}
			bytes += p.end - p.off
			count++
			idle = min(idle, p.last)
		}
		if idle != n.idle {
			t.Fatalf("seed %d step %d: node %d says %d, has %d", seed, step, i, n.idle, idle)
		}
	}
	if !slices.Equal(got, model) || bytes != s.bytes || count != s.count {
		t.Fatalf("seed %d step %d: set differs from the model (%d bytes of %d, %d pieces of %d)", seed, step, s.bytes, bytes, s.count, count)
	}
}

// TestSweep: two disks in turn, front to back, each byte once, none that is being read.
func TestSweep(t *testing.T) {
	e := New([]Disk{{Size: 100_000, BlockSize: 4096}, {Size: 9000, BlockSize: 512}})
	e.Open(append(on(0, 0, 100_000), on(1, 600, 7000)...), 5)
	e.Checkpoint(10, 1)
	if _, ok := e.Next(1 << 20); ok {
		t.Fatal("a job before any scan")
	}
	e.Scanned(10, on(0, 8192, 100))
	want := []struct {
		disk   int
		off, n int64
	}{{0, 0, 8192}, {1, 512, 7168}, {0, 12288, 16384}, {0, 28672, 16384}, {0, 45056, 16384}, {0, 61440, 16384}, {0, 77824, 16384}, {0, 94208, 5792}}
	var jobs []Job
	for _, w := range want {
		j, ok := e.Next(20_000)
		if !ok || j.Disk != w.disk || j.Range != (block.Range{Off: w.off, Len: w.n}) || j.Rank != 1 {
			t.Fatalf("job %+v, %v; want %+v", j, ok, w)
		}
		jobs = append(jobs, j)
	}
	if j, ok := e.Next(20_000); ok {
		t.Fatalf("job %+v under a lost write", j)
	}
	e.Scanned(10, nil)
	j, ok := e.Next(20_000)
	if !ok || j.Range.Off != 8192 || j.Range.Len != 4096 {
		t.Fatalf("job %+v, %v after the lost write ended", j, ok)
	}
	for _, j := range append(jobs, j) {
		e.Done(j.ID, 20)
	}
	if r := e.Ready(); len(r) != 0 {
		t.Fatalf("ready before the reader has passed: %+v", r)
	}
	e.Checkpoint(20, 7)
	r := e.Ready()
	if len(r) != 9 || r[0].ValidFrom != 7 || !r[0].Last {
		t.Fatalf("ready: %+v", r)
	}
	if from, ok := e.Settled(); !ok || from != 7 {
		t.Fatalf("settled %d %v", from, ok)
	}
	if _, ok := e.Settled(); ok {
		t.Fatal("settled twice")
	}
}

// TestPieces: a job whose middle is dropped again comes back in two pieces.
func TestPieces(t *testing.T) {
	e := New([]Disk{{Size: 16 << 10, BlockSize: 4096}})
	e.Open(on(0, 0, 16<<10), 0)
	e.Checkpoint(1, 1)
	e.Scanned(1, nil)
	j, _ := e.Next(tib)
	e.Open(on(0, 5000, 10), Held)
	e.Checkpoint(2, 2)
	e.Done(j.ID, 2)
	r := e.Ready()
	if len(r) != 2 || r[0].Range != (block.Range{Len: 4096}) || r[1].Range != (block.Range{Off: 8192, Len: 8192}) || r[0].Last || !r[1].Last {
		t.Fatalf("%+v", r)
	}
	if e.Remaining(0) != 4096 {
		t.Fatalf("%d bytes remain", e.Remaining(0))
	}
	e.Scanned(2, nil)
	if j, ok := e.Next(tib); ok {
		t.Fatalf("job %+v of a held block", j)
	}
	e.Cleared(on(0, 5000, 10), 2)
	if j, ok := e.Next(tib); ok {
		t.Fatalf("job %+v after a scan from before the clearing", j)
	}
	e.Scanned(2, nil)
	if _, ok := e.Next(tib); !ok {
		t.Fatal("no job")
	}
}

// TestKnown: the short last block of a disk is closed by a write that ends with the disk.
func TestKnown(t *testing.T) {
	e := New([]Disk{{Size: 10_000, BlockSize: 4096}})
	e.Open(on(0, 9000, 1), 5)
	e.Checkpoint(5, 3)
	e.Captured(0, block.Range{Off: 8192, Len: 1808}, 4, 4) // older than the drop
	e.Captured(0, block.Range{Off: 8704, Len: 1296}, 6, 5) // not the whole block
	e.Captured(0, block.Range{Off: 4096, Len: 5904}, 7, 6)
	e.Scanned(7, nil)
	if r := e.Ready(); len(r) != 0 {
		t.Fatalf("closed before the write has ended: %+v", r)
	}
	e.Scanned(8, nil)
	r := e.Ready()
	if len(r) != 1 || !r[0].Known || r[0].Range != (block.Range{Off: 8192, Len: 1808}) || r[0].ValidFrom != 6 {
		t.Fatalf("%+v", r)
	}
	if from, ok := e.Settled(); !ok || from != 6 {
		t.Fatalf("settled %d %v", from, ok)
	}
}

// TestEmptyGap: a gap without blocks, as after a start with every fill durable, settles at its own position.
func TestEmptyGap(t *testing.T) {
	e := New([]Disk{{Size: 10_000, BlockSize: 4096}})
	e.Open(nil, 3)
	if _, ok := e.Settled(); ok {
		t.Fatal("settled before the gap has a position")
	}
	e.Checkpoint(3, 9)
	if from, ok := e.Settled(); !ok || from != 9 {
		t.Fatalf("settled %d %v", from, ok)
	}
}

// TestBoundedMemory: a whole disk of 1 TiB is one piece, marks and known writes are bounded.
func TestBoundedMemory(t *testing.T) {
	e := New([]Disk{{Size: tib, BlockSize: 4096}})
	e.Open(on(0, 0, tib), 0)
	if e.pieces != 1 {
		t.Fatalf("%d pieces", e.pieces)
	}
	for i := range 200_000 {
		e.Checkpoint(Place(i), stream.Position(i))
		e.Captured(0, block.Range{Off: int64(i) * 8192, Len: 4096}, Place(i), stream.Position(i))
	}
	if len(e.marks) > usual.marks || len(e.known) > usual.known || e.pieces > 2*usual.known+2 {
		t.Fatalf("%d marks, %d known, %d pieces", len(e.marks), len(e.known), e.pieces)
	}
	e.Scanned(100_000, nil)
	if e.rank.place > 100_000 || e.rank.place < 98_000 || e.rank.position != stream.Position(e.rank.place) {
		t.Fatalf("rank %+v for a low-water mark of 100000", e.rank)
	}
}

func TestCapturedDoesNotAllocate(t *testing.T) {
	e := New([]Disk{{Size: tib, BlockSize: 4096}})
	if n := testing.AllocsPerRun(1000, func() { e.Captured(0, block.Range{Len: 4096}, 1, 1) }); n != 0 {
		t.Fatalf("%v allocations", n)
	}
}

func BenchmarkCapturedSettled(b *testing.B) {
	e := New([]Disk{{Size: tib, BlockSize: 4096}})
	b.ReportAllocs()
	for i := range b.N {
		e.Captured(0, block.Range{Off: int64(i) & 0xfffff000, Len: 4096}, Place(i), 1)
	}
}

// BenchmarkCapturedFilling: random 4 KiB writes while 1 TiB is unknown.
func BenchmarkCapturedFilling(b *testing.B) {
	e := New([]Disk{{Size: tib, BlockSize: 4096}})
	e.Open(on(0, 0, tib), 0)
	rng := rand.New(rand.NewPCG(1, 1))
	b.ReportAllocs()
	for i := range b.N {
		e.Captured(0, block.Range{Off: rng.Int64N(tib) &^ 4095, Len: 4096}, Place(i), stream.Position(i))
		if i%1000 == 0 {
			e.Checkpoint(Place(i), stream.Position(i))
			e.Scanned(Place(i), nil)
			e.Ready()
		}
	}
	b.ReportMetric(float64(e.pieces), "pieces")
}

// sweepAll fills all that is unknown, eight jobs at a time, and returns how many jobs that took.
func sweepAll(b *testing.B, e *Engine) (jobs int) {
	place := Place(100)
	for e.unknown > 0 {
		e.Checkpoint(place, stream.Position(place))
		e.Scanned(place, nil)
		for range 8 {
			j, ok := e.Next(1 << 20)
			if !ok {
				break
			}
			e.Done(j.ID, place+1)
			jobs++
		}
		place++
		e.Checkpoint(place, stream.Position(place))
		e.Ready()
	}
	if _, ok := e.Settled(); !ok {
		b.Fatal("not settled")
	}
	return jobs
}

// BenchmarkFirstCopy: the bookkeeping for 1 TiB in jobs of 1 MiB.
func BenchmarkFirstCopy(b *testing.B) {
	for range b.N {
		e := New([]Disk{{Size: tib, BlockSize: 4096}})
		e.Open(on(0, 0, tib), 0)
		n := sweepAll(b, e)
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(n)/float64(b.N), "ns/job")
	}
}

// BenchmarkMillionPieces: a map of every second block of 8 GiB is opened and swept.
func BenchmarkMillionPieces(b *testing.B) {
	for range b.N {
		e := New([]Disk{{Size: tib, BlockSize: 4096}})
		for i := range int64(1 << 20) {
			e.Open(on(0, i*8192, 4096), Place(i%50))
		}
		n := sweepAll(b, e)
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(n)/float64(b.N), "ns/piece")
	}
}
