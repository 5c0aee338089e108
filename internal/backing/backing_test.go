package backing

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
	"tidemark/internal/testkit"
)

const diskSize = 4 << 20

var (
	_ block.Device    = (*Device)(nil)
	_ block.Zeroer    = (*Device)(nil)
	_ block.Discarder = (*Device)(nil)
	_ block.FUAWriter = (*Device)(nil)
	_ block.Mover     = (*Device)(nil)
	_ block.Limiter   = (*Device)(nil)
	_ block.Mapper    = (*Device)(nil)
)

func imageFile(t testing.TB, dir string, size int64) string {
	t.Helper()
	path := filepath.Join(dir, "image")
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size)); err != nil {
		t.Fatal(err)
	}
	return path
}

func open(t testing.TB, path string, o Options) *Device {
	t.Helper()
	d, err := Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
	})
	return d
}

func tmpfs(t *testing.T) string {
	t.Helper()
	testkit.Need(t, "root")
	dir := t.TempDir()
	testkit.Run(t, "mount", "-t", "tmpfs", "tmpfs", dir)
	t.Cleanup(func() { testkit.Unmount(t, dir) })
	return dir
}

// kinds runs a test over everything that can be below a device.
func kinds(t *testing.T, f func(t *testing.T, path string)) {
	t.Run("file", func(t *testing.T) { f(t, imageFile(t, testkit.Dir(t), diskSize)) })
	t.Run("tmpfs", func(t *testing.T) {
		f(t, imageFile(t, tmpfs(t), diskSize))
	})
	for _, fs := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fs, func(t *testing.T) {
			d := testkit.NewDiskOf(t, 512<<20, 4096)
			testkit.Mkfs(t, d.Path, fs)
			f(t, imageFile(t, testkit.Mount(t, d.Path), diskSize))
		})
	}
	for _, sector := range []int{512, 4096} {
		t.Run(fmt.Sprint("disk", sector), func(t *testing.T) { f(t, testkit.NewDiskOf(t, diskSize, sector).Path) })
	}
}

// TestModel: random requests at any place, length and address do to the device
// what they do to an array, and are there when it is opened again.
func TestModel(t *testing.T) {
	kinds(t, func(t *testing.T, path string) {
		seed := uint64(time.Now().UnixNano())
		t.Logf("seed %d", seed)
		rnd := rand.New(rand.NewPCG(seed, 0))
		d := open(t, path, Options{})
		ones := bytes.Repeat([]byte{1}, diskSize)
		want, known := make([]byte, d.Size()), bytes.Clone(ones)
		if d.Size() != diskSize {
			t.Fatalf("%d bytes", d.Size())
		}
		if _, err := d.ReadAt(want, 0); err != nil {
			t.Fatal(err)
		}
		memory, noise := make([]byte, 1<<20+4096), make([]byte, 1<<20)
		rand.NewChaCha8([32]byte{byte(seed), 1}).Read(noise)
		for step := range 120 {
			r := someRange(rnd, d.Size())
			p := memory[rnd.IntN(600):][:r.Len]
			if rnd.IntN(2) == 0 { // an address that always fits
				p = aligned(memory)[:r.Len]
			}
			var err error
			switch what := rnd.IntN(8); what {
			case 0, 1, 2:
				read := d.ReadAt
				if what == 2 {
					read = func(p []byte, off int64) (int, error) { return len(p), load(rnd, p).move(d, block.OpRead, off, false) }
				}
				if _, err = read(p, r.Off); err == nil {
					compare(t, p, want[r.Off:], known[r.Off:], r)
				}
			case 3, 4, 5:
				copy(p, noise[rnd.IntN(len(noise)-len(p)):])
				write := d.WriteAt
				if what == 5 {
					write = d.WriteFUA
				}
				if rnd.IntN(2) == 0 {
					write = func(p []byte, off int64) (int, error) {
						return len(p), load(rnd, p).move(d, block.OpWrite, off, what == 5)
					}
				}
				_, err = write(p, r.Off)
				copy(want[r.Off:], p)
				copy(known[r.Off:r.End()], ones)
			case 6:
				err = d.WriteZeroes(r)
				clear(want[r.Off:r.End()])
				copy(known[r.Off:r.End()], ones)
			case 7:
				if err = d.Discard(r); d.Limits().Discard == 0 && errors.Is(err, errors.ErrUnsupported) {
					err = nil
					continue
				}
				in := r.Inward(d.LogicalBlock())
				clear(known[in.Off:in.End()])
			}
			if err != nil {
				t.Fatalf("seed %d, step %d: %v", seed, step, err)
			}
			if t.Failed() {
				t.Fatalf("seed %d, step %d", seed, step)
			}
		}
		if err := errors.Join(d.Flush(), d.Close()); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, diskSize)
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.ReadAt(got, 0); err != nil {
			t.Fatal(err)
		}
		compare(t, got, want, known, block.Range{Len: diskSize})
	})
}

