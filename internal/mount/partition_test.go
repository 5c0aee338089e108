package mount

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"

	"tidemark/internal/block"
)

type bytesDevice struct{ *bytes.Reader }

func (bytesDevice) WriteAt([]byte, int64) (int, error) { return 0, block.ErrReadOnly }
func (bytesDevice) Flush() error                       { return nil }

func device(b []byte) block.Device { return bytesDevice{bytes.NewReader(b)} }

func putEntry(sector []byte, i int, kind byte, first, count uint32) {
	e := sector[mbrEntries+16*i:]
	e[4] = kind
	binary.LittleEndian.PutUint32(e[8:], first)
	binary.LittleEndian.PutUint32(e[12:], count)
	sector[510], sector[511] = 0x55, 0xaa
}

func mbrDisk() []byte {
	d := make([]byte, 1<<20)
	putEntry(d, 0, 0x83, 16, 100)
	putEntry(d, 2, 0x0f, 20, 1000)       // extended
	putEntry(d, 3, 0x83, 1<<30, 1)       // beyond the end
	putEntry(d[20*512:], 0, 0x83, 8, 50) // logical 5, relative to its own table
	putEntry(d[20*512:], 1, 5, 10, 100)  // link, relative to the extended one
	putEntry(d[30*512:], 0, 0x83, 8, 60)
	putEntry(d[30*512:], 1, 5, 10, 100) // and back to itself: a loop
	return d
}

func gptDisk(sector int) []byte {
	d := make([]byte, 1<<20)
	putEntry(d, 0, 0xee, 1, 2047)
	head := d[sector:]
	copy(head, "EFI PART")
	binary.LittleEndian.PutUint64(head[72:], 2)
	binary.LittleEndian.PutUint32(head[80:], 8)
	binary.LittleEndian.PutUint32(head[84:], 128)
	entry := func(i int, first, last uint64) {
		e := d[2*sector+128*i:]
		e[0] = 1
		binary.LittleEndian.PutUint64(e[32:], first)
		binary.LittleEndian.PutUint64(e[40:], last)
	}
	entry(0, 10, 19)
	entry(2, 20, 39)
	entry(3, 20, 1<<40) // beyond the end
	return d
}

func TestPartitions(t *testing.T) {
	for _, c := range []struct {
		name string
		disk []byte
		want string
	}{
		{"none", make([]byte, 1<<20), "[]"},
		{"tiny", make([]byte, 100), "[]"},
		{"GPT, 512", gptDisk(512), "[{1 5120+5120} {3 10240+10240}]"},
		{"GPT, 4096", gptDisk(4096), "[{1 40960+40960} {3 81920+81920}]"},
	} {
		got, err := Partitions(device(c.disk))
		if s := fmt.Sprint(got); err != nil || s != c.want {
			t.Errorf("%s: %s, %v; want %s", c.name, s, err, c.want)
		}
	}
	got, err := Partitions(device(mbrDisk()))
	if err != nil || len(got) < 3 || fmt.Sprint(got[:3]) != "[{1 8192+51200} {5 14336+25600} {6 19456+30720}]" || len(got) > partitionsMax {
		t.Errorf("MBR: %d, %v, %v", len(got), got[:min(len(got), 3)], err)
	}
}

func FuzzPartitions(f *testing.F) {
	f.Add(mbrDisk()[:16<<10])
	f.Add(gptDisk(512)[:4<<10])
	f.Add(gptDisk(4096)[:16<<10])
	f.Fuzz(func(t *testing.T, b []byte) {
		parts, err := Partitions(device(b))
		for _, p := range parts {
			if err := block.CheckBounds(p.Range, int64(len(b))); err != nil || p.Range.Empty() {
				t.Errorf("partition %+v of %d bytes", p, len(b))
			}
		}
		if err == nil && len(b) > 0 {
			_, _ = detect(bytes.NewReader(b), block.Range{Len: int64(len(b))})
		}
	})
}
