package live

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/stream"
	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
	"tidemark/internal/timeline"
	"tidemark/internal/vault"
)

// marked is the counter of order over two groups of one disk each: what a write
// of one group saw complete in the other has to be in the mark of that one too.
type marked struct {
	*order
	groups [2]string
}

// markedAhead is how many steps the counter may go on by while a mark is put.
const markedAhead = 2000

// newMarked protects the counter's disks as two groups. With served the second is a
// device that the daemon serves.
func newMarked(t *testing.T, rng *rand.Rand, served bool, args ...string) *marked {
	testkit.Need(t, "root", "tap", "loop")
	o := &order{t: t, rng: rng, c: &counter{seed: rng.Uint64(), buf: aligned(t, slotBytes)}, noiseMax: 8 << 10}
	m := &marked{order: o, groups: [2]string{"ga", "gb"}}
	for i := range o.c.disks {
		if served && i == 1 {
			continue
		}
		path := testkit.NewDisk(t, orderDisk).Path
		fewRequests(t, path)
		o.c.disks[i] = open(t, path, unix.O_DIRECT)
		o.noise = append(o.noise, noise{open(t, path, unix.O_DIRECT), noiseStart, noiseEnd})
	}
	o.d = program.New(t, args...)
	o.d.Kill()
	o.d.Steps("slow@stood", "slow@telling")
	o.d.Start()
	if served {
		backing := filepath.Join(o.d.Dir, "backing")
		if err := os.WriteFile(backing, make([]byte, orderDisk), 0o600); err != nil {
			t.Fatal(err)
		}
		e := serve(t, o.d, "served", backing)
		o.c.disks[1] = e
		o.noise = append(o.noise, noise{&export{name: e.name, uri: e.uri, stop: e.stop}, noiseStart, noiseEnd})
	}
	for i, g := range m.groups {
		o.d.Protect(g, o.c.disks[i].Name())
	}
	return m
}

// at is a group's disk at a bookmark, straight from the vault.
func (m *marked) at(group, bookmark string) []byte {
	m.t.Helper()
	v, err := vault.Open(m.t.Context(), m.d.Vault)
	if err != nil {
		m.t.Fatal(err)
	}
	h, err := timeline.Load(m.t.Context(), v, group)
	if err != nil {
		m.t.Fatal(err)
	}
	p, err := h.Resolve(stream.Spec{Bookmark: bookmark})
	if err != nil {
		m.t.Fatal(err)
	}
	view, err := h.View(m.t.Context(), 0, p.Position)
	if err != nil {
		m.t.Fatal(err)
	}
	defer view.Close()
	b := make([]byte, noiseStart)
	if _, err := view.ReadAt(b, 0); err != nil {
		m.t.Fatal(err)
	}
	return b
}

// obeysMark holds a mark of both groups to the order in which the counter wrote.
func (m *marked) obeysMark(name string) {
	m.t.Helper()
	var n [2]uint64
	for i, g := range m.groups {
		var err error
		if n[i], err = m.c.newest(i, m.at(g, name)); err != nil {
			m.t.Fatalf("%s in %s: %v", name, g, err)
		}
	}
	var want uint64
	if _, err := fmt.Sscanf(name, "at-%d", &want); err != nil {
		m.t.Fatal(err)
	}
	if n[0] < want || n[1] < want || n[1] != n[0] && n[1]+1 != n[0] {
		m.t.Errorf("%s: group %s has number %d and group %s number %d", name, m.groups[0], n[0], m.groups[1], n[1])
	}
}

// bookmarks are those that a group offers.
func (m *marked) bookmarks(group string) (names []string) {
	m.t.Helper()
	for _, p := range m.d.Points(group) {
		if p.Bookmark != "" {
			names = append(names, p.Bookmark)
		}
	}
	return names
}

// both says which bookmarks the groups offer, and that it is the same ones.
func (m *marked) both() []string {
	m.t.Helper()
	for _, g := range m.groups {
		m.d.Settle(g)
	}
	a, b := m.bookmarks(m.groups[0]), m.bookmarks(m.groups[1])
	slices.Sort(a)
	slices.Sort(b)
	if !slices.Equal(a, b) {
		m.t.Fatalf("group %s offers %q, group %s %q", m.groups[0], a, m.groups[1], b)
	}
	return a
}