// someLoad is a request's data as the kernel would hold it; moving it fails now and then.
type someLoad struct {
	p    []byte
	op   block.Op
	fail int // 1: before anything was done; 2: when half of it was; else not
	here bool
	mode int // of the file that it was moved to or from
}

func load(rnd *rand.Rand, p []byte) *someLoad { return &someLoad{p: p, fail: rnd.IntN(4)} }

func (l *someLoad) move(d *Device, op block.Op, off int64, fua bool) error {
	l.op = op
	return d.Move(op, block.Range{Off: off, Len: int64(len(l.p))}, fua, l)
}

func (l *someLoad) Data() ([]byte, error) {
	l.here = true
	return l.p, nil
}

func (l *someLoad) Carry(fd int, off int64) error {
	if l.here {
		return errors.New("moved after it was copied")
	}
	var err error
	if l.mode, err = unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err != nil {
		return err
	}
	f := unix.Pwrite
	if l.op == block.OpRead {
		f = unix.Pread
	}
	p := l.p
	switch l.fail {
	case 1:
		return errors.New("cannot be moved")
	case 2:
		p = p[:len(p)/8192*4096]
	}
	if n, err := f(fd, p, off); err != nil || n != len(l.p) {
		return fmt.Errorf("%d bytes: %w", n, err)
	}
	return nil
}

