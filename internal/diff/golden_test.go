package diff

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"hash/crc32"
	"os"
	"path/filepath"
	"testing"

	"tidemark/internal/block"
	"tidemark/internal/sim"
)

var update = flag.Bool("update", false, "write the golden files anew")

// goldenArea is a small area: two chunks stored, one of them twice, one changed privately.
func goldenArea(t testing.TB) *sim.Disk {
	disk := sim.NewDisk(10 * Align)
	s := storage(t, Config{ID: ID{1, 2, 3}, Chunk: Align}, whole(t, disk))
	for i, e := range []entry{{key: Key{0, 5}}, {key: Key{1, 7}}, {key: Key{0, 5}, changed: true}} {
		slot, err := s.Reserve()
		if err != nil {
			t.Fatal(err)
		}
		p := bytes.Repeat([]byte{byte('a' + i)}, Align-i*512)
		if err := s.store(slot, entry{key: e.key, length: uint32(len(p)), version: s.Version(), sum: crcOf(p), changed: e.changed}, p); err != nil {
			t.Fatal(err)
		}
	}
	return disk
}

// goldenHeads are the heads of chunks on their way: one sealed, one free.
func goldenHeads(t testing.TB) []byte {
	s := storage(t, Config{ID: ID{1, 2, 3}, Chunk: Align}, whole(t, sim.NewDisk(10*Align)))
	name := filepath.Join(t.TempDir(), "chunks")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p, err := NewPending(s, 2, f)
	if err != nil {
		t.Fatal(err)
	}
	b, err := p.Take(0)
	if err != nil {
		t.Fatal(err)
	}
	clear(b.Bytes())
	copy(b.Bytes(), "golden")
	b.Seal(3, Key{1, 9}, 4, 1024, true)
	out := bytes.Clone(p.memory[:2*headSize])
	b.Drop()
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	return out
}

func compare(t *testing.T, name string, got []byte) {
	t.Helper()
	if *update {
		if err := errors.Join(os.MkdirAll("testdata", 0o755), os.WriteFile(name, got, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s: the format changed, %v", name, err)
	}
}

// TestGolden pins the formats of docs/formats/difference.md: header, table and
// heads as they are written, and that this build reads what stands there.
func TestGolden(t *testing.T) {
	disk := goldenArea(t)
	compare(t, "testdata/area.v1", disk.Bytes()[:2*Align])
	compare(t, "testdata/heads.v1", goldenHeads(t))
	want, err := os.ReadFile("testdata/area.v1")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := disk.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	s, found, err := Recover(Config{ID: ID{1, 2, 3}, Chunk: Align}, []Space{whole(t, disk)})
	if err != nil {
		t.Fatal(err)
	}
	if got := found[Key{0, 5}]; len(found) != 2 || got != (Found{2, 3, true}) || found[Key{1, 7}] != (Found{1, 2, false}) {
		t.Errorf("found %+v", found)
	}
	p := make([]byte, Align-1024)
	if err := s.Load(2, Key{0, 5}, p); err != nil || p[0] != 'c' {
		t.Errorf("%q, %v", p[0], err)
	}
}

// FuzzRecover: areas of any content are refused, or give what can be read or is
// found to be damaged; nothing panics and no slot is given twice.
func FuzzRecover(f *testing.F) {
	f.Add(goldenArea(f).Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		disk := sim.NewDisk(10 * Align)
		if _, err := disk.WriteAt(resum(b[:min(len(b), 10*Align)]), 0); err != nil {
			t.Fatal(err)
		}
		l, err := NewLinear(disk, []block.Range{{Len: disk.Size()}})
		if err != nil {
			t.Fatal(err)
		}
		s, found, err := Recover(Config{ID: ID{1, 2, 3}, Chunk: Align}, []Space{l})
		if err != nil {
			if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrSpoiled) {
				t.Errorf("refused with %v", err)
			}
			return
		}
		used := map[Slot]bool{}
		for key, at := range found {
			if used[at.Slot] {
				t.Fatalf("slot %d twice", at.Slot)
			}
			used[at.Slot] = true
			if e := s.sums[at.Slot]; e.length > 0 {
				_ = s.Load(at.Slot, key, make([]byte, e.length)) // right, or an error
			}
		}
		for {
			slot, err := s.Reserve()
			if err != nil {
				break
			}
			if used[slot] {
				t.Fatalf("slot %d given although it is used", slot)
			}
			used[slot] = true
		}
	})
}

// FuzzHeads: memory of any content is taken over as far as it is whole.
func FuzzHeads(f *testing.F) {
	f.Add(goldenHeads(f))
	f.Fuzz(func(t *testing.T, b []byte) {
		s := storage(t, Config{ID: ID{1, 2, 3}, Chunk: Align}, whole(t, sim.NewDisk(10*Align)))
		p, err := mapPending(s, 2, nil)
		if err != nil {
			t.Fatal(err)
		}
		copy(p.memory, b)
		for i := range 2 {
			buf := &Buffer{p: p, i: i}
			if e := buf.peek(); int64(e.length) > Align {
				t.Fatalf("%+v", e)
			}
		}
		p.start()
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

func crcOf(p []byte) uint32 { return crc32.Checksum(p, castagnoli) }

// resum gives header and entries their checksums, so that what is behind them is reached.
func resum(b []byte) []byte {
	b = bytes.Clone(b)
	if len(b) >= 44 {
		binary.LittleEndian.PutUint32(b[40:], crcOf(b[:40]))
	}
	id := ID{1, 2, 3}
	for at := Align; at+entrySize <= min(len(b), 2*Align); at += entrySize {
		if e := b[at:][:entrySize]; e[0] != 0 {
			binary.LittleEndian.PutUint32(e[28:], crc32.Update(crcOf(id[:]), castagnoli, e[:28]))
		}
	}
	return b
}
