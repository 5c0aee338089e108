package protect

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// Ledger holds the marks that were prepared in several groups and wait for a
// verdict, one for all of them.
//
//	prepare ─▶ prepared ──commit──▶ committing ─▶ committed
//	    │          │                 the intent is stable; it is decided
//	    └──────────┴──revoke, time over, a group went away──▶ revoked
//
// The verdict is what the state folder says: a commit is an intent, a file of its
// own that is stable before the first group's stream gets its verdict. So a daemon
// that was killed in the middle goes on: a mark in a group's history without a
// verdict is committed where there is an intent for it, and revoked where there is
// none. An intent goes when all its groups have the verdict in their spools. A
// session asks under the same lock under which intents are made, so none decides
// otherwise than its commit.
//
// All methods may be called concurrently.
type Ledger struct {
	dir  string
	step func(string)  // told before each step of a mark; tests end the process there, or slow it
	one  chan struct{} // whoever chooses an instant

	mu      sync.Mutex
	pending map[string]*pending
	intents map[string]*intent
	past    []outcome // of the newest marks, oldest first
}

// pending is a mark over several groups without a verdict.
type pending struct {
	Prepared
	members []member
	phase   string // preparing, prepared, committing, revoking
	doomed  error  // why it cannot be committed any more
	bound   *time.Timer
	over    chan struct{} // closed when it is no longer pending
}

// member is one group of it.
type member struct {
	group   *Group
	session *session
	mark    *mark
}

// outcome is what became of a mark.
type outcome struct {
	Prepared
	committed bool
	why       string
}

// pastMax is how many outcomes are remembered.
const pastMax = 256

// OpenLedger reads the intents in a state folder. Those that are damaged are told,
// and are none: the marks that they decided are revoked where they have no verdict yet.
func OpenLedger(stateDir string, step func(string)) (*Ledger, []error, error) {
	l := &Ledger{dir: filepath.Join(stateDir, "marks"), step: step, one: make(chan struct{}, 1), pending: map[string]*pending{}, intents: map[string]*intent{}}
	if l.step == nil {
		l.step = func(string) {}
	}
	files, err := os.ReadDir(l.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, err
	}
	var damaged []error
	for _, f := range files {
		if !strings.HasSuffix(f.Name(), intentSuffix) {
			continue // half of one: it was never stable
		}
		i, err := readIntent(filepath.Join(l.dir, f.Name()))
		if err != nil {
			damaged = append(damaged, err)
			continue
		}
		l.intents[i.Name] = i
	}
	return l, damaged, nil
}

// reserve takes a name for a mark that is about to be prepared.
func (l *Ledger) reserve(r MarkRequest) (*pending, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.pending[r.Name] != nil || l.intents[r.Name] != nil {
		return nil, fmt.Errorf("a mark %q waits for its verdict: %w", r.Name, ErrBookmarkExists)
	}
	p := &pending{Prepared: Prepared{Name: r.Name, Consistency: r.Consistency}, phase: "preparing", over: make(chan struct{})}
	l.pending[r.Name] = p
	return p, nil
}

// end takes a mark off the list of those that wait; l.mu is held.
func (l *Ledger) end(p *pending, o outcome) {
	if p.bound != nil {
		p.bound.Stop()
	}
	delete(l.pending, p.Name)
	close(p.over)
	o.Prepared = p.Prepared
	l.past = append(l.past, o)
	if len(l.past) > pastMax {
		l.past = l.past[1:]
	}
}

// Pending lists the marks that wait for a verdict, by name.
func (l *Ledger) Pending() []Prepared {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := []Prepared{}
	for _, p := range l.pending {
		if p.phase != "preparing" {
			out = append(out, p.Prepared)
		}
	}
	slices.SortFunc(out, func(a, b Prepared) int { return strings.Compare(a.Name, b.Name) })
	return out
}

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

func (l *Ledger) pastOf(name string) *outcome {
	for i := range slices.Backward(l.past) {
		if l.past[i].Name == name {
			return &l.past[i]
		}
	}
	return nil
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

// release ends what the groups' marks wait for, before one of them is unprotected.
func (l *Ledger) release(ctx context.Context, g *Group) error {
	if l == nil {
		return nil
	}
	for {
		l.mu.Lock()
		var held *pending
		for _, p := range l.pending {
			if slices.ContainsFunc(p.members, func(m member) bool { return m.group == g }) {
				held = p
			}
		}
		l.mu.Unlock()
		if held == nil {
			return nil
		}
		if !l.revoke(ctx, held, "the group "+g.cfg.Name+" was unprotected") {
			select {
			case <-held.over:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
}
