package segment

import (
	"bytes"
	"errors"
	"flag"
	"math/rand/v2"
	"os"
	"testing"

	"tidemark/internal/block"
	"tidemark/internal/stream"
)

var update = flag.Bool("update", false, "write the golden file anew")

func sample(seed uint64, n int) []stream.Record {
	r := rand.New(rand.NewPCG(seed, 1))
	out := []stream.Record{{Kind: stream.KindGap, Position: 1, Cause: stream.CauseInitial, Time: 10, Ranges: []block.DiskRange{{Disk: 0, Range: block.Range{Len: 1 << 20}}, {Disk: 1, Range: block.Range{Len: 4096}}}}}
	pos := stream.Position(1)
	for range n {
		pos++
		size := int64(512 * (1 + r.IntN(min(400, 2*n))))
		p := make([]byte, size)
		for i := range p {
			p[i] = byte(r.IntN(4))
		}
		rg := block.Range{Off: 512 * r.Int64N(1000), Len: size}
		switch r.IntN(6) {
		case 0:
			out = append(out, stream.Record{Kind: stream.KindWrite, Op: block.OpZeroes, Position: pos, Time: int64(pos), Range: rg})
		case 1:
			out = append(out, stream.Record{Kind: stream.KindBookmark, Position: pos, Time: int64(pos), Name: "bookmark", Consistency: stream.Filesystem})
		case 2:
			pos--
			out = append(out, stream.Record{Kind: stream.KindFill, Fill: stream.FillData, Position: pos, ValidFrom: pos, Range: rg, Payload: p})
		default:
			out = append(out, stream.Record{Kind: stream.KindWrite, Op: block.OpWrite, Position: pos, Time: int64(pos), Range: rg, Payload: p})
		}
	}
	return append(out, stream.Record{Kind: stream.KindSettled, Position: pos, Time: int64(pos)})
}

func build(t testing.TB, records []stream.Record) []byte {
	t.Helper()
	b := NewBuilder(1 << 20)
	for i := range records {
		if err := b.Append(&records[i]); err != nil {
			t.Fatal(err)
		}
	}
	h := Header{Group: "g", GroupID: [16]byte{1}, Sequence: 3, Previous: Digest{9}, Disks: []Disk{{Name: "a", Size: 1 << 20, SectorSize: 512, BlockSize: 4096}, {Name: "b", Size: 4096, SectorSize: 512, BlockSize: 4096}}}
	s, err := b.Seal(h, State{Last: 70, Settled: 60, Time: 99, Source: Source{Ring: [16]byte{7}, Place: 1 << 40, Drops: 5}})
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if n, err := s.WriteTo(&out); err != nil || n != s.Summary.Size {
		t.Fatalf("wrote %d of %d bytes, %v", n, s.Summary.Size, err)
	}
	return out.Bytes()
}

func open(b []byte) (*Segment, error) { return Open(bytes.NewReader(b), int64(len(b))) }

func TestRoundTrip(t *testing.T) {
	want := sample(1, 200)
	s, err := open(build(t, want))
	if err != nil {
		t.Fatal(err)
	}
	if s.Len() != len(want) || s.Summary().Settled != 60 || s.Header().Group != "g" || s.Summary().First != 1 {
		t.Fatalf("%d records, %+v", s.Len(), s.Summary())
	}
	for i := range want {
		e := s.Entry(i)
		if e.HasPayload() {
			got := make([]byte, e.Range.Len)
			if err := s.ReadPayload(&e, 0, got); err != nil || !bytes.Equal(got, want[i].Payload) {
				t.Fatalf("record %d: payload differs, %v", i, err)
			}
			part := make([]byte, 100)
			if err := s.ReadPayload(&e, 300, part); err != nil || !bytes.Equal(part, want[i].Payload[300:400]) {
				t.Fatalf("record %d: part differs, %v", i, err)
			}
		}
		if e.Kind != want[i].Kind || e.Position != want[i].Position || e.Range != want[i].Range || e.Name != want[i].Name || len(e.Ranges) != len(want[i].Ranges) || e.Consistency != want[i].Consistency {
			t.Fatalf("record %d: got %+v, want %+v", i, e.Record, want[i])
		}
	}
}

// TestSealTwice: a seal that the spool refuses is done again with more records.
func TestSealTwice(t *testing.T) {
	records := sample(2, 40)
	b := NewBuilder(1 << 20)
	for i := range records {
		if err := b.Append(&records[i]); err != nil {
			t.Fatal(err)
		}
		if _, err := b.Seal(Header{Sequence: 3}, State{}); err != nil {
			t.Fatal(err)
		}
	}
	whole := build(t, records)
	h := Header{Group: "g", GroupID: [16]byte{1}, Sequence: 3, Previous: Digest{9}, Disks: []Disk{{Name: "a", Size: 1 << 20, SectorSize: 512, BlockSize: 4096}, {Name: "b", Size: 4096, SectorSize: 512, BlockSize: 4096}}}
	s, err := b.Seal(h, State{Last: 70, Settled: 60, Time: 99, Source: Source{Ring: [16]byte{7}, Place: 1 << 40, Drops: 5}})
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	_, _ = s.WriteTo(&out)
	if !bytes.Equal(out.Bytes(), whole) {
		t.Error("sealing in between changed the segment")
	}
}

