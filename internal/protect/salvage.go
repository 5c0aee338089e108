package protect

import (
	"context"
	"errors"
	"fmt"

	"tidemark/internal/fill"
	"tidemark/internal/timeline"
)

// salvageStranded salvages the source of a group whose disks are not all here.
// It costs next to nothing where the ring is empty: the group tries again every
// few seconds.
func (s *session) salvageStranded(ctx context.Context) error {
	if s.source = s.way.stranded(); s.source == nil {
		return nil
	}
	h, err := s.history(ctx)
	if err == nil {
		_, err = s.salvage(ctx, h)
	}
	return errors.Join(err, s.source.Close())
}

// salvage moves what the ring of s.source holds into the history, and gives that as
// it is then. It is for a tap whose disks are gone, or are not what they were:
// what they wrote before is history all the same. Bookmarks are not: nobody was
// told of them, and writes may have gone past before they were put.
func (s *session) salvage(ctx context.Context, h *timeline.History) (*timeline.History, error) {
	if h == nil || !s.continues(h) {
		return h, nil
	}
	s.salvaging = true
	defer func() { s.salvaging = false }()
	end := s.source.Producer()
	s.carry(h)
	s.engine, s.mode, s.place = fill.New(s.sizes()), newMode(true), s.source.Consumer()
	from := s.position
	for done := false; !done; {
		before := s.place
		err := s.pump()
		if err == nil {
			done = s.place >= end || s.place == before && !s.full // a record that is never finished ends it too
			err = s.seal()
		}
		if err == nil {
			err = s.shipSpool(ctx) // so there is room
		}
		if err != nil {
			return h, fmt.Errorf("moving what the ring holds into the history: %w", err)
		}
		done = done && !s.full && s.builder.Records() == 0 // else what it held was distrusted: a gap is to be sealed, and behind it what was taken back
	}
	s.pending.arrived(s.previous.Sequence)
	s.uncleared = s.uncleared[:0] // of the old tap, which goes
	s.log.Info("what a tap held of disks that are gone or changed is in the history", "group", s.cfg.Name, "from", uint64(from), "to", uint64(s.position))
	return s.history(ctx)
}

// decideStranded gives a group whose disks are not all here the verdicts that are
// decided: where a disk is gone for good its bookmarks are what is left of it.
func (s *session) decideStranded(ctx context.Context) error {
	if !s.ledger.decides(s.cfg.ID) {
		return nil
	}
	h, err := s.history(ctx)
	if err != nil || h == nil {
		return err
	}
	s.carry(h)
	s.takeOverMarks(undecided(h))
	if err := s.appendVerdicts(); err != nil || s.builder.Records() == 0 {
		return err
	}
	state := h.Last().State // nothing else is known that was not
	state.Time = s.lastTime
	sealed, err := s.builder.Seal(s.header(), state)
	if err != nil {
		return err
	}
	if err := s.spool.Append(sealed); err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	s.previous = sealed.Summary
	s.builder.Reset()
	s.settleMarks()
	return s.shipSpool(ctx)
}

// undecided are the prepared marks of a history that no verdict follows.
func undecided(h *timeline.History) (out []pendingMark) {
	for _, m := range h.Undecided() {
		out = append(out, pendingMark{m.Bookmark, m.Position, m.Time})
	}
	return out
}

// sizes are the disks as the engine wants them.
func (s *session) sizes() []fill.Disk {
	var disks []fill.Disk
	for _, d := range s.cfg.Disks {
		disks = append(disks, fill.Disk{Size: d.Size, BlockSize: d.BlockSize})
	}
	return disks
}
