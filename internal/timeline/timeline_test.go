package timeline

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/segment"
	"tidemark/internal/stream"
	"tidemark/internal/vault"
)

const (
	diskSize = 64 << 10
	bs       = 4096
)

// written is a vault with a random history, and the history itself.
type written struct {
	v       *vault.Vault
	records []stream.Record
	bounds  []int // index of the first record of each segment
}

// history makes a stream that keeps the rules of internal/stream, cuts it into
// segments at random and puts them into a vault.
func history(t testing.TB, seed uint64, n int) *written {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 7))
	w := &written{records: randomStream(r, n)}
	dir := t.TempDir()
	v, err := vault.Create(t.Context(), filepath.Join(dir, "vault"))
	if err != nil {
		t.Fatal(err)
	}
	w.v = v
	lock, err := v.Lock(t.Context(), "g", vault.Holder{PID: os.Getpid()})
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Unlock()
	b := segment.NewBuilder(1 << 16)
	var prev segment.Summary
	var last stream.Position
	put := func() {
		h := segment.Header{Group: "g", GroupID: [16]byte{1}, Sequence: prev.Sequence + 1, Previous: prev.Digest,
			Disks: []segment.Disk{{Name: "a", Size: diskSize, SectorSize: 512, BlockSize: bs}, {Name: "b", Size: diskSize, SectorSize: 512, BlockSize: bs}}}
		s, err := b.Seal(h, segment.State{Last: last})
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, fmt.Sprint(h.Sequence))
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.WriteTo(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
		if err := v.Put(t.Context(), lock, path, s.Summary); err != nil {
			t.Fatal(err)
		}
		if err := v.Put(t.Context(), lock, path, s.Summary); err != nil {
			t.Fatalf("the same segment again: %v", err)
		}
		prev = s.Summary
		b.Reset()
	}
	for i := range w.records {
		if b.Records() == 0 {
			w.bounds = append(w.bounds, i)
		}
		if err := b.Append(&w.records[i]); err != nil {
			t.Fatal(err)
		}
		if w.records[i].Kind.TakesPosition() {
			last = w.records[i].Position
		}
		if r.IntN(15) == 0 {
			put()
		}
	}
	put()
	return w
}

func randomStream(r *rand.Rand, n int) []stream.Record {
	var out []stream.Record
	var pos, settled stream.Position
	clock := int64(1_000_000)
	stretches := []stream.Position{}
	payload := func(size int64) []byte {
		p := make([]byte, size)
		for i := range p {
			p[i] = byte(r.Uint32())
		}
		return p
	}
	write := func() {
		pos++
		size := 512 * (1 + r.Int64N(20))
		rec := stream.Record{Kind: stream.KindWrite, Op: block.Op(1 + r.IntN(3)), Disk: r.IntN(2), Position: pos, Time: clock,
			Range: block.Range{Off: 512 * r.Int64N((diskSize-size)/512+1), Len: size}}
		if rec.Op == block.OpWrite {
			rec.Payload = payload(size)
		}
		out = append(out, rec)
	}
	gap := func() {
		if settled != 0 {
			stretches = append(stretches, pos)
		}
		pos++
		settled = 0
		var ranges []block.DiskRange
		for d := range 2 {
			from := bs * r.Int64N(diskSize/bs)
			ranges = append(ranges, block.DiskRange{Disk: d, Range: block.Range{Off: from, Len: diskSize - from}})
		}
		if len(out) == 0 {
			ranges = []block.DiskRange{{Disk: 0, Range: block.Range{Len: diskSize}}, {Disk: 1, Range: block.Range{Len: diskSize}}}
		}
		out = append(out, stream.Record{Kind: stream.KindGap, Position: pos, Time: clock, Cause: stream.CauseOverflow, Ranges: ranges})
		opened := pos
		for _, g := range ranges {
			for off := g.Off; off < g.End(); off += bs {
				if r.IntN(4) == 0 {
					write()
				}
				rank := opened + stream.Position(r.Int64N(int64(pos-opened)+1))
				rec := stream.Record{Kind: stream.KindFill, Disk: g.Disk, Position: rank, ValidFrom: pos, Time: clock, Range: block.Range{Off: off, Len: bs}}
				switch k := r.IntN(4); {
				case k == 0:
					rec.Fill = stream.FillZero
				case k == 1 && len(stretches) > 0:
					rec.Fill, rec.Base = stream.FillSame, stretches[r.IntN(len(stretches))]
				default:
					rec.Fill, rec.Payload = stream.FillData, payload(bs)
				}
				out = append(out, rec)
			}
		}
		settled = pos
		out = append(out, stream.Record{Kind: stream.KindSettled, Position: settled, Time: clock})
	}
	gap()
	for range n {
		clock += r.Int64N(3) * 1000
		switch r.IntN(40) {
		case 0:
			gap()
		case 1:
			pos++
			out = append(out, stream.Record{Kind: stream.KindBookmark, Position: pos, Time: clock, Name: fmt.Sprint("mark", pos)})
		default:
			write()
		}
	}
	return out
}

