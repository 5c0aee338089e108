package protect

import (
	"testing"
	"time"

	"tidemark/internal/health"
)

// TestClockWentBack: times do not decrease whatever the clock does, and while
// it is behind that is said.
func TestClockWentBack(t *testing.T) {
	s := bookmarking()
	s.health = &health.Set{}
	said := func() bool {
		for _, c := range s.health.List() {
			if c.Code == "clock-went-back" {
				return true
			}
		}
		return false
	}
	noon := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	s.clockOffset = noon.UnixNano()
	first := s.stamp(0)
	if s.checkClock(noon); said() {
		t.Error("the clock is right, and it says otherwise")
	}
	s.clockOffset -= int64(time.Hour)
	if second := s.stamp(int64(time.Second)); second != first {
		t.Errorf("time %d after %d", second, first)
	}
	if s.checkClock(noon.Add(-time.Hour)); !said() {
		t.Error("the clock is an hour behind, and nobody says so")
	}
	if s.checkClock(noon.Add(time.Second)); said() {
		t.Error("the clock has caught up, and it still says so")
	}
}
