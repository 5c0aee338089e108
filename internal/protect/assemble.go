package protect

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
	"tidemark/internal/disk"
	"tidemark/internal/fill"
	"tidemark/internal/health"
	"tidemark/internal/segment"
	"tidemark/internal/spool"
	"tidemark/internal/stream"
	"tidemark/internal/tap"
	"tidemark/internal/timeline"
	"tidemark/internal/vault"
)

// Env is what a daemon lends its groups.
type Env struct {
	StateDir string // groups live in groups/NAME below it
	Instance string // names the pins that are this daemon's
	Holder   vault.Holder
	Log      *slog.Logger
}

func (e *Env) dir(group string) string { return filepath.Join(e.StateDir, "groups", group) }

// assemble opens everything that a session needs, in this order, and undoes it
// in reverse where a step fails:
//
//  1. the vault and the right to write the group's history;
//  2. the spool: what is in it goes to the vault, whatever became of the disks;
//  3. the disks, found again by their identity;
//  4. the history;
//  5. the tap: the pinned one if it fits, otherwise a new one and a gap.
//
// Where the pinned tap does not fit, or disks are gone, what its ring holds is
// moved into the history before anything else (salvage).
func assemble(ctx context.Context, env *Env, cfg *Config, h *health.Set) (s *session, err error) {
	settings, err := cfg.Settings.withDefaults()
	if err != nil {
		return nil, err
	}
	s = &session{cfg: cfg, settings: settings, stateDir: env.StateDir, log: env.Log, health: h, waiters: map[uint64]*waiter{}, names: map[string]bool{},
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
		return s, errors.Join(err, s.salvagePinned(ctx, env), noteGone(env, cfg))
	}
	history, err := s.history(ctx)
	if err != nil {
		return s, err
	}
	if history, err = s.openTap(ctx, env, history); err != nil {
		return s, err
	}
	undo = append(undo, s.tap.Close)
	if err = tap.SetOwner(env.Instance, cfg.Name, env.StateDir); err != nil {
		return s, err
	}
	files, err := s.openDisks()
	if err != nil {
		return s, err
	}
	s.filler = newFiller(files, settings.FillRate, s.tap.Producer)
	undo = append(undo, func() error { return errors.Join(closeAll(files), s.filler.closeBases()) })
	return s, s.resume(ctx, history)
}

// identify finds the disks, and notes how they are called in segments. Where it
// fails they are called as they were when they were protected.
func (s *session) identify() (err error) {
	s.disks, err = findDisks(s.cfg)
	for i, d := range s.cfg.Disks {
		id := d.Identity
		if err == nil {
			id = s.disks[i].Identity
		}
		text, failed := json.Marshal(id)
		if failed != nil {
			return failed
		}
		s.identities = append(s.identities, string(text))
	}
	return err
}

