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
	if n := testing.AllocsPerRun(1000, func() { now++; s.wrote(r, now); s.durable.observe(time.Millisecond) }); n > 0 {
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
	s.gap(stream.CauseOverflow, true)
	s.gap(stream.CauseFailed, false)
	s.known()
	f := s.Figures()
	want := []Move{{"data", "metadata", "payload-lost", 1}, {"data", "bitmap", "range-lost", 1}, {"metadata", "bitmap", "range-lost", 1},
		{"bitmap", "data", "settled", 1}, {"bitmap", "offline", "offline", 1}, {"offline", "data", "opened", 1}}
	if !slices.Equal(f.Moves, want) {
		t.Errorf("moves %v", f.Moves)
	}
	if f.Gaps["overflow"] != 1 || f.Gaps["failed-write"] != 0 || f.GapsWidened != 1 {
		t.Errorf("gaps %v, %d", f.Gaps, f.GapsWidened)
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