// truth evaluates a stream sector by sector, by the letter of internal/stream.
func truth(records []stream.Record, disk int, at stream.Position) []byte {
	out := make([]byte, diskSize)
	for sector := int64(0); sector < diskSize; sector += 512 {
		best := -1
		for i, r := range records {
			content := r.Kind == stream.KindWrite || r.Kind == stream.KindFill && r.Fill != stream.FillKnown
			if !content || r.Disk != disk || r.Position > at || sector < r.Range.Off || sector >= r.Range.End() {
				continue
			}
			if best < 0 || r.Position > records[best].Position ||
				r.Position == records[best].Position && (r.Kind == stream.KindFill || records[best].Kind != stream.KindFill) {
				best = i
			}
		}
		if best < 0 {
			continue
		}
		r := records[best]
		switch {
		case r.Payload != nil:
			copy(out[sector:sector+512], r.Payload[sector-r.Range.Off:])
		case r.Fill == stream.FillSame:
			copy(out[sector:sector+512], truth(records[:best], disk, r.Base)[sector:])
		}
	}
	return out
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
	for seed := range uint64(12) {
		w := history(t, seed, 150)
		h, err := Load(t.Context(), w.v, "g")
		if err != nil || h.Damage() != nil {
			t.Fatalf("seed %d: %v, %v", seed, err, h.Damage())
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
			checkExtents(t, v)
			if err := v.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// checkExtents holds the map against what is read: in order, gapless, and zero where it says so.
func checkExtents(t *testing.T, v *View) {
	t.Helper()
	content := read(t, v)
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
			if e.State == block.Zero && len(bytes.Trim(content[e.Off:e.End()], "\x00")) > 0 {
				t.Fatalf("extent %v is not zero", e)
			}
			at = e.End()
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
	for _, m := range h.moments {
		p, err := h.Resolve(stream.Spec{Time: time.Unix(0, m.time)})
		if err == nil && (p.Position < m.pos || h.timeOf(p.Position).UnixNano() != m.time) {
			t.Fatalf("time %d gives position %d (%d)", m.time, p.Position, h.timeOf(p.Position).UnixNano())
		}
	}
}

// TestEveryObjectFlipped: a flipped byte anywhere is found by verify, and no
// view returns anything but the truth or an error.
func TestEveryObjectFlipped(t *testing.T) {
	w := history(t, 5, 60)
	paths, _ := filepath.Glob(filepath.Join(w.v.Dir(), "groups/g/segments/L00/*.seg"))
	clean, err := Load(t.Context(), w.v, "g")
	if err != nil {
		t.Fatal(err)
	}
	st := clean.Stretches()
	latest := st[len(st)-1].Last
	r := rand.New(rand.NewPCG(1, 1))
	for range 150 {
		path := paths[r.IntN(len(paths))]
		good, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		bad := bytes.Clone(good)
		at := r.IntN(len(bad))
		bad[at] ^= 1 << r.IntN(8)
		rewrite(t, path, bad)
		report, err := Verify(t.Context(), w.v, "g", func(int64, int64) {})
		if err != nil || len(report.Damage) == 0 {
			t.Fatalf("byte %d of %s flipped: %+v, %v", at, filepath.Base(path), report, err)
		}
		h, err := Load(t.Context(), w.v, "g")
		if err != nil {
			t.Fatal(err)
		}
		if p, err := h.Resolve(stream.Spec{Latest: true}); err == nil && p.Position != latest {
			t.Fatalf("latest silently became %d", p.Position)
		}
		for _, s := range h.Stretches() {
			for disk := range 2 {
				v, err := h.View(t.Context(), disk, s.Last)
				if err != nil {
					continue
				}
				got := make([]byte, diskSize)
				if _, err := v.ReadAt(got, 0); err == nil && !bytes.Equal(got, truth(w.records, disk, s.Last)) {
					t.Fatalf("byte %d of %s flipped: a wrong view at %d", at, filepath.Base(path), s.Last)
				}
				v.Close()
			}
		}
		rewrite(t, path, good)
	}
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
