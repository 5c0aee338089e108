package protect

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"tidemark/internal/block"
	"tidemark/internal/health"
	"tidemark/internal/segment"
	"tidemark/internal/source"
	"tidemark/internal/spool"
	"tidemark/internal/stream"
)

// rung is a source of records that a test puts there: places are their numbers.
type rung struct {
	source.Source
	records []source.Record
	drops   uint64
}

func (r *rung) Producer() source.Place { return source.Place(len(r.records)) }
func (r *rung) Drops() uint64          { return r.drops }
func (r *rung) Identity() [16]byte     { return [16]byte{1} }

func (r *rung) Read(from source.Place, fn func(*source.Record) error) (source.Place, error) {
	for ; from < r.Producer(); from++ {
		one := r.records[from]
		one.Place, one.End = from, from+1
		if err := fn(&one); err != nil {
			return from, err
		}
	}
	return from, nil
}

// writes puts a write into the ring for each time.
func (r *rung) writes(times ...int64) {
	for _, at := range times {
		r.records = append(r.records, source.Record{Kind: source.Write, Op: block.OpZeroes, Range: block.Range{Len: 512}, MonoTime: at})
	}
}

func standingOver(r *rung) *session {
	s := bookmarking()
	s.source, s.settled, s.health = r, 1, &health.Set{}
	s.settings.SegmentBytes = segmentMax
	s.previous = segment.Summary{State: segment.State{Settled: 1, Source: segment.Source{Ring: r.Identity()}}}
	return s
}

func (s *session) standFor(t *testing.T, name string) *mark {
	t.Helper()
	m := &mark{name: name}
	if err := s.stand(m); err != nil {
		t.Fatal(err)
	}
	return m
}

// TestCutAtAnInstant: a mark lies before the first record with a later time, also
// where records with earlier ones lie behind that, and at the producer's place
// where there is none. Before the instant is known nothing is taken.
func TestCutAtAnInstant(t *testing.T) {
	for _, c := range []struct {
		before, after []int64 // in the ring when the instant was told, and put later
		want          stream.Position
	}{
		{[]int64{10, 20, 30}, nil, 4},
		{[]int64{10, 60, 20, 70}, nil, 2}, // 20 waited for its place
		{[]int64{60}, nil, 1},
		{[]int64{10, 50}, []int64{51}, 3}, // at the very instant is before it
		{nil, []int64{20, 30}, 3},         // had their times before it and their places after it
	} {
		r := &rung{}
		s := standingOver(r)
		m := s.standFor(t, "noon")
		r.writes(c.before...)
		if err := s.pump(); err != nil || s.position != 0 {
			t.Fatalf("%v: while it stands still it took %d, %v", c, s.position, err)
		}
		if err := s.cutAt(m, 50); err != nil {
			t.Fatal(err)
		}
		r.writes(c.after...)
		if err := s.pump(); err != nil || m.phase != placed || m.where.Position != c.want {
			t.Errorf("%v: position %d in phase %d, %v: want %d", c, m.where.Position, m.phase, err, c.want)
		}
		if want := stream.Position(len(r.records) + 1); s.position != want || s.place != r.Producer() {
			t.Errorf("%v: %d positions up to place %d", c, s.position, s.place)
		}
	}
}

// TestCutReadOnceMore: what was taken back is cut again at the same place, and a
// verdict that was taken back is given again.
func TestCutReadOnceMore(t *testing.T) {
	r := &rung{}
	s := standingOver(r)
	earlier := &mark{name: "earlier", phase: decided, commit: true, where: Bookmarked{Position: 7}}
	m := s.standFor(t, "noon")
	s.marks = append([]*mark{earlier}, s.marks...)
	r.writes(10, 60)
	if err := errors.Join(s.cutAt(m, 50), s.pump()); err != nil || m.where.Position != 2 {
		t.Fatalf("position %d, %v", m.where.Position, err)
	}
	s.rewind()
	if m.phase != cutting || earlier.phase != deciding || s.position != 0 || !s.names["noon"] {
		t.Fatalf("taken back: phases %d and %d, position %d", m.phase, earlier.phase, s.position)
	}
	if err := errors.Join(s.pump(), s.appendVerdicts()); err != nil || m.phase != placed || m.where.Position != 2 || earlier.phase != decided {
		t.Errorf("again: phases %d and %d, position %d, %v", m.phase, earlier.phase, m.where.Position, err)
	}
}

// TestCutInAGap: a mark is refused, and its name free again, where a gap is open or
// a write is lost of which no record has told yet.
func TestCutInAGap(t *testing.T) {
	r := &rung{}
	s := standingOver(r)
	m := s.standFor(t, "noon")
	r.writes(10)
	s.gapOpen = true
	if err := s.cutAt(m, 50); err != nil {
		t.Fatal(err)
	}
	if err := s.placeMark(m); err != nil {
		t.Fatal(err)
	}
	if err := <-m.reply; !errors.Is(err, ErrInsideGap) || len(s.marks) != 0 || s.names["noon"] {
		t.Errorf("%v, %d marks, names %v", err, len(s.marks), s.names)
	}
	s.gapOpen = false
	if err := s.stand(&mark{name: "noon"}); err != nil {
		t.Errorf("the name is not free again: %v", err)
	}
}

