package protect

import (
	"fmt"
	"time"

	"tidemark/internal/health"
)

// clockBehind is how far the machine's clock may lie behind the newest record
// before it is said.
const clockBehind = 5 * time.Second

// checkClock says that the clock went back. Times never decrease along
// positions, so until the clock has caught up all records have the newest time
// there was, and a point asked for by a time in between is an older one.
func (s *session) checkClock(now time.Time) {
	newest := time.Unix(0, s.lastTime)
	if newest.Sub(now) < clockBehind {
		s.health.Clear("clock-went-back", s.cfg.Name)
		return
	}
	s.health.Raise(health.Condition{Code: "clock-went-back", Severity: health.Warning, Subject: s.cfg.Name,
		Detail: fmt.Sprintf("The machine's clock went back: the newest record is from %s. Until then points are told apart by position and bookmark, not by time.", newest.UTC().Format(time.RFC3339)),
		Remedy: "Set the clock right; name points by position or bookmark meanwhile."})
}
