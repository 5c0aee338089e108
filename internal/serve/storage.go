package serve

import (
	"errors"
	"fmt"
	"maps"
	"path/filepath"

	"tidemark/internal/backing"
	"tidemark/internal/block"
	"tidemark/internal/disk"
	"tidemark/internal/snapshot"
)

// locate says what a path of difference storage is.
func (s *Server) locate(path string) (snapshot.Place, error) {
	at, err := s.look(path)
	if err != nil {
		return snapshot.Place{}, err
	}
	dev, file := at.Device, at.File
	if name := s.imageWith(dev); name != "" {
		return snapshot.Place{}, fmt.Errorf("difference storage %s: it lies on %s, which is a snapshot's image and needs difference storage itself: %w", path, name, ErrRefused)
	}
	on, below, err := s.below(dev)
	if err != nil {
		return snapshot.Place{}, fmt.Errorf("difference storage %s: %w", path, err)
	}
	if name := s.deepUnder(path); file && below == nil && name != "" {
		return snapshot.Place{}, fmt.Errorf("difference storage %s: it lies on the served device %s, not directly or on a file system whose files move (ext4 and xfs do not): put it on another device: %w", path, name, ErrRefused)
	}
	if below != nil || file {
		return snapshot.Place{Device: below, On: on, File: file, Served: !file}, nil
	}
	return s.storageDisk(path)
}

// deepUnder is the served device or image that holds a file in a way that its
// device number does not tell - btrfs, a loop device over a file -, "" for none.
func (s *Server) deepUnder(path string) string {
	nodes := map[string]string{}
	for _, d := range s.list() {
		if now := d.now(); now.served != nil && now.served.kernel() != "" {
			nodes[now.spec.Name] = s.kernelOf(now)
		}
	}
	s.mu.Lock()
	for name, m := range s.images {
		nodes[name] = m.served.kernel()
	}
	s.mu.Unlock()
	for name, node := range nodes {
		if i, err := disk.Glance(node); node != "" && err == nil && disk.Holds(i, path) {
			return name
		}
	}
	return ""
}

// ownUnder is the served device or image that a path is or lies on, "" for none.
func (s *Server) ownUnder(path string) string {
	at, err := s.look(path)
	if err != nil {
		return ""
	}
	dev, file := at.Device, at.File
	if name := s.imageWith(dev); name != "" {
		return name
	}
	for _, d := range s.list() {
		if now := d.now(); now.served != nil && now.served.kernel() != "" && where(s.kernelOf(now), dev) != stranger {
			return now.spec.Name
		}
	}
	if file {
		return s.deepUnder(path)
	}
	return ""
}

// imageWith is the image that a device number belongs to, or lies on, "" for none.
func (s *Server) imageWith(dev uint64) string {
	s.mu.Lock()
	images := maps.Clone(s.images)
	s.mu.Unlock()
	for name, m := range images {
		if kernel := m.served.kernel(); kernel != "" && where(kernel, dev) != stranger {
			return name
		}
	}
	return ""
}

// below is the device with a number, by name and as seen from below the snapshots'
// filters, nil where it is not one of ours.
func (s *Server) below(dev uint64) (name string, below block.Device, err error) {
	for _, d := range s.list() {
		now := d.now()
		if now.served == nil || now.served.kernel() == "" {
			continue
		}
		switch where(s.kernelOf(now), dev) {
		case itself:
			return now.spec.Name, now.part.Cow.Below(), nil
		case above:
			return "", nil, fmt.Errorf("it lies on a partition or volume of the served device %s, whose extents are not the device's: %w", now.spec.Name, ErrRefused)
		}
	}
	return "", nil, nil
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
		return snapshot.Place{Device: d, Name: path}, nil
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
	return snapshot.Place{Device: d, Name: path}, nil
}

// closeDisks lets go of those that no snapshot needs any more.
func (s *Server) closeDisks() error {
	needed := s.set.Disks()
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for path, d := range s.disks {
		if !needed[path] {
			errs = append(errs, d.Flush(), d.Close())
			delete(s.disks, path)
		}
	}
	return errors.Join(errs...)
}
