package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"tidemark/internal/control/api"
)

// holdups says, in sentences, what a group that is waited for still lacks, and
// every condition that may be the reason. None: it is consistent and durable.
func holdups(g api.Group) []string {
	size, gap := sizeAndGap(g)
	var out []string
	switch {
	case g.ConsistentSince != 0 && g.DurablePosition >= g.ConsistentSince:
		return nil
	case g.State == api.Offline:
		out = append(out, fmt.Sprintf("group %s is offline", g.Name))
	case gap > 0:
		out = append(out, fmt.Sprintf("%s of %s are still to be copied", formatSize(gap), formatSize(size)))
	case g.ConsistentSince == 0:
		out = append(out, "everything is copied; writes that were on their way have still to end")
	default:
		out = append(out, fmt.Sprintf("consistent since position %d; the vault holds everything up to %d", g.ConsistentSince, g.DurablePosition))
	}
	for _, c := range g.Conditions {
		out = append(out, strings.TrimSpace(fmt.Sprintf("%s %s: %s %s", c.Severity, c.Code, c.Detail, c.Remedy)))
	}
	return out
}

// sizeAndGap are the bytes of a group's disks, and those that the history does not know.
func sizeAndGap(g api.Group) (size, gap int64) {
	for _, d := range g.Disks {
		size, gap = size+d.SizeBytes, gap+d.GapBytes
	}
	return size, gap
}

// waiting decides when to say what holds a wait up: as soon as a condition comes
// or goes, and every now and then.
type waiting struct {
	conditions []string
	last       time.Time
}

const (
	sayFirst = 2 * time.Second  // a wait that is short says nothing
	sayAgain = 10 * time.Second // the longest silence
)

// due takes the newest hold-ups, the conditions among them from the second on.
func (w *waiting) due(now time.Time, reasons []string) bool {
	if w.last.IsZero() {
		w.last = now.Add(sayFirst - sayAgain)
	}
	conditions := reasons[min(1, len(reasons)):]
	changed := !slices.Equal(conditions, w.conditions)
	w.conditions = slices.Clone(conditions)
	if len(reasons) == 0 || !changed && now.Sub(w.last) < sayAgain {
		return false
	}
	w.last = now
	return true
}
