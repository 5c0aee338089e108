package protect

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"tidemark/internal/freeze"
	"tidemark/internal/stream"
)

// Barrier is what is done to the writers at the instant of a mark.
type Barrier string

const (
	BarrierAuto Barrier = ""     // held for served devices, cut for tapped disks
	BarrierCut  Barrier = "cut"  // nothing: the mark lies at one place in the order of writes
	BarrierHeld Barrier = "held" // new writes wait, and those under way have ended; served devices only
)

// MarkRequest is what is to be marked, and how.
type MarkRequest struct {
	Name        string
	Consistency stream.Consistency
	Barrier     Barrier
	Within      time.Duration // from when it is prepared to its verdict; 0: DefaultWithin
}

// Bounds of MarkRequest.
const (
	DefaultWithin = time.Minute
	WithinMin     = 10 * time.Millisecond
	WithinMax     = time.Hour
	markGroupsMax = 64
)

// Prepared is a mark over several groups, at one instant.
type Prepared struct {
	Name        string
	Consistency stream.Consistency
	Until       time.Time     // when it is revoked by itself
	Held        time.Duration // how long new writes of served devices waited
	Groups      []GroupMark
}

// GroupMark is its part in one group.
type GroupMark struct {
	Group string
	Bookmarked
	Barrier Barrier
}

// holdMax bounds how long writes of served devices are held for an instant.
const holdMax = 3 * time.Second

func (r *MarkRequest) check(groups []*Group) error {
	if err := stream.CheckBookmarkName(r.Name); err != nil {
		return fmt.Errorf("%w: %w", err, ErrSettings)
	}
	r.Within = cmp.Or(r.Within, DefaultWithin)
	if r.Within < WithinMin || r.Within > WithinMax {
		return fmt.Errorf("a verdict within %s: want %s to %s: %w", r.Within, WithinMin, WithinMax, ErrSettings)
	}
	if len(groups) == 0 || len(groups) > markGroupsMax {
		return fmt.Errorf("%d groups: want 1 to %d: %w", len(groups), markGroupsMax, ErrSettings)
	}
	switch r.Barrier {
	case BarrierAuto, BarrierCut, BarrierHeld:
	default:
		return fmt.Errorf("barrier %q: want %s or %s: %w", r.Barrier, BarrierCut, BarrierHeld, ErrSettings)
	}
	for n, g := range groups {
		if slices.Contains(groups[:n], g) {
			return fmt.Errorf("group %s is named twice: %w", g.cfg.Name, ErrSettings)
		}
		if r.Barrier == BarrierHeld && !g.cfg.Served() {
			return fmt.Errorf("the writes of group %s, which is tapped, cannot be held: %w", g.cfg.Name, ErrBarrier)
		}
	}
	return nil
}

// Prepare puts a mark over groups at one instant, durable in the spools of all of
// them, and waits for its verdict until r.Within is over. Where it fails for one it
// is revoked in all. Errors are those of Group.Bookmark, and ErrBarrier.
func (l *Ledger) Prepare(ctx context.Context, groups []*Group, r MarkRequest) (Prepared, error) {
	if err := r.check(groups); err != nil {
		return Prepared{}, err
	}
	p, err := l.reserve(r)
	if err != nil {
		for _, g := range groups {
			g.stats.refuse()
		}
		return Prepared{}, err
	}
	err = p.prepare(ctx, l, groups, r)
	l.mu.Lock()
	if err == nil && p.phase != "preparing" {
		err = fmt.Errorf("bookmark %q: %w", r.Name, ErrRevoked)
	}
	if err == nil {
		defer l.mu.Unlock()
		p.phase, p.Until = "prepared", time.Now().Add(r.Within)
		p.bound = time.AfterFunc(r.Within, func() { l.revoke(context.Background(), p, "its time of "+r.Within.String()+" was over") })
		return p.Prepared, nil
	}
	l.mu.Unlock()
	for _, g := range groups {
		g.stats.refuse()
	}
	if ctx = context.WithoutCancel(ctx); !l.revoke(ctx, p, "it could not be prepared") {
		p.withdraw(ctx) // it was revoked while it was prepared
	}
	return Prepared{}, err
}

// Bookmark prepares and commits: a bookmark over groups, in all of them or in none.
func (l *Ledger) Bookmark(ctx context.Context, groups []*Group, r MarkRequest) (Prepared, error) {
	if _, err := l.Prepare(ctx, groups, r); err != nil {
		return Prepared{}, err
	}
	l.step("prepared")
	return l.Commit(ctx, r.Name)
}

