package tap

import (
	"path/filepath"
	"testing"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/testkit"
)

// TestAging: a bio is stale where nothing happened to it while its disk was idle
// all along, or for very long; never one that is new under an old pointer.
func TestAging(t *testing.T) {
	var a aging
	start := time.Unix(1000, 0)
	idle := map[uint32]bool{}
	look := func(after time.Duration, flights ...flight) []uint64 {
		for _, f := range flights {
			a.see(f.Sector, f) // the sector serves as the key
		}
		return a.old(start.Add(after), func(whole uint32) bool { return idle[whole] })
	}
	want := func(what string, have []uint64, n int) {
		t.Helper()
		if len(have) != n {
			t.Errorf("%s: %d stale, want %d", what, len(have), n)
		}
	}
	f := flight{Sector: 1, Place: 10, Left: 4096, Whole: 7}
	idle[7] = true
	want("first seen", look(0, f), 0)
	want("just before", look(staleIdle-1, f), 0)
	want("idle for long enough", look(staleIdle, f), 1)
	idle[7] = false
	want("the disk works", look(staleIdle+1, f), 0)
	idle[7] = true
	want("idle again, not for long", look(2*staleIdle, f), 0)
	f.Left = 512
	want("a part has ended", look(3*staleIdle, f), 0)
	f.Place = 20
	want("queued anew", look(5*staleIdle, f), 0)
	want("gone", look(6*staleIdle), 0)
	want("back", look(8*staleIdle, f), 0)
	idle[7] = false
	want("at work for very long", look(8*staleIdle+staleBusy, f), 1)
	for i := range uint64(agingMax + 10) {
		a.see(i, f)
	}
	if len(a.is) > agingMax {
		t.Errorf("%d bios have their age noted, at most %d may", len(a.is), agingMax)
	}
}

// TestForgetsWhatNeverEnds: a bio that is in the map and nowhere else holds Low
// only for a while, and its range becomes a gap.
func TestForgetsWhatNeverEnds(t *testing.T) {
	testkit.Need(t, "root", "tap", "loop")
	d := testkit.NewDisk(t, 1<<20)
	tp := start(t, 64<<10, Options{MetadataOnly: true}, d)
	dead := flight{Place: 0, Sector: 9, Left: 1024, Bytes: 1024, Whole: tp.targets[0].Whole, Flags: flightDropped}
	if err := tp.maps["inflight"].Put(uint64(0xdead), dead); err != nil {
		t.Fatal(err)
	}
	if _, err := tp.Bookmark(Mark{Name: "past it"}); err != nil {
		t.Fatal(err)
	}
	drops := tp.Drops()
	for until := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		s, err := tp.ScanInFlight()
		if err != nil {
			t.Fatal(err)
		}
		if s.InFlight == 0 {
			if s.Low != tp.Producer() {
				t.Errorf("low %d, want %d", s.Low, tp.Producer())
			}
			break
		}
		if s.Low != 0 || len(s.Dropped) != 1 {
			t.Fatalf("while it is there: %+v", s)
		}
		if time.Now().After(until) {
			t.Fatalf("it stays: %s, %+v", filepath.Base(tp.pins.dir), s)
		}
	}
	p, err := tp.PeekGaps()
	if err != nil {
		t.Fatal(err)
	}
	want := block.DiskRange{Range: block.Range{Off: 4096, Len: 4096}}
	if len(p.Ranges) != 1 || p.Ranges[0] != want || p.Drops != drops+1 {
		t.Errorf("gap bits %v at %d drops, want %v at %d", p.Ranges, p.Drops, want, drops+1)
	}
}
