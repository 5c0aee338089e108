package main

import (
	"strings"
	"testing"
	"time"

	"tidemark/internal/control/api"
	"tidemark/internal/health"
)

func TestHoldups(t *testing.T) {
	disks := []api.Disk{{SizeBytes: 1 << 20, GapBytes: 1 << 19}}
	unreachable := []health.Condition{{Code: "vault-unreachable", Severity: health.Warning, Detail: "No.", Remedy: "Yes."}}
	for name, c := range map[string]struct {
		g    api.Group
		want string
	}{
		"filling":     {api.Group{Disks: disks}, "512.0 KiB of 1.0 MiB are still to be copied"},
		"offline":     {api.Group{Name: "g", State: api.Offline, Disks: disks}, "group g is offline"},
		"not durable": {api.Group{ConsistentSince: 7, DurablePosition: 3, Conditions: unreachable}, "consistent since position 7; the vault holds everything up to 3|warning vault-unreachable: No. Yes."},
		"settling":    {api.Group{}, "everything is copied; writes that were on their way have still to end"},
		"done":        {api.Group{ConsistentSince: 7, DurablePosition: 7, Conditions: unreachable}, ""},
	} {
		if got := strings.Join(holdups(c.g), "|"); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

func TestWaitingIsNeverSilentForLong(t *testing.T) {
	var w waiting
	now := time.Unix(1000, 0)
	for i, step := range []struct {
		after   time.Duration
		reasons []string
		want    bool
	}{
		{0, []string{"a"}, false}, {time.Second, []string{"b"}, false}, {time.Second, []string{"c"}, true},
		{time.Second, []string{"d"}, false}, {time.Second, []string{"d", "vault"}, true}, {time.Second, []string{"e", "vault"}, false},
		{9 * time.Second, []string{"e", "vault"}, true}, {time.Second, []string{"e"}, true}, {time.Second, nil, false},
	} {
		now = now.Add(step.after)
		if got := w.due(now, step.reasons); got != step.want {
			t.Errorf("step %d: %v", i, got)
		}
	}
}
