package tap

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"tidemark/internal/block"
	"tidemark/internal/stream"
	"tidemark/internal/testkit"
)

func targetFor(t testing.TB, d *testkit.Disk) Target {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(d.Path, &st); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/diskseq", unix.Major(st.Rdev), unix.Minor(st.Rdev)))
	if err != nil {
		t.Fatal(err)
	}
	seq, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return Target{Name: filepath.Base(d.Path), Whole: unix.Major(st.Rdev)<<20 | unix.Minor(st.Rdev), Len: d.Size, DiskSeq: seq,
		BlockSize: 4096, Pass: Passthrough{Kind: PassNone}}
}

func start(t testing.TB, ring int, o Options, disks ...*testkit.Disk) *Tap {
	t.Helper()
	var targets []Target
	for _, d := range disks {
		targets = append(targets, targetFor(t, d))
	}
	return startTargets(t, ring, o, targets...)
}

func startTargets(t testing.TB, ring int, o Options, targets ...Target) *Tap {
	t.Helper()
	testkit.Need(t, "tap")
	cfg := Config{Instance: "test", Group: fmt.Sprintf("t%d", os.Getpid()), RingBytes: ring, Options: o, Targets: targets}
	_ = Discard(cfg.Instance, cfg.Group)
	tp, err := Start(cfg)
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() {
		if err := tp.Remove(); err != nil {
			t.Error(err)
		}
	})
	return tp
}

// replica applies ring records to copies of the disks.
type replica struct {
	t     testing.TB
	disks [][]byte
	place Place
	marks []string
	n     int
	drops uint64
}

func newReplica(t testing.TB, tp *Tap, disks ...*testkit.Disk) *replica {
	r := &replica{t: t, place: tp.Consumer()}
	for _, d := range disks {
		b, err := os.ReadFile(d.File)
		if err != nil {
			t.Fatal(err)
		}
		r.disks = append(r.disks, b)
	}
	return r
}

func (r *replica) pull(tp *Tap) {
	r.t.Helper()
	next, err := tp.Read(r.place, func(rec *Record) error {
		r.n++
		r.drops = max(r.drops, rec.Drops)
		at := rec.Range
		switch {
		case rec.Kind == Bookmark:
			r.marks = append(r.marks, rec.Name)
		case rec.Kind == Lost:
		case rec.Op == block.OpWrite:
			copy(r.disks[rec.Disk][at.Off:at.End()], rec.Payload)
		default:
			clear(r.disks[rec.Disk][at.Off:at.End()]) // loop punches holes for both
		}
		return nil
	})
	if err != nil {
		r.t.Fatal(err)
	}
	tp.Commit(next)
	r.place = next
}

// differ lists the blocks in which the replica is not the disk.
func (r *replica) differ(i int, d *testkit.Disk) []int64 {
	r.t.Helper()
	unix.Sync()
	truth, err := os.ReadFile(d.File)
	if err != nil {
		r.t.Fatal(err)
	}
	var out []int64
	for off := 0; off < len(truth); off += 4096 {
		if !bytes.Equal(truth[off:off+4096], r.disks[i][off:off+4096]) {
			out = append(out, int64(off))
		}
	}
	return out
}

func (r *replica) sameOutsideGaps(tp *Tap, d *testkit.Disk) {
	r.t.Helper()
	peek, err := tp.PeekGaps()
	if err != nil {
		r.t.Fatal(err)
	}
	for _, off := range r.differ(0, d) {
		inside := false
		for _, g := range peek.Ranges {
			inside = inside || g.Contains(block.Range{Off: off, Len: 4096})
		}
		if !inside {
			r.t.Fatalf("block at %d differs outside the gap", off)
		}
	}
}

func direct(t testing.TB, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func pages(t testing.TB, n int) []byte {
	t.Helper()
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(b) })
	rand.Read(b)
	return b
}

func TestLayoutMatchesObject(t *testing.T) {
	testkit.Need(t, "root", "tap")
	d := testkit.NewDisk(t, 1<<20)
	tp := start(t, 64<<10, Options{}, d)
	for name, size := range map[string]uintptr{"state": unsafe.Sizeof(state{}), "targets": unsafe.Sizeof(whole{}), "counts": unsafe.Sizeof(counters{}), "inflight": unsafe.Sizeof(flight{})} {
		if got := tp.maps[name].ValueSize(); got != uint32(size) {
			t.Errorf("%s: %d bytes in the object, %d in Go", name, got, size)
		}
	}
}

