package segment

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"runtime"
	"testing"

	"tidemark/internal/block"
	"tidemark/internal/stream"
)

// noise is a write whose payload does not compress.
func noise(r *rand.Rand, pos stream.Position, n int) stream.Record {
	p := make([]byte, n)
	for i := 0; i+8 <= n; i += 8 {
		le.PutUint64(p[i:], r.Uint64())
	}
	return stream.Record{Kind: stream.KindWrite, Op: block.OpWrite, Position: pos, Range: block.Range{Off: 512 * r.Int64N(100), Len: int64(n)}, Payload: p}
}

var bigDisk = []Disk{{Name: "a", Size: 1 << 40, SectorSize: 512, BlockSize: 4096}}

func sealBytes(t testing.TB, b *Builder) []byte {
	t.Helper()
	s, err := b.Seal(Header{Group: "g", Sequence: 7, Disks: bigDisk}, State{Last: 99})
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if _, err := s.WriteTo(&out); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// TestOneFrame: a payload that fits into a frame lies in one, and so does any
// aligned part of a longer one; all sizes up to 32 MiB come back.
func TestOneFrame(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	b := NewBuilder(1 << 20)
	var want []stream.Record
	sizes := []int{0, 512, FrameSize, 512, FrameSize - 512, 512, 1024, FrameSize + 512, 3 * FrameSize, 512, 40 << 10, 40 << 10, 32 << 20, 512}
	for i, n := range sizes {
		rec := noise(r, stream.Position(i+1), n)
		if err := b.Append(&rec); err != nil {
			t.Fatal(err)
		}
		want = append(want, rec)
	}
	s, err := open(sealBytes(t, b))
	if err != nil {
		t.Fatal(err)
	}
	for i := range want {
		e := s.Entry(i)
		if n := uint64(e.Range.Len); n > 0 && n <= FrameSize && e.At/FrameSize != (e.At+n-1)/FrameSize || n > FrameSize && e.At%FrameSize != 0 {
			t.Errorf("payload of %d bytes at %d", n, e.At)
		}
	}
	i := 0
	err = s.Records(func(got *stream.Record) error {
		if got.Position != want[i].Position || got.Range != want[i].Range || !bytes.Equal(got.Payload, want[i].Payload) {
			t.Errorf("record %d differs", i)
		}
		i++
		return nil
	})
	if err != nil || i != len(want) {
		t.Errorf("%d records, %v", i, err)
	}
}

// TestEntryAnywhere: entries are the same in any order of asking.
func TestEntryAnywhere(t *testing.T) {
	want := sample(6, 500)
	s, err := open(build(t, want))
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(2, 2))
	for range 2000 {
		i := r.IntN(len(want))
		if e := s.Entry(i); e.Position != want[i].Position || e.Range != want[i].Range || e.Time != want[i].Time || e.Kind != want[i].Kind {
			t.Fatalf("entry %d is %+v, want %+v", i, e.Record, want[i])
		}
	}
}

// TestRecover cuts a file everywhere and damages it anywhere: what is kept ends
// at a mark and holds exactly the records that were appended before it, and as
// much is kept as can be.
func TestRecover(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 3))
	b := NewBuilder(1 << 20)
	var want []stream.Record
	for i := range 40 {
		sectors := 30
		if i%8 == 0 { // some are longer than a frame
			sectors = 200
		}
		rec := noise(r, stream.Position(i+1), 512*(1+r.IntN(sectors)))
		if err := b.Append(&rec); err != nil {
			t.Fatal(err)
		}
		want = append(want, rec)
		if i%4 == 3 {
			b.Mark(State{Last: stream.Position(i + 1), Source: Source{Place: uint64(i + 1)}})
		}
	}
	whole := sealBytes(t, b)
	for cut := 0; cut < len(whole); cut += 1 + r.IntN(len(whole)/150) {
		checkRecovered(t, whole[:cut], want)
		torn := bytes.Clone(whole)
		clear(torn[cut:min(cut+4096, len(torn))])
		checkRecovered(t, torn, want)
	}
	if kept := checkRecovered(t, whole[:len(whole)-footerSize], want); kept != 40 {
		t.Errorf("without its footer %d of 40 records are kept", kept)
	}
}