// prepare finds the sessions, has everything stand as was asked, and marks the instant.
func (p *pending) prepare(ctx context.Context, l *Ledger, groups []*Group, r MarkRequest) error {
	members := make([]member, len(groups))
	for n, g := range groups {
		s := g.current()
		if s == nil {
			return g.offlineError()
		}
		members[n] = member{g, s, &mark{name: r.Name, want: r.Consistency}}
		if err := s.ask(ctx, func() error { return s.checkMark(r.Name) }); err != nil { // before anybody is disturbed
			return err
		}
	}
	l.mu.Lock()
	if p.phase != "preparing" {
		members = nil
	}
	p.members = members
	l.mu.Unlock()
	if members == nil {
		return fmt.Errorf("bookmark %q: %w", r.Name, ErrRevoked)
	}
	select { // one instant after the other: freezes and barriers do not share
	case l.one <- struct{}{}:
		defer func() { <-l.one }()
	case <-ctx.Done():
		return ctx.Err()
	}
	thaw, err := p.freeze(ctx, r.Consistency)
	if err != nil {
		return err
	}
	kinds, err := p.instant(ctx, l, r)
	if failed := thaw(); err != nil || failed != nil {
		return errors.Join(err, failed)
	}
	var groupMarks []GroupMark
	for n, m := range p.members {
		if err := m.session.await(ctx, m.mark.reply); err != nil {
			return err
		}
		groupMarks = append(groupMarks, GroupMark{Group: m.group.cfg.Name, Bookmarked: m.mark.where, Barrier: kinds[n]})
		if n == 0 {
			l.step("one-prepared")
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	p.Groups = groupMarks
	return p.doomed
}

// freeze holds the file systems of all groups still, under one watchdog. thaw says
// whether they were so from the instant on until it was called.
func (p *pending) freeze(ctx context.Context, want stream.Consistency) (thaw func() error, err error) {
	if want == stream.Crash {
		return func() error { return nil }, nil
	}
	var r freeze.Request
	for _, m := range p.members {
		one, err := m.session.freezeRequest(want)
		if err != nil {
			return nil, err
		}
		r.Mounts, r.Own = append(r.Mounts, one.Mounts...), append(r.Own, one.Own...)
		if one.HookDir != "" && !slices.Contains(r.MoreHooks, one.HookDir) {
			r.MoreHooks = append(r.MoreHooks, one.HookDir)
		}
	}
	frozen, err := freeze.Freeze(ctx, r)
	if err != nil {
		return nil, err
	}
	return func() (err error) {
		if !frozen.Still() {
			err = freeze.ErrNotHeld
		}
		for _, dir := range r.MoreHooks {
			if want == stream.Application && frozen.HooksIn(dir) == 0 {
				err = errors.Join(err, fmt.Errorf("no hook ran from %s: %w", dir, ErrNoHooks))
			}
		}
		if err = errors.Join(err, frozen.Thaw()); err != nil {
			return fmt.Errorf("bookmark %q is not %s-consistent and was not put: %w", p.Name, want, err)
		}
		return nil
	}, nil
}

// instant has all walks over the rings stand still, holds the writes of served
// devices, chooses the instant, lets the writes go, and tells the sessions.
func (p *pending) instant(ctx context.Context, l *Ledger, r MarkRequest) (kinds []Barrier, err error) {
	if err := p.each(func(m *member) error {
		return m.session.ask(ctx, func() error { return m.session.stand(m.mark) })
	}); err != nil {
		return nil, err
	}
	began := time.Now()
	release, kinds, err := p.hold(ctx, r.Barrier)
	if err != nil {
		return nil, err
	}
	l.step("stood")
	at, err := monotonic()
	err = errors.Join(err, release())
	if slices.Contains(kinds, BarrierHeld) {
		p.Held = time.Since(began)
	}
	if err != nil {
		return nil, err
	}
	return kinds, p.each(func(m *member) error {
		l.step("telling")
		return m.session.ask(ctx, func() error { return m.session.cutAt(m.mark, at) })
	})
}

// hold raises a barrier over the served devices of all groups, where it is wanted.
func (p *pending) hold(ctx context.Context, wanted Barrier) (release func() error, kinds []Barrier, err error) {
	var devices []string
	var served Served
	for _, m := range p.members {
		if !m.group.cfg.Served() || wanted == BarrierCut {
			kinds = append(kinds, BarrierCut)
			continue
		}
		kinds, served = append(kinds, BarrierHeld), m.group.env.Served
		for _, d := range m.group.cfg.Disks {
			devices = append(devices, d.Served)
		}
	}
	if len(devices) == 0 {
		return func() error { return nil }, kinds, nil
	}
	release, err = served.Hold(ctx, holdMax, devices)
	return release, kinds, err
}

// each does something for all groups at once.
func (p *pending) each(do func(m *member) error) error {
	errs := make([]error, len(p.members))
	var all sync.WaitGroup
	for n := range p.members {
		all.Go(func() { errs[n] = do(&p.members[n]) })
	}
	all.Wait()
	return errors.Join(errs...)
}
