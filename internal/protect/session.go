package protect

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
	"tidemark/internal/disk"
	"tidemark/internal/fill"
	"tidemark/internal/health"
	"tidemark/internal/segment"
	"tidemark/internal/source"
	"tidemark/internal/spool"
	"tidemark/internal/stream"
	"tidemark/internal/vault"
)

const (
	tick      = 10 * time.Millisecond  // how often the ring is looked at
	scanEvery = 20 * time.Millisecond  // bios in flight, while a gap is open
	peekEvery = 200 * time.Millisecond // gap bits, while a gap is open anyway
	watchEach = time.Second            // the disks themselves
)

// session is one run of a group: from the moment everything is open until it is
// closed or fails. One goroutine, run, owns all of it but what is said
// otherwise; others ask it to do things for them.
type session struct {
	cfg      *Config
	settings Settings
	log      *slog.Logger
	health   *health.Set
	disks    []target
	// identities are the disks', as segments hold them.
	identities []string

	way    wayIn
	source source.Source
	spool  *spool.Spool
	cursor *spool.Cursor
	vault  *vault.Vault
	lock   *vault.Lock
	filler *filler

	engine       *fill.Engine
	builder      *segment.Builder
	builderSince time.Time
	marked       int // the builder's size at its newest mark
	previous     segment.Summary
	record       stream.Record

	place       source.Place
	skipBefore  source.Place
	position    stream.Position
	seenDrops   uint64
	lostSeen    uint64
	lostCounted uint64
	lastTime    int64
	clockOffset int64
	mode        mode
	full        bool
	fullUntil   time.Time // a disk without room is not asked again before
	held        bool      // the walk over the ring waits at a bookmark
	stateDir    string

	gapOpen    bool
	gapSince   stream.Position
	gapCause   stream.Cause
	settled    stream.Position
	stretchEnd stream.Position
	uncleared  []block.DiskRange
	lastPeek   time.Time
	lastScan   time.Time
	lastWatch  time.Time
	drainSince time.Time
	quieters   int // who wait until nothing is in flight that was
	stillLooks int // of watch, in a row, in which nothing was written or on its way
	watched    watched
	untold     untold
	unseen     string // what the kernel told of a disk that is not to be seen any more
	salvaging  bool   // the ring is of a source that has ended
	forsaken   bool   // the tap must not be taken over: the history lacks that a disk changed

	stats    *Stats
	oldest   int64 // time of the oldest write in the segment under construction; 0: none
	ledger   *Ledger
	marks    []*mark // in the order of their instants
	waiters  map[uint64]*waiter
	tokens   uint64
	names    map[string]bool
	unsealed []string // names of bookmarks that are not durable yet
	urgent   bool
	pending  onTheWay // safe for all
	stored   refs     // likewise

	requests chan request
	uevents  chan disk.Uevent // what the kernel tells of block devices
	over     chan struct{}
}

// request is something that the session's goroutine does for another.
type request struct {
	do   func() error
	done chan error
}

// ask has the session's goroutine call do.
func (s *session) ask(ctx context.Context, do func() error) error {
	r := request{do, make(chan error, 1)}
	select {
	case s.requests <- r:
	case <-s.over:
		return ErrOffline
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-r.done:
		return err
	case <-s.over:
		return ErrOffline
	}
}

// run is the session's goroutine. It returns when ctx ends or something fails.
// Its workers end before it does:
//  1. the fill workers, as their channel is closed;
//  2. the shipper, as its context is cancelled;
//  3. the listener to the kernel's events, as the context is cancelled;
//  4. whoever waits for a bookmark is told.
func (s *session) run(ctx context.Context) error {
	inner, cancel := context.WithCancel(ctx)
	var workers sync.WaitGroup
	failed := make(chan error, 1)
	workers.Go(func() { // "uevents"
		disk.Listen(inner, func(e disk.Uevent) {
			select {
			case s.uevents <- e:
			case <-inner.Done():
			}
		})
	})
	for range fillWorkers {
		workers.Go(func() { s.filler.work(inner) })
	}
	workers.Go(func() {
		if err := s.ship(inner); err != nil && inner.Err() == nil {
			failed <- fmt.Errorf("draining to the vault: %w", err)
		}
	})
	err := s.loop(ctx, failed)
	close(s.filler.jobs)
	cancel()
	workers.Wait()
	close(s.over)
	s.settleBookmarks(ErrOffline)
	s.leaveMarks(ErrOffline)
	return err
}

