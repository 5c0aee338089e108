package timeline

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/segment"
	"tidemark/internal/sim"
	"tidemark/internal/sim/story"
	"tidemark/internal/stream"
)

// truth evaluates a stream sector by sector, by the letter of internal/stream.
func truth(records []stream.Record, disk int, at stream.Position) []byte {
	out := make([]byte, sizes[disk])
	for sector := int64(0); sector < sizes[disk]; sector += 512 {
		copy(out[sector:sector+512], sectorAt(records, disk, at, sector))
	}
	return out
}

// sectorAt is what one sector held; nil stands for zeroes.
func sectorAt(records []stream.Record, disk int, at stream.Position, sector int64) []byte {
	best := newestAt(records, disk, at, sector)
	if best < 0 {
		return nil
	}
	switch r := &records[best]; {
	case r.Payload != nil:
		return r.Payload[sector-r.Range.Off:]
	case r.Fill == stream.FillSame:
		return sectorAt(records[:best], disk, r.Base, sector)
	}
	return nil
}

// stateAt is what kind of content one sector had.
func stateAt(records []stream.Record, disk int, at stream.Position, sector int64) block.State {
	best := newestAt(records, disk, at, sector)
	if best < 0 {
		return block.Undefined
	}
	switch r := &records[best]; {
	case r.Payload != nil:
		return block.Data
	case r.Fill == stream.FillSame:
		return stateAt(records[:best], disk, r.Base, sector)
	case r.Fill == stream.FillZero, r.Op == block.OpZeroes:
		return block.Zero
	}
	return block.Undefined
}

// newestAt is the number of the record that one sector's content is of; -1 if there is none.
func newestAt(records []stream.Record, disk int, at stream.Position, sector int64) int {
	best := -1
	for i := range records {
		r := &records[i]
		content := r.Kind == stream.KindWrite || r.Kind == stream.KindFill && r.Fill != stream.FillKnown
		if !content || r.Disk != disk || r.Position > at || sector < r.Range.Off || sector >= r.Range.End() {
			continue
		}
		if best < 0 || r.Position > records[best].Position ||
			r.Position == records[best].Position && (r.Kind == stream.KindFill || records[best].Kind != stream.KindFill) {
			best = i
		}
	}
	return best
}

func read(t testing.TB, v block.Device) []byte {
	t.Helper()
	b := make([]byte, v.Size())
	if _, err := v.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	return b
}

