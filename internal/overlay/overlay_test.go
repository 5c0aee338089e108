package overlay

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"tidemark/internal/block"
	"tidemark/internal/testkit"
)

// memory is a read-only device with a map: blocks of 1 KiB of zeroes are known as such.
type memory []byte

func (m memory) ReadAt(p []byte, off int64) (int, error) {
	if n := copy(p, m[off:]); n < len(p) {
		return n, io.EOF
	}
	return len(p), nil
}
func (m memory) WriteAt([]byte, int64) (int, error) { return 0, block.ErrReadOnly }
func (m memory) Flush() error                       { return nil }
func (m memory) Size() int64                        { return int64(len(m)) }
func (m memory) Extents(r block.Range) ([]block.Extent, error) {
	var out []block.Extent
	for at := r.Off; at < r.End() && len(out) < 3; { // few, so that the overlay has to ask again
		to := min(at&^1023+1024, r.End())
		s := block.Data
		if len(bytes.Trim(m[at:to], "\x00")) == 0 {
			s = block.Zero
		}
		out = join(out, block.Extent{Range: block.Range{Off: at, Len: to - at}, State: s})
		at = to
	}
	return out, nil
}

// faulty is a scratch file in memory with room for so many blocks.
type faulty struct {
	data []byte
	used map[int64]bool
	room int
}

func (f *faulty) ReadAt(p []byte, off int64) (int, error) { return copy(p, f.data[off:]), nil }
func (f *faulty) WriteAt(p []byte, off int64) (int, error) {
	for n := range p {
		b := (off + int64(n)) / blockSize
		if !f.used[b] && len(f.used) >= f.room {
			return n, syscall.ENOSPC
		}
		f.used[b] = true
		f.data[off+int64(n)] = p[n]
	}
	return len(p), nil
}
func (f *faulty) free(r block.Range) {
	if r.Off%blockSize != 0 || r.End()%blockSize != 0 && r.End() != int64(len(f.data)) {
		panic("part of a block freed: " + r.String())
	}
	clear(f.data[r.Off:r.End()])
	for b := r.Off / blockSize; b*blockSize < r.End(); b++ {
		delete(f.used, b)
	}
}

// TestModel compares with a plain slice, also where the scratch file has no room.
func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.IntRange(1, 12*blockSize).Draw(t, "size")
		under := make(memory, size)
		for i := range under {
			if i/1024%3 != 0 {
				under[i] = byte(i*7 + i>>8 | 1)
			}
		}
		want, first := bytes.Clone(under), bytes.Clone(under)
		s := &faulty{data: bytes.Repeat([]byte{0xee}, size), used: map[int64]bool{}, room: rapid.IntRange(0, 14).Draw(t, "room")}
		o := over(under, s)
		span := func(t *rapid.T) block.Range {
			off := rapid.IntRange(0, size).Draw(t, "off")
			return block.Range{Off: int64(off), Len: int64(rapid.IntRange(0, size-off).Draw(t, "len"))}
		}
		check := func(err error) {
			if err != nil && !errors.Is(err, syscall.ENOSPC) {
				t.Fatal(err)
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"write": func(t *rapid.T) {
				r := span(t)
				p := bytes.Repeat([]byte{rapid.Byte().Draw(t, "byte")}, int(r.Len))
				n, err := o.WriteAt(p, r.Off)
				check(err)
				if err == nil && n != len(p) {
					t.Fatalf("%d of %d bytes", n, len(p))
				}
				if err == nil {
					copy(want[r.Off:], p)
				}
			},
			"zeroes": func(t *rapid.T) {
				r := span(t)
				err := o.WriteZeroes(r)
				check(err)
				if err == nil {
					clear(want[r.Off:r.End()])
				} else { // each edge is whole or as it was
					got := make([]byte, r.Len)
					if _, err := o.ReadAt(got, r.Off); err != nil {
						t.Fatal(err)
					}
					for i := range got {
						if got[i] != 0 && got[i] != want[r.Off+int64(i)] {
							t.Fatalf("byte %d after %v", r.Off+int64(i), err)
						}
					}
					copy(want[r.Off:], got)
				}
			},
			"discard": func(t *rapid.T) {
				r := span(t)
				if err := o.Discard(r); err != nil {
					t.Fatal(err)
				}
				w := o.whole(r)
				if !w.Empty() {
					clear(want[w.Off:w.End()])
				}
			},
			"map": func(t *rapid.T) { checkMap(t, o, want, span(t)) },
			"": func(t *rapid.T) {
				got := make([]byte, size+1)
				if n, err := o.ReadAt(got, 0); n != size || err != io.EOF || !bytes.Equal(got[:size], want) {
					t.Fatalf("%d bytes, %v; first difference at %d", n, err, differs(got, want))
				}
				if !bytes.Equal(under, first) {
					t.Fatal("the device below changed")
				}
			},
		})
	})
}