// fewer is a third of n where the machine is slow: in the virtual machine.
func fewer(n int) int {
	if testing.Short() {
		return n / 3
	}
	return n
}

// TestReplica: what the ring alone gives is the disk, bit for bit.
func TestReplica(t *testing.T) {
	d := testkit.NewDisk(t, 192<<20)
	testkit.Mkfs(t, d.Path, "ext4")
	unix.Sync()
	tp := start(t, 64<<20, Options{}, d)
	if !tp.PayloadCaptured() {
		t.Fatal("payloads are not captured: the calibration failed")
	}
	r := newReplica(t, tp, d)
	dir := testkit.Mount(t, d.Path, "discard")
	for i := range fewer(300) {
		b := make([]byte, 1+mrand.IntN(300_000))
		rand.Read(b)
		name := filepath.Join(dir, fmt.Sprint(i%40))
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if i%7 == 0 {
			os.Remove(name)
		}
		if i%10 == 0 {
			unix.Sync()
		}
		r.pull(tp)
	}
	testkit.Unmount(t, dir)
	unix.Sync()
	r.pull(tp)
	if bad := r.differ(0, d); len(bad) > 0 {
		c, err := tp.Counters()
		t.Fatalf("%d blocks differ, the first at %d; drops %d, records %d, read to %d of %d, %+v, %+v, %v", len(bad), bad[0], tp.Drops(), r.n, r.place, tp.Producer(), *tp.state, c, err)
	}
	c, err := tp.Counters()
	if err != nil || tp.Drops() != 0 || c.Disks[0].Writes < 100 {
		t.Fatalf("drops %d, counters %+v, %v", tp.Drops(), c, err)
	}
}

// TestOddShapes: large bios, single sectors, buffers at odd places in memory
// (some of which the disk refuses: failed writes, whose blocks become gaps).
func TestOddShapes(t *testing.T) {
	d := testkit.NewDisk(t, 64<<20)
	tp := start(t, 64<<20, Options{}, d)
	r := newReplica(t, tp, d)
	f, buf := direct(t, d.Path), pages(t, 8<<20)
	for i := range fewer(400) {
		n := 512 << mrand.IntN(13)
		at := mrand.IntN(512) * 512 % (len(buf) - n)
		if i%3 == 0 {
			at += 4 * mrand.IntN(128) // dma_alignment of loop is 4
			at = min(at, len(buf)-n)
		}
		off := mrand.Int64N((d.Size-int64(n))/512) * 512
		if _, err := f.WriteAt(buf[at:at+n], off); err != nil && !errors.Is(err, unix.EINVAL) {
			t.Fatal(err)
		}
		r.pull(tp)
	}
	testkit.Run(t, "blkdiscard", "-o", "4096", "-l", "1048576", d.Path)
	testkit.Run(t, "blkdiscard", "-z", "-o", "8388608", "-l", "1048576", d.Path)
	r.pull(tp)
	c, err := tp.Counters()
	if err != nil || c.Disks[0].Failed != tp.Drops() || c.Disks[0].Lost != 0 {
		t.Fatalf("drops %d, counters %+v, %v: want failed writes only", tp.Drops(), c, err)
	}
	r.sameOutsideGaps(tp, d)
}

// TestOverflow: outside the gap bits the replica is the disk, and every drop is counted.
func TestOverflow(t *testing.T) {
	d := testkit.NewDisk(t, 16<<20)
	tp := start(t, 256<<10, Options{}, d)
	r := newReplica(t, tp, d)
	f, buf := direct(t, d.Path), pages(t, 1<<20)
	for i := range 600 {
		n := 4096 << mrand.IntN(3)
		if _, err := f.WriteAt(buf[:n], mrand.Int64N((d.Size-int64(n))/512)*512); err != nil {
			t.Fatal(err)
		}
		if i%100 == 99 {
			r.pull(tp)
		}
	}
	r.pull(tp)
	peek, err := tp.PeekGaps()
	if err != nil || peek.Drops == 0 || len(peek.Ranges) == 0 {
		t.Fatalf("peek %+v, %v: want drops", peek, err)
	}
	if r.drops == 0 {
		t.Error("no record carries a drop count")
	}
	r.sameOutsideGaps(tp, d)
	if _, err := tp.ClearGaps(peek.Ranges); err != nil {
		t.Fatal(err)
	}
	if again, _ := tp.PeekGaps(); len(again.Ranges) != 0 {
		t.Errorf("bits stay after clearing: %v", again.Ranges)
	}
	if s, err := tp.ScanInFlight(); err != nil || s.InFlight != 0 {
		t.Errorf("scan at rest: %+v, %v", s, err)
	}
}

