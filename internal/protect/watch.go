package protect

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/disk"
	"tidemark/internal/health"
	"tidemark/internal/source"
	"tidemark/internal/stream"
	"tidemark/internal/timeline"
)

// watched is what the last look at the disks and counters saw.
type watched struct {
	counters source.Counters
	excess   []int64 // bytes that the kernel counted beyond what was traced, by disk, at a settled moment; nil: not noted yet
	valid    bool
}

// watch looks for what writes do not explain: disks that changed or went away,
// writes that programs were skipped for, commands past the block layer, and
// more bytes written than were traced. Each makes the disks unknown as a whole.
func (s *session) watch() error {
	s.checkClock(time.Now())
	unseen := s.unseen
	s.unseen = ""
	for i := range s.disks {
		changed, err := s.glance(i)
		if err != nil {
			return err
		}
		if changed {
			unseen = "" // it is seen
		}
	}
	if err := s.distrust(unseen); err != nil {
		return err
	}
	// The kernel's counts first: it counts bytes when they end, the tap when they
	// are queued, so what is read in this order can only fall short of the tap's.
	ended := make([]int64, len(s.disks))
	for i, d := range s.disks {
		ended[i] = -1
		if k, ok := d.(counted); ok {
			ended[i] = k.written()
		}
	}
	c, err := s.source.Counters()
	if err != nil {
		return err
	}
	now := watched{counters: c, valid: true, excess: s.watched.excess}
	if why := s.crossCheck(&now, ended); why != "" {
		return s.distrust(why)
	}
	was := s.watched
	s.watched = now
	if err := s.forget(); err != nil {
		return err
	}
	if lost(c) > c.LostRanges { // some left only bits
		s.mode.applyWhile(s.gapOpen, evDropped, was.valid && lost(c) > lost(was.counters))
	}
	if err := s.distrust(s.newlyUntold(c)); err != nil {
		return err
	}
	if len(s.uncleared) == 0 { // what happened so far is a gap that is durable
		return s.source.SetNote(s.fingerprint())
	}
	return nil
}

// newlyUntold names what was counted since the last call that no record tells of.
func (s *session) newlyUntold(c source.Counters) string {
	now := untoldOf(c)
	why := now.since(s.untold)
	s.untold = now
	return why
}

// vouch looks for writes that went past the source before records become points:
// behind them they would be none. An error is of a disk that is not there any more.
func (s *session) vouch() error {
	if s.gapOpen || s.salvaging {
		return nil
	}
	for _, d := range s.disks {
		if v, ok := d.(vouched); ok {
			if err := v.vouch(); err != nil {
				return s.lose(err)
			}
		}
	}
	return nil
}

// checkUntold looks for it before records become points. While a gap is open
// there are none, and the next watch is early enough.
func (s *session) checkUntold() (why string, err error) {
	if s.gapOpen {
		return "", nil
	}
	c, err := s.source.Counters()
	if err != nil {
		return "", err
	}
	return s.newlyUntold(c), nil
}

// distrust makes everything unknown that is not durable yet, and the disks as a
// whole. Without a reason it does nothing.
func (s *session) distrust(why string) error {
	if why == "" {
		return nil
	}
	s.rewind()
	return s.unknownTerritory(why)
}

// glance looks whether a disk is still what it was.
func (s *session) glance(i int) (changed bool, err error) {
	what, err := s.disks[i].look()
	if err != nil {
		return true, s.lose(err)
	}
	return what != "", s.distrust(what)
}

// lose ends the session because a disk is not there any more as it was. It may
// come back, to the very same tap, with another content: the history says first
// that nothing is known of the disks from here on, and takes back what it can of
// the time since the last look.
func (s *session) lose(why error) error {
	s.rewind()
	err := s.openGap(stream.CauseTerritory, s.everything(), s.seenDrops)
	if err != nil || s.full { // it is not in the spool: a new tap will have to say it
		s.forsaken = true
	}
	return errors.Join(why, err)
}

// fingerprint is what the disks map to, and what was counted of what no record
// tells of, as text. The next session compares it.
func (s *session) fingerprint() string {
	all := []string{fmt.Sprintf("untold %+v", s.untold)}
	for _, d := range s.disks {
		all = append(all, d.fingerprint())
	}
	return strings.Join(all, "\n")
}

// told takes what the kernel tells of a block device: one of ours is looked at
// in the next round, not only when its second is over.
func (s *session) told(e disk.Uevent) {
	for _, d := range s.disks {
		if !d.told(e) {
			continue
		}
		s.lastWatch = time.Time{}
		if why := unseen(d, e); why != "" {
			s.unseen = why
		}
	}
}

