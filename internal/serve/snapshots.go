package serve

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"tidemark/internal/backing"
	"tidemark/internal/block"
	"tidemark/internal/filter/cow"
	"tidemark/internal/freeze"
	"tidemark/internal/front/nbd"
	"tidemark/internal/health"
	"tidemark/internal/snapshot"
)

// image is an image of a snapshot that is shown.
type image struct {
	spec   Spec
	device string
	served served
}

// imageDevice is an image with every ability that fronts use.
type imageDevice struct{ *cow.Image }

// WriteFUA writes, and makes the image as stable as its storage is.
func (i imageDevice) WriteFUA(p []byte, off int64) (int, error) {
	n, err := i.WriteAt(p, off)
	if err == nil {
		err = i.Flush()
	}
	return n, err
}

// openSnapshots goes on with the snapshots of an earlier process. The devices
// have their filters, and no requests yet.
func (s *Server) openSnapshots() error {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return err
	}
	s.memory = s.memoryFolder()
	s.set, err = snapshot.Open(snapshot.Config{
		Dir: filepath.Join(s.env.StateDir, "snapshots"), Memory: s.memory, BootID: strings.TrimSpace(string(boot)),
		Device: s.partsOf, Locate: s.locate, Freeze: s.freezeDevices,
	})
	return err
}

// memoryFolder is a folder in memory that outlives this process, "" where there is none.
func (s *Server) memoryFolder() string {
	var st unix.Statfs_t
	if unix.Statfs("/dev/shm", &st) != nil || st.Type != unix.TMPFS_MAGIC {
		return ""
	}
	sum := sha256.Sum256([]byte(s.env.StateDir))
	return filepath.Join("/dev/shm", "tidemark-"+hex.EncodeToString(sum[:8]))
}

// partsOf finds a device by its name or by what device create printed.
func (s *Server) partsOf(name string) (snapshot.Device, error) {
	d, err := s.named(name)
	if err != nil {
		return snapshot.Device{}, err
	}
	now := d.now()
	if now.stack == nil {
		return snapshot.Device{}, fmt.Errorf("%s is offline: %w", name, snapshot.ErrNoDevice)
	}
	return now.part, nil
}

func (s *Server) named(name string) (*Device, error) {
	for _, d := range s.list() {
		now := d.now()
		if now.spec.Name == name || now.served != nil && (s.node(now) == name || now.served.kernel() == name) {
			return d, nil
		}
	}
	return nil, fmt.Errorf("%q: %w: want a served device (tidemark device ls)", name, snapshot.ErrNoDevice)
}

// freezeDevices freezes what is mounted from the devices, together.
func (s *Server) freezeDevices(ctx context.Context, names []string) (func() error, error) {
	s.mu.Lock()
	r := freeze.Request{Own: []string{s.env.StateDir}, Except: slices.Collect(maps.Keys(s.byExtent))}
	s.mu.Unlock()
	for _, name := range names {
		d, err := s.find(name)
		if err != nil {
			return nil, err
		}
		if now := d.now(); now.served != nil && now.served.kernel() != "" {
			r.Mounts = append(r.Mounts, mountsOn(s.kernelOf(now))...)
		}
	}
	if len(r.Mounts) == 0 {
		return func() error { return nil }, nil
	}
	frozen, err := freeze.Freeze(ctx, r)
	if err != nil {
		return nil, err
	}
	return frozen.Thaw, nil
}

// kernelOf is the node that users of a device have: the volume's, of a spliced one.
func (s *Server) kernelOf(d parts) string {
	if sp := d.spec.Splice; sp != nil {
		return fmt.Sprintf("/dev/dm-%d", sp.Minor)
	}
	return d.served.kernel()
}

// locate says what a path of difference storage is.
func (s *Server) locate(path string) (snapshot.Place, error) {
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	if errors.Is(err, unix.ENOENT) {
		err = unix.Stat(filepath.Dir(path), &st)
	}
	if err != nil {
		return snapshot.Place{}, fmt.Errorf("%s: %w", path, err)
	}
	dev, file := st.Dev, true
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		dev, file = st.Rdev, false
	}
	below, err := s.below(dev)
	if err != nil {
		return snapshot.Place{}, fmt.Errorf("difference storage %s: %w", path, err)
	}
	if below != nil && file { // it is open, and nobody writes it through its file system
		if dir, err := filepath.EvalSymlinks(filepath.Dir(path)); err == nil {
			s.mu.Lock()
			s.byExtent[filepath.Join(dir, filepath.Base(path))] = true
			s.mu.Unlock()
		}
	}
	if below != nil || file {
		return snapshot.Place{Device: below, File: file}, nil
	}
	return s.storageDisk(path)
}