// TestWithdrawn: a mark that nobody waits for any more is revoked however far it is.
func TestWithdrawn(t *testing.T) {
	r := &rung{}
	s := standingOver(r)
	for _, far := range []cutPhase{standing, cutting, placed, prepared} {
		m := s.standFor(t, "noon")
		if far > standing {
			if err := s.cutAt(m, 50); err != nil {
				t.Fatal(err)
			}
		}
		if far > cutting {
			if err := s.pump(); err != nil {
				t.Fatal(err)
			}
		}
		if far > placed {
			s.settleMarks()
		}
		if m.phase != far {
			t.Fatalf("it is in phase %d, want %d", m.phase, far)
		}
		durable := s.withdraw(m)
		for range 2 { // the mark, then its verdict
			if err := s.appendVerdicts(); err != nil {
				t.Fatal(err)
			}
			s.settleMarks()
		}
		if durable != nil {
			if err := <-durable; err != nil {
				t.Errorf("from phase %d: %v", far, err)
			}
		}
		if len(s.marks) != 0 || s.names["noon"] || m.commit {
			t.Errorf("from phase %d: %d marks, names %v, commit %v", far, len(s.marks), s.names, m.commit)
		}
	}
}

// TestMarkAndFullSpool: while the spool takes nothing whoever waits is told, at
// every phase; a mark that was not durable is revoked when it has become so, and
// one that was has the verdict that it was given.
func TestMarkAndFullSpool(t *testing.T) {
	for _, far := range []cutPhase{standing, cutting, placed, prepared, deciding, decided} {
		s := standingOver(&rung{})
		m := s.standFor(t, "noon")
		var err error
		reply := m.reply
		if far > standing {
			err = s.cutAt(m, 50)
		}
		if far > cutting {
			err = errors.Join(err, s.pump())
		}
		if far > placed {
			s.settleMarks()
			err = errors.Join(err, <-reply)
		}
		if far > prepared {
			var failed error
			_, failed = s.decide(m, true)
			err, reply = errors.Join(err, failed), m.reply
		}
		if far > deciding {
			err = errors.Join(err, s.appendVerdicts())
		}
		if err != nil || m.phase != far {
			t.Fatalf("it is in phase %d, want %d: %v", m.phase, far, err)
		}
		s.full = true
		s.refuseMarks()
		s.refuseMarks() // at each tick
		select {
		case err := <-reply:
			if far == standing || far == prepared || !errors.Is(err, spool.ErrFull) {
				t.Errorf("phase %d: told %v", far, err)
			}
		default:
			if far != standing && far != prepared {
				t.Errorf("phase %d: nobody is told", far)
			}
		}
		if far == cutting && (len(s.marks) > 0 || s.names["noon"]) {
			t.Errorf("a mark that is in no stream stays: %+v", m)
		}
		s.full = false
		s.settleMarks()
		if err := s.appendVerdicts(); err != nil {
			t.Fatal(err)
		}
		s.settleMarks()
		if over := len(s.marks) == 0; over != (far == cutting || far == placed || far > prepared) || over && m.commit != (far > prepared) || s.names["noon"] != (m.commit || !over) {
			t.Errorf("phase %d: with room again it is in phase %d, commit %v, %d marks, names %v", far, m.phase, m.commit, len(s.marks), s.names)
		}
	}
}

// TestVerdictsOfALedger: a mark without a verdict is committed where an intent says
// so, also after the ledger was opened anew, and revoked elsewhere, for good.
func TestVerdictsOfALedger(t *testing.T) {
	state := t.TempDir()
	l, _, err := OpenLedger(state, nil)
	if err != nil {
		t.Fatal(err)
	}
	a, b := [16]byte{1}, [16]byte{2}
	if err := l.write(&intent{Version: 1, Name: "noon", Groups: []intentGroup{{"a", a, 5}, {"b", b, 9}}}); err != nil {
		t.Fatal(err)
	}
	open := func() *Ledger {
		t.Helper()
		l, damaged, err := OpenLedger(state, nil)
		if err != nil || len(damaged) > 0 {
			t.Fatal(err, damaged)
		}
		return l
	}
	l = open()
	if v := l.verdicts(a, []pendingMark{{name: "x", position: 4}, {name: "noon", position: 5}}); v[0] || !v[1] {
		t.Errorf("verdicts %v", v)
	}
	if v := l.verdicts([16]byte{3}, []pendingMark{{name: "noon", position: 5}}); v[0] {
		t.Error("an intent holds for a group that is not in it")
	}
	const stored = `{"version":1,"name":"noon","groups":[{"group":"a","id":[1,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0],"position":5},{"group":"b","id":[2,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0],"position":9}]}`
	if b, err := os.ReadFile(l.path("noon")); err != nil || string(b) != checksum([]byte(stored))+"\n"+stored {
		t.Errorf("the format of intents has changed: %s, %v", b, err)
	}
	l.durable(a, 5)
	if l.decides(a) || !l.decides(b) || l.decides([16]byte{3}) {
		t.Error("it is not told which groups may lack a commit")
	}
	l = open() // b has not had it, a has
	if v := l.verdicts(a, nil); len(v) != 0 {
		t.Error(v)
	}
	if v := l.verdicts(b, []pendingMark{{name: "noon", position: 9}}); !v[0] {
		t.Error("b was not committed")
	}
	l.durable(b, 9)
	if l = open(); len(l.intents) != 0 {
		t.Errorf("intents %v stay", l.intents)
	}
}

// FuzzIntent: what is not an intent is none, and what is comes back as it was.
func FuzzIntent(f *testing.F) {
	body := []byte(`{"version":1,"name":"noon","groups":[{"group":"a","id":[1],"position":5}]}`)
	f.Add([]byte(checksum(body) + "\n" + string(body)))
	f.Add([]byte("00000000\n"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		path := filepath.Join(t.TempDir(), "x.commit")
		for _, b := range [][]byte{b, append([]byte(checksum(b)+"\n"), b...)} {
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			if i, err := readIntent(path); err == nil && i.Version != 1 {
				t.Errorf("%q is read as %+v", b, i)
			}
		}
	})
}
