package involflt

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"math"
	"os"
	"reflect"
	"strings"
	"testing"
)

var golden = []Change{
	{Offset: 4096, Length: 4, At: Stamp{Time: 1000, Sequence: 7}, Data: []byte("abcd")},
	{Offset: 1 << 40, Length: 3, At: Stamp{Time: 1002, Sequence: 8}},
}

// sample reads bytes that were once written as they stand, with comments.
func sample(t *testing.T, name string) []byte {
	t.Helper()
	text, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	var digits strings.Builder
	for line := range strings.Lines(string(text)) {
		line, _, _ = strings.Cut(line, "#")
		digits.WriteString(strings.Join(strings.Fields(line), ""))
	}
	b, err := hex.DecodeString(digits.String())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestStream: the bytes of a stream are the ones that stand in a file, and come back.
func TestStream(t *testing.T) {
	first, last := golden[0].At, golden[1].At
	var b bytes.Buffer
	if err := WriteStream(&b, first, last, golden); err != nil {
		t.Fatal(err)
	}
	if want := sample(t, "stream.hex"); !bytes.Equal(b.Bytes(), want) {
		t.Errorf("written:\n% x\nwant:\n% x", b.Bytes(), want)
	}
	if n := StreamSize(golden); n != int64(b.Len()) || StreamOverhead != 228 || ChangeOverhead != 32 {
		t.Errorf("%d bytes, said to be %d; overhead %d and %d", b.Len(), n, StreamOverhead, ChangeOverhead)
	}
	f, l, changes, err := ParseStream(b.Bytes())
	want := append([]Change(nil), golden...)
	want[1].Data = make([]byte, 3)
	if err != nil || f != first || l != last || !reflect.DeepEqual(changes, want) {
		t.Errorf("%v %v %v %v", f, l, changes, err)
	}
	for n := range b.Len() {
		if _, _, _, err := ParseStream(b.Bytes()[:n]); !errors.Is(err, ErrStream) {
			t.Errorf("of %d bytes: %v", n, err)
		}
	}
}

// TestStreamRefuses what its deltas or lengths cannot say.
func TestStreamRefuses(t *testing.T) {
	var b bytes.Buffer
	first := Stamp{Time: 1 << 40, Sequence: 9}
	for _, at := range []Stamp{{Time: 1, Sequence: 10}, {Time: 1 << 40, Sequence: 8}, {Time: 1<<40 + math.MaxUint32, Sequence: 9}, {Time: 1 << 40, Sequence: 9 + math.MaxUint32}} {
		if err := WriteStream(&b, first, at, []Change{{Length: 1, At: at}}); !errors.Is(err, ErrDelta) || Fits(first, at) {
			t.Errorf("%v: %v", at, err)
		}
	}
	if err := WriteStream(&b, first, first, []Change{{Length: 2, At: first, Data: []byte{1}}}); !errors.Is(err, ErrStream) {
		t.Error(err)
	}
}

// TestTagList: short and long records, padded; the golden bytes; what does not fit.
func TestTagList(t *testing.T) {
	at := Stamp{Time: 0x1122334455667788, Sequence: 0x99}
	tags := [][]byte{[]byte("abc"), bytes.Repeat([]byte{'x'}, 250), {}}
	list, err := TagList(at, at, SourceMetadata, tags)
	if err != nil {
		t.Fatal(err)
	}
	want := sample(t, "tags.hex")
	if !bytes.Equal(list[:len(want)], want) || !bytes.Equal(list[len(want):], make([]byte, len(list)-len(want))) {
		t.Errorf("written:\n% x\nwant:\n% x", list[:len(want)], want)
	}
	f, l, source, back, err := ParseTagList(list[:])
	if err != nil || f != at || l != at || source != SourceMetadata || len(back) != 3 || !bytes.Equal(back[0], tags[0]) || !bytes.Equal(back[1], tags[1]) || len(back[2]) != 0 {
		t.Errorf("%v %v %d %q %v", f, l, source, back, err)
	}
	many := make([][]byte, (TagRecordsMax-4)/8)
	if _, err := TagList(at, at, SourceMetadata, many); err != nil {
		t.Error(err)
	}
	if _, err := TagList(at, at, SourceMetadata, append(many, nil)); !errors.Is(err, ErrTags) {
		t.Error(err)
	}
}

func TestFileName(t *testing.T) {
	name := "/" + strings.Repeat("n", FileNameMax-1)
	list, err := FileName(name)
	if back, perr := ParseFileName(list[:]); err != nil || perr != nil || back != name {
		t.Errorf("%q, %v, %v", back, err, perr)
	}
	if n := binary.NativeEndian.Uint16(list[:]); n != FileNameMax {
		t.Errorf("the length counts more than the name: %d", n)
	}
	if _, err := FileName(name + "n"); err == nil {
		t.Error("a name that is too long")
	}
}

func FuzzParseStream(f *testing.F) {
	var b bytes.Buffer
	if err := WriteStream(&b, golden[0].At, golden[1].At, golden); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, in []byte) {
		first, last, changes, err := ParseStream(in)
		if err != nil {
			return
		}
		for _, c := range changes {
			if !Fits(first, c.At) {
				return // the largest deltas, and numbers that wrap, are read but not written
			}
		}
		var out bytes.Buffer
		if err := WriteStream(&out, first, last, changes); err != nil || out.Len() != len(in) {
			t.Errorf("%d bytes, written again %d: %v", len(in), out.Len(), err)
		}
		f2, l2, again, err := ParseStream(out.Bytes())
		if err != nil || f2 != first || l2 != last || len(again) != len(changes) {
			t.Errorf("%v %v %v", f2, l2, err)
		}
	})
}

func FuzzParseTagList(f *testing.F) {
	list, err := TagList(Stamp{1, 2}, Stamp{3, 4}, SourceData, [][]byte{[]byte("a tag")})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(list[:96])
	name, err := FileName("/a/file")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(name[:16])
	f.Fuzz(func(t *testing.T, in []byte) {
		_, _ = ParseFileName(in)
		first, last, source, tags, err := ParseTagList(in)
		if err != nil {
			return
		}
		list, err := TagList(first, last, source, tags)
		if errors.Is(err, ErrTags) {
			return
		}
		f2, l2, s2, again, err := ParseTagList(list[:])
		if err != nil || f2 != first || l2 != last || s2 != source || len(again) != len(tags) {
			t.Errorf("%v %v %d %q %v", f2, l2, s2, again, err)
		}
	})
}
