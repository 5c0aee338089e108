package cuse

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// free looks whether the name can be had. A node that leads nowhere, which a
// server left that was killed where nobody but it makes nodes, is taken away.
func free(name string) error {
	if _, err := os.Stat("/sys/class/cuse/" + name); err == nil {
		return fmt.Errorf("/dev/%s: %w: another server, or another Tidemark daemon, has it", name, ErrExists)
	}
	path := "/dev/" + name
	var st unix.Stat_t
	err := unix.Lstat(path, &st)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil
	case err != nil:
		return fmt.Errorf("%s: %w", path, err)
	case st.Mode&unix.S_IFMT == unix.S_IFCHR:
		_, err := os.Stat(fmt.Sprintf("/sys/dev/char/%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)))
		if errors.Is(err, fs.ErrNotExist) {
			return os.Remove(path)
		}
	}
	return fmt.Errorf("%s: %w: a kernel module's, which must be unloaded first", path, ErrExists)
}

const nodeTime = 2 * time.Second // for the kernel or udev to make a node

// awaitNode waits for the node and makes it where nobody else does; remove then takes it away.
func (s *Server) awaitNode(ctx context.Context) (remove func(), err error) {
	remove, path := func() {}, "/dev/"+s.dev.Name
	var major, minor uint32
	for end := time.Now().Add(nodeTime); ; {
		if b, err := os.ReadFile("/sys/class/cuse/" + s.dev.Name + "/dev"); err == nil {
			if _, err := fmt.Sscanf(string(b), "%d:%d", &major, &minor); err == nil && isNode(path, major, minor) {
				return remove, os.Chmod(path, 0o600)
			}
		}
		select {
		case <-s.read:
			return remove, fmt.Errorf("the kernel refused the device: %w, or its name is taken", ErrUnavailable)
		case <-ctx.Done():
			return remove, ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(end) {
			break
		}
	}
	if major == 0 {
		return remove, fmt.Errorf("%w: nothing at /sys/class/cuse/%s", ErrUnavailable, s.dev.Name)
	}
	if err := unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(major, minor))); err != nil {
		return remove, fmt.Errorf("mknod: %w", err)
	}
	return func() { os.Remove(path) }, nil
}

func isNode(path string, major, minor uint32) bool {
	var st unix.Stat_t
	return unix.Lstat(path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == unix.Mkdev(major, minor)
}
