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

// link makes our own name for the kernel's node, without udev. What a daemon
// that was killed left there is replaced; anything else is not ours to take.
func (s *Server) link(d *Device) error {
	if d.served.kernel() == "" || d.spec.Splice != nil {
		return nil
	}
	if err := os.MkdirAll(s.env.Nodes, 0o755); err != nil {
		return err
	}
	name := s.node(d.now())
	st, err := os.Lstat(name)
	switch {
	case err == nil && st.Mode()&fs.ModeSymlink == 0:
		return fmt.Errorf("%s is there and is not of Tidemark: remove it, or give another --name: %w", name, ErrExists)
	case err == nil:
		if err := os.Remove(name); err != nil {
			return err
		}
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	return os.Symlink(d.served.kernel(), name)
}

func (s *Server) unlink(d *Device) error {
	name := filepath.Join(s.env.Nodes, d.spec.Name)
	if d.spec.Splice != nil {
		return nil
	}
	if st, err := os.Lstat(name); err != nil || st.Mode()&fs.ModeSymlink == 0 {
		return nil // an NBD server has none
	}
	return os.Remove(name)
}
