package live

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

const (
	mib      = 1 << 20
	patience = time.Minute // for what takes milliseconds on a machine with nothing else to do
)

// eachSeed runs a test with seeds of its own: one, or as many as TIDEMARK_SEEDS
// says, or the one of TIDEMARK_SEED. A failure names its seed.
func eachSeed(t *testing.T, run func(t *testing.T, rng *rand.Rand)) {
	count := 1
	if n, err := strconv.Atoi(os.Getenv("TIDEMARK_SEEDS")); err == nil {
		count = n
	}
	first := uint64(time.Now().UnixNano())
	if n, err := strconv.ParseUint(os.Getenv("TIDEMARK_SEED"), 10, 64); err == nil {
		first, count = n, 1
	}
	for i := range uint64(count) {
		t.Run(fmt.Sprintf("seed=%d", first+i), func(t *testing.T) {
			t.Cleanup(func() {
				if t.Failed() {
					t.Logf("again with: TIDEMARK_SEED=%d go test -run '%s' ./test/live", first+i, t.Name())
				}
			})
			run(t, rand.New(rand.NewPCG(first+i, 0)))
		})
	}
}

// fork gives a goroutine a generator of its own.
func fork(rng *rand.Rand) *rand.Rand { return rand.New(rand.NewPCG(rng.Uint64(), rng.Uint64())) }

// open opens a disk until the test ends; flags such as unix.O_DIRECT are added.
func open(t testing.TB, path string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// aligned is memory that O_DIRECT takes. It is given back when the test ends.
func aligned(t testing.TB, n int) []byte {
	t.Helper()
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(b) })
	return b
}

// content is all of a disk, past the page cache.
func content(t testing.TB, path string) []byte {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size, err := f.Seek(0, 2)
	if err != nil {
		t.Fatal(err)
	}
	buf, err := unix.Mmap(-1, 0, mib, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(buf)
	all := make([]byte, size)
	for off := int64(0); off < size; {
		n, err := f.ReadAt(buf[:min(mib, size-off)], off)
		if err != nil {
			t.Fatalf("reading %s at %d: %v", path, off, err)
		}
		copy(all[off:], buf[:n])
		off += int64(n)
	}
	return all
}

// image is a disk of a group as it was at a point.
func image(t testing.TB, d *program.Daemon, group, disk, at string) []byte {
	t.Helper()
	file := d.Restored(group, disk, at)
	defer os.Remove(file)
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// same fails the test where two images differ, and says where.
func same(t testing.TB, what string, want, have []byte) {
	t.Helper()
	if bytes.Equal(want, have) {
		return
	}
	if len(want) != len(have) {
		t.Errorf("%s: %d bytes, want %d", what, len(have), len(want))
		return
	}
	bad, first := 0, -1
	for off := 0; off < len(want); off += testkit.Sector {
		if end := min(off+testkit.Sector, len(want)); !bytes.Equal(want[off:end], have[off:end]) {
			if bad++; first < 0 {
				first = off
			}
		}
	}
	t.Errorf("%s: %d sectors differ, the first at byte %d:\nwant % x\nhave % x", what, bad, first, want[first:first+32], have[first:first+32])
}

// identical settles a group and fails the test where what the vault gives as
// latest is not what the disks hold.
func identical(t testing.TB, d *program.Daemon, group string) program.Group {
	t.Helper()
	g := d.Settle(group)
	for _, disk := range g.Disks {
		same(t, disk.Name+", latest", content(t, disk.Device), image(t, d, group, disk.Name, "latest"))
	}
	return g
}

// diskNames are the names of a group's disks, in its order.
func diskNames(g program.Group) (names []string) {
	for _, d := range g.Disks {
		names = append(names, d.Name)
	}
	return names
}

// tmpfs mounts a file system in memory that has a bound, such as "4m". Ask for
// it before the daemon that uses it: what is made last goes first.
func tmpfs(t testing.TB, size string) string {
	t.Helper()
	testkit.Need(t, "root")
	dir := t.TempDir()
	testkit.Run(t, "mount", "-t", "tmpfs", "-o", "size="+size, "tmpfs", dir)
	t.Cleanup(func() { testkit.Unmount(t, dir) })
	return dir
}

// Exit codes, as docs/operating.md has them.
const (
	exitUsage       = 2
	exitNotFound    = 4
	exitRefused     = 5
	exitNotAVault   = 6
	exitDamaged     = 7
	exitInsideGap   = 8
	exitInUse       = 9
	exitUnreachable = 10
)

// stretch is a run of positions that `points` offers.
type stretch struct{ first, last uint64 }

// stretches of a group, from the first to the last.
func stretches(t testing.TB, d *program.Daemon, group string) []stretch {
	t.Helper()
	var out []stretch
	for _, p := range d.Points(group) {
		switch {
		case p.Stretch == len(out)+1:
			out = append(out, stretch{p.Position, p.Position})
		case p.Stretch == len(out) && p.Position >= out[len(out)-1].last:
			out[len(out)-1].last = p.Position
		default:
			t.Fatalf("points out of order: stretch %d position %d after %v", p.Stretch, p.Position, out)
		}
	}
	return out
}

// positions picks n of the positions of a stretch: both ends, and others at random.
func (s stretch) positions(rng *rand.Rand, n int) []uint64 {
	out := []uint64{s.first, s.last}
	for len(out) < n {
		out = append(out, s.first+rng.Uint64N(s.last-s.first+1))
	}
	return out
}

func seq(p uint64) string { return fmt.Sprintf("seq:%d", p) }

// pinned lists what a daemon has pinned for a group.
func pinned(t testing.TB, d *program.Daemon, group string) []string {
	t.Helper()
	id, err := os.ReadFile(filepath.Join(d.State, "instance"))
	if err != nil {
		t.Fatal(err)
	}
	found, err := filepath.Glob(filepath.Join("/sys/fs/bpf/tidemark", string(bytes.TrimSpace(id)), group, "*"))
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// discard gives a range of a disk up, as blkdiscard does.
func discard(f *os.File, off, n int64) error {
	const blkDiscard = 0x1277
	r := [2]uint64{uint64(off), uint64(n)}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), blkDiscard, uintptr(unsafe.Pointer(&r))); errno != 0 {
		return fmt.Errorf("discarding %d bytes at %d: %w", n, off, errno)
	}
	return nil
}
