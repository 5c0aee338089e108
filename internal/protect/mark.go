package protect

import (
	"context"
	"fmt"
	"slices"
	"time"

	"tidemark/internal/source"
	"tidemark/internal/spool"
	"tidemark/internal/stream"
)

// cutPhase is how far a mark of one group is.
type cutPhase int

const (
	standing cutPhase = iota // the walk over the ring waits for the instant
	cutting                  // the instant is known, its place in the ring is not reached
	placed                   // in the segment under construction
	prepared                 // durable, and waits for the verdict
	deciding                 // the verdict is known
	decided                  // in the segment under construction
)

// mark is a prepared mark of one group, from when its name is taken until its
// verdict is durable. It belongs to the session's goroutine.
type mark struct {
	name  string
	want  stream.Consistency
	phase cutPhase
	since time.Time // standing
	at    int64     // the instant, CLOCK_MONOTONIC in nanoseconds
	end   source.Place
	drops uint64 // end and drops were read after the instant
	where Bookmarked
	// commit is the verdict.
	commit bool
	// withdrawn: nobody waits for it any more, and it is revoked as soon as it can be.
	withdrawn bool
	// reply gets the end of the phase that somebody waits for: prepared, or the
	// verdict durable. It has room.
	reply chan error
}

func (s *session) marksIn(p cutPhase) (out []*mark) {
	for _, m := range s.marks {
		if m.phase == p {
			out = append(out, m)
		}
	}
	return out
}

func (s *session) has(m *mark) bool {
	for _, o := range s.marks {
		if o == m {
			return true
		}
	}
	return false
}

// drop forgets a mark that is not in the stream, and says why.
func (s *session) drop(m *mark, why error) {
	s.unlist(m)
	delete(s.names, m.name)
	if m.reply != nil {
		m.reply <- why
	}
}

func (s *session) unlist(m *mark) {
	for i, o := range s.marks {
		if o == m {
			s.marks = append(s.marks[:i:i], s.marks[i+1:]...)
			return
		}
	}
}

// decide takes the verdict on a prepared mark; durable is told when it is so.
func (s *session) decide(m *mark, commit bool) (durable <-chan error, err error) {
	if !s.has(m) || m.phase != prepared {
		return nil, fmt.Errorf("group %s, bookmark %q: %w", s.cfg.Name, m.name, ErrNotPrepared)
	}
	m.phase, m.commit, m.reply = deciding, commit, make(chan error, 1)
	return m.reply, nil
}

// withdraw takes a mark back, however far it is; durable is told when the stream
// has that, nil where there is nothing to be told.
func (s *session) withdraw(m *mark) (durable <-chan error) {
	switch {
	case !s.has(m):
		return nil
	case m.phase == standing || m.phase == cutting:
		m.reply = nil
		s.drop(m, nil)
		return nil
	case m.phase == placed: // its verdict has to come after it
		m.withdrawn, m.reply = true, make(chan error, 1)
		return m.reply
	}
	durable, _ = s.decide(m, false) // one that is decided stays as it is
	return durable
}

// appendVerdicts puts the verdicts that are known into the segment under construction.
func (s *session) appendVerdicts() error {
	for _, m := range s.marksIn(deciding) {
		rec := stream.Record{Kind: stream.KindVerdict, Position: m.where.Position, Time: s.now(), Commit: m.commit}
		if err := s.append(&rec); err != nil {
			return err
		}
		m.phase = decided
		s.urgent = true
	}
	return nil
}

// settleMarks tells those who wait for what has just become durable.
func (s *session) settleMarks() {
	for _, m := range s.marksIn(placed) {
		if m.withdrawn {
			m.phase = deciding
			continue
		}
		m.phase = prepared
		m.reply <- nil
	}
	for _, m := range s.marksIn(decided) {
		s.unlist(m)
		if !m.commit {
			delete(s.names, m.name) // it may be given again
		}
		s.ledger.durable(s.cfg.ID, m.where.Position)
		if m.reply != nil {
			m.reply <- nil
		}
	}
}

// refuseMarks tells those who wait that the spool takes nothing, which may go on
// for as long as the vault is away. A mark that is not durable is none; a verdict
// follows when there is room.
func (s *session) refuseMarks() {
	for _, m := range slices.Clone(s.marks) {
		if m.reply == nil || m.phase == prepared || m.phase == standing {
			continue
		}
		err := fmt.Errorf("group %s: %w: bookmark %q", s.cfg.Name, spool.ErrFull, m.name)
		if m.phase == cutting {
			s.drop(m, err)
			continue
		}
		m.withdrawn = m.withdrawn || m.phase == placed
		m.reply <- err
		m.reply = nil
	}
}

// leaveMarks ends all waiting; what is in the stream is decided by the next session.
func (s *session) leaveMarks(why error) {
	for _, m := range s.marks {
		if m.reply != nil && m.phase != prepared {
			m.reply <- why
		}
	}
	s.marks = nil
}

// rewindMarks takes back what is not durable, when the ring is read once more.
func (s *session) rewindMarks() {
	for _, m := range s.marks {
		switch m.phase {
		case placed:
			m.phase, m.where = cutting, Bookmarked{}
		case decided:
			m.phase = deciding
		}
	}
}

// takeOverMarks decides what an earlier session left without a verdict.
func (s *session) takeOverMarks(undecided []pendingMark) {
	s.marks = nil
	for i, commit := range s.ledger.verdicts(s.cfg.ID, undecided) {
		u := undecided[i]
		s.names[u.name] = true
		if commit {
			s.stats.put(LastMark{Name: u.name, Time: u.time, Barrier: BarrierCut})
		} else {
			s.stats.drop()
		}
		s.marks = append(s.marks, &mark{name: u.name, phase: deciding, commit: commit, where: Bookmarked{Position: u.position}})
	}
}

// pendingMark is a prepared mark in a group's history that no verdict follows.
type pendingMark struct {
	name     string
	position stream.Position
	time     time.Time
}

// await waits for the answer of a phase.
func (s *session) await(ctx context.Context, reply <-chan error) error {
	select {
	case err := <-reply:
		return err
	case <-s.over:
		select {
		case err := <-reply: // it was told in time
			return err
		default:
			return ErrOffline
		}
	case <-ctx.Done():
		return ctx.Err()
	}
}