// TestViewsAgainstTruth compares views at random points with the plain evaluation.
func TestViewsAgainstTruth(t *testing.T) {
	for seed := range sim.Seeds(40) {
		w := history(t, seed, 150)
		h, err := Load(t.Context(), w.v, "g")
		if err != nil || h.Damage() != nil {
			t.Fatalf("seed %d: %v, %v", seed, err, h.Damage())
		}
		if !slices.Equal(h.Stretches(), w.stretch) {
			t.Fatalf("seed %d: stretches %v, want %v", seed, h.Stretches(), w.stretch)
		}
		if len(h.Unknown(0))+len(h.Unknown(1)) != 0 {
			t.Fatalf("seed %d: unknown at the end: %v %v", seed, h.Unknown(0), h.Unknown(1))
		}
		report, err := Verify(t.Context(), w.v, "g", func(int64, int64) {})
		if err != nil || len(report.Damage) != 0 {
			t.Fatalf("seed %d: verify: %+v, %v", seed, report.Damage, err)
		}
		r := rand.New(rand.NewPCG(seed, 9))
		for range 6 {
			st := h.Stretches()[r.IntN(len(h.Stretches()))]
			at := st.First + stream.Position(r.Int64N(int64(st.Last-st.First)+1))
			disk := r.IntN(2)
			v, err := h.View(t.Context(), disk, at)
			if err != nil {
				t.Fatal(err)
			}
			if got, want := read(t, v), truth(w.records, disk, at); !bytes.Equal(got, want) {
				i := 0
				for got[i] == want[i] {
					i++
				}
				t.Fatalf("seed %d: disk %d at %d differs at byte %d", seed, disk, at, i)
			}
			checkExtents(t, v, w.records)
			if err := v.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// checkExtents holds the map against the plain evaluation: in order, gapless,
// each sector in the state that it had.
func checkExtents(t *testing.T, v *View, records []stream.Record) {
	t.Helper()
	at := int64(0)
	for at < v.Size() {
		extents, err := v.Extents(block.Range{Off: at, Len: v.Size() - at})
		if err != nil || len(extents) == 0 {
			t.Fatalf("extents at %d: %v, %v", at, extents, err)
		}
		for _, e := range extents {
			if e.Off != at || e.Len <= 0 {
				t.Fatalf("extent %v at %d", e, at)
			}
			for ; at < e.End(); at += 512 {
				if want := stateAt(records, v.disk, v.at, at); e.State != want {
					t.Fatalf("disk %d at %d, sector at %d: %v, want %v", v.disk, v.at, at, e.State, want)
				}
			}
		}
	}
}

func TestResolve(t *testing.T) {
	w := history(t, 3, 300)
	h, err := Load(t.Context(), w.v, "g")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range h.Points() {
		got, err := h.Resolve(stream.Spec{Position: p.Position})
		if err != nil || got.Position != p.Position {
			t.Errorf("listed point %d is refused: %v", p.Position, err)
		}
		if p.Bookmark != "" {
			if got, err := h.Resolve(stream.Spec{Bookmark: p.Bookmark}); err != nil || got.Position != p.Position {
				t.Errorf("bookmark %s: %v, %v", p.Bookmark, got, err)
			}
		}
	}
	for p := stream.Position(1); p <= h.newest+1; p++ {
		inside := slices.ContainsFunc(w.stretch, func(st Stretch) bool { return st.First <= p && p <= st.Last })
		if got, err := h.Resolve(stream.Spec{Position: p}); (err == nil) != inside || inside && got.Position != p {
			t.Errorf("position %d, in a stretch: %v; %v, %v", p, inside, got, err)
		}
	}
	last := h.Stretches()[len(h.Stretches())-1].Last
	if p, err := h.Resolve(stream.Spec{Latest: true}); err != nil || p.Position != last {
		t.Errorf("latest: %v, %v", p, err)
	}
	if _, err := h.Resolve(stream.Spec{Position: last + 1}); !errors.Is(err, ErrNoPoint) {
		t.Errorf("beyond the end: %v", err)
	}
	if _, err := h.Resolve(stream.Spec{Position: 1}); !errors.Is(err, ErrInsideGap) {
		t.Errorf("inside the first gap: %v", err)
	}
	if _, err := h.Resolve(stream.Spec{Bookmark: "none"}); !errors.Is(err, ErrNoPoint) {
		t.Errorf("unknown bookmark: %v", err)
	}
	if _, err := h.Resolve(stream.Spec{Time: time.Unix(0, 1)}); !errors.Is(err, ErrNoPoint) {
		t.Errorf("before the history: %v", err)
	}
	checkTimes(t, w, h)
}

// checkTimes resolves every time that a record has: to the last position that is not younger.
func checkTimes(t *testing.T, w *written, h *History) {
	t.Helper()
	last := map[int64]stream.Position{}
	for _, r := range w.records {
		if r.Kind.TakesPosition() {
			last[r.Time] = r.Position
		}
	}
	for at, newest := range map[string]error{"1700-01-01T00:00:00Z": ErrNoPoint, "0001-01-01T00:00:01Z": ErrNoPoint, "2262-04-12T00:00:00Z": nil, "9999-12-31T23:59:59Z": nil} {
		when, err := time.Parse(time.RFC3339, at)
		if err != nil {
			t.Fatal(err)
		}
		if p, err := h.ResolveFuzzy(stream.Spec{Time: when}); !errors.Is(err, newest) || newest == nil && p.Position != h.newest {
			t.Fatalf("%s gives position %d of %d: %v, want %v", at, p.Position, h.newest, err, newest)
		}
	}
	for at, want := range last {
		if p, err := h.ResolveFuzzy(stream.Spec{Time: time.Unix(0, at)}); err != nil || p.Position != want {
			t.Fatalf("time %d itself gives position %d, want %d: %v", at, p.Position, want, err)
		}
		p, err := h.ResolveFuzzy(stream.Spec{Time: time.Unix(0, at+1)})
		if err != nil || p.Position != want || p.Time.UnixNano() != at {
			t.Fatalf("time %d gives position %d of %d, want %d: %v", at, p.Position, p.Time.UnixNano(), want, err)
		}
		if _, err := h.Resolve(stream.Spec{Time: time.Unix(0, at+1)}); (err == nil) != (p.Stretch != 0) || err != nil && !errors.Is(err, ErrInsideGap) {
			t.Fatalf("time %d, stretch %d: %v", at, p.Stretch, err)
		}
	}
}

// TestFuzzy: what a fuzzy view does not name is what it would be by the letter,
// and what it names is exactly what no fill had made known by then.
func TestFuzzy(t *testing.T) {
	for seed := range sim.Seeds(10) {
		w := history(t, seed, 60)
		h, err := Load(t.Context(), w.v, "g")
		if err != nil {
			t.Fatal(err)
		}
		for p := stream.Position(1); p <= h.newest; p += 1 + stream.Position(seed)%7 {
			for disk := range 2 {
				got, err := h.Fuzzy(t.Context(), disk, p)
				if err != nil {
					t.Fatal(err)
				}
				if want := unknownAt(w.records, disk, p); h.stretchOf(p) == 0 && !slices.Equal(got, want) || h.stretchOf(p) != 0 && len(got)+len(want) != 0 {
					t.Fatalf("seed %d: at %d of disk %d unknown: %v, want %v", seed, p, disk, got, want)
				}
				v, err := h.ViewFuzzy(t.Context(), disk, p)
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(read(t, v), truth(w.records, disk, p)) {
					t.Fatalf("seed %d: the view at %d of disk %d differs", seed, p, disk)
				}
				v.Close()
			}
		}
	}
}

// unknownAt goes sector by sector.
func unknownAt(records []stream.Record, disk int, p stream.Position) []block.Range {
	var out block.Set
	for at := int64(0); at < sizes[disk]; at += 512 {
		sector, unknown := block.Range{Off: at, Len: 512}, false
		for _, r := range records {
			switch {
			case r.Kind == stream.KindGap && r.Position <= p:
				unknown = unknown || slices.ContainsFunc(r.Ranges, func(g block.DiskRange) bool { return g.Disk == disk && g.Contains(sector) })
			case r.Kind == stream.KindFill && r.Disk == disk && r.Range.Contains(sector) && r.ValidFrom <= p:
				unknown = false
			}
		}
		if unknown {
			out.Add(sector)
		}
	}
	return out.Ranges()
}

// rewrite replaces a file rather than its content: objects can be links.
func rewrite(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := errors.Join(os.Remove(path), os.WriteFile(path, b, 0o600)); err != nil {
		t.Fatal(err)
	}
}

func TestMissingObject(t *testing.T) {
	w := history(t, 6, 200)
	refs, err := w.v.Segments(t.Context(), "g")
	if err != nil || len(refs) < 4 {
		t.Fatal(len(refs), err)
	}
	gone := refs[len(refs)/2]
	if err := os.Remove(filepath.Join(w.v.Dir(), "groups/g/segments/L00", gone.Name)); err != nil {
		t.Fatal(err)
	}
	h, err := Load(t.Context(), w.v, "g")
	if err != nil {
		t.Fatal(err)
	}
	var damaged *DamagedError
	if _, err := h.Resolve(stream.Spec{Latest: true}); !errors.As(err, &damaged) || damaged.Newest >= gone.First || !errors.Is(err, segment.ErrDamaged) {
		t.Fatalf("latest: %v", err)
	}
	if damaged.Newest != 0 {
		if _, err := h.Resolve(stream.Spec{Position: damaged.Newest}); err != nil {
			t.Errorf("the point it names as sound: %v", err)
		}
	}
	report, err := Verify(t.Context(), w.v, "g", func(int64, int64) {})
	if err != nil || len(report.Damage) == 0 {
		t.Errorf("verify: %+v, %v", report, err)
	}
}

// TestLongPayloads: payloads over several frames, cut by others, read in pieces
// of any size and place.
func TestLongPayloads(t *testing.T) {
	old := sizes
	sizes = [2]int64{600 << 10, 4096}
	defer func() { sizes = old }()
	whole := []block.DiskRange{{Range: block.Range{Len: sizes[0]}}, {Disk: 1, Range: block.Range{Len: sizes[1]}}}
	s := story.New(1)
	write := func(p stream.Position, off, size int64) {
		s.Add(stream.Record{Kind: stream.KindWrite, Op: block.OpWrite, Position: p, Range: block.Range{Off: off, Len: size}, Payload: s.Payload(size)})
	}
	s.Add(stream.Record{Kind: stream.KindGap, Position: 1, Ranges: whole})
	s.Add(stream.Record{Kind: stream.KindFill, Fill: stream.FillData, Position: 1, ValidFrom: 1, Range: whole[0].Range, Payload: s.Payload(sizes[0])})
	s.Add(zeroFill(1, 1, 1, whole[1].Range))
	s.Add(settledAt(1))
	write(2, 4096, 1024)
	write(3, 32<<10, 256<<10)
	write(4, 200<<10, 130<<10+512)
	write(5, 64<<10, 64<<10)
	w, h := told(t, s.Records)
	v, err := h.View(t.Context(), 0, 5)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	want := truth(w.records, 0, 5)
	for range 300 {
		off := s.Rand.Int64N(sizes[0])
		got := make([]byte, 1+s.Rand.Int64N(sizes[0]-off))
		if n, err := v.ReadAt(got, off); err != nil || n != len(got) || !bytes.Equal(got, want[off:off+int64(n)]) {
			t.Fatalf("%d bytes from %d: %d, %v", len(got), off, n, err)
		}
	}
}
