// Package serve assembles served devices: a backing disk or image file, the
// stack of filters over it, and a front that shows it to the kernel or to NBD
// clients. It remembers them in the state folder, so that they come back after
// a restart of the daemon, under the same names.
package serve

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"tidemark/internal/backing"
	"tidemark/internal/disk"
	"tidemark/internal/front/nbd"
	"tidemark/internal/health"
	"tidemark/internal/snapshot"
	"tidemark/internal/splice"
	"tidemark/internal/stack"
)

// What callers branch on. The error's text says more.
var (
	ErrName     = errors.New("not a name for a device")
	ErrExists   = errors.New("there is a device with that name")
	ErrNotFound = errors.New("no such device")
	ErrInUse    = errors.New("in use")
	ErrFront    = errors.New("this front cannot be had here")
	ErrNoFront  = errors.New("not what a front is asked for")
	ErrSize     = errors.New("not a size for the device")
	ErrDamaged  = errors.New("what is remembered of the device is damaged")
)

// Env is what all devices of a daemon share.
type Env struct {
	StateDir string
	// Nodes is the folder of the names that users see; "" is /dev/tidemark.
	Nodes string
	// Helper is the command line of a process that calls HelperMain. Without it there
	// is no loop front, and no device should hold difference storage.
	Helper []string
	// Guard is the command line of a process that calls GuardMain, without
	// GuardVerb; none: spliced volumes wait for the next daemon for ever.
	Guard []string
	Log   *slog.Logger
	// Taken says who else of this daemon uses a path, "" for nobody; nil: nobody.
	Taken func(path string) string
	// Look is how often is looked whether disks came or went, besides when the
	// kernel tells of it; 0: as suits each.
	Look time.Duration
	// Captures are those of the protected groups of the state folder.
	Captures []Capture
}

// Server holds the served devices of a daemon. All methods may be called concurrently.
type Server struct {
	env      *Env
	fronts   map[string]front
	system   *stack.System
	set      *snapshot.Set
	memory   string            // folder for what outlives this process, and not a reboot; "": none
	images   map[string]*image // by snapshot and device
	logs     map[string]*eventLog
	disks    map[string]*backing.Device // difference storage on disks of others
	captures map[string]*capturing      // by group
	health   health.Set
	folder   string
	changes  sync.Mutex // one device is made or removed at a time

	watch0   context.Context // until Stop
	cancel   context.CancelFunc
	watching sync.WaitGroup
	changed  hint // a disk went, or a mapped device changed
	arrived  hint // a disk came, or has become one

	mu      sync.Mutex // held for a moment
	devices map[string]*Device
	seen    func() // told when images came or went; nil: nobody is
}

// Device is one served device. Whoever holds Server.changes may read its fields;
// they are written with mu held too, so that others can look at it (now).
type Device struct {
	health health.Set

	mu    sync.Mutex
	spec  Spec
	lower *backing.Device
	stack *stack.Stack
	part  snapshot.Device // its filters and its change map, as snapshots need them

	served served // nil where it could not be brought back

	// Of a spliced device.
	claim     *splice.Claim
	guard     *guard
	givenBack bool      // the volume has its own table again
	lost      bool      // it has another table
	tried     time.Time // when it was last tried to splice a lost one again
	heard     uint64    // the kernel's event up to which it is known what its volume led to
	resumed   bool      // somebody has put a table of its volume in use since, for a while perhaps another one

	was  *disk.Identity // of the backing, where that is a disk, when it was last looked at
	disk incarnation    // of the backing
	gone bool           // it was pulled
}

