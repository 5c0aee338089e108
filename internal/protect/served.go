package protect

import (
	"context"
	"errors"
	"fmt"
	"time"

	"tidemark/internal/disk"
	"tidemark/internal/filter/capture"
	"tidemark/internal/source"
)

// Served are the devices that the daemon serves, as groups need them. Its
// methods may be called concurrently.
type Served interface {
	// Device finds a device by its name, or by what device create printed.
	Device(name string) (ServedDevice, bool)
	// Capture gives the ring that records a group's devices; nil: there is none.
	Capture(group string) *capture.Ring
	// StartCapture puts a new ring over devices, in the place of any that the group has.
	StartCapture(c Capture) (*capture.Ring, error)
	// EndCapture takes the group's ring away, if it has one.
	EndCapture(group string) error
	// Leads says whether users of a device still get to it: a volume may have got
	// another table, and then its writes go past.
	Leads(name string) error
	// Mounts are where file systems of a device are mounted.
	Mounts(name string) ([]string, error)
	// Hold holds the writes of devices: when it returns those under way have ended,
	// and none goes on before release or the end of max. An error of release says that
	// some went on before.
	Hold(ctx context.Context, max time.Duration, devices []string) (release func() error, err error)
}

// ServedDevice is one served device.
type ServedDevice struct {
	Name, Backing string
	Node          string // what users open; empty while it is offline
	Kernel        string // its block device; empty where it has none
	Size          int64  // bytes
	SectorSize    int64
}

// Capture says over which devices a group's ring is, and how it works.
type Capture struct {
	Group     string
	RingBytes int64
	Patience  time.Duration // that a write has with a full ring
	Disks     []capture.Disk
}

// backPressure is how long a write waits for room in the ring, where that was
// chosen: shorter than a filter may take before it is taken out of its stack.
const backPressure = 20 * time.Second

// Capture is what records the group's devices; ok is false where it is of tapped disks.
func (c *Config) Capture() (out Capture, ok bool) {
	settings, err := c.Settings.withDefaults()
	if err != nil || !c.Served() {
		return out, false
	}
	out = Capture{Group: c.Name, RingBytes: int64(settings.RingBytes)}
	if settings.BackPressure {
		out.Patience = backPressure
	}
	for _, d := range c.Disks {
		out.Disks = append(out.Disks, capture.Disk{Name: d.Served, Size: d.Size, BlockSize: d.BlockSize})
	}
	return out, true
}

// identityOf names a served device: it stays the same when the device is removed
// and made again.
func identityOf(d ServedDevice) disk.Identity {
	return disk.Identity{Served: d.Name + " over " + d.Backing, Size: d.Size, Name: d.Name}
}

// served is the way in to served devices: the ring of their capture filters,
// which lies in memory that outlives the daemon.
type served struct {
	env *Env
	cfg *Config
}

// kept is a ring that goes on when a session lets go of it.
type kept struct {
	*capture.Ring
	way *served
}

// Close does nothing: the filters go on recording.
func (k kept) Close() error { return nil }

// Remove has the next session begin a new one, and move nothing of this one's
// into the history.
func (k kept) Remove() error {
	k.Distrust(0, errors.New("the history lacks what happened to its devices"))
	return k.SetNote(forsaken)
}

// forsaken is the note of a ring that is of no use any more.
const forsaken = "forsaken"

// servedDisk is one device of the group.
type servedDisk struct {
	ServedDevice
	way   *served
	index int
}

func (w *served) find() ([]target, error) {
	if w.env.Served == nil {
		return nil, fmt.Errorf("this daemon serves no devices: %w", ErrOffline)
	}
	var out []target
	for i, d := range w.cfg.Disks {
		is, ok := w.env.Served.Device(d.Served)
		switch {
		case !ok:
			return nil, fmt.Errorf("the served device %s is gone: %w", d.Served, ErrOffline)
		case is.Node == "":
			return nil, fmt.Errorf("the served device %s is offline (tidemark device ls says why): %w", d.Served, ErrOffline)
		case is.Size != d.Size:
			return nil, fmt.Errorf("device %s has %d bytes and had %d when it was protected: unprotect the group and protect it again: %w", d.Served, is.Size, d.Size, ErrOffline)
		}
		if err := w.leads(d.Served); err != nil {
			return nil, err
		}
		out = append(out, &servedDisk{is, w, i})
	}
	return out, nil
}

// adopt goes on with the ring that is at work, unless writes went past it.
func (w *served) adopt([]target) (source.Source, bool, error) {
	ring := w.env.Served.Capture(w.cfg.Name)
	if ring == nil || ring.Note() == forsaken {
		return nil, false, nil
	}
	if err := ring.Lost(); err != nil {
		w.env.Log.Warn("the capture begins anew", "group", w.cfg.Name, "error", err)
		return kept{ring, w}, false, nil
	}
	return kept{ring, w}, true, nil
}

func (w *served) renew([]target) (source.Source, error) {
	c, _ := w.cfg.Capture()
	ring, err := w.env.Served.StartCapture(c)
	if err != nil {
		return nil, err
	}
	return kept{ring, w}, nil
}

func (w *served) stranded() source.Source {
	if w.env.Served == nil {
		return nil
	}
	ring := w.env.Served.Capture(w.cfg.Name)
	if ring == nil || ring.Note() == forsaken || ring.Producer() == ring.Consumer() {
		return nil
	}
	return kept{ring, w}
}

