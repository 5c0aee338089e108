package serve

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/disk"
	"tidemark/internal/dm"
	"tidemark/internal/health"
	"tidemark/internal/splice"
)

// ErrRefused: the device cannot be spliced; the text says why and what else can be done.
var ErrRefused = splice.ErrRefused

// Splice puts a served device under a mapped device that is in use. name is
// what the served device is called; "" takes the mapped device's own. After
// giveBack without a daemon the volume gets its own table back; 0: never.
func (s *Server) Splice(ctx context.Context, path, name, front string, giveBack time.Duration) (Info, error) {
	s.changes.Lock()
	defer s.changes.Unlock()
	if giveBack < 0 || giveBack > giveBackMax {
		return Info{}, fmt.Errorf("%w: giving back after %v: want 0, for never, to %v", ErrRefused, giveBack, giveBackMax)
	}
	d, err := s.spliceIn(ctx, path, name, front, giveBack)
	if err != nil {
		return Info{}, err
	}
	return s.info(d), nil
}

// giveBackMax is the longest that can be asked for, but for never.
const giveBackMax = 7 * 24 * time.Hour

func (s *Server) spliceIn(ctx context.Context, path, name, front string, giveBack time.Duration) (*Device, error) {
	id, err := s.spliceable(path)
	if err != nil {
		return nil, err
	}
	c, err := dm.Open()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if front, err = s.outliving(front); err != nil {
		return nil, err
	}
	sp, lower, err := splice.Prepare(c, id)
	if err != nil {
		return nil, err
	}
	if name == "" {
		name = sp.Name
	}
	if err := s.forgetPast(sp); err != nil {
		return nil, errors.Join(err, sp.Remove(c))
	}
	d, err := s.makeSpliced(ctx, c, Spec{Name: name, Backing: lower, Front: front, Splice: sp, GiveBack: giveBack})
	if err != nil {
		return nil, errors.Join(err, sp.Remove(c))
	}
	return d, nil
}

// forgetPast makes room for a splice of a volume that leads past Tidemark: it
// was given back, or got another table.
func (s *Server) forgetPast(sp *splice.Splice) error {
	for _, d := range s.list() {
		if d.past() && d.spec.Splice.Name == sp.Name {
			return s.forgotten(d.spec.Name)
		}
	}
	return nil
}

// spliceable finds the mapped device, and refuses one that this process needs.
func (s *Server) spliceable(path string) (dm.ID, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return dm.ID{}, fmt.Errorf("%s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return dm.ID{}, fmt.Errorf("%w: %s is not a block device: name a device-mapper device, as /dev/VG/LV", ErrRefused, path)
	}
	info, err := disk.Inspect(path)
	if err != nil {
		return dm.ID{}, err
	}
	if info.Mapping == nil || info.Partition {
		return dm.ID{}, fmt.Errorf("%w: %s is no device-mapper device: there is no table to swap; use the tap, or put the data on an LVM volume", ErrRefused, path)
	}
	folders := []string{s.env.StateDir}
	if self, err := os.Executable(); err == nil {
		folders = append(folders, self)
	}
	if c := disk.HoldsRefusal(info, folders...); c != nil {
		return dm.ID{}, fmt.Errorf("%w: %s the server would wait for itself", ErrRefused, c.Detail)
	}
	if mirror := movedBy(unix.Minor(st.Rdev)); mirror != "" {
		return dm.ID{}, fmt.Errorf("%w: LVM moves blocks of %s just now (%s), and could not end that: wait until pvmove has ended", ErrRefused, path, mirror)
	}
	return dm.Numbered(unix.Major(st.Rdev), unix.Minor(st.Rdev)), nil
}

// outliving chooses a front whose requests wait for the next process.
func (s *Server) outliving(front string) (string, error) {
	able := []string{FrontUblk, FrontNBD}
	var why []error
	for _, name := range able {
		if front != "" && front != Auto && front != name {
			continue
		}
		err := s.fronts[name].probe()
		if err == nil {
			return name, nil
		}
		why = append(why, fmt.Errorf("%s: %w", name, err))
	}
	if len(why) == 0 {
		return "", fmt.Errorf("%q: %w: a mounted volume needs a front that outlives its server: %s", front, ErrFront, strings.Join(able, " or "))
	}
	return "", fmt.Errorf("%w: %w", ErrFront, errors.Join(why...))
}