// cuts puts many marks over both groups while the counter runs, and checks them.
func (m *marked) cuts(n int, args ...string) {
	m.t.Helper()
	var names []string
	m.write(func() {
		for range n {
			m.counted(1 + m.rng.Uint64N(60))
			m.limit.Store(m.c.n.Load() + markedAhead) // it must not come to rest while the mark is put
			name := fmt.Sprintf("at-%d", m.c.n.Load())
			if slices.Contains(names, name) {
				continue
			}
			m.d.Run(append([]string{"bookmark", m.groups[0], m.groups[1], name}, args...)...)
			names = append(names, name)
		}
	})
	have := m.both()
	for _, name := range names {
		if !slices.Contains(have, name) {
			m.t.Fatalf("put were %q, offered are %q", names, have)
		}
	}
	for _, name := range names {
		m.obeysMark(name)
	}
	for _, g := range m.groups {
		m.d.Run("verify", "--vault", m.d.Vault, g)
	}
}

// TestCutOverTappedGroups: one bookmark over two tapped groups is one cut through
// the order in which writes completed and were submitted, with nobody held.
func TestCutOverTappedGroups(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) { newMarked(t, rng, false).cuts(10) })
}

// TestCutOverTappedAndServed: the same with one group of a served device, whose
// writes are held for it, or only cut.
func TestCutOverTappedAndServed(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		m := newMarked(t, rng, true)
		m.cuts(5)
		m.cuts(5, "--barrier", "cut")
	})
}

// marksJSON are the fields of a bookmark over groups that tests look at.
type marksJSON struct {
	Bookmark string
	State    string
	Groups   []struct {
		Group    string
		Position uint64
		Barrier  string
	}
}

func (m *marked) json(args ...string) (out marksJSON) {
	m.t.Helper()
	text := m.d.Run(append(args, "--json")...)
	if err := json.Unmarshal([]byte(text), &out); err != nil {
		m.t.Fatalf("%v in %s", err, text)
	}
	return out
}

// TestTwoPhases: a prepared mark is no point before its commit, is one in all
// groups after it, and none after a revocation, the end of its time, or a restart.
func TestTwoPhases(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		m := newMarked(t, rng, true)
		a, b := m.groups[0], m.groups[1]
		prepare := func(name string, args ...string) {
			t.Helper()
			m.d.Run(append([]string{"bookmark", "--prepare", a, b, name}, args...)...)
		}
		is := m.json("bookmark", "--prepare", a, b, "kept")
		if is.State != "prepared" || len(is.Groups) != 2 || is.Groups[0].Barrier != "cut" || is.Groups[1].Barrier != "held" {
			t.Errorf("prepared: %+v", is)
		}
		if have := m.both(); len(have) > 0 {
			t.Errorf("offered before its commit: %q", have)
		}
		m.d.Refused(exitNotFound, "restore", "--vault", m.d.Vault, a, "--at", "kept", "--to", m.d.Dir+"/never")
		if text := m.d.Run("bookmark", "--pending"); !strings.Contains(text, "kept") {
			t.Errorf("pending: %s", text)
		}
		for range 2 { // who asks again gets the same answer
			if is := m.json("bookmark", "--commit", "kept"); is.State != "committed" {
				t.Errorf("committed: %+v", is)
			}
		}
		m.d.Refused(exitRefused, "bookmark", "--revoke", "kept")
		if have := m.both(); !slices.Equal(have, []string{"kept"}) {
			t.Errorf("after the commit: %q", have)
		}

		prepare("taken-back")
		m.d.Refused(exitInUse, "bookmark", a, "taken-back") // its name is taken until its verdict
		m.d.Run("bookmark", "--revoke", "taken-back")
		m.d.Refused(exitRefused, "bookmark", "--commit", "taken-back")
		prepare("too-late", "--timeout", "100ms")
		program.Eventually(t, time.Minute, "it is revoked by itself", func() error {
			if text := m.d.Run("bookmark", "--pending"); strings.Contains(text, "too-late") {
				return program.ErrNotYet
			}
			return nil
		})
		if text := m.d.Refused(exitRefused, "bookmark", "--commit", "too-late"); !strings.Contains(text, "100ms") {
			t.Errorf("committing too late: %s", text)
		}
		prepare("forgotten")
		m.d.Restart()
		for _, g := range m.groups {
			m.d.Await(g, "taken over", online)
		}
		m.d.Refused(exitNotFound, "bookmark", "--commit", "forgotten")
		if have := m.both(); !slices.Equal(have, []string{"kept"}) {
			t.Errorf("after revocations: %q", have)
		}
		for _, name := range []string{"taken-back", "too-late", "forgotten"} {
			m.d.Run("bookmark", a, b, name) // what was revoked never was
		}
		if have := m.both(); len(have) != 4 {
			t.Errorf("names that were revoked: %q", have)
		}
		m.refusals()
	})
}

