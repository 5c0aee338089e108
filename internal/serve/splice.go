package serve

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
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
// what the served device is called; "" takes the mapped device's own.
func (s *Server) Splice(ctx context.Context, path, name, front string) (Info, error) {
	s.changes.Lock()
	defer s.changes.Unlock()
	d, err := s.spliceIn(ctx, path, name, front)
	if err != nil {
		return Info{}, err
	}
	return s.info(d), nil
}

func (s *Server) spliceIn(ctx context.Context, path, name, front string) (*Device, error) {
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
	spec := Spec{Name: name, Backing: lower, Front: front, Splice: sp}
	d, err := s.makeSpliced(ctx, c, spec)
	if err != nil {
		return nil, errors.Join(err, sp.Remove(c))
	}
	return d, nil
}

// spliceable finds the mapped device, and refuses one that this process needs.
func (s *Server) spliceable(path string) (dm.ID, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return dm.ID{}, fmt.Errorf("%s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return dm.ID{}, fmt.Errorf("%w: %s is not a block device", ErrRefused, path)
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
	if err := s.save(record{Spec: spec}); err != nil {
		return nil, err
	}
	err = s.bring(ctx, d, nil)
	if err == nil {
		err = s.save(record{Spec: spec, Made: true, Memory: d.served.memory()})
		if err == nil {
			err = s.lead(c, d)
		}
		if err != nil {
			err = errors.Join(err, s.take(ctx, d))
		}
	}
	if err != nil {
		return nil, errors.Join(err, s.forgotten(spec.Name))
	}
	s.mu.Lock()
	s.devices[spec.Name] = d
	s.mu.Unlock()
	return d, nil
}

// lead swaps the mapped device's table for one that leads to the served device.
func (s *Server) lead(c *dm.Control, d *Device) error {
	major, minor, err := numberOf(d.served.kernel())
	if err != nil {
		return err
	}
	return d.spec.Splice.In(c, major, minor)
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
	d.spec.Splice.Upper = strconv.Itoa(int(major)) + ":" + strconv.Itoa(int(minor))
	if err := d.spec.Splice.Check(c); errors.Is(err, splice.ErrReplaced) {
		return s.replaced(ctx, c, d)
	} else if err != nil {
		return err
	}
	return nil
}

// replaced begins anew where somebody else has given the volume another table:
// what was written since is not known.
func (s *Server) replaced(ctx context.Context, c *dm.Control, d *Device) error {
	sp, name, front := d.spec.Splice, d.spec.Name, d.spec.Front
	s.env.Log.Warn("a spliced volume has got another table", "device", name, "volume", sp.Name)
	// The kernel still tears down the table that was in use when the other one already is.
	if err := letGo(ctx, func() error { return s.take(ctx, d) }); err != nil {
		return err // and the next look tries again
	}
	err := letGo(ctx, func() error { return sp.Remove(c) })
	if err == nil {
		err = s.forgotten(name)
	}
	var fresh *Device
	if err == nil {
		fresh, err = s.spliceIn(ctx, fmt.Sprintf("/dev/dm-%d", sp.Minor), name, front)
	}
	if err != nil {
		d.set(func() { d.spec.Splice = nil })
		d.health.Raise(health.Condition{Code: "splice-lost", Severity: health.Error, Subject: name,
			Detail: fmt.Sprintf("The volume %s has got another table and leads past Tidemark: %v.", sp.Name, err),
			Remedy: "Mend what it names, then: tidemark device rm " + name + "; tidemark device splice /dev/mapper/" + sp.Name + "."})
		s.mu.Lock()
		s.devices[name] = d
		s.mu.Unlock()
		return nil
	}
	fresh.health.Raise(health.Condition{Code: "splice-replaced", Severity: health.Info, Subject: name,
		Detail: fmt.Sprintf("The volume %s got another table, by LVM as a rule, and was spliced again: its change map begins a new generation.", sp.Name),
		Remedy: "Take a full copy next."})
	return nil
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
	if err := letGo(ctx, func() error { return sp.Remove(c) }); err != nil {
		return err
	}
	return s.forgotten(name)
}

// watch looks at the spliced volumes whenever the kernel tells of one, and every
// few seconds in case it does not.
func (s *Server) watch(ctx context.Context) {
	events := make(chan string, 64)
	s.watching.Go(func() {
		disk.Listen(ctx, func(e disk.Uevent) {
			if e.Name != "" && !strings.HasPrefix(e.Name, "dm-") {
				return
			}
			select {
			case events <- e.Name:
			default: // there are enough of them to make us look
			}
		})
	})
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-events:
		case <-tick.C:
		}
		if slices.ContainsFunc(s.list(), func(d *Device) bool { return d.now().spec.Splice != nil }) {
			s.checkSplices(ctx)
		}
	}
}

func (s *Server) checkSplices(ctx context.Context) {
	if !s.changes.TryLock() { // a splice is being made; the next tick looks again
		return
	}
	defer s.changes.Unlock()
	c, err := dm.Open()
	if err != nil {
		return
	}
	defer c.Close()
	for _, d := range s.list() {
		if d.spec.Splice == nil || d.served == nil {
			continue
		}
		if err := d.spec.Splice.Check(c); errors.Is(err, splice.ErrReplaced) {
			if err := s.replaced(ctx, c, d); err != nil {
				s.env.Log.Error("a spliced volume has got another table", "device", d.spec.Name, "error", err)
			}
		}
	}
}
