package protect

import (
	"errors"
	"slices"
	"testing"

	"tidemark/internal/health"
	"tidemark/internal/spool"
)

// TestConditionsEndWithWhatTheySay: a condition that outlives its reason sends
// people after something that is not there.
func TestConditionsEndWithWhatTheySay(t *testing.T) {
	var set health.Set
	s := &session{cfg: &Config{Name: "g", Disks: []DiskConfig{{Name: "a"}, {Name: "b"}}}, health: &set}
	codes := func() (out []string) {
		for _, c := range set.List() {
			out = append(out, c.Code+" "+c.Subject)
		}
		slices.Sort(out)
		return out
	}
	bad := &reading{err: errors.New("medium error")}
	bad.job.Disk = 1
	s.readFailed(bad)
	s.setFull(spool.ErrFull)
	if got := codes(); !slices.Equal(got, []string{"disk-read-failed b", "spool-full g"}) {
		t.Fatalf("raised: %q", got)
	}
	s.readable()
	s.setFull(nil)
	if got := codes(); len(got) != 0 {
		t.Fatalf("still raised: %q", got)
	}
}
