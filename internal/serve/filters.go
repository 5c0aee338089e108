package serve

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
	"tidemark/internal/filter/barrier"
	"tidemark/internal/filter/capture"
	"tidemark/internal/filter/cow"
	"tidemark/internal/filter/delay"
	"tidemark/internal/filter/fault"
	"tidemark/internal/filter/track"
	"tidemark/internal/snapshot"
	"tidemark/internal/stack"
)

// What callers branch on.
var (
	// ErrNoFilter: there is no filter of that name, or the device does not have it.
	ErrNoFilter = errors.New("no such filter")
	// ErrSetting: a filter cannot be set so.
	ErrSetting = errors.New("not a setting for the filter")
	// ErrSpoils: it can be had by force, and the text says what that spoils.
	ErrSpoils = errors.New("is not done without --force")
)

// filterAt is a filter in its place.
type filterAt struct {
	name     string
	altitude int
	driver   stack.Driver
}

// usual are the filters that every device has, the lowest first, as they are
// asked. Another filter of our own is one line here.
func usual(part *snapshot.Device) []filterAt {
	return []filterAt{
		{track.Name, track.Altitude, track.Driver(part.Changes)},
		{cow.Name, cow.Altitude, cow.Driver(func(f *cow.Filter) { part.Cow = f })},
		{barrier.Name, barrier.Altitude, barrier.Driver(func(f *barrier.Filter) { part.Barrier = f })},
	}
}

// The filters for trials, just above the disk: to all others they are the disk.
const (
	delayName, delayAltitude = "delay", 20
	errorName, errorAltitude = "error", 10
	// delayMax is the longest that a request may be held: far from what the stack takes for a stall.
	delayMax = 4 * time.Second
)

// FilterSpec is a filter that is to be put over a live device.
type FilterSpec struct {
	Name  string
	Delay time.Duration // of "delay": for which each request waits
	Range block.Range   // of "error": what fails; empty: every request
}

// trial gives a filter for trials.
func trial(spec FilterSpec) (filterAt, error) {
	if spec.Name != delayName && spec.Delay != 0 || spec.Name != errorName && !spec.Range.Empty() {
		return filterAt{}, fmt.Errorf("%s: %w: only delay has a duration, and only error a range", spec.Name, ErrSetting)
	}
	switch spec.Name {
	case delayName:
		if spec.Delay <= 0 || spec.Delay > delayMax {
			return filterAt{}, fmt.Errorf("%v: %w delay: want more than 0 and no more than %v, as in delay=10ms", spec.Delay, ErrSetting, delayMax)
		}
		return filterAt{delayName, delayAltitude, delay.Driver(func(*stack.Request) time.Duration { return spec.Delay })}, nil
	case errorName:
		return filterAt{errorName, errorAltitude, fault.Driver(func(r *stack.Request) error {
			if !spec.Range.Empty() && !r.Range.Overlaps(spec.Range) {
				return nil
			}
			return fmt.Errorf("%s of %s: the filter error is to make it fail: %w", r.Op, r.Range, unix.EIO)
		})}, nil
	}
	return filterAt{}, fmt.Errorf("%q: %w: want %s, %s, %s or %s that the device has lost, %s=DURATION or %s[=OFFSET:LENGTH]", spec.Name, ErrNoFilter,
		barrier.Name, cow.Name, track.Name, capture.Name, delayName, errorName)
}

// AttachFilter puts a filter over a live device, under load: one of its own that
// it has lost or that was taken off, or one for trials, which is gone with the daemon.
// Force attaches one that makes requests of a device fail that is open (ErrSpoils).
func (s *Server) AttachFilter(name string, spec FilterSpec, force bool) (Info, error) {
	s.changes.Lock()
	defer s.changes.Unlock()
	d, st, err := s.live(name)
	if err != nil {
		return Info{}, err
	}
	if slices.ContainsFunc(st.Filters(), func(f stack.Info) bool { return f.Name == spec.Name }) {
		return Info{}, fmt.Errorf("%s has the filter %s: %w", name, spec.Name, ErrInUse)
	}
	part := d.now().part
	own := usual(&part)
	i := slices.IndexFunc(own, func(f filterAt) bool { return f.name == spec.Name })
	switch {
	case spec.Name == capture.Name:
		err = s.captureAgain(name)
	case i >= 0 && (spec.Delay != 0 || !spec.Range.Empty()):
		err = fmt.Errorf("%s: %w: it has none", spec.Name, ErrSetting)
	case i >= 0:
		part.Changes.Resize(st.Size()) // nobody told it while the filter was away
		_, err = st.Attach(own[i].name, own[i].altitude, own[i].driver)
		if err == nil {
			d.set(func() { d.part = part })
			if spec.Name == track.Name {
				part.Changes.Sighted()
			}
		}
	default:
		err = s.attachTrial(d, st, spec, force)
	}
	if err != nil {
		return Info{}, err
	}
	s.health.Clear("filter-lost", name+"/"+spec.Name)
	s.env.Log.Info("a filter was put over a live device", "device", name, "filter", spec.Name)
	return s.info(d), nil
}

