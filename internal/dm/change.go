package dm

import (
	"fmt"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Create makes a device without a table. Its node appears when a table is resumed.
// An empty uuid is none; with one the device can be told again whatever its name.
func (c *Control) Create(name, uuid string) (Info, error) {
	return c.simple(unix.DM_DEV_CREATE, "making mapped device", Named(name), func(req *unix.DmIoctl) {
		copy(req.Uuid[:len(req.Uuid)-1], uuid)
	})
}

// Load gives a device a table that the next resume puts in use.
func (c *Control) Load(id ID, t Table, readOnly bool) error {
	buf := make([]byte, headerSize, 64<<10)
	for _, x := range t {
		at := len(buf)
		size := (specSize + len(x.Params) + 1 + 7) &^ 7
		buf = append(buf, make([]byte, size)...)
		spec := unix.DmTargetSpec{Sector_start: x.Start, Length: x.Length, Next: uint32(size)}
		if len(x.Type) >= len(spec.Target_type) {
			return fmt.Errorf("%q is no type of target", x.Type)
		}
		copy(spec.Target_type[:], x.Type)
		copy(buf[at:], unsafe.Slice((*byte)(unsafe.Pointer(&spec)), specSize))
		copy(buf[at+specSize:], x.Params)
	}
	req, err := request(buf, id, 0)
	if err != nil {
		return err
	}
	if readOnly {
		req.Flags |= unix.DM_READONLY_FLAG
	}
	req.Target_count = uint32(len(t))
	if err := c.call(unix.DM_TABLE_LOAD, req); err != nil {
		return fmt.Errorf("loading a table into mapped device %s: %w", id, err)
	}
	return nil
}

// Clear forgets the table that Load has brought.
func (c *Control) Clear(id ID) error {
	_, err := c.simple(unix.DM_TABLE_CLEAR, "clearing the waiting table of mapped device", id, nil)
	return err
}

// Suspend lets requests under way end (but where noFlush is set, those that the
// targets can give back are held instead) and holds new ones until Resume. The
// file system above is not frozen.
func (c *Control) Suspend(id ID, noFlush bool) error {
	_, err := c.simple(unix.DM_DEV_SUSPEND, "suspending mapped device", id, func(req *unix.DmIoctl) {
		req.Flags |= unix.DM_SUSPEND_FLAG | unix.DM_SKIP_LOCKFS_FLAG
		if noFlush {
			req.Flags |= unix.DM_NOFLUSH_FLAG
		}
	})
	return err
}

// Resume puts a waiting table in use, if there is one, and lets requests flow.
// quiet tells udev's rules to leave the device alone.
func (c *Control) Resume(id ID, quiet bool) (Info, error) {
	return c.simple(unix.DM_DEV_SUSPEND, "resuming mapped device", id, func(req *unix.DmIoctl) {
		if quiet {
			req.Event_nr = udevLeaveAlone
		}
	})
}

// Remove removes a device that nobody has open. ErrBusy: somebody has.
func (c *Control) Remove(id ID) error {
	_, err := c.simple(unix.DM_DEV_REMOVE, "removing mapped device", id, func(req *unix.DmIoctl) {
		req.Event_nr = udevLeaveAlone
	})
	return err
}

// MakeNode waits until the device's node is there, or makes it where no udev
// does. The node is named by number, so it needs no cleaning up after a crash.
func MakeNode(i Info) (string, error) {
	path := i.Node()
	deadline := time.Now().Add(time.Second)
	for {
		var st unix.Stat_t
		err := unix.Stat(path, &st)
		if err == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK && unix.Major(st.Rdev) == i.Major && unix.Minor(st.Rdev) == i.Minor {
			return path, nil
		}
		if time.Now().After(deadline) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	err := unix.Mknod(path, unix.S_IFBLK|0o600, int(unix.Mkdev(i.Major, i.Minor)))
	if err != nil && !os.IsExist(err) {
		return "", fmt.Errorf("making %s: %w", path, err)
	}
	return path, nil
}
