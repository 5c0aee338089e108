package timeline

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
	"tidemark/internal/segment"
	"tidemark/internal/stream"
	"tidemark/internal/vault"
)

// memoryDir is a folder in memory, where there is one, so that the disk is not
// what is measured, nor what histories of thousands of objects wait for: no power is lost here.
func memoryDir(t testing.TB) string {
	dir, err := os.MkdirTemp("/dev/shm", "tidemark-test-"+strconv.Itoa(os.Getpid())+"-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// many makes a vault with a disk of so many sectors, each written by itself, in
// an order that scatters neighbours, perSegment records a segment.
func many(b *testing.B, sectors, perSegment int) (*vault.Vault, int64) {
	b.Helper()
	dir := memoryDir(b)
	v, err := vault.Create(b.Context(), filepath.Join(dir, "vault"))
	if err != nil {
		b.Fatal(err)
	}
	lock, err := v.Lock(b.Context(), "g", vault.Holder{})
	if err != nil {
		b.Fatal(err)
	}
	defer lock.Unlock()
	size := int64(sectors) * 512
	builder := segment.NewBuilder(1 << 20)
	var prev segment.Summary
	pos := stream.Position(1)
	add := func(r stream.Record) {
		if err := builder.Append(&r); err != nil {
			b.Fatal(err)
		}
	}
	put := func() {
		s, err := builder.Seal(segment.Header{Group: "g", Sequence: prev.Sequence + 1, Previous: prev.Digest,
			Disks: []segment.Disk{{Name: "a", Size: size, SectorSize: 512, BlockSize: bs}}}, segment.State{Last: pos})
		if err != nil {
			b.Fatal(err)
		}
		name := filepath.Join(dir, "sealed")
		f, err := os.Create(name)
		if err == nil {
			_, err = s.WriteTo(f)
		}
		if err == nil {
			err = f.Close()
		}
		if err == nil {
			err = v.Put(b.Context(), lock, name, s.Summary)
		}
		if err == nil {
			err = os.Remove(name)
		}
		if err != nil {
			b.Fatal(err)
		}
		prev = s.Summary
		builder.Reset()
	}
	whole := block.Range{Len: size}
	add(stream.Record{Kind: stream.KindGap, Position: 1, Cause: stream.CauseInitial, Ranges: []block.DiskRange{{Range: whole}}})
	add(stream.Record{Kind: stream.KindFill, Fill: stream.FillZero, Position: 1, ValidFrom: 1, Range: whole})
	add(stream.Record{Kind: stream.KindSettled, Position: 1})
	payload := make([]byte, 512)
	const prime = 1_000_003
	for i := range sectors {
		if i%perSegment == 0 {
			for j := range payload { // compresses to an eighth
				payload[j] = byte(uint32(pos) * 2654435761 >> (j % 64 / 3))
			}
			put()
		}
		pos++
		at := int64(i) * prime % int64(sectors)
		add(stream.Record{Kind: stream.KindWrite, Op: block.OpWrite, Position: pos, Time: int64(pos), Range: block.Range{Off: at * 512, Len: 512}, Payload: payload})
	}
	put()
	return v, size
}

// resident and peak are this process's memory in MB, now and at most since forget.
func resident() float64 { return statusMB("VmRSS:") }
func peak() float64     { return statusMB("VmHWM:") }
func forget()           { _ = os.WriteFile("/proc/self/clear_refs", []byte("5"), 0) }

func statusMB(field string) float64 {
	text, _ := os.ReadFile("/proc/self/status")
	_, after, _ := strings.Cut(string(text), field)
	var kib float64
	fmt.Sscan(after, &kib)
	return kib * 1024 / 1e6
}

// processor is the processor time that this process has used: what a busy
// machine does not falsify.
func processor() time.Duration {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u) // with these arguments it cannot fail
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func heapMB() float64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc) / 1e6
}

// BenchmarkLoad opens a vault of b.N segments: -benchtime 10000x for 10,000.
// An operation is one segment of 250 records.
func BenchmarkLoad(b *testing.B) {
	v, _ := many(b, b.N*250, 250)
	used := processor()
	b.ResetTimer()
	h, err := Load(b.Context(), v, "g")
	if err != nil || h.Damage() != nil {
		b.Fatal(err, h.Damage())
	}
	b.ReportMetric(float64((processor()-used).Nanoseconds())/float64(b.N), "cpu-ns/op")
}

// BenchmarkTenMillion opens a view of ten million extents; an operation is a
// random read of 4 KiB.
func BenchmarkTenMillion(b *testing.B) {
	v, size := many(b, 10_000_000, 20_000)
	before := heapMB()
	forget()
	base := resident()
	start, used := time.Now(), processor()
	h, err := Load(b.Context(), v, "g")
	if err != nil || h.Damage() != nil {
		b.Fatal(err, h.Damage())
	}
	loaded := time.Since(start)
	view, err := h.View(b.Context(), 0, h.newest)
	if err != nil {
		b.Fatal(err)
	}
	defer view.Close()
	opened, openedCPU, most := time.Since(start), processor()-used, peak()-base
	after := heapMB()
	rng := rand.New(rand.NewPCG(1, 2))
	buf := make([]byte, bs)
	used = processor()
	for b.Loop() {
		if _, err := view.ReadAt(buf, rng.Int64N(size/bs)*bs); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64((processor()-used).Microseconds())/float64(b.N), "cpu-µs/op")
	b.ReportMetric(openedCPU.Seconds(), "cpu-s-open")
	b.ReportMetric(float64(len(view.extents))/1e6, "Mextents")
	b.ReportMetric(loaded.Seconds(), "s-load")
	b.ReportMetric(opened.Seconds(), "s-open")
	b.ReportMetric(after-before, "MB-held")
	b.ReportMetric(most, "MB-peak")
}
