package protect

import (
	"context"
	"time"

	"tidemark/internal/source"
)

// quietEvery is how often a Quiet looks.
const quietEvery = 10 * time.Millisecond

// Quiet returns when every write that was submitted before the call has ended on
// its disk, however busy the disks are meanwhile: who reads them then sees
// all that is in the stream up to there. Until then bios in flight are tracked,
// which costs their writers under a microsecond each.
func (g *Group) Quiet(ctx context.Context) error {
	if s := g.current(); s != nil {
		return s.quiet(ctx)
	}
	return g.offlineError()
}

func (s *session) quiet(ctx context.Context) error {
	var from source.Place
	begin := func() error {
		from = s.source.Producer()
		if err := s.source.SetEnds(true); err != nil {
			return err
		}
		s.quieters++
		return nil
	}
	if err := s.ask(ctx, begin); err != nil {
		return err
	}
	defer func() { // a session that has ended meanwhile leaves it to the next one
		_ = s.ask(context.WithoutCancel(ctx), func() error { s.quieters--; return nil })
	}()
	for {
		quiet := false
		err := s.ask(ctx, func() error {
			scan, err := s.source.ScanInFlight()
			quiet = scan.OldKnownEnded && scan.Low >= from
			return err
		})
		if err != nil || quiet {
			return err
		}
		select {
		case <-time.After(quietEvery):
		case <-ctx.Done():
			return ctx.Err()
		case <-s.over:
			return ErrOffline
		}
	}
}
