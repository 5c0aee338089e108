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
	excess   []int64 // bytes that the kernel counted beyond what was traced, by disk, at a settled moment; nil: not noted yet
	valid    bool
}

// watch looks for what writes do not explain: disks that changed or went away,
// writes that programs were skipped for, commands past the block layer, and
// more bytes written than were traced. Each makes the disks unknown as a whole.
func (s *session) watch() error {
	for i, was := range s.disks {
		is, err := disk.Glance(was.Path) // reads nothing: a disk may sleep, or hang
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
	// The kernel's counts first: it counts bytes when they end, the tap when they
	// are queued, so what is read in this order can only fall short of the tap's.
	ended := make([]int64, len(s.disks))
	for i, d := range s.disks {
		ended[i] = -1
		if written, discarded, ok, err := disk.Stat(d); err == nil && ok && !d.BioBased {
			ended[i] = int64(written + discarded)
		}
	}
	c, err := s.tap.Counters()
	if err != nil {
		return err
	}
	now := watched{counters: c, valid: true, excess: s.watched.excess}
	if why := s.crossCheck(&now, ended); why != "" {
		return s.unknownTerritory(why)
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

// crossCheck compares the bytes that the kernel counted with those that were
// traced. The difference is noted while the disks are known to be settled; when
// it has grown since, bytes were written that nobody traced.
func (s *session) crossCheck(now *watched, ended []int64) string {
	if !s.gapOpen && s.quietScans >= 2 && now.excess == nil && s.still(now.counters) {
		now.excess = make([]int64, len(ended))
		for i := range ended {
			now.excess[i] = ended[i] - int64(now.counters.Disks[i].Traced)
		}
		return ""
	}
	for i := range now.excess {
		if ended[i] < 0 || ended[i]-int64(now.counters.Disks[i].Traced) <= now.excess[i] {
			continue
		}
		s.watched.excess = nil // anew when it is settled again
		return fmt.Sprintf("the kernel counts more bytes written to %s than were traced", s.cfg.Disks[i].Name)
	}
	return ""
}

// still says that nothing was written since the last look and nothing is on its way.
func (s *session) still(now tap.Counters) bool {
	for i, d := range s.disks {
		r, w, err := disk.InFlight(d)
		if !s.watched.valid || err != nil || r+w > 0 || now.Disks[i].Traced != s.watched.counters.Disks[i].Traced {
			return false
		}
	}
	return true
}

// unexplained names what happened between two looks that no record tells of.
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
