// Package loop serves any block.Device as a file of the kernel's FUSE file
// system and puts a loop device on that file: a block device with no kernel
// module of ours, and none beyond FUSE and loop.
//
// Two processes share the work. One (the user) makes an Export and hands its
// connection to the other (the server), which answers the kernel in Serve; the
// user then attaches the loop device. The server never touches the file
// that it serves: a process that waits for itself cannot even be killed.
//
// The FUSE file system is one regular file, mounted nowhere: no path leads
// to it, and only the loop device holds it. So there is nothing to clean up.
// When the loop device goes, the kernel ends the connection and Serve returns;
// when the server dies, the kernel fails what it owed, and the loop device gives I/O errors.
package loop

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/loop"
)

// ErrHang says that the server did not answer in time. End it: that ends the
// connection and frees whoever waits for it.
var ErrHang = errors.New("the server of the device does not answer")

// Export is the user's side of a served device.
type Export struct {
	// Conn is the connection, for the server; see Started.
	Conn  *os.File
	mount *os.File
}

// New makes the file system, which waits for a server on Conn.
func New() (*Export, error) {
	// Non-blocking would make it part of Go's poller; go-fuse reads it with plain system calls.
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("/dev/fuse: %w (is FUSE in this kernel, and is this root?)", err)
	}
	conn := os.NewFile(uintptr(fd), "/dev/fuse")
	mount, err := mountNowhere(fd)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("a FUSE file system for the device: %w", err), conn.Close())
	}
	return &Export{Conn: conn, mount: mount}, nil
}

// mountNowhere makes a FUSE file system whose root is a regular file, and a mount of it without a place.
func mountNowhere(conn int) (*os.File, error) {
	fs, err := unix.Fsopen("fuse", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fs)
	for _, o := range [][2]string{
		{"source", "tidemark"}, {"subtype", "tidemark"}, {"fd", strconv.Itoa(conn)},
		{"rootmode", strconv.FormatUint(unix.S_IFREG|0o600, 8)},
		{"user_id", strconv.Itoa(os.Geteuid())}, {"group_id", strconv.Itoa(os.Getegid())},
	} {
		if err := unix.FsconfigSetString(fs, o[0], o[1]); err != nil {
			return nil, fmt.Errorf("option %s=%s: %w", o[0], o[1], err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, err
	}
	m, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(m), "fuse"), nil
}

// Started lets go of Conn once the server has it: the death of the server must
// leave nobody who keeps the connection open.
func (e *Export) Started() error {
	if e.Conn == nil {
		return nil
	}
	c := e.Conn
	e.Conn = nil
	return c.Close()
}

// Close lets go of the file. An attached loop device keeps it alive.
func (e *Export) Close() error {
	err := e.Started()
	if e.mount != nil {
		err = errors.Join(err, e.mount.Close())
		e.mount = nil
	}
	return err
}

// Attach puts a loop device on the served file, in another process than the
// server's, after Started. When ctx ends first it calls kill, which
// must end the server, and returns ErrHang. Attach with o.AutoClear, and the
// last user of the device ends it all; with o.DirectIO it is several times as fast.
func (e *Export) Attach(ctx context.Context, o loop.Options, kill func()) (*loop.Device, error) {
	type result struct {
		dev *loop.Device
		err error
	}
	done := make(chan result, 1)
	go func() { // ends with its system calls: at the latest after kill
		dev, err := e.attach(o)
		done <- result{dev, err}
	}()
	select {
	case r := <-done:
		return r.dev, r.err
	case <-ctx.Done():
	}
	kill()
	select {
	case r := <-done:
		if r.dev != nil {
			_ = r.dev.Detach() // its server is dead: no use to anybody
		}
	case <-time.After(10 * time.Second): // still stuck: it goes with this process
	}
	return nil, fmt.Errorf("attaching a loop device: %w: %w", ErrHang, ctx.Err())
}

func (e *Export) attach(o loop.Options) (*loop.Device, error) {
	mode := os.O_RDWR
	if o.ReadOnly {
		mode = os.O_RDONLY
	}
	f, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", e.mount.Fd()), mode|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening the served file: %w", err)
	}
	defer f.Close()
	if _, err := f.Stat(); err != nil { // the kernel learns its size here
		return nil, fmt.Errorf("size of the served file: %w", err)
	}
	return loop.AttachFile(f, o)
}
