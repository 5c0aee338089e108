package protect

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
	"tidemark/internal/fill"
	"tidemark/internal/source"
	"tidemark/internal/spool"
	"tidemark/internal/stream"
)

// errStop ends one walk over the ring; the next begins where it stopped.
var errStop = errors.New("stop here")

// pump moves what the ring holds into the segment under construction, sealing
// as segments fill, until it has seen the ring's producer as it was at the call.
// It stops early, without error, where the spool has no room.
func (s *session) pump() error {
	s.clockOffset = clockOffset()
	s.held = false
	if s.standsStill() {
		return nil // for the instant that a mark over several groups is put at
	}
	end := s.source.Producer()
	for s.place < end {
		next, err := s.source.Read(s.place, s.take)
		s.advance(next)
		switch {
		case errors.Is(err, errStop):
		case err != nil:
			return err
		default:
			return s.cutReached()
		}
		if s.held {
			return nil // a bookmark waits for the verdict on its freeze
		}
		if s.builder.Size() >= s.settings.SegmentBytes {
			if err := s.seal(); err != nil || s.full {
				return err
			}
		}
	}
	return s.cutReached()
}

// advance tells the engine that everything before next has its position.
func (s *session) advance(next source.Place) {
	s.place = next
	if s.gapOpen {
		s.engine.Checkpoint(fill.Place(next), s.position)
	}
}

// take gives one ring record its position. It is called in ring order.
func (s *session) take(r *source.Record) error {
	if r.Place < s.skipBefore {
		return nil // read and stored before a crash
	}
	s.place = r.Place
	if s.builder.Size() >= s.settings.SegmentBytes {
		return errStop
	}
	s.markSound()
	if err := s.cutBefore(r); err != nil {
		return err
	}
	if r.Drops > s.seenDrops && !s.gapOpen {
		s.advance(r.Place)
		if err := s.openDropGap(); err != nil {
			return err
		}
		if s.full {
			return errStop
		}
	}
	switch r.Kind {
	case source.Write:
		return s.takeWrite(r)
	case source.Lost:
		s.mode.apply(evRangeOnly)
		s.lostSeen++
	case source.Bookmark:
		return s.takeBookmark(r)
	}
	return nil
}

func (s *session) takeWrite(r *source.Record) error {
	s.position++
	s.record = stream.Record{
		Kind: stream.KindWrite, Op: r.Op, Disk: r.Disk, Position: s.position,
		Time: s.stamp(r.MonoTime), Range: r.Range, Payload: r.Payload,
	}
	if err := s.append(&s.record); err != nil {
		return fmt.Errorf("write of %s at %s: %w", s.cfg.Disks[r.Disk].Name, r.Range, err)
	}
	if s.stats.wrote(r, s.lastTime); s.oldest == 0 {
		s.oldest = s.record.Time
	}
	if s.gapOpen && r.Op != block.OpDiscard {
		s.engine.Captured(r.Disk, r.Range, fill.Place(r.Place), s.position)
	}
	return nil
}

func (s *session) append(r *stream.Record) error {
	if s.builder.Records() == 0 {
		s.builderSince = time.Now()
	}
	return s.builder.Append(r)
}

// markEvery is how many bytes a torn segment loses at most of its sound part.
const markEvery = 64 << 10

// markSound notes, now and then, that the segment could end here. It is called
// where it could also be sealed: everything before s.place has been taken.
func (s *session) markSound() {
	if size := s.builder.Size(); size-s.marked >= markEvery {
		s.builder.Mark(s.state())
		s.marked = size
	}
}

// stamp turns the kernel's monotonic clock into time since 1970 that never
// goes back along positions.
func (s *session) stamp(mono int64) int64 {
	s.lastTime = max(s.lastTime, mono+s.clockOffset)
	return s.lastTime
}

func (s *session) now() int64 {
	s.lastTime = max(s.lastTime, time.Now().UnixNano())
	return s.lastTime
}

// clockOffset is what to add to CLOCK_MONOTONIC for time since 1970, in nanoseconds.
func clockOffset() int64 {
	var mono unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &mono); err != nil {
		return 0 // cannot fail on Linux
	}
	return time.Now().UnixNano() - mono.Nano()
}

