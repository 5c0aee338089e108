package serve

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"tidemark/internal/disk"
	"tidemark/internal/dm"
	"tidemark/internal/health"
	"tidemark/internal/splice"
)

// A spliced volume leads to its served device until it gets another table: LVM
// extends, moves or refreshes it, a guard gives it back, the machine is started
// anew. From then on it is written to past every filter. What the filters keep
// is declared lost before anything else is done, and the volume is spliced again,
// as a new generation, as soon as that can be.

// errBypassed is what spoils snapshots and histories.
var errBypassed = errors.New("the volume got another table and was written to past Tidemark")

func replacedOrGone(err error) bool {
	return errors.Is(err, splice.ErrReplaced) || errors.Is(err, dm.ErrAbsent)
}

// past: the volume of the device leads past Tidemark.
func (d *Device) past() bool { return d.givenBack || d.lost }

// Leads says whether users of a device still get to it; splice.ErrReplaced or
// dm.ErrAbsent: its volume leads elsewhere. One that is offline is not asked.
func (s *Server) Leads(name string) error {
	d, err := s.find(name)
	if err != nil {
		return err
	}
	now := d.now()
	if now.spec.Splice == nil || now.served == nil {
		return nil
	}
	if now.resumed {
		return fmt.Errorf("%s may have had another table for a while: %w", now.spec.Splice.Name, splice.ErrReplaced)
	}
	c, err := dm.Open()
	if err != nil {
		return nil // nobody has seen it lead elsewhere
	}
	defer c.Close()
	if err := now.spec.Splice.Check(c); replacedOrGone(err) {
		return err
	}
	return nil
}

// resumed notes that somebody has put a table of a volume in use: the kernel tells
// of that and not of which table it was, and by now it may be ours again.
func (s *Server) resumed(e disk.Uevent) {
	for _, d := range s.list() {
		d.set(func() {
			if sp := d.spec.Splice; sp != nil && d.heard > 0 && (e.Name == "" || e.Seq > d.heard && e.Name == fmt.Sprintf("dm-%d", sp.Minor)) {
				d.resumed = true
			}
		})
	}
}

// doubted begins anew where the volume leads to its device, and may have led past
// it for a while.
func (s *Server) doubted(d *Device) {
	name, volume := d.spec.Name, d.spec.Splice.Name
	s.env.Log.Warn("somebody resumed a spliced volume, which may have had another table meanwhile", "device", name, "volume", volume)
	d.set(func() { d.resumed = false }) // first: the next one is to be noted
	s.bypassed(d)
	d.part.Changes.Reset()
	d.health.Raise(health.Condition{Code: "splice-replaced", Severity: health.Info, Subject: name,
		Detail: fmt.Sprintf("Somebody suspended and resumed the volume %s, and nobody can tell whether it had another table meanwhile: its change map begins a new generation.", volume),
		Remedy: "Take a full copy next."})
}

// bypassed declares lost what the filters of a device keep.
func (s *Server) bypassed(d *Device) {
	s.mu.Lock()
	for _, k := range s.captures {
		for i := range k.Disks {
			if k.ring != nil && k.Disks[i].Name == d.spec.Name {
				k.ring.Distrust(i, errBypassed)
			}
		}
	}
	s.mu.Unlock()
	if err := s.set.Bypassed(d.spec.Name, errBypassed); err != nil {
		s.env.Log.Error("spoiling the snapshots of a volume that was written past", "device", d.spec.Name, "error", err)
	}
}

// spliceAfterRestart splices a volume again after a start of the machine.
func (s *Server) spliceAfterRestart(ctx context.Context, d *Device) error {
	err := errors.Join(s.front(d.spec.Front).forget(ctx, d.spec, nil), d.claim.Close(), s.eraseChanges(d.spec.Name))
	d.claim = nil
	if err != nil {
		return err
	}
	c, err := dm.Open()
	if err != nil {
		return err
	}
	defer c.Close()
	s.spliceAnew(ctx, c, d)
	return nil
}

// replaced begins anew where somebody else has given the volume another table:
// what was written since is not known.
func (s *Server) replaced(ctx context.Context, c *dm.Control, d *Device) error {
	s.env.Log.Warn("a spliced volume has got another table", "device", d.spec.Name, "volume", d.spec.Splice.Name)
	s.bypassed(d)
	// The kernel still tears down the table that was in use when the other one already is.
	if err := letGo(ctx, func() error { return s.take(ctx, d) }); err != nil {
		return err // and the next look tries again
	}
	d.unguard()
	err := errors.Join(s.eraseChanges(d.spec.Name), d.claim.Close())
	d.claim = nil
	if err != nil {
		s.env.Log.Warn("ending a splice whose volume has another table", "device", d.spec.Name, "error", err)
	}
	s.spliceAnew(ctx, c, d)
	return nil
}

