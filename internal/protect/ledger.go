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

func (l *Ledger) pastOf(name string) *outcome {
	for i := range slices.Backward(l.past) {
		if l.past[i].Name == name {
			return &l.past[i]
		}
	}
	return nil
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
