package protect

import (
	"slices"
	"testing"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/source"
	"tidemark/internal/stream"
)

// TestSizeBuckets: every size is in the class whose bounds hold it.
func TestSizeBuckets(t *testing.T) {
	for _, n := range []int64{1, 512, 513, 1024, 1025, 4096, 65536, 1 << 20, 8<<20 - 1, 8 << 20, 8<<20 + 1, 1 << 30} {
		b := sizeBucket(n)
		if above := SizeBound(b); above != 0 && n > above || b > 0 && n <= SizeBound(b-1) {
			t.Errorf("%d bytes are in class %d, up to %d", n, b, above)
		}
	}
	if SizeBound(SizeBuckets-2) != 8<<20 {
		t.Errorf("the last bound is %d", SizeBound(SizeBuckets-2))
	}
}

// TestCountingAllocatesNothing: it stands in the way of every record.
func TestCountingAllocatesNothing(t *testing.T) {
	s, now := newStats(1), int64(1000)
	r := &source.Record{Op: block.OpWrite, Range: block.Range{Len: 4096}}
	if n := testing.AllocsPerRun(1000, func() { now += int64(time.Second); s.wrote(r, now); s.durable.observe(time.Millisecond) }); n > 0 {
		t.Errorf("%v allocations a record", n)
	}
	if d := s.Figures().Disks[0]; d.Writes < 1000 || d.Bytes != 4096*d.Writes || d.Sizes[3] != d.Writes {
		t.Errorf("%+v", d)
	}
}

// TestChurn: the average is over the last minute, whatever was before it.
func TestChurn(t *testing.T) {
	var c churn
	for s := range int64(200) {
		c.add(s, 600)
	}
	c.add(199, 1200)
	c.add(150, 60) // a clock that went back: it counts for the newest second
	for _, at := range []struct {
		now  int64
		want float64
	}{{199, 600 + 21}, {229, 321}, {258, 31}, {259, 0}, {1000, 0}} {
		if is, peak := c.read(time.Unix(at.now, 0)); is != at.want || peak != 1860 {
			t.Errorf("at %d: %v bytes a second, %d at most: want %v, 1860", at.now, is, peak, at.want)
		}
	}
}

// TestModesAndGaps: changes are counted with their causes, what is no change is not.
func TestModesAndGaps(t *testing.T) {
	s := newStats(1)
	m := newMode(true)
	m.told = s
	s.moved(m.now, moveOpened)
	for _, e := range []modeEvent{evRangeOnly, evRangeOnly, evDropped, evSettled, evSettled, evDropped} {
		m.apply(e)
	}
	s.moved("offline", moveOffline)
	s.gap(stream.CauseOverflow, true, []block.DiskRange{{Disk: 0}, {Disk: 0}})
	s.gap(stream.CauseFailed, false, nil)
	s.known()
	f := s.Figures()
	want := []Move{{"data", "metadata", "payload-lost", 1}, {"data", "bitmap", "range-lost", 1}, {"metadata", "bitmap", "range-lost", 1},
		{"bitmap", "data", "settled", 1}, {"bitmap", "offline", "offline", 1}, {"offline", "data", "opened", 1}}
	if !slices.Equal(f.Moves, want) {
		t.Errorf("moves %v", f.Moves)
	}
	if f.Gaps["overflow"] != 1 || f.Gaps["failed-write"] != 0 || f.GapsWidened != 1 || f.Disks[0].Gaps != 1 {
		t.Errorf("gaps %v, %d; of the disk %d", f.Gaps, f.GapsWidened, f.Disks[0].Gaps)
	}
}

// TestPending: what arrived in the vault is not pending, and has its time.
func TestPending(t *testing.T) {
	s := newStats(1)
	began := time.Now().Add(-time.Hour)
	for n := range uint64(3) {
		s.stored(n+1, began, 100)
	}
	s.arrived(2)
	f := s.Figures()
	if last := len(f.Vaulted.Counts) - 1; f.OnTheWay != 100 || f.Vaulted.Counts[last] != 2 || f.Durable.Counts[last] != 3 {
		t.Errorf("%d bytes on the way, in the vault %v, in the spool %v", f.OnTheWay, f.Vaulted.Counts, f.Durable.Counts)
	}
}

// TestPendingOfDisks: each disk has its own bytes and age, from the ring on until
// the vault has them; what is taken from the ring once more does not count twice.
func TestPendingOfDisks(t *testing.T) {
	s, now := newStats(3), time.Now()
	write := func(disk int, op block.Op, size int64, ago time.Duration) {
		s.wrote(&source.Record{Op: op, Disk: disk, Range: block.Range{Len: size}}, now.Add(-ago).UnixNano())
	}
	is := func(what string, bytes [3]uint64, ages [3]time.Duration) {
		t.Helper()
		s.mu.Lock()
		defer s.mu.Unlock()
		for i := range bytes {
			if b, age := s.pending(i, now); b != bytes[i] || age != ages[i] {
				t.Errorf("%s: disk %d has %d bytes, %s old; want %d, %s", what, i, b, age, bytes[i], ages[i])
			}
		}
	}
	write(0, block.OpWrite, 4096, time.Hour)
	write(0, block.OpWrite, 512, time.Minute)
	write(1, block.OpZeroes, 4096, 30*time.Minute)
	is("in the ring", [3]uint64{4608, 0, 0}, [3]time.Duration{time.Hour, 30 * time.Minute, 0})
	s.begun()
	is("to be taken once more", [3]uint64{}, [3]time.Duration{})
	write(0, block.OpWrite, 4096, time.Hour)
	s.stored(1, now, 100)
	write(1, block.OpWrite, 512, time.Minute)
	s.stored(2, now, 100)
	write(0, block.OpWrite, 1024, time.Second)
	is("in two segments and the ring", [3]uint64{5120, 512, 0}, [3]time.Duration{time.Hour, time.Minute, 0})
	s.arrived(1)
	is("one in the vault", [3]uint64{1024, 512, 0}, [3]time.Duration{time.Second, time.Minute, 0})
	s.stored(3, now, 100)
	s.arrived(3)
	is("all in the vault", [3]uint64{}, [3]time.Duration{})
	if f := s.Figures(); f.Disks[0].Churn*churnSeconds != 1024 || f.Disks[1].Churn != 0 || f.Disks[2].ChurnPeak != 0 || f.Churn*churnSeconds != 1024 {
		t.Errorf("churn %v of %+v", f.Churn, f.Disks)
	}
}