// Open brings back the devices that the state folder remembers. One that cannot
// come back is there all the same, with a condition that says why.
func Open(ctx context.Context, env *Env) (*Server, error) {
	s := &Server{env: env, fronts: newFronts(env), folder: filepath.Join(env.StateDir, "devices"), devices: map[string]*Device{}}
	s.system = stack.New(stack.Config{}, &s.health)
	s.watch0, s.cancel = context.WithCancel(context.WithoutCancel(ctx))
	s.images, s.logs, s.disks = map[string]*image{}, map[string]*eventLog{}, map[string]*backing.Device{}
	s.captures = map[string]*capturing{}
	s.changed, s.arrived = make(hint, 1), make(hint, 1)
	if env.Nodes == "" {
		env.Nodes = "/dev/tidemark"
	}
	entries, err := os.ReadDir(s.folder)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	s.watching.Go(func() { s.listen(s.watch0) }) // before anything is looked at: what comes meanwhile is looked at again
	s.memory = s.memoryFolder()
	s.openRings()
	records := map[string]record{}
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), recordSuffix)
		if !ok || CheckName(name) != nil {
			continue
		}
		d := &Device{spec: Spec{Name: name}}
		r, err := s.load(name)
		if err == nil && !r.Made { // killed while it was made: nobody was told of it
			err = errors.Join(s.front(r.Spec.Front).forget(ctx, r.Spec, r.Memory), s.erase(name))
			if err == nil {
				continue
			}
		} else if err == nil {
			d.spec, d.was = r.Spec, r.Disk
			if err = s.takeOver(ctx, d, r); err == nil && !d.givenBack && !s.restarted(d) {
				err = s.lay(d)
			}
			records[name] = r
		}
		if err != nil {
			s.offline(d, err)
			delete(records, name)
		}
		s.devices[name] = d
	}
	// Snapshots go on before the first request comes through a front. What they
	// write to difference storage passes the captures, which are there already.
	s.distrustAbsent()
	if err := s.openSnapshots(); err != nil {
		s.cancel()
		return nil, errors.Join(err, s.system.Close())
	}
	for name, r := range records {
		d, err := s.devices[name], error(nil)
		switch {
		case d.givenBack:
		case d.stack == nil:
			err = s.spliceAfterRestart(ctx, d)
		default:
			err = s.bringBack(ctx, d, r)
		}
		if err != nil {
			s.offline(d, err)
		}
	}
	s.bringBackImages(ctx)
	s.watching.Go(func() { s.watch(s.watch0) })
	return s, nil
}

// Create makes a device and remembers it. On any error nothing is left.
func (s *Server) Create(ctx context.Context, spec Spec) (Info, error) {
	s.changes.Lock()
	defer s.changes.Unlock()
	if err := s.check(&spec); err != nil {
		return Info{}, err
	}
	id, err := newID()
	if err != nil {
		return Info{}, err
	}
	spec.ID = id
	d := &Device{spec: spec}
	if err := s.save(record{Spec: spec}); err != nil {
		return Info{}, err
	}
	err = s.bring(ctx, d, nil)
	if err == nil {
		if err = s.save(record{Spec: spec, Made: true, Memory: d.served.memory(), Disk: d.was}); err != nil {
			err = errors.Join(err, s.take(ctx, d))
		}
	}
	if err != nil {
		return Info{}, errors.Join(err, s.eraseChanges(spec.Name), s.erase(spec.Name))
	}
	s.mu.Lock()
	s.devices[spec.Name] = d
	s.mu.Unlock()
	return s.info(d), nil
}

func newID() (string, error) {
	var id [8]byte
	_, err := rand.Read(id[:])
	return hex.EncodeToString(id[:]), err
}

// offline says why a device is not there.
func (s *Server) offline(d *Device, err error) {
	s.env.Log.Error("a served device is not there", "device", d.spec.Name, "error", err)
	d.health.Raise(health.Condition{Code: "device-offline", Severity: health.Error, Subject: d.spec.Name, Detail: err.Error(),
		Remedy: "Mend what it names and start the daemon again, or remove the device: tidemark device rm " + d.spec.Name + "."})
	s.handOver(d)
}

// bringBack shows a device of an earlier process.
func (s *Server) bringBack(ctx context.Context, d *Device, r record) error {
	if err := s.show(ctx, d, r.Memory); err != nil {
		return err
	}
	if now := d.served.memory(); string(now) != string(r.Memory) {
		r.Memory = now
		if err := s.save(r); err != nil {
			return err
		}
	}
	if d.spec.Splice != nil {
		return s.leadBack(ctx, d)
	}
	if err := s.rememberDisk(d); err != nil { // known by what it was
		s.env.Log.Warn("noting which disk is behind a device", "device", d.spec.Name, "error", err)
	}
	return nil
}

// bring makes a device out of its backing; memory is the front's, of the process before.
func (s *Server) bring(ctx context.Context, d *Device, memory json.RawMessage) error {
	if err := s.lay(d); err != nil {
		return err
	}
	return s.show(ctx, d, memory)
}

