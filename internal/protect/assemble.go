package protect

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"path/filepath"

	"tidemark/internal/block"
	"tidemark/internal/disk"
	"tidemark/internal/fill"
	"tidemark/internal/health"
	"tidemark/internal/segment"
	"tidemark/internal/source"
	"tidemark/internal/spool"
	"tidemark/internal/stream"
	"tidemark/internal/timeline"
	"tidemark/internal/vault"
)

// Env is what a daemon lends its groups.
type Env struct {
	StateDir string // groups live in groups/NAME below it
	Instance string // names the pins that are this daemon's
	Holder   vault.Holder
	Log      *slog.Logger
	Served   Served // nil: there are no served devices
	Ledger   *Ledger
}

func (e *Env) dir(group string) string { return filepath.Join(e.StateDir, "groups", group) }

// assemble opens everything that a session needs, in this order, and undoes it
// in reverse where a step fails:
//
//  1. the vault and the right to write the group's history;
//  2. the spool: what is in it goes to the vault, whatever became of the disks;
//  3. the disks, found again by their identity;
//  4. the history;
//  5. the source: the one of before if it fits, otherwise a new one and a gap.
//
// Where the one of before does not fit, or disks are gone, what its ring holds is
// moved into the history before anything else (salvage); verdicts on marks that
// are decided follow it.
func assemble(ctx context.Context, env *Env, cfg *Config, h *health.Set, stats *Stats) (s *session, err error) {
	settings, err := cfg.Settings.withDefaults()
	if err != nil {
		return nil, err
	}
	s = &session{cfg: cfg, ledger: env.Ledger, stats: stats, way: cfg.wayIn(env), settings: settings, stateDir: env.StateDir, log: env.Log, health: h, waiters: map[uint64]*waiter{}, names: map[string]bool{},
		tokens:   rand.Uint64(), // the ring may hold bookmarks of a daemon before this one
		requests: make(chan request), uevents: make(chan disk.Uevent, 16), over: make(chan struct{}), builder: segment.NewBuilder(settings.SegmentBytes)}
	var undo []func() error
	defer func() {
		if err != nil {
			for i := len(undo) - 1; i >= 0; i-- {
				err = errors.Join(err, undo[i]())
			}
			s = nil
		}
	}()
	if s.vault, err = vault.Open(ctx, cfg.Vault); err != nil {
		return s, err
	}
	if s.lock, err = s.vault.Lock(ctx, cfg.Name, env.Holder); err != nil {
		return s, err
	}
	undo = append(undo, s.lock.Unlock)
	var report spool.Report
	if s.spool, report, err = spool.Open(filepath.Join(env.dir(cfg.Name), "spool"), spool.Options{MaxBytes: settings.SpoolBytes}); err != nil {
		return s, err
	}
	undo = append(undo, s.spool.Close)
	if len(report.Torn) > 0 {
		env.Log.Warn("a crash left unfinished files in the spool", "group", cfg.Name, "files", report.Torn)
	}
	for _, damage := range report.Damaged {
		env.Log.Error("the spool is damaged", "group", cfg.Name, "error", damage)
	}
	if s.cursor, err = s.spool.Cursor("vault"); err != nil {
		return s, err
	}
	if err = s.shipSpool(ctx); err != nil {
		return s, err
	}
	if err = s.identify(); err != nil {
		return s, errors.Join(err, s.salvageStranded(ctx), s.decideStranded(ctx), s.way.gone())
	}
	history, err := s.history(ctx)
	if err != nil {
		return s, err
	}
	if history, err = s.openSource(ctx, history); err != nil {
		return s, err
	}
	undo = append(undo, s.source.Close)
	files, err := s.openDisks()
	if err != nil {
		return s, err
	}
	s.filler = newFiller(files, s.diskNames(), settings.FillRate, s.source.Producer)
	undo = append(undo, func() error { return errors.Join(closeAll(files), s.filler.closeBases()) })
	return s, s.resume(ctx, history)
}