// TestEveryFlip: no changed bit goes unseen.
func TestEveryFlip(t *testing.T) {
	b := build(t, sample(3, 4))
	for i := range b {
		b[i] ^= 1 << (i % 8)
		s, err := open(b)
		if err == nil {
			s.Check(func(_, _ uint64, e error) { err = e })
		}
		if err == nil {
			t.Fatalf("a flipped bit in byte %d of %d was not seen", i, len(b))
		}
		b[i] ^= 1 << (i % 8)
	}
	for n := range b {
		if _, err := open(b[:n]); err == nil {
			t.Fatalf("the first %d of %d bytes pass for a segment", n, len(b))
		}
	}
}

// twoPhases has prepared marks and verdicts among other records.
func twoPhases() []stream.Record {
	out := sample(5, 6)
	last := out[len(out)-1].Position
	return append(out,
		stream.Record{Kind: stream.KindPrepared, Position: last + 1, Time: 100, Name: "kept", Consistency: stream.Application},
		stream.Record{Kind: stream.KindPrepared, Position: last + 2, Time: 101, Name: "taken back"},
		stream.Record{Kind: stream.KindWrite, Op: block.OpDiscard, Position: last + 3, Time: 102, Range: block.Range{Len: 4096}},
		stream.Record{Kind: stream.KindVerdict, Position: last + 1, Time: 103, Commit: true},
		stream.Record{Kind: stream.KindVerdict, Position: last + 2, Time: 104},
	)
}

func TestGolden(t *testing.T) {
	for path, records := range map[string][]stream.Record{"testdata/v1.seg": sample(4, 12), "testdata/v1-two-phases.seg": twoPhases()} {
		got := build(t, records)
		if *update {
			if err := os.WriteFile(path, got, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := open(want); err != nil {
			t.Fatalf("the golden file %s cannot be read: %v", path, err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("the format of %s has changed: it needs a new version", path)
		}
	}
}

// TestTwoPhases: both kinds come back as they were, and only a segment that has them
// carries the flag by which a reader that does not know them refuses it.
func TestTwoPhases(t *testing.T) {
	want := twoPhases()
	b := build(t, want)
	s, err := open(b)
	if err != nil {
		t.Fatal(err)
	}
	for i := len(want) - 5; i < len(want); i++ {
		e := s.Entry(i)
		if e.Kind != want[i].Kind || e.Position != want[i].Position || e.Time != want[i].Time || e.Name != want[i].Name || e.Commit != want[i].Commit || e.Consistency != want[i].Consistency {
			t.Errorf("record %d: got %+v, want %+v", i, e.Record, want[i])
		}
	}
	flags := func(b []byte) uint32 { return le.Uint32(b[le.Uint32(b[16:])+8:]) }
	if with, without := flags(b), flags(build(t, sample(5, 6))); with != flagTwoPhase || without != 0 {
		t.Errorf("flags %#x and %#x", with, without)
	}
	builder := NewBuilder(1 << 10)
	for i := range want {
		if err := builder.Append(&want[i]); err != nil {
			t.Fatal(err)
		}
	}
	if builder.Reset(); builder.flags != 0 {
		t.Error("the next segment would have the flag, too")
	}
	for flags, is := range map[uint32]error{0: ErrDamaged, 3: ErrVersion, 2: ErrVersion} {
		if _, err := open(reflagged(b, flags)); !errors.Is(err, is) {
			t.Errorf("flags %#x: %v, want %v", flags, err, is)
		}
	}
}

// reflagged gives an index other flags, with checksums that fit.
func reflagged(b []byte, flags uint32) []byte {
	b = bytes.Clone(b)
	f := b[len(b)-footerSize:]
	ix := b[le.Uint32(f[16:]):][:le.Uint32(f[24:])]
	le.PutUint32(ix[8:], flags)
	le.PutUint32(ix[len(ix)-sumSize:], crc(ix[:len(ix)-sumSize]))
	copy(f[28:32], ix[len(ix)-sumSize:])
	le.PutUint32(f[footerSize-sumSize:], crc(f[:footerSize-sumSize]))
	return b
}

// TestDigestStandsForEveryByte: segments that differ in one payload byte, in an
// entry or in the header have different digests, and their footers do not fit
// one another.
func TestDigestStandsForEveryByte(t *testing.T) {
	seal := func(group string, position stream.Position, payload byte) (Digest, []byte) {
		b := NewBuilder(1 << 10)
		r := stream.Record{Kind: stream.KindWrite, Op: block.OpWrite, Position: position, Range: block.Range{Len: 512}, Payload: bytes.Repeat([]byte{payload}, 512)}
		if err := b.Append(&r); err != nil {
			t.Fatal(err)
		}
		s, err := b.Seal(Header{Group: group, Sequence: 1, Disks: []Disk{{Name: "d", Size: 4096, SectorSize: 512, BlockSize: 4096}}}, State{Last: 9})
		if err != nil {
			t.Fatal(err)
		}
		var buf bytes.Buffer
		if _, err := s.WriteTo(&buf); err != nil {
			t.Fatal(err)
		}
		return s.Summary.Digest, buf.Bytes()
	}
	digest, whole := seal("g", 5, 1)
	for name, other := range map[string]func() (Digest, []byte){
		"a payload": func() (Digest, []byte) { return seal("g", 5, 2) },
		"an entry":  func() (Digest, []byte) { return seal("g", 6, 1) },
		"a header":  func() (Digest, []byte) { return seal("h", 5, 1) },
	} {
		d, b := other()
		if d == digest {
			t.Errorf("%s that differs does not change the digest", name)
		}
		copy(b[len(b)-footerSize:], whole[len(whole)-footerSize:])
		if _, err := open(b); err == nil {
			t.Errorf("the footer fits a segment that differs in %s", name)
		}
	}
}