// lay opens the backing and lays the stack of filters over it.
func (s *Server) lay(d *Device) error {
	state := d.spec.backingState() // before it is opened: trying what it can do may touch the file
	lower, err := backing.Open(d.spec.Backing, backing.Options{ReadOnly: d.spec.ReadOnly})
	if err != nil {
		return err
	}
	now := identityOf(lower)
	if err := checkDisk(d.spec.Backing, d.was, now); err != nil && d.spec.Splice == nil {
		return errors.Join(err, lower.Close())
	}
	d.was = now
	st, err := s.system.Add(d.spec.Name, lower)
	if err != nil {
		return errors.Join(err, lower.Close())
	}
	s.captureLaid(d.spec.Name, st) // the lowest first
	part := snapshot.Device{Name: d.spec.Name}
	if part.Changes, part.Foreign, err = s.openChanges(d.spec, state, st); err == nil {
		for _, f := range usual(&part) {
			if err == nil {
				_, err = st.Attach(f.name, f.altitude, f.driver)
			}
		}
	}
	if err != nil {
		return errors.Join(err, s.system.Remove(d.spec.Name), lower.Close())
	}
	d.disk, d.gone = incarnationOf(lower.Path()), false
	d.set(func() { d.lower, d.stack, d.part = lower, st, part })
	return nil
}

// show puts the front over a device that is laid. Where it fails the device is taken apart.
func (s *Server) show(ctx context.Context, d *Device, memory json.RawMessage) error {
	if err := lockMemory(); err != nil && d.spec.Front != FrontNBDServer { // whose clients are elsewhere, and which needs no privileges
		d.health.Raise(health.Condition{Code: "memory-not-locked", Severity: health.Warning, Subject: d.spec.Name,
			Detail: "The server's memory cannot be locked: " + err.Error() + ". Under memory pressure the device may stall.",
			Remedy: "Let the daemon lock memory (LimitMEMLOCK=infinity, CAP_IPC_LOCK)."})
	}
	changes := d.part.Changes
	served, err := s.front(d.spec.Front).serve(ctx, d.spec, shown{d.stack, d.lower.Limits(), func() []nbd.Bitmap { return bitmaps(changes) }}, memory)
	if err != nil {
		d.set(func() { d.stack = nil })
		return errors.Join(err, s.system.Remove(d.spec.Name), d.lower.Close())
	}
	d.set(func() { d.served = served })
	if err := s.link(d); err != nil {
		return errors.Join(err, s.take(ctx, d))
	}
	return nil
}

// take ends a device for good. ErrInUse: it is open, and nothing was done.
func (s *Server) take(ctx context.Context, d *Device) error {
	if d.served == nil {
		return nil
	}
	if err := d.served.remove(ctx); err != nil {
		return err
	}
	d.set(func() { d.served, d.stack = nil, nil })
	return errors.Join(s.unlink(d), s.dismantle(d))
}

// dismantle ends a device's stack and lets go of its backing.
func (s *Server) dismantle(d *Device) error {
	if d.gone { // the stack ended with the disk, of which nothing can be asked any more
		_ = d.lower.Close()
		return nil
	}
	return errors.Join(s.system.Remove(d.spec.Name), d.lower.Flush(), d.lower.Close())
}

// Remove ends a device. The backing stays as it is. ErrInUse: it is open.
func (s *Server) Remove(ctx context.Context, name string) error {
	s.changes.Lock()
	defer s.changes.Unlock()
	d, err := s.find(name)
	if err != nil {
		return err
	}
	if d.spec.Splice != nil && !d.past() {
		return fmt.Errorf("%s: %w by the volume %s, under which it lies: tidemark device unsplice %[1]s", name, ErrInUse, d.spec.Splice.Name)
	}
	if err := s.held(name); err != nil {
		return err
	}
	if d.lost {
		return s.forgetLost(d)
	}
	if d.served == nil {
		if r, err := s.load(name); err == nil {
			if err := s.front(r.Spec.Front).forget(ctx, r.Spec, r.Memory); err != nil {
				return err
			}
		}
	} else if err := s.take(ctx, d); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return s.forgotten(name)
}