// identify finds the disks, and notes how they are called in segments. Where it
// fails they are called as they were when they were protected.
func (s *session) identify() (err error) {
	s.disks, err = s.way.find()
	for i, d := range s.cfg.Disks {
		id := d.Identity
		if err == nil {
			id = s.disks[i].identity()
		}
		text, failed := json.Marshal(id)
		if failed != nil {
			return failed
		}
		s.identities = append(s.identities, string(text))
	}
	return err
}

func closeAll(files []reader) error {
	var errs []error
	for _, f := range files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// shipSpool carries what the spool holds to the vault.
func (s *session) shipSpool(ctx context.Context) error {
	for !s.cursor.Drained() {
		item, err := s.cursor.Next(ctx)
		if err != nil {
			return err
		}
		if err := s.vault.Put(ctx, s.lock, item.Path, item.Summary); err != nil {
			return err
		}
		if err := s.cursor.Commit(item.Sequence); err != nil {
			return err
		}
	}
	return nil
}

// history reads what the vault knows; nil: nothing.
func (s *session) history(ctx context.Context) (*timeline.History, error) {
	h, err := timeline.Load(ctx, s.vault, s.cfg.Name)
	if errors.Is(err, vault.ErrNoGroup) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if d := h.Damage(); d != nil {
		return nil, fmt.Errorf("%w; protect under another name, or repair the vault", d)
	}
	if h.Last().Sequence == 0 {
		return nil, nil
	}
	if h.GroupID() != s.cfg.ID {
		return nil, fmt.Errorf("group %s: %w", s.cfg.Name, ErrOtherDisks)
	}
	return h, nil
}

// openSource goes on with the source of before where it sees these very disks.
// Where it does not, a new one takes its place; the history is then as salvage left it.
func (s *session) openSource(ctx context.Context, h *timeline.History) (*timeline.History, error) {
	src, fits, err := s.way.adopt(s.disks)
	if err != nil {
		if src != nil {
			err = errors.Join(err, src.Close())
		}
		return h, err
	}
	s.source = src
	if fits {
		return h, nil
	}
	if src != nil {
		if h, err = s.salvage(ctx, h); err != nil {
			return h, errors.Join(err, src.Close())
		}
		if err := src.Close(); err != nil {
			return h, err
		}
	}
	s.source, err = s.way.renew(s.disks)
	return h, err
}

func (s *session) openDisks() ([]reader, error) {
	var out []reader
	for _, d := range s.disks {
		f, err := d.open()
		if err != nil {
			return nil, errors.Join(err, closeAll(out))
		}
		out = append(out, f)
	}
	return out, nil
}

// resume continues the history where it ended: in the ring, if it is the ring
// that the newest segment knows; otherwise with the whole of every disk unknown.
func (s *session) resume(ctx context.Context, h *timeline.History) error {
	var whole []block.DiskRange
	for i, d := range s.cfg.Disks {
		whole = append(whole, block.DiskRange{Disk: i, Range: block.Range{Len: d.Size}})
	}
	s.engine = fill.New(s.sizes())
	s.mode = newMode(s.source.PayloadCaptured())
	s.mode.told = s.stats
	s.stats.moved(s.mode.now, moveOpened)
	s.stats.begun()
	s.place, s.skipBefore, s.seenDrops = s.source.Consumer(), 0, 0
	s.gapOpen, s.settled = false, 0
	c, err := s.source.Counters()
	if err != nil {
		return err
	}
	s.untold = untoldOf(c)
	if !s.source.PayloadCaptured() {
		s.metadataMode()
	} else {
		s.health.Clear("metadata-mode", s.cfg.Name)
	}
	cause := stream.CauseInitial
	s.stats.known()
	if h != nil {
		s.carry(h)
		s.takeOverMarks(undecided(h))
		if s.continues(h) {
			if !s.gapOpen {
				return s.changedMeanwhile()
			}
			s.stats.unknown()
			if err := s.source.SetEnds(true); err != nil { // before the producer's place is noted
				return err
			}
			for i := range s.cfg.Disks {
				s.reopen(i, h.Unknown(i))
			}
			s.useBase(ctx, h)
			return s.changedMeanwhile()
		}
		if s.stretchEnd != 0 {
			cause = stream.CauseContinuity
		}
		s.useBase(ctx, h)
	}
	s.gapCause = cause
	s.lastTime = max(s.lastTime, 1)
	return s.openGap(cause, whole, s.source.Drops())
}

// changedMeanwhile looks whether the disks still map to what they did when the
// last session looked at them, and whether only writes happened since.
func (s *session) changedMeanwhile() error {
	if note := s.source.Note(); note == "" || note == s.fingerprint() {
		return nil
	}
	s.place = max(s.place, s.skipBefore) // where the position is what it is
	return s.unknownTerritory("a disk was changed, or written past the capture, while nobody looked")
}

// metadataMode says that payloads are not captured, and why.
func (s *session) metadataMode() {
	s.health.Raise(health.Condition{Code: "metadata-mode", Severity: health.Warning, Subject: s.cfg.Name,
		Detail: fmt.Sprintf("Payloads are not captured: only the ranges of writes are kept, and points exist only while the disks are idle. The reason: %v.", s.source.WhyNoPayload()),
		Remedy: "Restart the daemon to try again; tidemark doctor says what this machine can do."})
}

// continues says whether the tap's ring is the one that the history ends in, and
// takes over where in it that is. A consumer beyond the newest segment says that
// what was between them is lost.
func (s *session) continues(h *timeline.History) bool {
	last := h.Last()
	if last.Source.Ring != s.source.Identity() || s.source.Consumer() > source.Place(last.Source.Place) {
		return false
	}
	s.skipBefore, s.seenDrops = source.Place(last.Source.Place), last.Source.Drops
	s.gapSince, s.settled = last.GapSince, last.Settled
	s.gapOpen = last.Settled == 0
	return true
}

// carry takes over what the history says of the past.
func (s *session) carry(h *timeline.History) {
	last := h.Last()
	s.previous, s.position, s.lastTime = last, last.Last, last.Time
	for _, m := range h.Bookmarks() {
		s.names[m.Bookmark] = true
	}
	if st := h.Stretches(); len(st) > 0 {
		s.stretchEnd = st[len(st)-1].Last
		s.pending.durable = s.stretchEnd
	}
}

// reopen makes blocks unknown again that were so when the last session ended.
// Any drop on them lies before the producer's place now.
func (s *session) reopen(i int, ranges []block.Range) {
	var open []block.DiskRange
	for _, r := range ranges {
		open = append(open, block.DiskRange{Disk: i, Range: r})
	}
	s.engine.Open(open, fill.Place(s.source.Producer()))
}

// useBase has fills compared with the newest point that the vault holds, so
// that only what differs is stored again.
func (s *session) useBase(ctx context.Context, h *timeline.History) {
	s.compareWith(s.newest(ctx, h))
}

// base is the newest point of a history, disk by disk; nil where there is none.
type base struct {
	at    stream.Position
	views []block.Device
}

// newest changes nothing of the session and may run beside it.
func (s *session) newest(ctx context.Context, h *timeline.History) base {
	st := h.Stretches()
	if len(st) == 0 {
		return base{}
	}
	b := base{at: st[len(st)-1].Last, views: make([]block.Device, len(s.cfg.Disks))}
	for i := range s.cfg.Disks {
		v, err := h.View(ctx, i, b.at)
		if err != nil {
			s.log.Warn("no comparison with the vault: everything is copied", "group", s.cfg.Name, "error", err)
			break
		}
		b.views[i] = v
	}
	return b
}

func (b base) close() {
	for _, v := range b.views {
		if c, ok := v.(io.Closer); ok {
			_ = c.Close() // nothing was written to it
		}
	}
}

// compareWith hands the fills a base, which is closed where it is of no use: while
// fills are under way, and to a session that only salvages and fills nothing.
func (s *session) compareWith(b base) {
	if len(b.views) == 0 || s.filler == nil || len(s.filler.out) > 0 {
		b.close()
		return
	}
	if err := s.filler.closeBases(); err != nil {
		s.log.Warn("what the gap before was compared with", "group", s.cfg.Name, "error", err)
	}
	s.filler.base = b.at
	copy(s.filler.bases, b.views)
}

func (s *session) diskNames() (out []string) {
	for _, d := range s.cfg.Disks {
		out = append(out, d.Name)
	}
	return out
}
