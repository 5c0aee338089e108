package serve

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// node is what users are told: our own name for a block device, or an NBD URI.
func (s *Server) node(d parts) string {
	if d.served.kernel() == "" {
		return d.served.uri()
	}
	if d.spec.Splice != nil {
		return "/dev/mapper/" + d.spec.Splice.Name
	}
	return filepath.Join(s.env.Nodes, d.spec.Name)
}

func (s *Server) link(d *Device) error {
	if d.spec.Splice != nil {
		return nil
	}
	return s.linkTo(d.spec.Name, d.served)
}

// linkTo makes our own name for the kernel's node, without udev. What a daemon
// that was killed left there is replaced; anything else is not ours to take.
func (s *Server) linkTo(name string, shows served) error {
	if shows.kernel() == "" {
		return nil
	}
	if err := os.MkdirAll(s.env.Nodes, 0o755); err != nil {
		return err
	}
	path := filepath.Join(s.env.Nodes, name)
	st, err := os.Lstat(path)
	switch {
	case err == nil && st.Mode()&fs.ModeSymlink == 0:
		return fmt.Errorf("%s is there and is not of Tidemark: remove it, or give another --name: %w", path, ErrExists)
	case err == nil:
		if err := os.Remove(path); err != nil {
			return err
		}
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	return os.Symlink(shows.kernel(), path)
}

func (s *Server) unlink(d *Device) error {
	if d.spec.Splice != nil {
		return nil
	}
	return s.unlinkName(d.spec.Name)
}

func (s *Server) unlinkName(name string) error {
	path := filepath.Join(s.env.Nodes, name)
	if st, err := os.Lstat(path); err != nil || st.Mode()&fs.ModeSymlink == 0 {
		return nil // an NBD server has none
	}
	return os.Remove(path)
}
