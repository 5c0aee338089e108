package serve

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/filter/capture"
	"tidemark/internal/stack"
)

// Capture says over which devices the ring of a protected group is.
type Capture struct {
	Group     string
	RingBytes int64
	Patience  time.Duration  // that a write has with a full ring
	Disks     []capture.Disk // by the names of their devices
}

// capturing is a group's capture; ring is nil where it could not be had.
type capturing struct {
	Capture
	ring *capture.Ring
}

const ringSuffix = ".ring"

// ringFolders are where rings lie: in memory that outlives this process and,
// where that has no room or is somebody else's, beside the records.
func (s *Server) ringFolders() (out []string) {
	if s.memory != "" {
		if st, err := os.Stat(s.memory); err != nil || st.Sys().(*syscall.Stat_t).Uid == uint32(os.Geteuid()) {
			out = append(out, filepath.Join(s.memory, "rings"))
		}
	}
	return append(out, s.folder)
}

func (s *Server) rings() (out []string) {
	for _, folder := range s.ringFolders() {
		found, _ := filepath.Glob(filepath.Join(folder, "*"+ringSuffix)) // a pattern without faults
		out = append(out, found...)
	}
	return out
}

// openRings goes on with the rings of an earlier process. Its filters come with
// the devices (captureLaid). Where one cannot be had its group begins anew when it
// finds that out.
func (s *Server) openRings() {
	wanted := map[string]bool{}
	for _, c := range s.env.Captures {
		wanted[c.Group+ringSuffix] = true
		k := &capturing{Capture: c}
		s.captures[c.Group] = k
		if err := s.continueRing(k); err != nil {
			s.env.Log.Warn("the capture of served devices cannot go on", "group", c.Group, "error", err)
		}
	}
	for _, path := range s.rings() {
		if !wanted[filepath.Base(path)] { // of a protect that was killed before it was durable
			_ = os.Remove(path)
		}
	}
}

// continueRing opens the ring that an earlier process left.
func (s *Server) continueRing(k *capturing) error {
	for _, folder := range s.ringFolders() {
		cfg := k.config(filepath.Join(folder, k.Group+ringSuffix))
		if _, err := os.Stat(cfg.Path); err != nil {
			continue
		}
		ring, fresh, err := capture.Open(cfg)
		if err != nil {
			return err
		}
		if fresh { // of an earlier boot, or of other devices
			return ring.Remove()
		}
		k.ring = ring
		return nil
	}
	return nil
}

// distrustAbsent says of the devices that are not there that nobody captures
// what is written to them: a volume that was given back is written past us.
func (s *Server) distrustAbsent() {
	for _, k := range s.captures {
		for i, disk := range k.Disks {
			if d := s.devices[disk.Name]; k.ring != nil && (d == nil || d.stack == nil) {
				k.ring.Distrust(i, fmt.Errorf("the device %s is offline: %w", disk.Name, ErrNotFound))
			}
		}
	}
}

func (k *capturing) config(path string) capture.Config {
	return capture.Config{Path: path, RingBytes: k.RingBytes, Disks: k.Disks, Patience: k.Patience}
}

// attachCapture puts the filter over one device.
func (s *Server) attachCapture(k *capturing, disk int) error {
	d, err := s.find(k.Disks[disk].Name)
	if err != nil {
		return err
	}
	st := d.now().stack
	if st == nil {
		return fmt.Errorf("the device %s is offline: %w", d.now().spec.Name, ErrNotFound)
	}
	_, err = st.Attach(capture.Name, capture.Altitude, k.ring.Driver(disk))
	return err
}

// captureLaid puts the filter over a device that was made anew under its name.
func (s *Server) captureLaid(name string, st *stack.Stack) {
	for _, k := range s.captures {
		for i := range k.Disks {
			if k.ring == nil || k.Disks[i].Name != name {
				continue
			}
			if _, err := st.Attach(capture.Name, capture.Altitude, k.ring.Driver(i)); err != nil {
				k.ring.Distrust(i, err)
			}
		}
	}
}

// Captured gives the ring of a group; nil: there is none.
func (s *Server) Captured(group string) *capture.Ring {
	s.mu.Lock()
	defer s.mu.Unlock()
	if k := s.captures[group]; k != nil {
		return k.ring
	}
	return nil
}

