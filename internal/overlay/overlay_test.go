package overlay

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"tidemark/internal/block"
)

type memory []byte

func (m memory) ReadAt(p []byte, off int64) (int, error) { return copy(p, m[off:]), nil }
func (m memory) WriteAt([]byte, int64) (int, error)      { return 0, block.ErrReadOnly }
func (m memory) Flush() error                            { return nil }
func (m memory) Size() int64                             { return int64(len(m)) }

// TestAgainstMemory compares random reads and writes with a plain slice.
func TestAgainstMemory(t *testing.T) {
	for seed := range uint64(30) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		below := make(memory, 50_000)
		for i := range below {
			below[i] = byte(rnd.Uint32())
		}
		want := bytes.Clone(below)
		first := bytes.Clone(below)
		f, err := os.Create(filepath.Join(t.TempDir(), "scratch"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		o, err := New(below, f)
		if err != nil {
			t.Fatal(err)
		}
		for range 200 {
			off := rnd.IntN(len(want))
			n := rnd.IntN(min(12_000, len(want)-off) + 1)
			got := make([]byte, n)
			switch rnd.IntN(3) {
			case 0:
				for i := range got {
					got[i] = byte(rnd.Uint32())
				}
				copy(want[off:], got)
				_, err = o.WriteAt(got, int64(off))
			case 1:
				clear(want[off : off+n])
				err = o.WriteZeroes(block.Range{Off: int64(off), Len: int64(n)})
			default:
				_, err = o.ReadAt(got, int64(off))
				if !bytes.Equal(got, want[off:off+n]) {
					t.Fatalf("seed %d: %d bytes at %d differ", seed, n, off)
				}
			}
			if err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
		}
		if !bytes.Equal(below, first) {
			t.Fatalf("seed %d: the device below changed", seed)
		}
	}
}
