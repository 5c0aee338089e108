package serve

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
	"tidemark/internal/cbt"
	"tidemark/internal/freeze"
	"tidemark/internal/health"
	"tidemark/internal/snapshot"
)

// openSnapshots goes on with the snapshots of an earlier process. The devices
// have their filters, and no requests yet.
func (s *Server) openSnapshots() error {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return err
	}
	s.set, err = snapshot.Open(snapshot.Config{
		Dir: filepath.Join(s.env.StateDir, "snapshots"), Memory: s.memory, BootID: strings.TrimSpace(string(boot)),
		Trouble: func(id string, err error) {
			s.health.Raise(health.Condition{Code: "snapshot-remains", Severity: health.Warning, Subject: id, Detail: "What is left of a snapshot: " + err.Error() + ".",
				Remedy: "Mend what it names and start the daemon again; what lies in " + filepath.Join(s.env.StateDir, "snapshots") + " says which files are its storage."})
		},
		Device: s.partsOf, Locate: s.locate, Files: s.fileTask, Freeze: s.freezeDevices,
	})
	return err
}

// memoryFolder is a folder in memory that outlives this process, "" where there is none.
func (s *Server) memoryFolder() string {
	var st unix.Statfs_t
	if unix.Statfs("/dev/shm", &st) != nil || st.Type != unix.TMPFS_MAGIC {
		return ""
	}
	return filepath.Join("/dev/shm", stateMark(s.env.StateDir))
}

// stateMark names what belongs to a state folder and lies elsewhere.
func stateMark(state string) string {
	sum := sha256.Sum256([]byte(state))
	return "tidemark-" + hex.EncodeToString(sum[:8])
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
	if f := missing(now.stack); f != "" {
		return snapshot.Device{}, fmt.Errorf("%s: %w %s, which snapshots need: tidemark device filters %[1]s --attach %[3]s", now.spec.Name, ErrNoFilter, f)
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
func (s *Server) freezeDevices(ctx context.Context, names []string) (thaw func() error, mounts int, err error) {
	r := freeze.Request{Own: []string{s.env.StateDir}}
	for _, name := range names {
		d, err := s.find(name)
		if err != nil {
			return nil, 0, err
		}
		if now := d.now(); now.served != nil && now.served.kernel() != "" {
			r.Mounts = append(r.Mounts, mountsOn(s.kernelOf(now))...)
		}
	}
	if len(r.Mounts) == 0 {
		return func() error { return nil }, 0, nil
	}
	frozen, err := freeze.Freeze(ctx, r)
	if err != nil {
		return nil, 0, err
	}
	return frozen.Thaw, len(r.Mounts), nil
}

// kernelOf is the node that users of a device have: the volume's, of a spliced one.
func (s *Server) kernelOf(d parts) string {
	if sp := d.spec.Splice; sp != nil {
		return fmt.Sprintf("/dev/dm-%d", sp.Minor)
	}
	return d.served.kernel()
}

// Snapshots lists the snapshots.
func (s *Server) Snapshots() []snapshot.Info { return s.set.List() }

// CreateSnapshot prepares one. Devices are names, or what device create printed.
func (s *Server) CreateSnapshot(r snapshot.Request) (snapshot.Info, error) {
	s.changes.Lock()
	defer s.changes.Unlock()
	for i, name := range r.Devices {
		d, err := s.named(name)
		if err != nil {
			return snapshot.Info{}, err
		}
		r.Devices[i] = d.now().spec.Name
	}
	id, err := s.set.Create(r)
	if err != nil {
		return snapshot.Info{}, errors.Join(err, s.closeDisks())
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
	err := s.showImages(ctx, id)
	if err != nil {
		s.imagesOffline(snapshot.FormatID(id), err)
	}
	s.tellOfImages()
	return err
}

// AppendStorage gives a snapshot more difference storage.
func (s *Server) AppendStorage(id snapshot.ID, place snapshot.Storage) error {
	s.changes.Lock()
	defer s.changes.Unlock()
	if err := s.set.Append(id, place); err != nil {
		return errors.Join(err, s.closeDisks())
	}
	return nil
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
	s.tellOfImages()                   // before other devices can get their numbers
	for _, d := range info.Devices {
		errs = append(errs, s.endImage(ctx, imageName(d.Name, id)))
	}
	s.health.Clear("image-offline", info.ID)
	if len(s.set.List()) == 0 {
		_ = os.Remove(s.memory) // where it is empty
	}
	return errors.Join(append(errs, s.closeDisks())...)
}

// SnapshotPart is a device of a taken snapshot, for who reads its image.
type SnapshotPart struct {
	snapshot.ImageOf
	SectorSize int64 // bytes
	BlockSize  int64 // of the change map
}

// SnapshotParts gives the devices of a taken snapshot.
func (s *Server) SnapshotParts(id snapshot.ID) (snapshot.Info, []SnapshotPart, error) {
	images, err := s.set.Images(id)
	if err != nil {
		return snapshot.Info{}, nil, err
	}
	info, err := s.Snapshot(id)
	if err != nil {
		return info, nil, err
	}
	var out []SnapshotPart
	for _, i := range images {
		d, err := s.find(i.Device)
		if err != nil {
			return info, nil, err
		}
		now := d.now()
		if now.lower == nil {
			return info, nil, fmt.Errorf("%s is offline: %w", i.Device, ErrNotFound)
		}
		out = append(out, SnapshotPart{i, cmp.Or(now.lower.Limits().LogicalBlock, block.SectorSize), cbt.BlockSize(i.Image.Size())})
	}
	return info, out, nil
}
