package serve

import (
	"errors"
	"fmt"

	"tidemark/internal/backing"
	"tidemark/internal/disk"
)

// ErrOtherDisk: the path of a device's backing leads to another disk than it did.
var ErrOtherDisk = errors.New("it may be another disk")

// identityOf is that of a backing that is a disk, nil of a file.
func identityOf(lower *backing.Device) *disk.Identity {
	i, err := disk.Inspect(lower.Path())
	if err != nil {
		return nil // a file, or a disk that cannot be asked
	}
	return &i.Identity
}

// checkDisk refuses a disk that has taken the name of the one that was served:
// the kernel gives names anew at each boot, and to what is plugged in. One that
// has no name of its own is known by its number within a boot; after that by
// what lies on it, where there was anything.
func checkDisk(path string, was, now *disk.Identity) error {
	if was == nil || now == nil {
		return nil
	}
	same, why := disk.Same(*was, *now)
	unnamed := was.ByID == "" && was.DMUUID == "" && was.PartUUID == "" && was.PTUUID == "" && was.FSUUID == ""
	if same || unnamed && was.BootID != now.BootID && was.Size <= now.Size {
		return nil // nothing tells two such disks apart
	}
	return fmt.Errorf("%s: %w: %s. If it is the same one, remove the device and create it again, which changes nothing on it", path, ErrOtherDisk, why)
}

// rememberDisk notes which disk is behind a device: a file system that was made
// on it meanwhile is a name of it.
func (s *Server) rememberDisk(d *Device) error {
	now := identityOf(d.lower)
	if now == nil || d.spec.Splice != nil {
		return nil
	}
	r, err := s.load(d.spec.Name)
	if err != nil || r.Disk != nil && *r.Disk == *now {
		return err
	}
	d.was, r.Disk = now, now
	return s.save(r)
}
