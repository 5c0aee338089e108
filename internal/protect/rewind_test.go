package protect

import (
	"testing"

	"tidemark/internal/block"
	"tidemark/internal/segment"
	"tidemark/internal/source"
	"tidemark/internal/tap"
)

// TestRewind: what is taken back was never there: the next record gets the
// position again, a bookmark its name, and who waits for it still waits.
func TestRewind(t *testing.T) {
	s := bookmarking()
	s.source, s.settled = &tap.Tap{}, 1
	s.previous = segment.Summary{State: segment.State{Last: 7, Settled: 1, Time: 5, Source: segment.Source{Place: 4096, Drops: 2}}}
	s.position, s.place, s.seenDrops, s.lastTime = 7, 4096, 2, 5
	w := s.waitFor(1, "noon")
	take := func() {
		t.Helper()
		for _, err := range []error{
			s.takeWrite(&source.Record{Op: block.OpZeroes, Range: block.Range{Len: 512}, MonoTime: 9}),
			s.takeBookmark(&source.Record{Kind: source.Bookmark, Name: "noon", Token: 1}),
		} {
			if err != nil {
				t.Fatal(err)
			}
		}
		s.place, s.seenDrops = 8192, 3
	}
	take()
	if s.position != 9 || !w.taken {
		t.Fatalf("position %d, taken %v: nothing to take back", s.position, w.taken)
	}
	s.rewind()
	if s.position != 7 || s.place != 4096 || s.seenDrops != 2 || s.lastTime != 5 || w.taken || s.names["noon"] || s.builder.Records() != 0 {
		t.Errorf("position %d, place %d, drops %d, time %d, taken %v, names %v, %d records", s.position, s.place, s.seenDrops, s.lastTime, w.taken, s.names, s.builder.Records())
	}
	take()
	if s.position != 9 || w.at.Position != 9 {
		t.Errorf("read once more it is %d at %d, want 9", s.position, w.at.Position)
	}
	s.gapOpen = true // fills may be among them, and the engine knows of them
	if s.rewind(); s.position != 9 || s.builder.Records() != 2 {
		t.Errorf("with a gap open: position %d, %d records: want nothing taken back", s.position, s.builder.Records())
	}
}

// TestUntold: each of the counters is a reason, and the same ones are none.
func TestUntold(t *testing.T) {
	was := untoldOf(source.Counters{MissedQueue: 1, MissedCompletions: 2, Disks: []source.DiskCounters{{Passthrough: 3}, {Blind: 4, Foreign: 5}}})
	if why := was.since(was); why != "" {
		t.Errorf("nothing happened, and it says: %s", why)
	}
	told := map[string]bool{}
	for i, c := range []source.Counters{
		{MissedQueue: 1}, {MissedCompletions: 1}, {Disks: []source.DiskCounters{{}, {Passthrough: 1}}}, {Disks: []source.DiskCounters{{Blind: 1}}}, {Disks: []source.DiskCounters{{Foreign: 1}}},
	} {
		why := untoldOf(c).since(untold{})
		if why == "" || told[why] {
			t.Errorf("counter %d: %q", i, why)
		}
		told[why] = true
	}
}