// unseen says what has happened to a disk that may not be to be seen any more: of a
// size that changed and changed back what lay beyond the smaller one is gone, and
// what was written while a volume had another table went elsewhere.
func unseen(d target, e disk.Uevent) string {
	t, ok := d.(*tappedDisk)
	switch {
	case e.Resized:
		return fmt.Sprintf("disk %s: its size changed, and changed back", e.Name)
	case e.Resumed:
		return fmt.Sprintf("disk %s: somebody suspended and resumed it, and it may have had another table meanwhile", e.Name)
	case e.Name == "" && ok && t.Mapping != nil:
		return fmt.Sprintf("disk %s: the kernel told more than could be heard, and it may have had another table meanwhile", t.cfg.Name)
	}
	return ""
}

// crossCheck compares the bytes that the kernel counted with those that were
// traced. The difference is noted while the disks are known to be settled; when
// it has grown since, bytes were written that nobody traced.
func (s *session) crossCheck(now *watched, ended []int64) string {
	if s.stillLooks++; s.gapOpen || !s.still(now.counters) {
		s.stillLooks = 0
	}
	if s.stillLooks >= 2 && now.excess == nil {
		now.excess = make([]int64, len(ended))
		for i := range ended {
			now.excess[i] = ended[i] - int64(now.counters.Disks[i].Traced)
		}
		return ""
	}
	for i := range now.excess {
		if ended[i] < 0 || ended[i]-int64(now.counters.Disks[i].Traced) <= now.excess[i] {
			continue
		}
		s.watched.excess = nil // anew when it is settled again
		return fmt.Sprintf("the kernel counts more bytes written to %s than were traced", s.cfg.Disks[i].Name)
	}
	return ""
}

// still says that nothing was written since the last look and nothing is on its way.
func (s *session) still(now source.Counters) bool {
	for i, d := range s.disks {
		k, ok := d.(counted)
		if !s.watched.valid || ok && !k.still() || now.Disks[i].Traced != s.watched.counters.Disks[i].Traced {
			return false
		}
	}
	return true
}

// untold counts what happens without a record in the ring, over all disks.
type untold struct{ skippedAtQueue, skippedAtEnd, passthrough, blind, foreign uint64 }

func untoldOf(c source.Counters) untold {
	u := untold{skippedAtQueue: c.MissedQueue, skippedAtEnd: c.MissedCompletions}
	for _, d := range c.Disks {
		u.passthrough += d.Passthrough
		u.blind += d.Blind
		u.foreign += d.Foreign
	}
	return u
}

// since names what happened after was.
func (u untold) since(was untold) string {
	switch {
	case u.skippedAtQueue > was.skippedAtQueue:
		return "the kernel skipped the capture program for a write"
	case u.skippedAtEnd > was.skippedAtEnd:
		return "the kernel skipped a program that looks for failed writes"
	case u.passthrough > was.passthrough:
		return "a command was sent past the block layer that may have written"
	case u.blind > was.blind:
		return "a write ended whose place cannot be told"
	case u.foreign > was.foreign:
		return "another disk was written under this one's number"
	}
	return ""
}

func (s *session) unknownTerritory(why string) error {
	s.health.Raise(health.Condition{Code: "unknown-territory", Severity: health.Warning, Subject: s.cfg.Name,
		Detail: "The disks are compared with the vault as a whole: " + why + ".", Remedy: "Nothing is to be done; points come again when the comparison has ended."})
	b, ok := within(baseTime, func(ctx context.Context) base {
		if h, err := timeline.Load(ctx, s.vault, s.cfg.Name); err == nil && h.Damage() == nil {
			return s.newest(ctx, h)
		}
		return base{}
	}, base.close) // in the session's own goroutine a vault that hangs would stall the group
	if !ok {
		s.log.Warn("the vault does not answer: everything is copied, nothing compared", "group", s.cfg.Name, "waited", baseTime)
	}
	s.compareWith(b)
	return s.openGap(stream.CauseTerritory, s.everything(), s.seenDrops)
}

// baseTime is how long a group waits for what its vault holds, to compare with
// it. Meanwhile the ring holds what is written.
const baseTime = 10 * time.Second

// within waits for what may hang, for a bounded time. What comes later is given
// to late, and the context has ended by then.
func within[T any](limit time.Duration, get func(context.Context) T, late func(T)) (got T, ok bool) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	answer, left := make(chan T), make(chan struct{})
	go func() {
		v := get(ctx)
		select {
		case answer <- v:
		case <-left:
			late(v)
		}
	}()
	select {
	case got = <-answer:
		return got, true
	case <-ctx.Done():
		close(left)
		return got, false
	}
}

// everything is all of every disk.
func (s *session) everything() (whole []block.DiskRange) {
	for i, d := range s.cfg.Disks {
		whole = append(whole, block.DiskRange{Disk: i, Range: block.Range{Len: d.Size}})
	}
	return whole
}

// applyWhile applies an event where both conditions hold.
func (m *mode) applyWhile(open bool, e modeEvent, happened bool) {
	if open && happened {
		m.apply(e)
	}
}