func (w *served) gone() error {
	if w.env.Served == nil {
		return nil
	}
	if ring := w.env.Served.Capture(w.cfg.Name); ring != nil && !ring.Resting() && ring.Note() != forsaken {
		return ring.SetNote("gone")
	}
	return nil
}

func (w *served) discard() error {
	if w.env.Served == nil {
		return nil
	}
	return w.env.Served.EndCapture(w.cfg.Name)
}

func (d *servedDisk) identity() disk.Identity { return identityOf(d.ServedDevice) }

func (d *servedDisk) node() string { return d.Node }

// open reads through the stack from right below the capture filter on: what is
// read there and is newer than the ring's producer was not passed on yet.
func (d *servedDisk) open() (reader, error) {
	ring := d.way.env.Served.Capture(d.way.cfg.Name)
	if ring == nil {
		return nil, fmt.Errorf("device %s is not captured: %w", d.Name, ErrOffline)
	}
	return belowCapture{ring, d.index}, nil
}

type belowCapture struct {
	ring *capture.Ring
	disk int
}

func (b belowCapture) ReadAt(p []byte, off int64) (int, error) { return b.ring.ReadAt(b.disk, p, off) }
func (b belowCapture) Close() error                            { return nil }

// look hears of what the filter saw. A device that rests because the daemon is
// ending is what it was.
func (d *servedDisk) look() (string, error) {
	ring := d.way.env.Served.Capture(d.way.cfg.Name)
	if ring == nil {
		return "", fmt.Errorf("device %s is not captured: %w", d.Name, ErrOffline)
	}
	if err := ring.Lost(); err != nil {
		return "", fmt.Errorf("%w: %w", err, ErrOffline)
	}
	return "", d.way.leads(d.Name)
}

// vouch is a look that is quick enough for each time that records become points.
func (d *servedDisk) vouch() error {
	_, err := d.look()
	return err
}

// leads returns ErrOffline where what users open leads past the device.
func (w *served) leads(name string) error {
	if err := w.env.Served.Leads(name); err != nil {
		return fmt.Errorf("writes go past the served device %s: %w: %w", name, err, ErrOffline)
	}
	return nil
}

func (d *servedDisk) fingerprint() string { return fmt.Sprintf("%s %d", d.identity(), d.Size) }

func (d *servedDisk) mounts() ([]string, error) {
	if d.Kernel == "" {
		return nil, fmt.Errorf("device %s is used by NBD clients, whose file systems cannot be frozen from here: %w", d.Name, ErrNotFrozen)
	}
	return d.way.env.Served.Mounts(d.Name)
}

func (d *servedDisk) told(disk.Uevent) bool { return false }

// admitServed refuses devices that cannot be protected, or not beside the others.
func (c *Config) admitServed(env *Env, r Request, devices []ServedDevice, folders []string, taken []occupied, others []*Config) error {
	if r.Settings.Metadata {
		return fmt.Errorf("a served device is captured with its payloads: %w", ErrSettings)
	}
	for n, d := range devices {
		for _, o := range others {
			for _, theirs := range o.Disks {
				if theirs.Served == d.Name {
					return fmt.Errorf("%s is protected already, by group %s: %w", d.Name, o.Name, ErrInUse)
				}
			}
		}
		for _, before := range devices[:n] {
			if before.Name == d.Name {
				return fmt.Errorf("%s is named twice: protect it once: %w", d.Name, ErrInUse)
			}
		}
		if d.Node == "" {
			return fmt.Errorf("%w: the served device %s is offline\n  tidemark device ls says why", ErrRefused, d.Name)
		}
		if err := admitKernel(d, folders, taken); err != nil {
			return err
		}
		c.Disks = append(c.Disks, DiskConfig{Name: d.Name, Path: d.Node, Identity: identityOf(d), Size: d.Size, SectorSize: d.SectorSize,
			BlockSize: blockSize(d.Size), Served: d.Name})
	}
	return nil
}

// admitKernel looks at the block device that a served one is, where it is one.
func admitKernel(d ServedDevice, folders []string, taken []occupied) error {
	if d.Kernel == "" {
		return nil
	}
	i, err := disk.Inspect(d.Kernel)
	if err != nil {
		return err
	}
	if c := disk.HoldsRefusal(i, folders...); c != nil {
		return refused(*c)
	}
	return apart(i, taken)
}

// servedOf finds the served devices among those of a request. It refuses a mix:
// two ways in have no common order.
func servedOf(env *Env, r Request) ([]ServedDevice, error) {
	var found []ServedDevice
	tapped := ""
	for _, name := range r.Devices {
		if env.Served != nil {
			if d, ok := env.Served.Device(name); ok {
				found = append(found, d)
				continue
			}
		}
		tapped = name
	}
	switch {
	case len(found) > 0 && tapped != "":
		return nil, fmt.Errorf("%w: %s is served by Tidemark and %s is not: writes to both have no common order\n  Protect them as two groups, or serve %[3]s too: tidemark device create --backing %[3]s", ErrRefused, found[0].Name, tapped)
	case len(found) == 0 && r.Settings.BackPressure:
		return nil, fmt.Errorf("--back-pressure: writes to a tapped disk cannot be held; serve it (tidemark device create) to have that: %w", ErrSettings)
	}
	return found, nil
}

// infoOf is a group's disk as the kernel has it.
func infoOf(env *Env, d DiskConfig) (*disk.Info, error) {
	if d.Served == "" {
		return find(d)
	}
	if env.Served != nil {
		if is, ok := env.Served.Device(d.Served); ok && is.Kernel != "" {
			return disk.Inspect(is.Kernel)
		}
	}
	return nil, errors.New("it is no block device")
}