func (s *session) loop(ctx context.Context, failed <-chan error) error {
	t := time.NewTicker(tick)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			s.urgent = true // what the ring holds becomes durable once more: it may not outlive a reboot
			for _, m := range s.marksIn(standing) {
				s.drop(m, ErrOffline)
			}
			return s.step()
		case err := <-failed:
			return err
		case r := <-s.requests:
			r.done <- r.do()
			continue
		case e := <-s.uevents:
			s.told(e)
			continue
		case <-t.C:
		}
		if err := s.step(); err != nil {
			return err
		}
	}
}

// step is one round: ring to segment, gaps, fills, seal.
func (s *session) step() error {
	if s.full && (time.Now().Before(s.fullUntil) || !s.spool.Room(int64(s.builder.Size()))) {
		s.refuseMarks()
		return s.overflowing() // the ring holds on; the tap degrades when it is full too
	}
	if err := s.sealGaps(); err != nil {
		return err
	}
	if err := s.pump(); err != nil {
		return err
	}
	if err := s.gaps(); err != nil {
		return err
	}
	if err := s.appendVerdicts(); err != nil {
		return err
	}
	s.markSound()
	old := s.builder.Records() > 0 && time.Since(s.builderSince) >= s.settings.SealEvery
	if old || s.urgent || s.builder.Size() >= s.settings.SegmentBytes {
		s.urgent = false
		if err := s.seal(); err != nil {
			return err
		}
	}
	if time.Since(s.lastWatch) >= watchEach {
		s.lastWatch = time.Now()
		return s.watch()
	}
	return nil
}

// gaps looks for drops that no record has told of, and moves an open gap on.
func (s *session) gaps() error {
	// While a gap is open its exact place does not matter; otherwise a record
	// that the ring still holds may tell of the drop, and of its place.
	due := s.place >= s.source.Producer()
	if s.gapOpen {
		due = time.Since(s.lastPeek) >= peekEvery
	}
	if s.source.Drops() > s.seenDrops && due {
		if err := s.openDropGap(); err != nil || s.full {
			return err
		}
	}
	if !s.gapOpen {
		return s.endsOff()
	}
	if len(s.uncleared) > 0 {
		return nil
	}
	s.engine.Checkpoint(fill.Place(s.place), s.position)
	if err := s.lookInFlight(); err != nil {
		return err
	}
	s.collect()
	if err := s.appendReady(); err != nil {
		return err
	}
	s.dispatch()
	return s.settle()
}

// lookInFlight tells the engine, now and then, what is on its way to the disks:
// behind that nothing may be read.
func (s *session) lookInFlight() error {
	if time.Since(s.lastScan) < scanEvery {
		return nil
	}
	s.lastScan = time.Now()
	scan, err := s.source.ScanInFlight()
	if err != nil {
		return err
	}
	s.engine.Scanned(fill.Place(scan.Low), scan.Dropped)
	return nil
}

func (s *session) appendReady() error {
	for _, f := range s.engine.Ready() {
		if !f.Range.Empty() {
			if err := s.appendFill(f); err != nil {
				return err
			}
		}
		if r := s.filler.out[f.ID]; f.Last && r != nil {
			s.retire(r)
		}
	}
	return nil
}

// settle closes the gap when every block is known and no drop is unaccounted for.
func (s *session) settle() error {
	if s.source.Drops() > s.seenDrops {
		return nil
	}
	from, ok := s.engine.Settled()
	if !ok {
		return nil
	}
	from = max(from, s.gapSince)
	if err := s.append(&stream.Record{Kind: stream.KindSettled, Position: from, Time: s.now()}); err != nil {
		return err
	}
	s.gapOpen, s.gapSince, s.settled = false, 0, from
	s.stats.known()
	s.mode.apply(evSettled)
	s.filler.settle()
	s.readable()
	s.urgent = true
	s.log.Info("consistent", "group", s.cfg.Name, "since", uint64(from))
	return nil
}

