package protect

import (
	"context"
	"errors"
	"fmt"

	"tidemark/internal/fill"
	"tidemark/internal/tap"
	"tidemark/internal/timeline"
)

// salvagePinned salvages the pinned tap of a group whose disks are not all
// here. It costs next to nothing where the ring is empty: the group tries again
// every few seconds.
func (s *session) salvagePinned(ctx context.Context, env *Env) error {
	waits, err := tap.Waiting(env.Instance, s.cfg.Name)
	if err != nil || waits == 0 {
		return nil // no tap, or none that can be read: what became of it is seen when the disks are back
	}
	h, err := s.history(ctx)
	if err != nil {
		return err
	}
	if s.tap, err = tap.Adopt(env.Instance, s.cfg.Name); err != nil {
		return nil
	}
	_, err = s.salvage(ctx, h)
	return errors.Join(err, s.tap.Close())
}

// salvage moves what the ring of s.tap holds into the history, and gives that as
// it is then. It is for a tap whose disks are gone, or are not what they were:
// what they wrote before is history all the same.
func (s *session) salvage(ctx context.Context, h *timeline.History) (*timeline.History, error) {
	if h == nil || !s.continues(h) {
		return h, nil
	}
	end := s.tap.Producer()
	s.carry(h)
	s.engine, s.mode, s.place = fill.New(s.sizes()), newMode(true), s.tap.Consumer()
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
		done = done && !s.full
	}
	s.pending.arrived(s.previous.Sequence)
	s.uncleared = s.uncleared[:0] // of the old tap, which goes
	s.log.Info("what a tap held of disks that are gone or changed is in the history", "group", s.cfg.Name, "from", uint64(from), "to", uint64(s.position))
	return s.history(ctx)
}

// sizes are the disks as the engine wants them.
func (s *session) sizes() []fill.Disk {
	var disks []fill.Disk
	for _, d := range s.cfg.Disks {
		disks = append(disks, fill.Disk{Size: d.Size, BlockSize: d.BlockSize})
	}
	return disks
}