// makeSpliced is Create for a splice. Once the volume leads to the device the
// record must say so: it is written before.
func (s *Server) makeSpliced(ctx context.Context, c *dm.Control, spec Spec) (d *Device, err error) {
	if err := s.check(&spec); err != nil {
		return nil, err
	}
	if spec.ID, err = newID(); err != nil {
		return nil, err
	}
	d = &Device{spec: spec}
	if err := s.claim(ctx, d); err != nil {
		return nil, err
	}
	claim := d.claim // of a device that is not returned
	defer func() {
		if err != nil {
			err = errors.Join(err, s.forgotten(spec.Name), claim.Close())
		}
	}()
	if err := s.save(record{Spec: spec}); err != nil {
		return nil, err
	}
	// What is left of an earlier splice under this name was written past.
	if err := s.set.Bypassed(spec.Name, errBypassed); err != nil {
		return nil, err
	}
	if err := s.bring(ctx, d, nil); err != nil {
		return nil, err
	}
	if err := s.lead(c, d); err != nil {
		d.unguard()
		return nil, errors.Join(err, s.take(ctx, d))
	}
	s.mu.Lock()
	s.devices[spec.Name] = d
	s.mu.Unlock()
	return d, nil
}

// claim takes the right to serve a spliced device, from a guard if need be.
func (s *Server) claim(ctx context.Context, d *Device) error {
	claim, err := splice.OpenClaim(d.spec.Splice)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, claimWait)
	defer cancel()
	if err := claim.Take(ctx); err != nil {
		return errors.Join(fmt.Errorf("%s: %w", d.spec.Splice.Name, err), claim.Close())
	}
	d.claim = claim
	return nil
}

// claimWait is how long a guard may take to make way: longer than each of its steps.
const claimWait = stepWait + 10*time.Second

// lead swaps the mapped device's table for one that leads to the served device.
// Before that it is guarded, and its record says what it leads to.
func (s *Server) lead(c *dm.Control, d *Device) error {
	major, minor, err := numberOf(d.served.kernel())
	if err != nil {
		return err
	}
	d.spec.Splice.Upper = splice.Upper(major, minor)
	if err := s.save(record{Spec: d.spec, Made: true, Memory: d.served.memory()}); err != nil {
		return err
	}
	if err := s.guard(d); err != nil {
		return err
	}
	if err := d.spec.Splice.In(c, major, minor); err != nil {
		return err
	}
	d.set(func() { d.heard = disk.Told() })
	return nil
}

func numberOf(node string) (major, minor uint32, err error) {
	var st unix.Stat_t
	if err := unix.Stat(node, &st); err != nil {
		return 0, 0, fmt.Errorf("%s: %w", node, err)
	}
	return unix.Major(st.Rdev), unix.Minor(st.Rdev), nil
}

// leadBack looks, after a restart, whether the volume still leads to the device.
func (s *Server) leadBack(ctx context.Context, d *Device) error {
	c, err := dm.Open()
	if err != nil {
		return err
	}
	defer c.Close()
	major, minor, err := numberOf(d.served.kernel())
	if err != nil {
		return err
	}
	d.spec.Splice.Upper = splice.Upper(major, minor)
	told := disk.Told()
	if err := d.spec.Splice.Check(c); replacedOrGone(err) {
		return s.replaced(ctx, c, d)
	} else if err != nil {
		return err
	}
	d.set(func() { d.heard, d.resumed = told, false })
	if err := s.guard(d); err != nil { // the volume works, which is more
		s.env.Log.Error("a spliced volume has no guard", "device", d.spec.Name, "error", err)
		s.unguarded(d, err)
	}
	return nil
}