// refusals are what leaves nothing behind.
func (m *marked) refusals() {
	m.t.Helper()
	a, b := m.groups[0], m.groups[1]
	before := m.both()
	for _, c := range []struct {
		exit int
		args []string
	}{
		{exitInUse, []string{a, b, "kept"}},
		{exitUsage, []string{a, a, "twice"}},
		{exitUsage, []string{a, b, "seq:5"}},
		{exitUsage, []string{a, b, "x", "--timeout", "5s"}},
		{exitUsage, []string{a, b, "x", "--prepare", "--timeout", "2h"}},
		{exitUsage, []string{a, b, "x", "--prepare", "--commit", "x"}},
		{exitUsage, []string{a, b, "x", "--barrier", "high"}},
		{exitNotFound, []string{a, "nobody", "x"}},
		{exitNotFound, []string{"--revoke", "x"}},
		{exitRefused, []string{a, b, "x", "--barrier", "held"}},            // one is tapped
		{exitRefused, []string{a, b, "x", "--consistency", "filesystem"}},  // NBD clients' file systems cannot be frozen
		{exitRefused, []string{a, b, "x", "--consistency", "application"}}, // no hooks
		{exitUsage, []string{a}},
	} {
		m.d.Refused(c.exit, append([]string{"bookmark"}, c.args...)...)
	}
	if have := m.both(); !slices.Equal(have, before) {
		m.t.Errorf("refused bookmarks left %q, before there were %q", have, before)
	}
	m.d.Run("bookmark", "--prepare", a, b, "x")
	m.d.Run("unprotect", b)
	m.d.Refused(exitRefused, "bookmark", "--commit", "x") // one of its groups is gone
	m.d.Settle(a)
	if slices.Contains(m.bookmarks(a), "x") || slices.Contains(m.bookmarks(b), "x") {
		m.t.Error("a mark over a group that was unprotected is offered")
	}
}

// TestKilledBetweenVerdicts: the daemon is killed before each step of a bookmark over
// two groups. When it is back both offer it, or neither does.
func TestKilledBetweenVerdicts(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		m := newMarked(t, rng, false)
		var want []string
		for _, step := range []struct {
			name    string
			decided bool
		}{{[]string{"stood", "telling"}[rng.IntN(2)], false}, {"one-prepared", false}, {"prepared", false}, {"before-intent", false}, {"intent", true}, {"one-verdict", true}} {
			name := "killed-at-" + step.name
			m.d.Kill()
			m.d.Steps("kill@" + step.name)
			m.d.Start()
			for _, g := range m.groups {
				m.d.Await(g, "taken over", online)
			}
			if _, err := m.d.Verb("bookmark", m.groups[0], m.groups[1], name); err == nil {
				t.Fatalf("%s: the daemon was not killed", step.name)
			}
			m.d.Ended()
			m.d.Steps()
			m.d.Start()
			if step.decided {
				want = append(want, name)
			}
			slices.Sort(want)
			var have []string
			program.Eventually(t, time.Minute, "both have their verdicts", func() error {
				if have = m.both(); !slices.Equal(have, want) {
					return fmt.Errorf("killed at %s they offer %q, want %q", step.name, have, want)
				}
				return nil
			})
			if files, _ := filepath.Glob(filepath.Join(m.d.State, "marks", "*")); len(files) > 0 {
				t.Errorf("killed at %s: what was decided is still noted: %q", step.name, files)
			}
			if !step.decided {
				m.d.Run("bookmark", m.groups[0], m.groups[1], name) // it never was
				want = append(want, name)
			}
		}
		for _, g := range m.groups {
			m.d.Run("verify", "--vault", m.d.Vault, g)
		}
	})
}
