package protect

import (
	"context"
	"errors"
	"fmt"
	"time"

	"tidemark/internal/freeze"
	"tidemark/internal/source"
	"tidemark/internal/spool"
	"tidemark/internal/stream"
)

// Bookmarked says where a bookmark came to lie.
type Bookmarked struct {
	Position stream.Position
	Time     time.Time
}

// waiter is somebody who waits for a bookmark to be read from the ring and made durable.
type waiter struct {
	name    string
	want    stream.Consistency
	reply   chan error
	at      Bookmarked
	token   uint64
	taken   bool
	verdict chan bool // a consistent bookmark counts only if the freeze held until the mark
}

// takeBookmark gives a bookmark its position, or lets it go where it did not get
// what was asked of it.
func (s *session) takeBookmark(r *source.Record) error {
	w := s.waiters[r.Token]
	if w != nil && w.name != r.Name {
		w = nil // an earlier daemon's, that had the same token
	}
	if s.salvaging {
		return nil
	}
	if r.Consistency != stream.Crash {
		if w == nil {
			return nil // its daemon died before it knew whether the freeze held
		}
		select {
		case held := <-w.verdict:
			if !held {
				return nil // who asked for it knows why
			}
			w.verdict <- true // for the case that this record is read once more
		default:
			s.held = true
			return errStop
		}
	}
	if s.gapOpen {
		s.answer(w, fmt.Errorf("bookmark %q fell into an open gap: %w", r.Name, ErrInsideGap))
		return nil
	}
	if s.names[r.Name] { // also where nobody waits: of two that a daemon's death left in the ring, one counts
		s.answer(w, fmt.Errorf("bookmark %q: %w", r.Name, ErrBookmarkExists))
		return nil
	}
	s.position++
	s.names[r.Name] = true
	s.unsealed = append(s.unsealed, r.Name)
	rec := stream.Record{Kind: stream.KindBookmark, Position: s.position, Time: s.stamp(r.MonoTime), Name: r.Name, Consistency: r.Consistency}
	if err := s.append(&rec); err != nil {
		return err
	}
	if w != nil {
		w.at = Bookmarked{Position: s.position, Time: time.Unix(0, rec.Time)}
		w.taken = true
		s.urgent = true
	}
	return nil
}

func (s *session) answer(w *waiter, err error) {
	if w == nil {
		return
	}
	delete(s.waiters, w.token)
	w.reply <- err // has room
}

// settleBookmarks answers those whose bookmarks have just become durable or,
// with an error, everybody.
func (s *session) settleBookmarks(err error) {
	for _, w := range s.waiters {
		if w.taken || err != nil {
			s.answer(w, err)
		}
	}
}

// Bookmark puts a bookmark over all disks of the group and returns when it is
// durable on this machine. Errors: ErrInsideGap, ErrBookmarkExists, ErrOffline,
// source.ErrFull, spool.ErrFull, and those of the freeze.
func (g *Group) Bookmark(ctx context.Context, name string, want stream.Consistency) (Bookmarked, error) {
	at, err := g.bookmark(ctx, name, want)
	if err != nil {
		g.stats.refuse()
	} else {
		g.stats.put(LastMark{Name: name, Time: at.Time, Barrier: BarrierCut})
	}
	return at, err
}

func (g *Group) bookmark(ctx context.Context, name string, want stream.Consistency) (Bookmarked, error) {
	if err := stream.CheckBookmarkName(name); err != nil {
		return Bookmarked{}, fmt.Errorf("%w: %w", err, ErrSettings)
	}
	s := g.current()
	if s == nil {
		return Bookmarked{}, g.offlineError()
	}
	w := &waiter{name: name, want: want, reply: make(chan error, 1), verdict: make(chan bool, 1)}
	if err := s.ask(ctx, func() error { return s.admit(w) }); err != nil {
		return Bookmarked{}, err
	}
	if err := s.mark(ctx, w); err != nil {
		_ = s.ask(context.WithoutCancel(ctx), func() error { delete(s.waiters, w.token); return nil })
		return Bookmarked{}, err
	}
	select {
	case err := <-w.reply:
		return w.at, err
	case <-s.over:
		return Bookmarked{}, fmt.Errorf("the group stopped before bookmark %q was durable: %w", name, ErrOffline)
	case <-ctx.Done():
		return Bookmarked{}, ctx.Err()
	}
}

// admit refuses early what is bound to fail, and registers the waiter.
func (s *session) admit(w *waiter) error {
	if err := s.pump(); err != nil {
		return err
	}
	if s.gapOpen {
		return fmt.Errorf("group %s has an open gap since position %d: %w", s.cfg.Name, s.gapSince, ErrInsideGap)
	}
	if s.names[w.name] {
		return fmt.Errorf("bookmark %q: %w", w.name, ErrBookmarkExists)
	}
	if s.full { // it would wait for as long as that lasts, and may get lost
		return fmt.Errorf("group %s: %w: a bookmark cannot be made durable", s.cfg.Name, spool.ErrFull)
	}
	s.tokens++
	w.token = s.tokens
	s.waiters[w.token] = w
	return nil
}

// mark puts the bookmark into the ring, inside a freeze where one is wanted.
func (s *session) mark(ctx context.Context, w *waiter) error {
	m := source.Mark{Name: w.name, Consistency: w.want, Token: w.token}
	if w.want == stream.Crash {
		_, err := s.source.Bookmark(m)
		return err
	}
	frozen, err := s.freeze(ctx, w.want)
	if err != nil {
		w.verdict <- false
		return err
	}
	_, err = s.source.Bookmark(m)
	if err == nil && !frozen.Still() {
		err = freeze.ErrNotHeld
	}
	if err == nil && w.want == stream.Application && frozen.Hooks() == 0 {
		err = fmt.Errorf("no hook ran from %s: %w", s.settings.HookDir, ErrNoHooks)
	}
	err = errors.Join(err, frozen.Thaw())
	w.verdict <- err == nil
	if err != nil {
		return fmt.Errorf("bookmark %q is not %s-consistent and was not put: %w", w.name, w.want, err)
	}
	return nil
}

// freeze holds every mounted file system of the group's disks still.
func (s *session) freeze(ctx context.Context, want stream.Consistency) (*freeze.Frozen, error) {
	r, err := s.freezeRequest(want)
	if err != nil {
		return nil, err
	}
	return freeze.Freeze(ctx, r)
}

// freezeRequest is what to freeze for it. It may be called concurrently.
func (s *session) freezeRequest(want stream.Consistency) (r freeze.Request, err error) {
	if want == stream.Application && s.settings.HookDir == "" {
		return r, fmt.Errorf("group %s has no folder of hooks (protect --hook-dir): %w", s.cfg.Name, ErrNoHooks)
	}
	r = freeze.Request{HookDir: s.settings.HookDir, Own: []string{s.stateDir, vaultFolder(s.cfg.Vault)}}
	for _, d := range s.disks {
		points, err := d.mounts()
		if err != nil {
			return r, err
		}
		r.Mounts = append(r.Mounts, points...)
	}
	return r, nil
}