// spliceAnew splices a volume again whose device has ended, or says that the
// volume leads past Tidemark. Then the device is tried again.
func (s *Server) spliceAnew(ctx context.Context, c *dm.Control, d *Device) {
	name, volume := d.spec.Name, d.spec.Splice.Name
	first := !d.lost
	d.set(func() { d.lost, d.tried = true, time.Now() })
	fresh, err := s.again(ctx, c, d, first)
	if err == nil {
		fresh.health.Raise(health.Condition{Code: "splice-replaced", Severity: health.Info, Subject: name,
			Detail: fmt.Sprintf("The volume %s got another table, by LVM or at the start of the machine, and was spliced again: its change map begins a new generation.", volume),
			Remedy: "Take a full copy next."})
		return
	}
	if _, gone := s.load(name); gone != nil { // the next daemon is to try it too
		if err := s.save(record{Spec: d.spec, Made: true}); err != nil {
			s.env.Log.Warn("remembering a splice that was lost", "device", name, "error", err)
		}
	}
	d.health.Raise(health.Condition{Code: "splice-lost", Severity: health.Error, Subject: name,
		Detail: fmt.Sprintf("The volume %s has got another table and leads past Tidemark: %v.", volume, err),
		Remedy: "Mend what it names: it is tried again every few seconds. Or: tidemark device rm " + name + "."})
	s.mu.Lock()
	s.devices[name] = d
	s.mu.Unlock()
}

// again splices the volume, whatever its number is by now. At first what is just
// being taken down is waited for.
func (s *Server) again(ctx context.Context, c *dm.Control, d *Device, first bool) (*Device, error) {
	sp := d.spec.Splice
	err := sp.Remove(c)
	if err != nil && first {
		err = letGo(ctx, func() error { return sp.Remove(c) })
	}
	if err != nil {
		return nil, err
	}
	info, err := c.Info(dm.Named(sp.Name))
	if err != nil {
		return nil, err
	}
	if info.UUID != sp.UUID {
		return nil, fmt.Errorf("%s is another volume (%s, not %s)", sp.Name, info.UUID, sp.UUID)
	}
	node, err := dm.MakeNode(info)
	if err != nil {
		return nil, err
	}
	return s.spliceIn(ctx, node, d.spec.Name, d.spec.Front, d.spec.GiveBack)
}

// forgetLost removes what is left of a splice that was lost.
func (s *Server) forgetLost(d *Device) error {
	c, err := dm.Open()
	if err != nil {
		return err
	}
	defer c.Close()
	return errors.Join(d.spec.Splice.Remove(c), s.forgotten(d.spec.Name))
}

// lostEvery is how often a splice that was lost is tried again at most.
const lostEvery = time.Second

// checkSplices looks where the spliced volumes lead.
func (s *Server) checkSplices(ctx context.Context) {
	if !s.changes.TryLock() { // a device is being made or removed, which waits for nothing of this one
		time.AfterFunc(afterArrival, s.changed.give)
		return
	}
	defer s.changes.Unlock()
	c, err := dm.Open()
	if err != nil {
		return
	}
	defer c.Close()
	for _, d := range s.list() {
		switch {
		case d.lost && time.Since(d.tried) >= lostEvery:
			s.spliceAnew(ctx, c, d)
		case d.spec.Splice == nil || d.served == nil:
		case replacedOrGone(d.spec.Splice.Check(c)):
			if err := s.replaced(ctx, c, d); err != nil {
				s.env.Log.Error("a spliced volume has got another table", "device", d.spec.Name, "error", err)
			}
		case d.now().resumed:
			s.doubted(d)
		}
	}
}

var pvmove = regexp.MustCompile(`[^-]-pvmove[0-9]+$`) // a dash of a name itself is doubled

// movedBy is the mirror over which LVM moves blocks of a mapped device, "" where
// it moves none. LVM removes it in the end: nothing of ours may lie on it.
func movedBy(minor uint32) string {
	names, _ := filepath.Glob(fmt.Sprintf("/sys/block/dm-%d/slaves/*/dm/name", minor)) // a pattern without faults
	for _, path := range names {
		if text, err := os.ReadFile(path); err == nil && pvmove.MatchString(strings.TrimSpace(string(text))) {
			return strings.TrimSpace(string(text))
		}
	}
	return ""
}