// below is the device with a number as seen from below the snapshots' filters,
// nil where it is not one of ours.
func (s *Server) below(dev uint64) (block.Device, error) {
	for _, d := range s.list() {
		now := d.now()
		if now.served == nil || now.served.kernel() == "" {
			continue
		}
		switch where(s.kernelOf(now), dev) {
		case itself:
			return now.part.Cow.Below(), nil
		case above:
			return nil, fmt.Errorf("it lies on a partition or volume of the served device %s, whose extents are not the device's: %w", now.spec.Name, ErrRefused)
		}
	}
	return nil, nil
}

// Snapshots lists the snapshots.
func (s *Server) Snapshots() []snapshot.Info { return s.set.List() }

// CreateSnapshot prepares one. Devices are names, or what device create printed.
func (s *Server) CreateSnapshot(r snapshot.Request) (snapshot.Info, error) {
	for i, name := range r.Devices {
		d, err := s.named(name)
		if err != nil {
			return snapshot.Info{}, err
		}
		r.Devices[i] = d.now().spec.Name
	}
	if s.memory != "" {
		if err := os.MkdirAll(s.memory, 0o700); err != nil {
			return snapshot.Info{}, err
		}
	}
	id, err := s.set.Create(r)
	if err != nil {
		return snapshot.Info{}, err
	}
	s.followEvents(id)
	return s.Snapshot(id)
}

// Snapshot describes one.
func (s *Server) Snapshot(id snapshot.ID) (snapshot.Info, error) {
	for _, i := range s.set.List() {
		if i.ID == snapshot.FormatID(id) {
			return i, nil
		}
	}
	return snapshot.Info{}, fmt.Errorf("%s: %w", snapshot.FormatID(id), snapshot.ErrNoSuch)
}

// TakeSnapshot takes a prepared one and shows its images.
func (s *Server) TakeSnapshot(ctx context.Context, id snapshot.ID) error {
	s.changes.Lock()
	defer s.changes.Unlock()
	if err := s.set.Take(ctx, id); err != nil {
		return err
	}
	return s.showImages(ctx, id)
}

// showImages shows every image of a snapshot by the front of its device.
func (s *Server) showImages(ctx context.Context, id snapshot.ID) error {
	images, err := s.set.Images(id)
	if err != nil {
		return err
	}
	var errs []error
	for _, i := range images {
		if err := s.showImage(ctx, id, i); err != nil {
			errs = append(errs, fmt.Errorf("the image of %s: %w", i.Device, err))
		}
	}
	return errors.Join(errs...)
}