// TestMoveChanging: writes are moved only where their pages may change meanwhile,
// parts of blocks never, and reads always.
func TestMoveChanging(t *testing.T) {
	testkit.Need(t, "root", "loop")
	disk := testkit.NewDiskOf(t, diskSize, 4096).Path
	attr := filepath.Join("/sys/block", filepath.Base(disk), "queue/stable_writes")
	for _, c := range []struct {
		path, stable string
		moved        bool
	}{{disk, "0", true}, {disk, "1", false}, {imageFile(t, tmpfs(t), diskSize), "0", false}} {
		if err := os.WriteFile(attr, []byte(c.stable), 0); err != nil {
			t.Fatal(err)
		}
		d := open(t, c.path, Options{})
		for _, fua := range []bool{false, true} {
			l := &someLoad{p: aligned(make([]byte, 16384))[:8192]}
			if err := l.move(d, block.OpWrite, 4096, fua); err != nil || l.here == c.moved {
				t.Errorf("%s, stable pages %s: came here %v, %v", c.path, c.stable, l.here, err)
			}
			if c.moved && (l.mode&unix.O_DSYNC != 0) != fua {
				t.Errorf("%s: fua %v is moved with mode %#o", c.path, fua, l.mode)
			}
		}
		l := &someLoad{p: aligned(make([]byte, 16384))[:8192]}
		if err := l.move(d, block.OpRead, 4096, false); err != nil || l.here {
			t.Errorf("%s: a read came here %v, %v", c.path, l.here, err)
		}
		l = &someLoad{p: make([]byte, 512)}
		if err := l.move(d, block.OpRead, 512, false); err != nil || c.path == disk && !l.here {
			t.Errorf("%s: a part of a block came here %v, %v", c.path, l.here, err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}

// someRange is of any length, mostly small and often of whole blocks.
func someRange(rnd *rand.Rand, size int64) block.Range {
	r := block.Range{Off: rnd.Int64N(size), Len: 1 + rnd.Int64N(1<<(4+rnd.IntN(16)))}
	if rnd.IntN(2) == 0 {
		r = r.Outward(4096)
	}
	return r.Intersect(block.Range{Len: size})
}

func aligned(b []byte) []byte {
	for !(&Device{shape: shape{1, 4096}}).fits(b, 0) {
		b = b[1:]
	}
	return b
}

func compare(t *testing.T, got, want, known []byte, r block.Range) {
	t.Helper()
	for i := range got {
		if got[i] != want[i] && known[i] != 0 {
			t.Errorf("byte %d of %s is %#x, want %#x", i, r, got[i], want[i])
			return
		}
	}
}

// TestNeighbours: writes of parts of one block, at the same time, lose nothing
// of one another.
func TestNeighbours(t *testing.T) {
	d := open(t, testkit.NewDiskOf(t, diskSize, 4096).Path, Options{})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			p := bytes.Repeat([]byte{byte(i + 1)}, 512)
			for block := range int64(50) {
				if _, err := d.WriteAt(p, block*4096+int64(i)*512); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	got := make([]byte, 50*4096)
	if _, err := d.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	for i, b := range got {
		if b != byte(i%4096/512+1) {
			t.Fatalf("byte %d is %d", i, b)
		}
	}
}

func TestRefused(t *testing.T) {
	disk := testkit.NewDisk(t, 64<<20)
	testkit.Mkfs(t, disk.Path, "ext4")
	dir := testkit.Mount(t, disk.Path)
	refused := func(path string, want error) {
		t.Helper()
		if d, err := Open(path, Options{}); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", path, err, want)
			if err == nil {
				d.Close()
			}
		}
	}
	refused(disk.Path, ErrInUse) // mounted
	image := imageFile(t, dir, diskSize)
	open(t, image, Options{})
	refused(image, ErrInUse) // ours already
	refused(dir, ErrKind)
	refused("/dev/null", ErrKind)
	refused(filepath.Join(dir, "none"), os.ErrNotExist)
	free := testkit.NewDisk(t, diskSize)
	open(t, free.Path, Options{})
	refused(free.Path, ErrInUse)
}

func TestReadOnlyAndBounds(t *testing.T) {
	path := imageFile(t, testkit.Dir(t), diskSize)
	d := open(t, path, Options{ReadOnly: true})
	open(t, path, Options{ReadOnly: true}) // readers share
	p := make([]byte, 512)
	for name, err := range map[string]error{
		"write": second(d.WriteAt(p, 0)), "fua": second(d.WriteFUA(p, 0)),
		"zeroes": d.WriteZeroes(block.Range{Len: 512}), "discard": d.Discard(block.Range{Len: 512}),
	} {
		if !errors.Is(err, block.ErrReadOnly) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := second(d.ReadAt(p, diskSize-511)); !errors.Is(err, block.ErrBounds) {
		t.Errorf("beyond the end: %v", err)
	}
	if err := os.Truncate(path, 4096); err != nil {
		t.Fatal(err)
	}
	if err := second(d.ReadAt(p, 8192)); !errors.Is(err, unix.EIO) {
		t.Errorf("what was cut off: %v", err)
	}
	if err := d.Grow(0); !errors.Is(err, ErrShrunk) {
		t.Errorf("a file that was cut off: %v", err)
	}
}

func second(_ int, err error) error { return err }

func TestGrow(t *testing.T) {
	path := imageFile(t, testkit.Dir(t), diskSize+100)
	d := open(t, path, Options{})
	if d.Size() != diskSize {
		t.Errorf("size %d is not of whole blocks", d.Size())
	}
	if err := d.Grow(diskSize - 4096); !errors.Is(err, ErrShrunk) {
		t.Errorf("shrinking: %v", err)
	}
	if err := d.Grow(2 * diskSize); err != nil || d.Size() != 2*diskSize {
		t.Errorf("%d: %v", d.Size(), err)
	}
	if err := os.Truncate(path, 3*diskSize); err != nil {
		t.Fatal(err)
	}
	if err := d.Grow(0); err != nil || d.Size() != 3*diskSize {
		t.Errorf("%d: %v", d.Size(), err)
	}
	if _, err := d.WriteAt(make([]byte, 4096), 3*diskSize-4096); err != nil {
		t.Error(err)
	}
	disk := testkit.NewDisk(t, diskSize)
	dd := open(t, disk.Path, Options{})
	if err := os.Truncate(disk.File, 2*diskSize); err != nil {
		t.Fatal(err)
	}
	if err := dd.Grow(2 * diskSize); err == nil {
		t.Error("a disk was given a size")
	}
	testkit.Run(t, "losetup", "-c", disk.Path)
	if err := dd.Grow(0); err != nil || dd.Size() != 2*diskSize {
		t.Errorf("%d: %v", dd.Size(), err)
	}
}

// TestLimits: what the disk says is what the kernel says of it.
func TestLimits(t *testing.T) {
	d := open(t, testkit.NewDiskOf(t, diskSize, 4096).Path, Options{})
	if l := d.Limits(); l.LogicalBlock != 4096 || l.PhysicalBlock != 4096 || l.ReadOnly || !l.Volatile {
		t.Errorf("%+v", l)
	}
	if l := open(t, testkit.NewDisk(t, diskSize).Path, Options{ReadOnly: true}).Limits(); l.LogicalBlock != 512 || !l.ReadOnly || l.Discard != 0 {
		t.Errorf("%+v", l)
	}
}

func TestExtents(t *testing.T) {
	d := open(t, imageFile(t, tmpfs(t), 1<<20), Options{})
	p := bytes.Repeat([]byte{7}, 64<<10)
	for _, off := range []int64{128 << 10, 512 << 10} {
		if _, err := d.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	got, err := d.Extents(block.Range{Off: 4096, Len: 1<<20 - 8192})
	want := []block.Extent{
		{Range: block.Range{Off: 4096, Len: 124 << 10}, State: block.Zero}, {Range: block.Range{Off: 128 << 10, Len: 64 << 10}},
		{Range: block.Range{Off: 192 << 10, Len: 320 << 10}, State: block.Zero}, {Range: block.Range{Off: 512 << 10, Len: 64 << 10}},
		{Range: block.Range{Off: 576 << 10, Len: 444 << 10}, State: block.Zero},
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v, want %v", got, err, want)
	}
	disk := open(t, testkit.NewDisk(t, diskSize).Path, Options{})
	if got, err := disk.Extents(block.Range{Off: 512, Len: 1024}); err != nil || len(got) != 1 || got[0].State != block.Data || got[0].Range != (block.Range{Off: 512, Len: 1024}) {
		t.Errorf("%v, %v", got, err)
	}
}

// TestStable: a flush, and a write that is to be stable, reach the disk as such.
func TestStable(t *testing.T) {
	disk := testkit.NewDisk(t, diskSize)
	d := open(t, disk.Path, Options{})
	flushed := func() int {
		t.Helper()
		b, err := os.ReadFile("/sys/block/" + filepath.Base(disk.Path) + "/stat")
		if err != nil {
			t.Fatal(err)
		}
		n, err := strconv.Atoi(strings.Fields(string(b))[15])
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	p := aligned(make([]byte, 8192))[:4096]
	for _, c := range []struct {
		name string
		do   func() error
		want int
	}{
		{"write", func() error { return second(d.WriteAt(p, 0)) }, 0},
		{"stable write", func() error { return second(d.WriteFUA(p, 0)) }, 1},
		{"stable write anywhere", func() error { return second(d.WriteFUA(p[1:100], 77)) }, 1},
		{"flush", d.Flush, 1},
	} {
		before := flushed()
		if err := c.do(); err != nil {
			t.Error(err)
		}
		if got := flushed() - before; got < c.want || c.want == 0 && got > 0 { // some kernels flush twice
			t.Errorf("%s: %d flushes, want %d", c.name, got, c.want)
		}
	}
}