func (s *Server) attachTrial(d *Device, st *stack.Stack, spec FilterSpec, force bool) error {
	f, err := trial(spec)
	if err != nil {
		return err
	}
	if spec.Name == errorName && !force && d.served.open() {
		return fmt.Errorf("%s is open, and its users would get I/O errors: that %w", d.spec.Name, ErrSpoils)
	}
	_, err = st.Attach(f.name, f.altitude, f.driver)
	return err
}

// captureAgain puts a group's filter back over a device that has lost it.
func (s *Server) captureAgain(name string) error {
	for _, k := range s.captures {
		for i := range k.Disks {
			if k.Disks[i].Name == name && k.ring != nil {
				return s.attachCapture(k, i)
			}
		}
	}
	return fmt.Errorf("%s: %w: tidemark protect puts the filter %s over the devices of a group", name, ErrNoFilter, capture.Name)
}

// DetachFilter takes a filter off a live device, under load. Where that spoils
// something it is not done without force, and the error is ErrSpoils.
func (s *Server) DetachFilter(name, filter string, force bool) (Info, error) {
	s.changes.Lock()
	defer s.changes.Unlock()
	d, st, err := s.live(name)
	if err != nil {
		return Info{}, err
	}
	var have []string
	for _, f := range st.Filters() {
		have = append(have, f.Name)
	}
	if !slices.Contains(have, filter) {
		return Info{}, fmt.Errorf("%q: %w: %s has %s", filter, ErrNoFilter, name, cmp.Or(strings.Join(have, ", "), "none"))
	}
	if spoils := s.spoils(name, filter); filter == capture.Name {
		return Info{}, fmt.Errorf("the filter %s of %s is %w by the group %s: tidemark unprotect %[4]s", filter, name, ErrInUse, s.CapturedBy(name))
	} else if spoils != "" && !force {
		return Info{}, fmt.Errorf("the filter %s of %s: without it %s: taking it off %w", filter, name, spoils, ErrSpoils)
	}
	if err := st.Detach(filter); err != nil {
		return Info{}, err
	}
	s.env.Log.Info("a filter was taken off a live device", "device", name, "filter", filter)
	return s.info(d), nil
}

// spoils says what is no longer true without a filter; "" is nothing.
func (s *Server) spoils(name, filter string) string {
	switch filter {
	case track.Name:
		return "the change map ends its generation, and the next copy is a full one"
	case cow.Name, barrier.Name:
		for _, i := range s.set.List() {
			if slices.ContainsFunc(i.Devices, func(d snapshot.DeviceInfo) bool { return d.Name == name }) {
				return "the snapshot " + i.ID + " is spoiled"
			}
			if filter == cow.Name {
				return "the snapshot " + i.ID + " is spoiled where its difference storage lies on the device"
			}
		}
	}
	return ""
}

// live finds a device that is served.
func (s *Server) live(name string) (*Device, *stack.Stack, error) {
	d, err := s.find(name)
	if err != nil {
		return nil, nil, err
	}
	if d.served == nil || d.gone {
		return nil, nil, fmt.Errorf("%s is offline: %w", name, ErrNotFound)
	}
	return d, d.stack, nil
}

// missing names a filter that snapshots need and a device has not, "" for none.
func missing(st *stack.Stack) string {
	have := st.Filters()
	for _, name := range []string{barrier.Name, cow.Name} {
		if !slices.ContainsFunc(have, func(f stack.Info) bool { return f.Name == name }) {
			return name
		}
	}
	return ""
}