func (s *Server) showImage(ctx context.Context, id snapshot.ID, i snapshot.ImageOf) error {
	d, err := s.find(i.Device)
	if err != nil {
		return err
	}
	now := d.now()
	name := imageName(i.Device, id)
	key := sha256.Sum256([]byte(now.spec.ID + " " + name))
	spec := Spec{Name: name, Backing: now.spec.Backing, Front: now.spec.Front, ID: hex.EncodeToString(key[:8])}
	var memory json.RawMessage
	if r, err := s.load(name); err == nil {
		memory = r.Memory
	}
	show := shown{imageDevice{i.Image}, now.lower.Limits(), nil}
	if c := i.Changes; c != nil {
		show.bitmaps = func() (out []nbd.Bitmap) {
			for n := 1; n < int(c.Info().Number); n++ {
				if since, err := c.Since(c.Info().Generation, uint8(n)); err == nil {
					out = append(out, nbd.Bitmap{Name: fmt.Sprintf("since-%d", n), Map: runsOf(since)})
				}
			}
			return out
		}
	}
	served, err := s.front(spec.Front).serve(ctx, spec, show, memory)
	if err != nil {
		return err
	}
	m := &image{spec, i.Device, served}
	if err := errors.Join(s.save(record{Spec: spec, Made: true, Memory: served.memory()}), s.linkTo(name, served)); err != nil {
		return errors.Join(err, served.end(ctx))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.images[name] = m
	return nil
}

func imageName(device string, id snapshot.ID) string {
	return device + "@" + snapshot.FormatID(id)
}

// ImageNode is where users find a device's image, "" where it is not shown.
func (s *Server) ImageNode(device string, id string) string {
	s.mu.Lock()
	m := s.images[device+"@"+id]
	s.mu.Unlock()
	if m == nil {
		return ""
	}
	if m.served.kernel() == "" {
		return m.served.uri()
	}
	return filepath.Join(s.env.Nodes, m.spec.Name)
}

// bringBackImages shows the images of snapshots that go on, and takes away what
// is left of others.
func (s *Server) bringBackImages(ctx context.Context) {
	wanted := map[string]bool{}
	for _, i := range s.set.List() {
		id, err := snapshot.ParseID(i.ID)
		if err != nil {
			continue
		}
		s.followEvents(id)
		for _, d := range i.Devices {
			wanted[imageName(d.Name, id)] = i.State != "created"
		}
		if i.State == "created" {
			continue
		}
		if err := s.showImages(ctx, id); err != nil {
			s.health.Raise(health.Condition{Code: "image-offline", Severity: health.Error, Subject: i.ID, Detail: err.Error(),
				Remedy: "Start the daemon again when what it names is mended, or: tidemark snapshot destroy " + i.ID + "."})
		}
	}
	left, _ := filepath.Glob(filepath.Join(s.folder, "*@*"+recordSuffix)) // a pattern without faults
	for _, path := range left {
		name := strings.TrimSuffix(filepath.Base(path), recordSuffix)
		if r, err := s.load(name); err == nil && !wanted[name] {
			if err := errors.Join(s.front(r.Spec.Front).forget(ctx, r.Spec, r.Memory), s.erase(name)); err != nil {
				s.env.Log.Warn("what is left of an image", "image", name, "error", err)
			}
		}
	}
}

// AppendStorage gives a snapshot more difference storage.
func (s *Server) AppendStorage(id snapshot.ID, place snapshot.Storage) error {
	return s.set.Append(id, place)
}

// DestroySnapshot ends a snapshot at once. Whoever has an image open gets errors.
func (s *Server) DestroySnapshot(ctx context.Context, id snapshot.ID) error {
	s.changes.Lock()
	defer s.changes.Unlock()
	info, err := s.Snapshot(id)
	if err != nil {
		return err
	}
	errs := []error{s.set.Destroy(id)} // its images answer with errors, so that nothing waits
	for _, d := range info.Devices {
		errs = append(errs, s.endImage(ctx, imageName(d.Name, id)))
	}
	s.health.Clear("image-offline", info.ID)
	if len(s.set.List()) == 0 {
		errs = append(errs, s.closeDisks())
		_ = os.Remove(s.memory) // where it is empty
	}
	return errors.Join(errs...)
}

func (s *Server) endImage(ctx context.Context, name string) error {
	s.mu.Lock()
	m := s.images[name]
	delete(s.images, name)
	s.mu.Unlock()
	if m == nil {
		return nil
	}
	return errors.Join(s.unlinkName(name), m.served.end(ctx), s.erase(name))
}

// pauseImages lets go of the images, before their devices.
func (s *Server) pauseImages(ctx context.Context) error {
	s.mu.Lock()
	images := s.images
	s.images = map[string]*image{}
	s.mu.Unlock()
	var errs []error
	for name, m := range images {
		errs = append(errs, m.served.pause(ctx))
		if !m.served.outlives() {
			errs = append(errs, s.unlinkName(name))
		}
	}
	return errors.Join(errs...)
}

// imagesInUse lists the images that somebody has open.
func (s *Server) imagesInUse() (out []string) {
	s.mu.Lock()
	images := maps.Clone(s.images)
	s.mu.Unlock()
	for name, m := range images {
		if m.served.open() {
			out = append(out, name)
		}
	}
	return out
}

// storageDisk opens a disk that is not ours, for difference storage.
func (s *Server) storageDisk(path string) (snapshot.Place, error) {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return snapshot.Place{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if d := s.disks[path]; d != nil {
		return snapshot.Place{Device: d}, nil
	}
	if s.env.Taken != nil {
		if who := s.env.Taken(path); who != "" {
			return snapshot.Place{}, fmt.Errorf("%s is %w: %s", path, ErrInUse, who)
		}
	}
	d, err := backing.Open(path, backing.Options{})
	if err != nil {
		return snapshot.Place{}, err
	}
	s.disks[path] = d
	return snapshot.Place{Device: d}, nil
}

// closeDisks lets go of them, when the last snapshot is gone.
func (s *Server) closeDisks() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, d := range s.disks {
		errs = append(errs, d.Flush(), d.Close())
	}
	clear(s.disks)
	return errors.Join(errs...)
}
