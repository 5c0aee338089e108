package protect

import (
	"context"
	"time"

	"tidemark/internal/health"
	"tidemark/internal/stream"
)

// State is what people want to know first about a group. The names are those
// that they read.
type State string

const (
	Filling   State = "filling"   // a gap is open and being filled; no new points yet
	Protected State = "protected" // every write is captured; the newest position is a point
	Degraded  State = "degraded"  // capture or delivery is weaker than asked; Conditions say how
	Offline   State = "offline"   // a disk, or the capture itself, is not there
)

// Status is how a group is at one moment. Positions are 0 where there is none
// yet; sizes are bytes.
type Status struct {
	Name            string
	State           State
	Mode            Mode
	WayIn           string // WayTap or WayServe
	Vault           string
	ConsistentSince stream.Position
	Captured        stream.Position // covers every write that completed before the call
	Durable         stream.Position // what a restore from the vault alone can reach
	Lag             time.Duration   // age of the oldest record that is not durable
	Ring, RingUsed  int64
	Spool           int64
	Disks           []DiskStatus
	Figures         Figures
	Conditions      []health.Condition
}

// DiskStatus is one disk of it. The last four count since the capture began.
type DiskStatus struct {
	Name, Device, Identity string
	Size, Gap              int64
	Writes, Written        uint64 // Written in bytes
	Lost, Failed           uint64 // writes
}

// Status says how the group is. The ring is looked at up to its producer first.
func (g *Group) Status(ctx context.Context) Status {
	out := Status{Name: g.cfg.Name, State: Offline, Mode: ModeBitmap, WayIn: WayTap, Vault: g.cfg.Vault}
	if g.cfg.Served() {
		out.WayIn = WayServe
	}
	for _, d := range g.cfg.Disks {
		out.Disks = append(out.Disks, DiskStatus{Name: d.Name, Device: d.Path, Size: d.Size, Gap: d.Size, Identity: d.Identity.String()})
	}
	if s := g.current(); s != nil {
		_ = s.ask(ctx, func() error { return s.describe(&out) }) // a session that is just ending is offline
	}
	out.Conditions, out.Figures = g.health.List(), g.stats.Figures()
	return out
}

// describe fills in what only the session knows.
func (s *session) describe(out *Status) error {
	if !s.full {
		if err := s.pump(); err != nil {
			return err
		}
		if err := s.gaps(); err != nil {
			return err
		}
	}
	c, err := s.source.Counters()
	if err != nil {
		return err
	}
	out.Mode, out.ConsistentSince, out.Captured = s.mode.now, s.settled, s.position
	var oldest time.Time
	out.Durable, oldest = s.pending.state()
	if oldest.IsZero() && s.builder.Records() > 0 {
		oldest = s.builderSince
	}
	if !oldest.IsZero() {
		out.Lag = time.Since(oldest)
	}
	out.Ring, out.RingUsed, out.Spool = s.source.RingSize(), int64(s.source.Producer()-s.source.Consumer()), s.spool.Bytes()
	for i := range out.Disks {
		d, n := &out.Disks[i], c.Disks[i]
		d.Device, d.Gap = s.disks[i].node(), s.engine.Remaining(i)
		d.Writes, d.Written, d.Lost, d.Failed = n.Writes, n.Bytes, n.Lost, n.Failed
	}
	if s.full && s.source.Drops() > s.seenDrops {
		if err := s.describeUntold(out); err != nil {
			return err
		}
	}
	switch {
	case s.mode.now != ModeData || s.full:
		out.State = Degraded
	case s.gapOpen:
		out.State = Filling
	default:
		out.State = Protected
		s.health.Clear("unknown-territory", s.cfg.Name)
	}
	return nil
}

// describeUntold adds the blocks that were lost while nothing could be taken
// from the ring: no gap record tells of them yet.
func (s *session) describeUntold(out *Status) error {
	peek, err := s.source.PeekGaps()
	if err != nil {
		return err
	}
	for _, r := range peek.Ranges {
		d := &out.Disks[r.Disk]
		d.Gap = min(d.Gap+r.Range.Len, d.Size)
	}
	out.ConsistentSince = 0
	return nil
}
