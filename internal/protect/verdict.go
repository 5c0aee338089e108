package protect

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// Commit makes a prepared mark a bookmark in all its groups, or says why it is none
// any more. From when the intent is stable it is decided, and ErrUndelivered only says
// which group has not heard of it yet. Who asks again after a commit gets the same
// answer. Errors: ErrNoMark, ErrRevoked, ErrInUse, ErrUndelivered.
func (l *Ledger) Commit(ctx context.Context, name string) (Prepared, error) {
	l.mu.Lock()
	p, err := l.take(name)
	if err == nil && p == nil { // committed before
		defer l.mu.Unlock()
		return l.pastOf(name).Prepared, nil
	}
	if err == nil {
		err = p.ready()
	}
	if p != nil && err != nil && errors.Is(err, ErrRevoked) {
		l.mu.Unlock()
		l.revoke(context.WithoutCancel(ctx), p, err.Error())
		return Prepared{}, err
	}
	if err != nil {
		l.mu.Unlock()
		return Prepared{}, err
	}
	i := &intent{Version: 1, Name: name}
	for n, m := range p.members {
		i.Groups = append(i.Groups, intentGroup{Group: m.group.cfg.Name, ID: m.group.cfg.ID, Position: p.Groups[n].Position})
	}
	l.step("before-intent")
	if err := l.write(i); err != nil {
		l.mu.Unlock()
		return Prepared{}, fmt.Errorf("bookmark %q stays prepared: the verdict cannot be made durable: %w", name, err)
	}
	l.intents[name] = i
	p.phase = "committing"
	l.mu.Unlock()
	l.step("intent")
	err = l.tellCommit(ctx, p)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.end(p, outcome{committed: true})
	for n, m := range p.members {
		m.group.stats.put(LastMark{Name: name, Time: p.Groups[n].Time, Barrier: p.Groups[n].Barrier, Held: p.Held})
	}
	return p.Prepared, err
}

// take gives a mark that waits for its verdict; nil without an error: it is
// committed. l.mu is held.
func (l *Ledger) take(name string) (*pending, error) {
	switch p := l.pending[name]; {
	case p != nil && p.phase == "prepared":
		return p, nil
	case p != nil:
		return nil, fmt.Errorf("mark %q is %s just now: %w", name, p.phase, ErrInUse)
	}
	switch o := l.pastOf(name); {
	case o == nil:
		return nil, fmt.Errorf("%q: %w: none of that name waits for a verdict", name, ErrNoMark)
	case !o.committed:
		return nil, fmt.Errorf("bookmark %q: %w: %s", name, ErrRevoked, o.why)
	}
	return nil, nil
}

// ready says whether every group still has the mark. The ledger's lock is held:
// nothing that a session does here waits for it.
func (p *pending) ready() error {
	if p.doomed != nil {
		return fmt.Errorf("bookmark %q: %w: %w", p.Name, ErrRevoked, p.doomed)
	}
	for _, m := range p.members {
		select {
		case <-m.session.over:
			return fmt.Errorf("bookmark %q: %w: group %s: %w", p.Name, ErrRevoked, m.group.cfg.Name, ErrGroupWentAway)
		default:
		}
	}
	if time.Now().After(p.Until) {
		return fmt.Errorf("bookmark %q: %w: its time is over", p.Name, ErrRevoked)
	}
	return nil
}

// tellWithin bounds how long a commit waits for the groups to have it.
const tellWithin = 30 * time.Second

// tellCommit gives every group its verdict and waits until all have it. A group that
// went away finds the intent when it is back.
func (l *Ledger) tellCommit(ctx context.Context, p *pending) error {
	ctx, cancel := context.WithTimeout(ctx, tellWithin)
	defer cancel()
	errs := make([]error, len(p.members))
	tell := func(n int) {
		if err := p.members[n].tell(ctx, true); err != nil {
			errs[n] = fmt.Errorf("bookmark %q is committed, and %w: group %s takes it when it can: %w", p.Name, ErrUndelivered, p.members[n].group.cfg.Name, err)
		}
	}
	tell(0)
	l.step("one-verdict")
	var all sync.WaitGroup
	for n := 1; n < len(p.members); n++ {
		all.Go(func() { tell(n) })
	}
	all.Wait()
	return errors.Join(errs...)
}

// tell gives a group its verdict, and waits until it is durable there.
func (m *member) tell(ctx context.Context, commit bool) error {
	var reply <-chan error
	if err := m.session.ask(ctx, func() (err error) { reply, err = m.session.decide(m.mark, commit); return err }); err != nil {
		return err
	}
	return m.session.await(ctx, reply)
}

// Revoke makes a prepared mark nothing. Errors: ErrNoMark, ErrCommitted.
func (l *Ledger) Revoke(ctx context.Context, name string) error {
	l.mu.Lock()
	p, err := l.take(name)
	l.mu.Unlock()
	switch {
	case errors.Is(err, ErrRevoked):
		return nil // as was wanted
	case err != nil:
		return err
	case p == nil:
		return fmt.Errorf("bookmark %q: %w", name, ErrCommitted)
	}
	if !l.revoke(ctx, p, "it was asked for") {
		return fmt.Errorf("mark %q is being decided just now: %w", name, ErrInUse)
	}
	return nil
}

// revokeWithin bounds how long a revocation waits for the groups: one that does not
// hear of it finds no intent, which is the same.
const revokeWithin = 10 * time.Second

// revoke tells the groups, unless it is decided otherwise by now.
func (l *Ledger) revoke(ctx context.Context, p *pending, why string) bool {
	l.mu.Lock()
	if p.phase != "prepared" && p.phase != "preparing" {
		l.mu.Unlock()
		return false
	}
	for _, m := range p.members {
		if p.phase == "prepared" {
			m.group.stats.drop()
		}
	}
	p.phase = "revoking"
	l.mu.Unlock()
	p.withdraw(ctx)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.end(p, outcome{why: why})
	return true
}

// withdraw tells all groups.
func (p *pending) withdraw(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, revokeWithin)
	defer cancel()
	var all sync.WaitGroup
	for _, m := range p.members {
		all.Go(func() { m.withdraw(ctx) })
	}
	all.Wait()
}

// withdraw takes a mark back. What cannot be told to the session is found without
// an intent by the next.
func (m *member) withdraw(ctx context.Context) {
	var reply <-chan error
	if err := m.session.ask(ctx, func() error { reply = m.session.withdraw(m.mark); return nil }); err == nil && reply != nil {
		_ = m.session.await(ctx, reply) // it goes on by itself
	}
}
