package protect

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/source"
	"tidemark/internal/spool"
	"tidemark/internal/stream"
)

// # One cut over several rings
//
// Several groups get one mark without a pause: one instant T is chosen, and in each
// ring the mark lies just before the first record with a time after T.
//
// The claim (P1, over groups): let write b lie before the mark of its group, and
// write a of another group have completed before b was submitted. Then a lies before
// the mark of its own group. The proof needs one thing of a ring, which
// bpf/tap.bpf.c and internal/filter/capture say that they keep: a record's time is read
// before its place is reserved, and both before the write is passed on.
//
//   - b lies before the first record after T, so its time is at most T; a has
//     completed before that time was read, so a had its place before T.
//   - Suppose that a lies behind the mark. Then a record x with a time after T lies
//     before a (or is a itself). x read its time before it reserved its place, so it
//     has its place since after T; a's place is behind x's, so a has it since after T
//     too. That cannot be.
//   - Where a ring is read up to where its producer was after T and no such record was
//     met, the mark lies there: a had its place before T, which is before that place.
//
// What got no record is a gap bit and a drop counted before the write is passed on:
// drops are read after T, and where one is not accounted for the mark is refused.
// Failed writes are counted in the same way before their end is told to anybody.
//
// The clock is CLOCK_MONOTONIC, of all processors. The kernel's quick way to read it,
// which eBPF has, may be some ten nanoseconds off while the clock is being adjusted,
// and that of served devices was compared with it once, as closely. Between the two
// sides of the claim lies a whole write, from its place in the ring to its end and
// on to whoever waited for it.
//
// So that no session has gone past T before it hears of it, their walks over the
// rings stand still for the moment in which T is chosen; the rings have room, and no
// writer waits.

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

// standMax bounds how long the walk over a ring stands still for an instant.
const standMax = 5 * time.Second

// monotonic is the clock of the rings.
func monotonic() (int64, error) {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return 0, err
	}
	return now.Nano(), nil
}

// checkMark refuses what is bound to fail.
func (s *session) checkMark(name string) error {
	if err := s.pump(); err != nil {
		return err
	}
	return s.admits(name)
}

// admits says whether the group can take a mark of this name now.
func (s *session) admits(name string) error {
	switch {
	case s.gapOpen:
		return fmt.Errorf("group %s has an open gap since position %d: %w", s.cfg.Name, s.gapSince, ErrInsideGap)
	case s.names[name]:
		return fmt.Errorf("group %s, bookmark %q: %w", s.cfg.Name, name, ErrBookmarkExists)
	case s.full: // it would wait for as long as that lasts, and may get lost
		return fmt.Errorf("group %s: %w: a bookmark cannot be made durable", s.cfg.Name, spool.ErrFull)
	}
	return nil
}

// stand takes the mark's name and has the walk over the ring stand still.
func (s *session) stand(m *mark) error {
	if err := s.admits(m.name); err != nil {
		return err
	}
	s.names[m.name] = true
	m.phase, m.since, m.reply = standing, time.Now(), make(chan error, 1)
	s.marks = append(s.marks, m)
	return nil
}

// cutAt tells a standing mark its instant, which is over. The walk goes on.
func (s *session) cutAt(m *mark, at int64) error {
	if m.phase != standing || !s.has(m) {
		return fmt.Errorf("group %s, bookmark %q: %w", s.cfg.Name, m.name, ErrStoodTooLong)
	}
	m.phase, m.at, m.end, m.drops = cutting, at, s.source.Producer(), s.source.Drops()
	return nil
}

// standsStill says that no record may be taken now. Who does not choose an instant
// in time loses the mark.
func (s *session) standsStill() bool {
	still := false
	for _, m := range s.marksIn(standing) {
		if time.Since(m.since) > standMax {
			s.drop(m, ErrStoodTooLong)
			continue
		}
		still = true
	}
	return still
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

// cutBefore places the marks whose instant is before a record's time, which is the
// first such in the ring.
func (s *session) cutBefore(r *source.Record) error {
	for _, m := range s.marks {
		if m.phase == cutting && r.MonoTime > m.at {
			if err := s.placeMark(m); err != nil {
				return err
			}
		}
	}
	return nil
}

// cutReached places the marks up to whose end the ring has been read.
func (s *session) cutReached() error {
	for _, m := range s.marksIn(cutting) {
		if s.place < m.end {
			continue
		}
		if err := s.placeMark(m); err != nil {
			if errors.Is(err, errStop) {
				return nil // the spool is full: later
			}
			return err
		}
	}
	return nil
}

// placeMark gives a mark its position: everything before s.place has been taken.
func (s *session) placeMark(m *mark) error {
	if m.drops > s.seenDrops && !s.gapOpen {
		s.advance(s.place)
		if err := s.openDropGap(); err != nil {
			return err
		}
		if s.full {
			return errStop
		}
	}
	if s.gapOpen {
		s.drop(m, fmt.Errorf("bookmark %q fell into an open gap of group %s: %w", m.name, s.cfg.Name, ErrInsideGap))
		return nil
	}
	s.position++
	rec := stream.Record{Kind: stream.KindPrepared, Position: s.position, Time: s.stamp(m.at), Name: m.name, Consistency: m.want}
	if err := s.append(&rec); err != nil {
		return err
	}
	m.phase, m.where = placed, Bookmarked{Position: s.position, Time: time.Unix(0, rec.Time)}
	s.urgent = true
	return nil
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