// takeOver is the beginning of bringing a splice back: a guard that is at work
// makes way, or has given the volume back, which is noted in the record.
func (s *Server) takeOver(ctx context.Context, d *Device, r record) error {
	if d.spec.Splice == nil {
		return nil
	}
	if err := s.claim(ctx, d); err != nil {
		return err
	}
	r, err := s.load(d.spec.Name) // a guard may have written it since
	if err != nil || r.GivenBack.IsZero() {
		return err
	}
	d.givenBack = true
	c, err := dm.Open()
	if err != nil {
		return err
	}
	defer c.Close()
	at := r.GivenBack.Format(time.DateTime)
	s.env.Log.Warn("a spliced volume was given its own table back, as there was no daemon", "device", d.spec.Name, "volume", d.spec.Splice.Name, "at", at)
	d.health.Raise(health.Condition{Code: "splice-given-back", Severity: health.Error, Subject: d.spec.Name,
		Detail: fmt.Sprintf("The volume %s waited for a daemon for longer than %v and got its own table back at %s: what was written to it since is in no change map and no snapshot.", d.spec.Splice.Name, d.spec.GiveBack, at),
		Remedy: fmt.Sprintf("Splice it again, which begins a new generation: tidemark device splice /dev/mapper/%s --name %s; then take a full copy. Or: tidemark device rm %[2]s.", d.spec.Splice.Name, d.spec.Name)})
	err = errors.Join(s.front(r.Spec.Front).forget(ctx, r.Spec, r.Memory), d.spec.Splice.Remove(c), s.eraseChanges(d.spec.Name), d.claim.Close())
	if err != nil { // it is in nobody's way
		s.env.Log.Warn("removing what was under a volume that was given back", "device", d.spec.Name, "error", err)
	}
	d.claim = nil
	return nil
}

// handOver leaves a device that cannot be brought back to a guard: requests must not wait for ever.
func (s *Server) handOver(d *Device) {
	if d.claim == nil || d.served != nil {
		return
	}
	g, err := s.guardFor(d.spec)
	if err := errors.Join(err, d.claim.Close()); err != nil {
		s.env.Log.Error("a spliced volume has no guard", "device", d.spec.Name, "error", err)
	}
	d.claim = nil
	if g != nil {
		g.release()
	}
}

// restarted: the machine was started anew, and the volume has its own table.
func (s *Server) restarted(d *Device) bool {
	if d.spec.Splice == nil || d.givenBack {
		return false
	}
	c, err := dm.Open()
	if err != nil {
		return false
	}
	defer c.Close()
	_, err = c.Info(dm.Named(d.spec.Splice.Lower))
	return errors.Is(err, dm.ErrAbsent)
}

// letGoTime is for how long a device may be in use by what is just being taken down.
const letGoTime = 10 * time.Second

// letGo does what needs a device that nobody uses, and waits for that a while.
func letGo(ctx context.Context, do func() error) error {
	for end := time.Now().Add(letGoTime); ; {
		err := do()
		if !errors.Is(err, ErrInUse) && !errors.Is(err, dm.ErrBusy) || time.Now().After(end) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Unsplice gives the mapped device its own table back and ends the served device.
func (s *Server) Unsplice(ctx context.Context, name string) error {
	s.changes.Lock()
	defer s.changes.Unlock()
	d, err := s.find(name)
	if err != nil {
		return err
	}
	sp := d.spec.Splice
	if sp == nil {
		return fmt.Errorf("%s lies under no volume: %w: tidemark device rm ends it", name, ErrNotFound)
	}
	if err := s.held(name); err != nil {
		return err
	}
	if r, err := s.load(name); err == nil && !r.GivenBack.IsZero() { // by a guard, before this process or beside it
		return s.forgotten(name)
	}
	if d.lost {
		return s.forgetLost(d)
	}
	c, err := dm.Open()
	if err != nil {
		return err
	}
	defer c.Close()
	if d.served == nil {
		return fmt.Errorf("%s is offline, and requests that wait cannot end: start the daemon again when its disk is there: %w", name, ErrInUse)
	}
	if err := sp.Out(c, false); err != nil && !errors.Is(err, splice.ErrReplaced) {
		return err
	}
	if err := letGo(ctx, func() error { return s.take(ctx, d) }); err != nil {
		return err
	}
	d.unguard()
	if err := letGo(ctx, func() error { return sp.Remove(c) }); err != nil {
		return err
	}
	return errors.Join(s.forgotten(name), d.claim.Close())
}
