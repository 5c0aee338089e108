package batch

import (
	"bytes"
	"errors"
	"io"
	"os"
	"reflect"
	"testing"

	"tidemark/internal/block"
	"tidemark/internal/stream"
)

var testDisks = []Disk{{Name: "sda", Size: 1 << 20, SectorSize: 512}, {Name: "data", Size: 3 << 40, SectorSize: 4096}}

// samples has one batch of each kind.
func samples() []*Batch {
	head := Header{Number: 7, From: 41, To: 44, Time: 1_700_000_000_123_456_789, GroupID: [16]byte{1, 2, 3, 15: 16}, Group: "db", Consumer: "copy", Disks: testDisks}
	writes, mark, fill, ranges := &Batch{Header: head}, &Batch{Header: head}, &Batch{Header: head}, &Batch{Header: head}
	writes.Kind, writes.Consistent = Writes, true
	writes.Records = []Record{
		{Op: block.OpWrite, Disk: 0, Position: 42, Time: head.Time - 2000, Range: block.Range{Off: 4096, Len: 8}, Payload: []byte("tidemark")},
		{Op: block.OpZeroes, Disk: 1, Position: 43, Time: head.Time - 1000, Range: block.Range{Off: 1 << 40, Len: 1 << 39}},
		{Op: block.OpDiscard, Disk: 1, Position: 44, Time: head.Time, Range: block.Range{Off: 0, Len: 4096}},
	}
	mark.Kind, mark.Consistent, mark.Bookmark, mark.Consistency, mark.Records = Bookmark, true, "before upgrade", stream.Filesystem, []Record{}
	fill.Kind = Fill
	fill.Records = []Record{{Op: block.OpWrite, Disk: 0, Range: block.Range{Off: 512, Len: 3}, Payload: []byte{1, 2, 3}}}
	ranges.Kind = Ranges
	ranges.Records = []Record{{Op: block.OpRead, Disk: 1, Range: block.Range{Off: 1 << 30, Len: 1 << 20}}}
	return []*Batch{writes, mark, fill, ranges}
}

func encode(t testing.TB, b *Batch) []byte {
	t.Helper()
	var build Builder
	for i := range b.Records {
		build.Add(&b.Records[i])
	}
	e, err := build.Encode(b.Header)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if _, err := e.WriteTo(&out); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// TestGolden pins the format: what this build writes is what the first one
// wrote, and is read back as what was written, one batch behind the other.
func TestGolden(t *testing.T) {
	var all []byte
	for _, b := range samples() {
		all = append(all, encode(t, b)...)
	}
	const name = "testdata/version-1.batches"
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(want, all) {
		t.Errorf("the format has changed: %s has %d bytes, written were %d", name, len(want), len(all))
	}
	r := bytes.NewReader(want)
	for _, b := range samples() {
		got, err := Read(r)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(b, got) {
			t.Errorf("got %+v\nwant %+v", got, b)
		}
	}
	if _, err := Read(r); err != io.EOF {
		t.Errorf("behind the last: %v", err)
	}
}

// TestEveryByteCounts: a batch with any byte changed, or cut anywhere, is refused.
func TestEveryByteCounts(t *testing.T) {
	for _, b := range samples() {
		whole := encode(t, b)
		for i := range whole {
			bad := bytes.Clone(whole)
			bad[i] ^= 0x10
			if _, err := Read(bytes.NewReader(bad)); err == nil {
				t.Errorf("%s: byte %d changed, and nothing was noticed", b.Kind, i)
			} else if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrVersion) {
				t.Errorf("%s: byte %d changed: %v", b.Kind, i, err)
			}
			if _, err := Read(bytes.NewReader(whole[:i])); i > 0 && !errors.Is(err, ErrDamaged) {
				t.Errorf("%s cut at %d: %v", b.Kind, i, err)
			}
		}
	}
}

// FuzzRead: whatever comes, there is an answer, and what is read is written again
// as the same bytes.
func FuzzRead(f *testing.F) {
	for _, b := range samples() {
		f.Add(encode(f, b))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) >= headerSize { // checksums that fit, or a fuzzer gets nowhere
			in = bytes.Clone(in)
			le.PutUint32(in[headerSize-4:], crc(in[:headerSize-4]))
		}
		b, err := Read(bytes.NewReader(in))
		if err != nil {
			return
		}
		again, err := Read(bytes.NewReader(encode(t, b)))
		if err != nil || !reflect.DeepEqual(b, again) {
			t.Errorf("read %+v, written and read again %+v, %v", b, again, err)
		}
	})
}
