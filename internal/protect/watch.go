package protect

import (
	"context"
	"fmt"
	"strings"

	"tidemark/internal/block"
	"tidemark/internal/disk"
	"tidemark/internal/health"
	"tidemark/internal/stream"
	"tidemark/internal/tap"
	"tidemark/internal/timeline"
)

// watched is what the last look at the disks and counters saw.
type watched struct {
	counters tap.Counters
	excess   []int64 // bytes that the kernel counted beyond what was traced, by disk
	valid    bool
}

// watch looks for what writes do not explain: disks that changed or went away,
// writes that programs were skipped for, commands past the block layer, and
// more bytes written than were traced. Each makes the disks unknown as a whole.
func (s *session) watch() error {
	for i, was := range s.disks {
		is, err := disk.Inspect(was.Path)
		if err != nil {
			return fmt.Errorf("disk %s is gone: %w: %w", s.cfg.Disks[i].Name, err, ErrOffline)
		}
		changed := disk.Changed(was, is)
		if len(changed) == 0 {
			continue
		}
		what := fmt.Sprintf("disk %s: %s", s.cfg.Disks[i].Name, strings.Join(changed, ", "))
		if is.Dev != was.Dev || is.Size != was.Size || is.Start != was.Start || is.DiskSeq != was.DiskSeq {
			return fmt.Errorf("%s: %w", what, ErrOffline) // another tap is needed
		}
		s.disks[i] = is
		if err := s.unknownTerritory(what); err != nil {
			return err
		}
	}
	c, err := s.tap.Counters()
	if err != nil {
		return err
	}
	now := watched{counters: c, valid: true, excess: make([]int64, len(s.disks))}
	for i, d := range s.disks {
		if written, discarded, ok, err := disk.Stat(d); err == nil && ok {
			now.excess[i] = int64(written+discarded) - int64(c.Disks[i].Traced)
		}
	}
	was := s.watched
	s.watched = now
	if !s.gapOpen && !s.tap.Ends() {
		if err := s.tap.ForgetInFlight(); err != nil {
			return err
		}
	}
	if lost(c) > c.LostRanges { // some left only bits
		s.mode.applyWhile(s.gapOpen, evDropped, was.valid && lost(c) > lost(was.counters))
	}
	if was.valid {
		if why := unexplained(was, now); why != "" {
			return s.unknownTerritory(why)
		}
	}
	return nil
}

// unexplained names what happened between two looks that no record tells of.
// The kernel counts bytes when they end and the tap when they are queued, so
// the kernel can catch up with the tap but not overtake it; what was on its way
// when the tap started is allowed for by looking at growth over the highest mark.
func unexplained(was, now watched) string {
	if now.counters.MissedQueue > was.counters.MissedQueue {
		return "the kernel skipped the capture program for a write"
	}
	if now.counters.MissedCompletions > was.counters.MissedCompletions {
		return "the kernel skipped a program that looks for failed writes"
	}
	for i, d := range now.counters.Disks {
		old := was.counters.Disks[i]
		switch {
		case d.Passthrough > old.Passthrough:
			return "a command was sent past the block layer that may have written"
		case d.Blind > old.Blind:
			return "a write ended whose place cannot be told"
		case d.Foreign > old.Foreign:
			return "another disk was written under this one's number"
		}
	}
	return ""
}

func (s *session) unknownTerritory(why string) error {
	s.health.Raise(health.Condition{Code: "unknown-territory", Severity: health.Warning, Subject: s.cfg.Name,
		Detail: "The disks are compared with the vault as a whole: " + why + ".", Remedy: "Nothing is to be done; points come again when the comparison has ended."})
	var whole []block.DiskRange
	for i, d := range s.cfg.Disks {
		whole = append(whole, block.DiskRange{Disk: i, Range: block.Range{Len: d.Size}})
	}
	if h, err := timeline.Load(context.Background(), s.vault, s.cfg.Name); err == nil && h.Damage() == nil {
		s.useBase(context.Background(), h)
	}
	return s.openGap(stream.CauseTerritory, whole, s.seenDrops)
}

// applyWhile applies an event where both conditions hold.
func (m *mode) applyWhile(open bool, e modeEvent, happened bool) {
	if open && happened {
		m.apply(e)
	}
}
