package daemon

import (
	"time"

	"tidemark/internal/control/api"
	"tidemark/internal/protect"
)

// statsOf says in the API's words what a group did.
func statsOf(s *protect.Status) api.GroupStats {
	f := &s.Figures
	out := api.GroupStats{
		ChurnBytesPerSecond: f.Churn, ChurnPeakBytesPerSecond: f.ChurnPeak, PendingBytes: s.RingUsed + f.OnTheWay, PendingSeconds: s.Lag.Seconds(),
		ModeSeconds: map[api.Mode]float64{}, ModeMoves: []api.ModeMove{}, Gaps: f.Gaps, GapsWidened: f.GapsWidened, GapSeconds: f.InGaps.Seconds(),
		Bookmarks: api.BookmarkCounts{Cut: f.Made[protect.BarrierCut], Held: f.Made[protect.BarrierHeld], Refused: f.Refused, Dropped: f.Dropped},
		Durable:   latencyOf(f.Durable), Vault: latencyOf(f.Vaulted), Drained: latencyOf(f.Drained),
	}
	for m, d := range f.InMode {
		out.ModeSeconds[api.Mode(m)] = d.Seconds()
	}
	for _, m := range f.Moves {
		out.ModeMoves = append(out.ModeMoves, api.ModeMove{From: api.Mode(m.From), To: api.Mode(m.To), Cause: m.Cause, Count: m.Count})
	}
	if m := f.Last; m.Name != "" {
		out.LastBookmark = &api.LastBookmark{Name: m.Name, Time: m.Time.UTC(), Barrier: string(m.Barrier), HeldSeconds: m.Held.Seconds()}
	}
	return out
}

func latencyOf(l protect.Latency) api.Latency {
	out := api.Latency{Counts: l.Counts, SumSeconds: l.Sum.Seconds(), NewestSeconds: l.Newest.Seconds()}
	for _, b := range l.Bounds {
		out.BoundsSeconds = append(out.BoundsSeconds, time.Duration(b).Seconds())
	}
	return out
}

// totalsOf adds the groups up.
func totalsOf(groups []api.Group) api.Totals {
	out := api.Totals{WriteSizes: make([]uint64, protect.SizeBuckets)}
	for b := range protect.SizeBuckets - 1 {
		out.WriteSizeBounds = append(out.WriteSizeBounds, protect.SizeBound(b))
	}
	for i := range groups {
		g := &groups[i]
		for _, d := range g.Disks {
			out.Writes += d.Writes
			out.WrittenBytes += d.WrittenBytes
			out.LostWrites += d.LostWrites
			for b, n := range d.WriteSizes {
				out.WriteSizes[b] += n
			}
		}
		for _, n := range g.Stats.Gaps {
			out.Gaps += n
		}
		out.GapSeconds = max(out.GapSeconds, g.Stats.GapSeconds)
		out.ChurnBytesPerSecond += g.Stats.ChurnBytesPerSecond
		out.PendingBytes += g.Stats.PendingBytes
		out.PendingSeconds = max(out.PendingSeconds, g.Stats.PendingSeconds)
		out.Bookmarks.Cut += g.Stats.Bookmarks.Cut
		out.Bookmarks.Held += g.Stats.Bookmarks.Held
		out.Bookmarks.Refused += g.Stats.Bookmarks.Refused
		out.Bookmarks.Dropped += g.Stats.Bookmarks.Dropped
	}
	return out
}