func closeAll(files []*os.File) error {
	var errs []error
	for _, f := range files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// findDisks looks the group's disks up under the names they have now.
func findDisks(cfg *Config) ([]*disk.Info, error) {
	var out []*disk.Info
	for _, d := range cfg.Disks {
		i, err := find(d)
		if err != nil {
			return nil, err
		}
		if i.Size != d.Size {
			return nil, fmt.Errorf("disk %s has %d bytes and had %d when it was protected: unprotect the group and protect it again: %w", d.Name, i.Size, d.Size, ErrOffline)
		}
		out = append(out, i)
	}
	return out, nil
}

func find(d DiskConfig) (*disk.Info, error) {
	if i, err := disk.Inspect(d.Path); err == nil {
		if sameDisk(d.Identity, i.Identity) {
			return i, nil
		}
		resized := i.Identity
		resized.Size = d.Identity.Size
		if i.Size > 0 && sameDisk(d.Identity, resized) {
			return i, nil // findDisks says what it is about its size
		}
	}
	names, err := os.ReadDir("/sys/class/block")
	if err != nil {
		return nil, err
	}
	for _, n := range names {
		i, err := disk.Inspect("/dev/" + strings.ReplaceAll(n.Name(), "!", "/"))
		if err != nil {
			continue // without medium, or gone
		}
		if sameDisk(d.Identity, i.Identity) {
			return i, nil
		}
	}
	return nil, fmt.Errorf("disk %s (%s) is not on this machine: %w", d.Name, d.Identity, ErrOffline)
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

func (s *session) targets() []tap.Target {
	var out []tap.Target
	for i, d := range s.disks {
		out = append(out, tap.Target{Name: s.cfg.Disks[i].Name, Whole: d.WholeDev, Start: d.Start, Len: d.Size, DiskSeq: d.DiskSeq,
			BlockSize: s.cfg.Disks[i].BlockSize, BioBased: d.BioBased, Pass: passthrough(d, s.log)})
	}
	return out
}

// passthrough says how to tell the commands that a disk gets past the block layer.
func passthrough(d *disk.Info, log *slog.Logger) tap.Passthrough {
	var kind uint32
	switch d.Kind {
	case disk.Loop, disk.DM, disk.MD, disk.Zram, disk.Brd, disk.Pmem, disk.NBD, disk.Ublk:
		return tap.Passthrough{Kind: tap.PassNone}
	case disk.SCSI:
		kind = tap.PassSCSI
	case disk.NVMe:
		kind = tap.PassNVMe
	default:
		return tap.Passthrough{Kind: tap.PassUnknown}
	}
	p, err := tap.FindPassthrough(kind)
	if err != nil {
		log.Warn("commands past the block layer cannot be told apart: each that sends data counts as a write", "disk", d.Name, "error", err)
	}
	return p
}

// openTap adopts the pinned tap where it sees these very disks. Where it does
// not, a new one takes its place; the history is then as salvage left it.
func (s *session) openTap(ctx context.Context, env *Env, h *timeline.History) (*timeline.History, error) {
	pin := s.cfg.Name
	t, err := tap.Adopt(env.Instance, pin)
	switch {
	case err == nil && sameTargets(t.Targets(), s.targets()):
		s.tap = t
		return h, nil
	case err == nil:
		s.tap = t
		if h, err = s.salvage(ctx, h); err != nil {
			return h, errors.Join(err, t.Close())
		}
		err = t.Remove()
	case passing(err):
		return h, err // its ring may hold what is nowhere else
	default:
		if !errors.Is(err, tap.ErrNoPins) {
			s.log.Warn("the pinned tap cannot be taken over", "group", s.cfg.Name, "error", err)
		}
		err = tap.Discard(env.Instance, pin)
	}
	if err != nil {
		return h, err
	}
	s.tap, err = tap.Start(tap.Config{Instance: env.Instance, Group: pin, RingBytes: s.settings.RingBytes, Targets: s.targets(),
		Options: tap.Options{MetadataOnly: s.settings.Metadata}})
	return h, err
}

// passing says whether an error tells of a lack that waiting may mend.
func passing(err error) bool {
	for _, e := range []error{unix.ENOMEM, unix.EMFILE, unix.ENFILE, unix.EAGAIN, unix.EINTR, unix.EIO} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func sameTargets(a, b []tap.Target) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

func (s *session) openDisks() ([]*os.File, error) {
	var out []*os.File
	for _, d := range s.disks {
		f, err := openDirect(d.Path)
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
	s.mode = newMode(s.tap.PayloadCaptured())
	s.place, s.skipBefore, s.seenDrops = s.tap.Consumer(), 0, 0
	s.gapOpen, s.settled = false, 0
	c, err := s.tap.Counters()
	if err != nil {
		return err
	}
	s.untold = untoldOf(c)
	if !s.tap.PayloadCaptured() {
		s.metadataMode()
	} else {
		s.health.Clear("metadata-mode", s.cfg.Name)
	}
	cause := stream.CauseInitial
	if h != nil {
		s.carry(h)
		if s.continues(h) {
			if !s.gapOpen {
				return s.changedMeanwhile()
			}
			if err := s.tap.SetEnds(true); err != nil { // before the producer's place is noted
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
	return s.openGap(cause, whole, s.tap.Drops())
}

// changedMeanwhile looks whether the disks still map to what they did when the
// last session looked at them, and whether only writes happened since.
func (s *session) changedMeanwhile() error {
	if note := s.tap.Note(); note == "" || note == s.fingerprint() {
		return nil
	}
	s.place = max(s.place, s.skipBefore) // where the position is what it is
	return s.unknownTerritory("a disk was changed, or written past the capture, while nobody looked")
}

// noteGone has changedMeanwhile find a change where disks that are not as they
// were come back to the pinned tap.
func noteGone(env *Env, cfg *Config) error {
	err := tap.SetNote(env.Instance, cfg.Name, "gone")
	if errors.Is(err, tap.ErrNoPins) || errors.Is(err, tap.ErrLayout) {
		return nil // there will be another tap
	}
	return err
}

// metadataMode says that payloads are not captured, and why.
func (s *session) metadataMode() {
	s.health.Raise(health.Condition{Code: "metadata-mode", Severity: health.Warning, Subject: s.cfg.Name,
		Detail: fmt.Sprintf("Payloads are not captured: only the ranges of writes are kept, and points exist only while the disks are idle. The reason: %v.", s.tap.WhyNoPayload()),
		Remedy: "Restart the daemon to try again; tidemark doctor says what this machine can do."})
}

// continues says whether the tap's ring is the one that the history ends in, and
// takes over where in it that is. A consumer beyond the newest segment says that
// what was between them is lost.
func (s *session) continues(h *timeline.History) bool {
	last := h.Last()
	if last.Source.Ring != s.tap.Identity() || s.tap.Consumer() > tap.Place(last.Source.Place) {
		return false
	}
	s.skipBefore, s.seenDrops = tap.Place(last.Source.Place), last.Source.Drops
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
	s.engine.Open(open, fill.Place(s.tap.Producer()))
}

// useBase has fills compared with the newest point that the vault holds, so
// that only what differs is stored again.
func (s *session) useBase(ctx context.Context, h *timeline.History) {
	st := h.Stretches()
	if len(st) == 0 || len(s.filler.out) > 0 {
		return
	}
	if err := s.filler.closeBases(); err != nil {
		s.log.Warn("what the gap before was compared with", "group", s.cfg.Name, "error", err)
	}
	s.filler.base = st[len(st)-1].Last
	for i := range s.cfg.Disks {
		v, err := h.View(ctx, i, s.filler.base)
		if err != nil {
			s.log.Warn("no comparison with the vault: everything is copied", "group", s.cfg.Name, "error", err)
			return
		}
		s.filler.bases[i] = v
	}
}