func TestBookmarksInOrder(t *testing.T) {
	a, b := testkit.NewDisk(t, 4<<20), testkit.NewDisk(t, 4<<20)
	tp := start(t, 4<<20, Options{}, a, b)
	fa, fb, buf := direct(t, a.Path), direct(t, b.Path), pages(t, 4096)
	for i := range 5 {
		if _, err := fa.WriteAt(buf, int64(i)*4096); err != nil {
			t.Fatal(err)
		}
		if _, err := tp.Bookmark(Mark{Name: fmt.Sprint("m", i), Consistency: stream.Crash, Token: uint64(i)}); err != nil {
			t.Fatal(err)
		}
		if _, err := fb.WriteAt(buf, int64(i)*4096); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	if _, err := tp.Read(tp.Consumer(), func(r *Record) error {
		if r.Kind == Bookmark {
			got = append(got, r.Name)
		} else {
			got = append(got, fmt.Sprint(r.Disk))
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if want := "0 m0 1 0 m1 1 0 m2 1 0 m3 1 0 m4 1"; strings.Join(got, " ") != want {
		t.Errorf("got  %s\nwant %s", strings.Join(got, " "), want)
	}
}

// TestAdopt: a killed holder loses nothing, and the next one goes on, with its own programs.
func TestAdopt(t *testing.T) {
	d := testkit.NewDisk(t, 8<<20)
	tp := start(t, 4<<20, Options{}, d)
	r := newReplica(t, tp, d)
	f, buf := direct(t, d.Path), pages(t, 4096)
	write := func(off int64) {
		t.Helper()
		if _, err := f.WriteAt(buf, off); err != nil {
			t.Fatal(err)
		}
	}
	write(0)
	p := tp.pins
	if err := tp.Close(); err != nil {
		t.Fatal(err)
	}
	write(8192)
	again, err := Adopt(filepath.Base(filepath.Dir(p.dir)), filepath.Base(p.dir))
	if err != nil {
		t.Fatalf("%+v", err)
	}
	*tp = *again // the clean-up removes what is live
	write(16384)
	r.pull(tp)
	if bad := r.differ(0, d); len(bad) > 0 || r.n != 3 {
		t.Fatalf("%d records, differing blocks %v", r.n, bad)
	}
	found, err := Pinned()
	ours := func(f Pin) bool { return pinsMust(t, f) == p && f.Err == nil && len(f.Targets) == 1 }
	if err != nil || !slices.ContainsFunc(found, ours) {
		t.Fatalf("pinned: %+v, %v", found, err)
	}
}

func pinsMust(t testing.TB, f Pin) pins {
	t.Helper()
	p, err := pinsOf(f.Instance, f.Group)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestOtherBacking: another file behind the same loop device is another disk.
func TestOtherBacking(t *testing.T) {
	d, other := testkit.NewDisk(t, 1<<20), testkit.NewDisk(t, 1<<20)
	tp := start(t, 1<<20, Options{}, d)
	testkit.Run(t, "losetup", "-d", d.Path)
	testkit.Run(t, "losetup", d.Path, other.File)
	f, buf := direct(t, d.Path), pages(t, 4096)
	if _, err := f.WriteAt(buf, 0); err != nil {
		t.Fatal(err)
	}
	f.Close()
	c, err := tp.Counters()
	if err != nil || c.Disks[0].Foreign == 0 || c.Disks[0].Writes != 0 {
		t.Fatalf("counters %+v, %v", c, err)
	}
}

// TestVoidWrite: a write that came back with EAGAIN never reached the disk.
func TestVoidWrite(t *testing.T) {
	d := testkit.NewDisk(t, 8<<20)
	tp := start(t, 8<<20, Options{}, d)
	if err := tp.SetEnds(false); err != nil {
		t.Fatal(err)
	}
	f, buf := direct(t, d.Path), pages(t, 1<<20)
	refused := 0
	for i := range 2000 {
		_, err := unix.Pwritev2(int(f.Fd()), [][]byte{buf[:512*(1+i%8)]}, int64(i%1000)*4096, unix.RWF_NOWAIT)
		if errors.Is(err, unix.EAGAIN) {
			refused++
		} else if err != nil {
			t.Fatal(err)
		}
		if i%100 == 0 {
			tp.Commit(tp.Producer())
		}
	}
	c, err := tp.Counters()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d refused, counters %+v, drops %d", refused, c.Disks[0], tp.Drops())
	if c.Disks[0].Failed > 0 && tp.Drops() == 0 {
		t.Error("a void write left no gap")
	}
}

func TestMetadataMode(t *testing.T) {
	d := testkit.NewDisk(t, 1<<20)
	tp := start(t, 1<<20, Options{MetadataOnly: true}, d)
	if _, err := direct(t, d.Path).WriteAt(pages(t, 4096), 8192); err != nil {
		t.Fatal(err)
	}
	var lost []block.Range
	if _, err := tp.Read(tp.Consumer(), func(r *Record) error {
		if r.Kind == Lost {
			lost = append(lost, r.Range)
		}
		return nil
	}); err != nil || len(lost) != 1 || lost[0] != (block.Range{Off: 8192, Len: 4096}) {
		t.Fatalf("lost %v, %v", lost, err)
	}
	if p, _ := tp.PeekGaps(); len(p.Ranges) != 1 || p.Ranges[0].Range != lost[0] {
		t.Fatalf("gap %v", p.Ranges)
	}
}

// BenchmarkPrograms reads the kernel's own statistics: nanoseconds a write in
// the attached programs. The writes come in batches; given are the median of the
// batches' means, and the least of them, which what else the machine does touches little.
func BenchmarkPrograms(b *testing.B) {
	for _, size := range []int{4096, 16384, 65536} {
		for _, how := range []string{"map", "payload", "payload+ends", "lost"} {
			b.Run(fmt.Sprintf("%s/%d", how, size), func(b *testing.B) { benchPrograms(b, size, how) })
		}
	}
}

func benchPrograms(b *testing.B, size int, how string) {
	const batch = 100
	d := testkit.NewDisk(b, 64<<20)
	tp := start(b, 64<<20, Options{MapOnly: how == "map", MetadataOnly: how == "lost"}, d)
	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		b.Skip("kernel statistics:", err)
	}
	defer stats.Close()
	f, buf := direct(b, d.Path), pages(b, size)
	if how == "payload" { // no gap is open
		_ = tp.SetEnds(false)
		_ = tp.ForgetInFlight()
	}
	means := map[string][]float64{}
	base := readStats(b, tp)
	for i := range max(b.N, batch) {
		if _, err := f.WriteAt(buf, int64(i%256)*int64(size)); err != nil {
			b.Fatal(err)
		}
		tp.Commit(tp.Producer())
		if i%batch == batch-1 {
			now := readStats(b, tp)
			for hook, n := range now {
				if runs := n[1] - base[hook][1]; runs > 0 {
					means[hook] = append(means[hook], float64(n[0]-base[hook][0])/float64(runs))
				}
			}
			base = now
		}
	}
	var median, least float64
	for hook, m := range means {
		slices.Sort(m)
		b.ReportMetric(m[len(m)/2], "ns/"+hook)
		median, least = median+m[len(m)/2], least+m[0]
	}
	b.ReportMetric(median, "ns/write")
	b.ReportMetric(least, "least-ns/write")
	b.ReportMetric(0, "ns/op") // the disk's, not ours
}

// readStats gives nanoseconds and runs, by hook.
func readStats(b *testing.B, tp *Tap) map[string][2]uint64 {
	out := map[string][2]uint64{}
	for hook, p := range tp.stubs {
		s, err := p.Stats()
		if err != nil {
			b.Fatal(err)
		}
		out[hook] = [2]uint64{uint64(s.Runtime), s.RunCount}
	}
	return out
}
