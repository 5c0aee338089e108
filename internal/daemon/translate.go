package daemon

import (
	"tidemark/internal/control/api"
	"tidemark/internal/protect"
)

// groupOf says in the API's words how a group is.
func groupOf(s protect.Status) api.Group {
	out := api.Group{
		Name: s.Name, State: api.State(s.State), Mode: api.Mode(s.Mode), WayIn: s.WayIn, Vault: s.Vault,
		ConsistentSince: s.ConsistentSince, CapturedPosition: s.Captured, DurablePosition: s.Durable, LagSeconds: s.Lag.Seconds(),
		RingBytes: s.Ring, RingUsedBytes: s.RingUsed, SpoolBytes: s.Spool, Stats: statsOf(&s), Conditions: s.Conditions,
	}
	for n, d := range s.Disks {
		f := s.Figures.Disks[n]
		out.Disks = append(out.Disks, api.Disk{
			Name: d.Name, Device: d.Device, Identity: d.Identity, SizeBytes: d.Size, GapBytes: d.Gap,
			Writes: d.Writes, WrittenBytes: d.Written, LostWrites: d.Lost, FailedWrites: d.Failed,
			TakenWrites: f.Writes, TakenBytes: f.Bytes, ZeroedBytes: f.Zeroes, DiscardedBytes: f.Discards, WriteSizes: f.Sizes,
			Gaps: f.Gaps, ChurnBytesPerSecond: f.Churn, ChurnPeakBytesPerSecond: f.ChurnPeak, PendingBytes: f.Pending, PendingSeconds: f.Age.Seconds(),
		})
	}
	return out
}

func liveOf(disks []protect.LiveDisk) []api.LiveDisk {
	var out []api.LiveDisk
	for _, d := range disks {
		out = append(out, api.LiveDisk{Disk: d.Disk, Position: d.Position, ComparedBytes: d.Compared, DifferentBytes: d.Different,
			FirstDifferent: d.FirstDifferent, Settled: d.Settled})
	}
	return out
}