// endsOff stops tracking bios in flight when all that are older than the
// tracking are known to have ended, whatever the load. In doubt it stays on,
// which costs time and nothing else.
func (s *session) endsOff() error {
	if !s.source.Ends() || s.quieters > 0 || time.Since(s.lastScan) < watchEach {
		return nil
	}
	s.lastScan = time.Now()
	scan, err := s.source.ScanInFlight()
	if err != nil || !scan.OldKnownEnded {
		return err
	}
	if err := s.source.SetEnds(false); err != nil {
		return err
	}
	if s.source.Drops() > s.seenDrops { // a drop switched it on in this moment
		return s.source.SetEnds(true)
	}
	// Programs that saw it on may be at work: what is in the map stays for a moment (forget).
	s.drainSince = time.Now()
	return nil
}

// drainTime is how long bios stay in the map after tracking has ended.
const drainTime = time.Second

// forget empties the map of bios in flight when tracking is over.
func (s *session) forget() error {
	if s.gapOpen || s.source.Ends() || time.Since(s.drainSince) < drainTime {
		return nil
	}
	return s.source.ForgetInFlight()
}

func (s *session) header() segment.Header {
	h := segment.Header{Group: s.cfg.Name, GroupID: s.cfg.ID, Sequence: s.previous.Sequence + 1, Previous: s.previous.Digest}
	for i, d := range s.cfg.Disks {
		h.Disks = append(h.Disks, segment.Disk{Name: d.Name, Size: d.Size, SectorSize: d.SectorSize, BlockSize: d.BlockSize, Identity: s.identities[i]})
	}
	return h
}

func (s *session) state() segment.State {
	return segment.State{
		Source: segment.Source{Ring: s.source.Identity(), Place: uint64(s.place), Drops: s.seenDrops},
		Last:   s.position, Settled: s.settled, GapSince: s.gapSince, Time: s.lastTime,
	}
}

// roomEvery is how often a disk without room is tried again.
const roomEvery = 500 * time.Millisecond

// setFull notes whether the spool takes segments; err says why it does not.
func (s *session) setFull(err error) {
	if err == nil {
		if s.full {
			s.health.Clear("spool-full", s.cfg.Name)
		}
		s.full = false
		return
	}
	c := health.Condition{Code: "spool-full", Severity: health.Warning, Subject: s.cfg.Name,
		Detail: "The spool is full: the vault takes less than is written. When the ring is full too, only changed blocks are kept.",
		Remedy: "Make the vault reachable or faster, or give more room with --spool-size."}
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		s.fullUntil = time.Now().Add(roomEvery)
		c.Detail = "The disk of the spool has no room left. When the ring is full too, only changed blocks are kept."
		c.Remedy = "Make room on the disk that holds " + s.stateDir + "."
	}
	s.full = true
	s.health.Raise(c)
}

// overflowing keeps the mode true while nothing can be taken from the ring: the
// records that would tell of what is lost are behind those that wait.
func (s *session) overflowing() error {
	if s.source.Drops() == s.seenDrops {
		return nil
	}
	c, err := s.source.Counters()
	if err != nil {
		return err
	}
	s.mode.apply(evRangeOnly)
	if lost(c) > c.LostRanges && (!s.watched.valid || lost(c)-c.LostRanges > lost(s.watched.counters)-s.watched.counters.LostRanges) {
		s.mode.apply(evDropped)
	}
	return nil
}

func (s *session) readFailed(r *reading) {
	if errors.Is(r.err, context.Canceled) {
		return
	}
	s.health.Raise(health.Condition{Code: "disk-read-failed", Severity: health.Error, Subject: s.cfg.Disks[r.job.Disk].Name,
		Detail: "A block that the history needs cannot be read: " + r.err.Error(), Remedy: "Repair or replace the disk; points from before stay."})
}

// readable takes back what readFailed said: every block is known by now.
func (s *session) readable() {
	for _, d := range s.cfg.Disks {
		s.health.Clear("disk-read-failed", d.Name)
	}
}

// close lets go of everything; the tap stays pinned and goes on capturing. What
// held for this session only is no longer said: the next one finds out by itself.
func (s *session) close() error {
	s.health.Clear("spool-full", s.cfg.Name)
	s.health.Clear("vault-unreachable", s.cfg.Name)
	s.readable()
	var errs []error
	for _, f := range s.filler.disks {
		errs = append(errs, f.Close())
	}
	leave := s.source.Close
	if s.forsaken {
		leave = s.source.Remove
	}
	errs = append(errs, s.filler.closeBases(), leave(), s.spool.Close(), s.lock.Unlock())
	return errors.Join(errs...)
}