func checkRecovered(t *testing.T, b []byte, want []stream.Record) int {
	t.Helper()
	sealed, found, err := Recover(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		if !errors.Is(err, ErrDamaged) {
			t.Fatal(err)
		}
		return 0
	}
	var out bytes.Buffer
	if _, err := sealed.WriteTo(&out); err != nil {
		t.Fatal(err)
	}
	s, err := open(out.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	if s.Len() != found.Kept || found.Records != len(want) || int(s.Summary().Source.Place) != found.Kept || int(s.Summary().Last) != found.Kept {
		t.Fatalf("kept %+v, summary %+v", found, s.Summary())
	}
	i := 0
	err = s.Records(func(r *stream.Record) error {
		if r.Position != want[i].Position || !bytes.Equal(r.Payload, want[i].Payload) {
			t.Fatalf("record %d differs", i)
		}
		i++
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// FuzzOpen: no bytes make the reader panic, or allocate far more than there are.
func FuzzOpen(f *testing.F) {
	f.Add(build(f, sample(5, 3)))
	f.Add(build(f, nil))
	f.Add(build(f, twoPhases()))
	b := NewBuilder(0)
	for i := range 70 {
		if err := b.Append(&stream.Record{Kind: stream.KindWrite, Op: block.OpWrite, Position: stream.Position(i), Range: block.Range{Len: 512}, Payload: make([]byte, 512)}); err != nil {
			f.Fatal(err)
		}
		b.Mark(State{})
	}
	f.Add(sealBytes(f, b))
	if whole := build(f, sample(5, 3)); !bytes.Equal(resum(whole), whole) {
		f.Fatal("mending the checksums of a sound segment changes it: nothing behind them is reached")
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, b := range [][]byte{b, resum(b)} {
			exercise(t, b)
		}
	})
}

// resum mends the checksums of a mutated file, so that what lies behind them is
// reached.
func resum(b []byte) []byte {
	if len(b) < footerSize+headerHead+indexHead+2*sumSize {
		return b
	}
	b = bytes.Clone(b)
	foot := b[len(b)-footerSize:]
	head, ix := int64(le.Uint32(foot[16:])), int64(le.Uint32(foot[24:]))
	if head < sumSize+8 || ix < sumSize+8 || head+ix > int64(len(b)-footerSize) {
		return b
	}
	for _, part := range [][]byte{b[:head], b[head : head+ix]} {
		le.PutUint32(part[len(part)-sumSize:], crc(part[:len(part)-sumSize]))
	}
	copy(foot[20:24], b[head-sumSize:head])
	copy(foot[28:32], b[head+ix-sumSize:head+ix])
	le.PutUint32(foot[footerSize-sumSize:], crc(foot[:footerSize-sumSize]))
	return b
}

// TestHostileLengths writes huge numbers over every byte of header, index and
// footer, mends the checksums, and looks at what opening allocates.
func TestHostileLengths(t *testing.T) {
	whole := build(t, sample(5, 3))
	foot := len(whole) - footerSize
	front := int(le.Uint32(whole[foot+16:]) + le.Uint32(whole[foot+24:]))
	for at := range len(whole) - 8 {
		if at >= front && at < foot {
			continue
		}
		n := [...]uint32{1<<32 - 1, 1<<31 - 1, 1 << 24}[at%3]
		b := bytes.Clone(whole)
		le.PutUint32(b[at:], n)
		b = resum(b)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, _ = open(b)
		_, _ = openFront(bytes.NewReader(b), int64(len(b)))
		runtime.ReadMemStats(&after)
		if got := after.TotalAlloc - before.TotalAlloc; got > uint64(16*len(b)) {
			t.Fatalf("%d at byte %d: opening %d bytes allocated %d", n, at, len(b), got)
		}
	}
}

func exercise(t *testing.T, b []byte) {
	s, err := open(b)
	if _, _, err := Recover(bytes.NewReader(b), int64(len(b))); err != nil && !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrVersion) {
		t.Logf("recover: %v", err)
	}
	if err != nil {
		if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrVersion) {
			t.Fatalf("an error of its own: %v", err)
		}
		return
	}
	s.Check(func(_, _ uint64, _ error) {})
	for i := s.Len() - 1; i >= 0; i-- {
		e := s.Entry(i)
		if e.HasPayload() && e.Range.Len > 0 {
			_ = s.ReadPayload(&e, e.Range.Len-1, make([]byte, 1))
		}
	}
	_ = s.Records(func(*stream.Record) error { return nil })
}

// BenchmarkBuild appends 4 KiB writes and seals every 8 MiB.
func BenchmarkBuild(b *testing.B) {
	r := rand.New(rand.NewPCG(1, 1))
	text := make([]byte, 32<<20)
	for i := range text {
		text[i] = "the quick brown fox jumps over "[(i+r.IntN(8)/7)%31]
	}
	random := noise(r, 1, 32<<20).Payload
	for name, data := range map[string][]byte{"random": random, "text": text} {
		b.Run(name, func(b *testing.B) {
			bd := NewBuilder(8 << 20)
			rec := stream.Record{Kind: stream.KindWrite, Op: block.OpWrite, Range: block.Range{Len: 4096}}
			b.SetBytes(4096)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				rec.Position++
				rec.Range.Off = int64(i) % 5000 * 4096
				rec.Payload = data[i%(len(data)/4096)*4096:][:4096]
				if bd.Size() > 8<<20 {
					if _, err := bd.Seal(Header{Sequence: 1}, State{}); err != nil {
						b.Fatal(err)
					}
					bd.Reset()
				}
				if err := bd.Append(&rec); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func million(b *testing.B) []byte {
	bd := NewBuilder(8 << 20)
	rec := stream.Record{Kind: stream.KindWrite, Op: block.OpZeroes, Range: block.Range{Len: 4096}}
	r := rand.New(rand.NewPCG(1, 1))
	for range 1 << 20 {
		rec.Position++
		rec.Time += r.Int64N(100000)
		rec.Range.Off = 4096 * r.Int64N(1<<25)
		if err := bd.Append(&rec); err != nil {
			b.Fatal(err)
		}
	}
	return sealBytes(b, bd)
}

// BenchmarkOpen opens a segment of a million records and goes through them.
func BenchmarkOpen(b *testing.B) {
	data := million(b)
	b.ReportMetric(float64(len(data))/(1<<20), "bytes/entry")
	for b.Loop() {
		s, err := open(data)
		if err != nil {
			b.Fatal(err)
		}
		for i := range s.Len() {
			_ = s.Entry(i)
		}
	}
}

// BenchmarkRead4K reads 4 KiB at random from a segment in memory.
func BenchmarkRead4K(b *testing.B) {
	r := rand.New(rand.NewPCG(1, 1))
	bd := NewBuilder(8 << 20)
	for i := range 2048 {
		rec := noise(r, stream.Position(i+1), 4096)
		if err := bd.Append(&rec); err != nil {
			b.Fatal(err)
		}
	}
	s, err := open(sealBytes(b, bd))
	if err != nil {
		b.Fatal(err)
	}
	dst := make([]byte, 4096)
	for i := 0; b.Loop(); i++ {
		e := s.Entry(i * 31 % s.Len())
		if err := s.ReadPayload(&e, 0, dst); err != nil {
			b.Fatal(err)
		}
	}
}
