package protect

import (
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