// held refuses to end a device that a group protects or a snapshot is of.
func (s *Server) held(name string) error {
	if group := s.CapturedBy(name); group != "" {
		return fmt.Errorf("%s: %w by the group %s, which protects it: tidemark unprotect %[3]s", name, ErrInUse, group)
	}
	for _, i := range s.set.List() {
		if slices.ContainsFunc(i.Devices, func(d snapshot.DeviceInfo) bool { return d.Name == name }) {
			return fmt.Errorf("%s: %w by the snapshot %s: tidemark snapshot destroy %[3]s", name, ErrInUse, i.ID)
		}
	}
	return nil
}

// forgotten takes a device that has ended out of the records.
func (s *Server) forgotten(name string) error {
	if err := errors.Join(s.eraseChanges(name), s.erase(name)); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.devices, name)
	return nil
}

// Resize makes the device as large as its backing is by now; where that is a
// file and size is not 0, the file gets that size first. Bytes; a device never
// becomes smaller. ErrSize says why not.
func (s *Server) Resize(ctx context.Context, name string, size int64) (Info, error) {
	s.changes.Lock()
	defer s.changes.Unlock()
	d, err := s.find(name)
	if err != nil {
		return Info{}, err
	}
	if d.served == nil {
		return Info{}, fmt.Errorf("%s: %w", name, ErrNotFound)
	}
	if err := d.lower.Grow(size); err != nil {
		return Info{}, fmt.Errorf("%s: %w: %w", name, ErrSize, err)
	}
	d.stack.Resized()
	if err := d.served.resized(ctx); err != nil {
		return Info{}, fmt.Errorf("%s: telling its users of the new size: %w", name, err)
	}
	return s.info(d), nil
}

// InUse lists the names of devices that somebody has open.
func (s *Server) InUse() []string {
	var out []string
	for _, d := range s.list() {
		if now := d.now(); now.served != nil && now.served.open() {
			out = append(out, now.spec.Name)
		}
	}
	return append(out, s.imagesInUse()...)
}

// Stop lets go of the devices: those whose front outlives this process wait for
// the next one, the others end.
func (s *Server) Stop(ctx context.Context) error {
	s.cancel()
	s.watching.Wait()
	s.changes.Lock()
	defer s.changes.Unlock()
	s.restCaptures()
	errs := []error{s.pauseImages(ctx)}
	var laid, quiet []*Device
	for _, d := range s.list() {
		if d.stack == nil {
			continue
		}
		laid = append(laid, d)
		if d.served == nil {
			continue
		}
		err := d.served.pause(ctx)
		if err == nil { // nobody writes any more
			quiet = append(quiet, d)
		}
		errs = append(errs, err)
		if !d.served.outlives() {
			errs = append(errs, s.unlink(d))
		}
	}
	errs = append(errs, s.set.Stop(), s.closeDisks())
	for _, d := range laid {
		errs = append(errs, s.dismantle(d))
		if slices.Contains(quiet, d) && !d.gone {
			errs = append(errs, s.saveChanges(d), s.rememberDisk(d))
		}
		d.set(func() { d.served, d.stack = nil, nil })
	}
	return errors.Join(append(errs, s.system.Close())...)
}

// Conditions are what is wrong with the filters of any device.
func (s *Server) Conditions() []health.Condition { return s.health.List() }

// parts are a device at one moment; served is nil while it is offline.
type parts struct {
	spec   Spec
	lower  *backing.Device
	stack  *stack.Stack
	part   snapshot.Device
	served served

	heard   uint64
	resumed bool
}

func (d *Device) now() parts {
	d.mu.Lock()
	defer d.mu.Unlock()
	return parts{d.spec, d.lower, d.stack, d.part, d.served, d.heard, d.resumed}
}

func (d *Device) set(change func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	change()
}

func (s *Server) find(name string) (*Device, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if d := s.devices[name]; d != nil {
		return d, nil
	}
	return nil, fmt.Errorf("%q: %w", name, ErrNotFound)
}

func (s *Server) list() []*Device {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*Device
	for _, d := range s.devices {
		out = append(out, d)
	}
	slices.SortFunc(out, func(a, b *Device) int { return strings.Compare(a.spec.Name, b.spec.Name) })
	return out
}