func differs(a, b []byte) int {
	for i := range b {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// checkMap: extents are in order and gapless, no two neighbours alike, and zeroes are zero.
func checkMap(t *rapid.T, o *Overlay, want []byte, r block.Range) {
	extents, err := o.Extents(r)
	if err != nil || len(extents) == 0 {
		t.Fatal(extents, err)
	}
	at := r.Off
	for i, e := range extents {
		if e.Off != at || i > 0 && extents[i-1].State == e.State || e.Len == 0 && !r.Empty() {
			t.Fatalf("extents of %s: %v", r, extents)
		}
		if e.State == block.Zero && len(bytes.Trim(want[e.Off:e.End()], "\x00")) != 0 {
			t.Fatalf("not zero: %v", e)
		}
		at = e.End()
	}
	if at != r.End() {
		t.Fatalf("extents of %s end at %d", r, at)
	}
}

func TestBounds(t *testing.T) {
	o := over(make(memory, 5000), &faulty{})
	for _, r := range []block.Range{{Off: -1, Len: 1}, {Off: 5000, Len: 1}, {Off: 4999, Len: 2}, {Off: 1 << 62, Len: 1}} {
		_, werr := o.WriteAt(make([]byte, r.Len), r.Off)
		_, merr := o.Extents(r)
		for i, err := range []error{werr, merr, o.WriteZeroes(r), o.Discard(r)} {
			if !errors.Is(err, block.ErrBounds) {
				t.Errorf("%s, operation %d: %v", r, i, err)
			}
		}
	}
}

// TestConcurrent: writers of runs of one byte over borders of blocks and
// stripes; readers never see a run half written.
func TestConcurrent(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "scratch"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	o, err := New(make(memory, 4*stripeBytes), f)
	if err != nil {
		t.Fatal(err)
	}
	const runLen = 3 * 3000
	place := func(i int) int64 { return int64(i+1)*stripeBytes - 4500 }
	var all sync.WaitGroup
	for i := range 3 {
		for w := range 2 {
			all.Go(func() {
				for n := range 200 {
					var err error
					switch n % 4 {
					case 3:
						err = o.WriteZeroes(block.Range{Off: place(i), Len: runLen})
					default:
						_, err = o.WriteAt(bytes.Repeat([]byte{byte(n*2 + w)}, runLen), place(i))
					}
					if err != nil {
						t.Error(err)
					}
				}
			})
		}
		all.Go(func() {
			p := make([]byte, runLen)
			for range 400 {
				if _, err := o.ReadAt(p, place(i)); err != nil {
					t.Error(err)
				}
				if len(bytes.Trim(p, string(p[:1]))) != 0 {
					t.Errorf("run %d: half of a write was read", i)
					return
				}
				if _, err := o.Extents(block.Range{Len: o.Size()}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
}

// TestFullFileSystem: on a real one without room writers are told, nothing
// changes, and a discard makes room again.
func TestFullFileSystem(t *testing.T) {
	testkit.Need(t, "root")
	dir := t.TempDir()
	if err := unix.Mount("tidemark-test", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	f, err := os.Create(filepath.Join(dir, "scratch"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	under := memory(bytes.Repeat([]byte{1}, 1<<20))
	o, err := New(under, f)
	if err != nil {
		t.Fatal(err)
	}
	two := bytes.Repeat([]byte{2}, 32<<10)
	if _, err := o.WriteAt(two, 1000); err != nil {
		t.Fatal(err)
	}
	if _, err := o.WriteAt(bytes.Repeat([]byte{3}, 512<<10), 0); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("half a MiB where 64 KiB are: %v", err)
	}
	want := bytes.Clone(under)
	copy(want[1000:], two)
	got := make([]byte, len(want))
	if _, err := o.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("after the failed write: %v, first difference at %d", err, differs(got, want))
	}
	if _, err := o.WriteAt(bytes.Repeat([]byte{1}, 4096), 800<<10); err != nil {
		t.Fatalf("what the failed write took was not given back: %v", err)
	}
	if err := o.Discard(block.Range{Len: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	if _, err := o.WriteAt(two, 512<<10); err != nil {
		t.Fatalf("after a discard of everything: %v", err)
	}
}

func TestStripes(t *testing.T) {
	var l stripes
	for r, want := range map[block.Range]uint64{{Off: 0, Len: 0}: 1, {Off: 0, Len: stripeBytes}: 1, {Off: stripeBytes - 1, Len: 2}: 3,
		{Off: 63 * stripeBytes, Len: stripeBytes + 1}: 1<<63 | 1, {Off: 5, Len: 64 * stripeBytes}: ^uint64(0)} {
		if got := l.mask(r); got != want {
			t.Errorf("%s: %#x, want %#x", r, got, want)
		}
	}
}

func BenchmarkWrite(b *testing.B) {
	for _, size := range []int{4096, 64 << 10} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			f, err := os.Create(filepath.Join(b.TempDir(), "scratch"))
			if err != nil {
				b.Fatal(err)
			}
			defer f.Close()
			o, err := New(make(memory, 64<<20), f)
			if err != nil {
				b.Fatal(err)
			}
			p := make([]byte, size)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if _, err := o.WriteAt(p, int64(i*size%(64<<20))); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