// StartCapture puts a new ring over devices, in the place of any that the group
// has. When it returns every write passes it. On an error there is none.
func (s *Server) StartCapture(c Capture) (*capture.Ring, error) {
	s.changes.Lock()
	defer s.changes.Unlock()
	if err := s.endCapture(c.Group, true); err != nil {
		return nil, err
	}
	k := &capturing{Capture: c}
	for _, d := range c.Disks {
		if _, err := s.find(d.Name); err != nil {
			return nil, err
		}
	}
	if err := s.newRing(k); err != nil {
		return nil, err
	}
	s.keep(k)
	for i := range k.Disks {
		if err := s.attachCapture(k, i); err != nil {
			return nil, errors.Join(fmt.Errorf("capturing the writes of %s: %w", k.Disks[i].Name, err), s.endCapture(c.Group, true))
		}
	}
	return k.ring, nil
}

// newRing makes the ring where there is room for it.
func (s *Server) newRing(k *capturing) (err error) {
	var errs []error
	for _, folder := range s.ringFolders() {
		path := filepath.Join(folder, k.Group+ringSuffix)
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if k.ring, _, err = capture.Open(k.config(path)); err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (s *Server) keep(k *capturing) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.captures[k.Group] = k
}

// EndCapture takes the filters of a group off its devices, and its ring away.
func (s *Server) EndCapture(group string) error {
	s.changes.Lock()
	defer s.changes.Unlock()
	return s.endCapture(group, false)
}

// endCapture leaves the group's claim on its devices where another ring follows.
func (s *Server) endCapture(group string, anew bool) error {
	s.mu.Lock()
	k := s.captures[group]
	if k != nil && !anew {
		delete(s.captures, group)
	}
	s.mu.Unlock()
	if k == nil || k.ring == nil {
		return nil
	}
	k.ring.Rest()
	errs := []error{s.detachCapture(k)}
	ring := k.ring
	s.mu.Lock()
	k.ring = nil
	s.mu.Unlock()
	errs = append(errs, ring.Remove())
	if s.memory != "" {
		_ = os.Remove(filepath.Join(s.memory, "rings")) // where they are empty
		if len(s.set.List()) == 0 {
			_ = os.Remove(s.memory)
		}
	}
	return errors.Join(errs...)
}

func (s *Server) detachCapture(k *capturing) error {
	var errs []error
	for _, disk := range k.Disks {
		d, err := s.find(disk.Name)
		if err != nil {
			continue
		}
		if st := d.now().stack; st != nil {
			if err := st.Detach(capture.Name); err != nil && !errors.Is(err, stack.ErrNoSuch) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// CapturedBy is the group that protects a device, "" where none does.
func (s *Server) CapturedBy(name string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range s.captures {
		for _, d := range k.Disks {
			if d.Name == name {
				return k.Group
			}
		}
	}
	return ""
}

// restCaptures has what is recorded stay, while the devices end in order.
func (s *Server) restCaptures() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range s.captures {
		if k.ring != nil {
			k.ring.Rest()
		}
	}
}

// Close lets go of the rings, after Stop and when no group is at work with them
// any more. They stay in their files, for the next process.
func (s *Server) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, k := range s.captures {
		if k.ring != nil {
			errs = append(errs, k.ring.Close())
			k.ring = nil
		}
	}
	return errors.Join(errs...)
}

// Found is a served device as groups need it.
type Found struct {
	Name, Backing string
	Node          string // what users open; "" while it is offline
	Kernel        string // the block device that users have; "" for nbd-server
	Size          int64  // bytes
	SectorSize    int64
}

// Find finds a device by its name, by what device create printed, or by any name
// of its block device.
func (s *Server) Find(name string) (Found, bool) {
	var wanted unix.Stat_t
	isNode := unix.Stat(name, &wanted) == nil && wanted.Mode&unix.S_IFMT == unix.S_IFBLK
	for _, d := range s.list() {
		now := d.now()
		f := Found{Name: now.spec.Name, Backing: now.spec.Backing}
		if sp := now.spec.Splice; sp != nil { // the lower device's own name changes from splice to splice
			f.Backing = strings.TrimSpace(sp.Name + " " + sp.UUID)
		}
		if now.served != nil {
			f.Node, f.Size, f.SectorSize = s.node(now), now.lower.Size(), now.lower.Limits().LogicalBlock
			if now.served.kernel() != "" {
				f.Kernel = s.kernelOf(now)
			}
		}
		if f.Name == name || f.Node != "" && f.Node == name {
			return f, true
		}
		for _, node := range []string{f.Kernel, f.Node} {
			var st unix.Stat_t
			if isNode && f.Kernel != "" && unix.Stat(node, &st) == nil && st.Rdev == wanted.Rdev {
				return f, true
			}
		}
	}
	return Found{}, false
}

// MountsOf lists where file systems of a device are mounted.
func (s *Server) MountsOf(name string) ([]string, error) {
	f, ok := s.Find(name)
	if !ok || f.Kernel == "" {
		return nil, fmt.Errorf("%q: %w", name, ErrNotFound)
	}
	return mountsOn(f.Kernel), nil
}