// seal makes everything taken so far durable, then lets go of it in the ring
// (P3: nothing else moves the consumer). Where the spool is full nothing is
// changed and s.full is set: the ring then fills, and the tap degrades by name.
func (s *session) seal() error {
	if s.builder.Records() == 0 {
		// The consumer stays where the newest segment says it is: should that
		// segment rot, the difference tells that records are missing.
		return nil
	}
	if err := s.vouch(); err != nil {
		return err
	}
	if why, err := s.checkUntold(); err != nil || why != "" {
		return errors.Join(err, s.distrust(why))
	}
	sealed, err := s.builder.Seal(s.header(), s.state())
	if err != nil {
		return fmt.Errorf("sealing a segment: %w", err)
	}
	err = s.spool.Append(sealed)
	if errors.Is(err, spool.ErrFull) {
		s.setFull(err)
		return nil
	}
	if err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	s.setFull(nil)
	s.previous = sealed.Summary
	s.source.Commit(s.place)
	captured := s.builderSince
	if s.oldest != 0 {
		captured = time.Unix(0, s.oldest)
	}
	s.oldest = 0
	s.stats.stored(sealed.Summary.Sequence, captured, sealed.Summary.Size)
	s.pending.push(sealed.Summary.Sequence, s.builderSince, s.restorable())
	s.builder.Reset()
	s.marked = 0
	s.unsealed = s.unsealed[:0]
	s.settleBookmarks(nil)
	s.settleMarks()
	return nil
}

// rewind takes back what was taken from the ring and is not durable: it is read
// once more. It can where no gap is open: then there are writes and bookmarks only.
func (s *session) rewind() {
	last := s.previous
	if s.gapOpen || last.Source.Ring != s.source.Identity() || last.Settled != s.settled {
		return
	}
	s.place, s.seenDrops, s.position, s.lastTime = source.Place(last.Source.Place), last.Source.Drops, last.Last, last.Time
	for _, name := range s.unsealed {
		delete(s.names, name)
	}
	for _, w := range s.waiters {
		w.taken = false
	}
	s.rewindMarks()
	s.stats.begun()
	s.oldest = 0
	s.builder.Reset()
	s.marked, s.unsealed = 0, s.unsealed[:0]
}

// restorable is the newest position that a restore from everything sealed so far can reach.
func (s *session) restorable() stream.Position {
	if s.settled != 0 {
		return s.position
	}
	return s.stretchEnd
}

// openDropGap records the blocks whose bits the tap has set. The gap is durable
// before a bit is cleared, and the bits are cleared before the engine may fill
// them: the producer's place after that bounds the last write that was dropped.
func (s *session) openDropGap() error {
	peek, err := s.source.PeekGaps()
	if err != nil {
		return err
	}
	s.lastPeek = time.Now()
	if len(peek.Ranges) == 0 {
		s.seenDrops = max(s.seenDrops, peek.Drops)
		return nil
	}
	cause := stream.CauseOverflow
	if !s.source.PayloadCaptured() {
		cause = stream.CauseMetadata
	} else if c, err := s.source.Counters(); err == nil && lost(c) == s.lostCounted {
		cause = stream.CauseFailed
	} else {
		s.lostCounted = lost(c)
	}
	return s.openGap(cause, s.bounded(peek.Ranges), peek.Drops)
}

// lost is how many writes of the group lost their payload, whole disks counted once.
func lost(c source.Counters) uint64 {
	var n uint64
	for _, d := range c.Disks {
		n = max(n, d.Lost)
	}
	return n
}

// openGap appends and seals a gap over ranges, then hands it to the engine.
func (s *session) openGap(cause stream.Cause, ranges []block.DiskRange, drops uint64) error {
	if err := s.source.SetEnds(true); err != nil {
		return err
	}
	first, what := s.position+1, "gap widened"
	if !s.gapOpen {
		what = "gap opened"
		s.stretchEnd = s.restorable()
		s.gapSince = first
		s.gapOpen, s.settled = true, 0
	}
	s.stats.gap(cause, what == "gap opened", ranges)
	for part := range chunks(ranges, gapRangesMax) {
		s.position++
		if err := s.append(&stream.Record{Kind: stream.KindGap, Cause: cause, Position: s.position, Time: s.now(), Ranges: part}); err != nil {
			return err
		}
	}
	s.seenDrops = max(s.seenDrops, drops)
	s.engine.Open(ranges, fill.Held)
	s.engine.Checkpoint(fill.Place(s.place), s.position)
	s.uncleared = append(s.uncleared, ranges...)
	s.log.Warn(what, "group", s.cfg.Name, "cause", cause.String(), "position", uint64(first), "ranges", len(ranges))
	return s.sealGaps()
}

// sealGaps makes the gap records durable and then clears their bits in the
// kernel. Where the spool is full it is tried again at the next tick.
func (s *session) sealGaps() error {
	if len(s.uncleared) == 0 {
		return nil
	}
	if err := s.seal(); err != nil || s.full {
		return err
	}
	place, err := s.source.ClearGaps(s.uncleared)
	if err != nil {
		return err
	}
	s.engine.Cleared(s.uncleared, fill.Place(place))
	s.uncleared = s.uncleared[:0]
	return nil
}

// gapRangesMax bounds the ranges of one gap record.
const gapRangesMax = 1 << 16

func chunks[T any](all []T, n int) func(yield func([]T) bool) {
	return func(yield func([]T) bool) {
		for len(all) > 0 {
			part := all[:min(n, len(all))]
			all = all[len(part):]
			if !yield(part) {
				return
			}
		}
	}
}
