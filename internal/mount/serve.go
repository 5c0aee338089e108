package mount

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
	fuseloop "tidemark/internal/front/loop"
)

// Descriptors that the serving process inherits, in the order of exec.Cmd.ExtraFiles.
const (
	fdConfig = 3 + iota // config, JSON, to its end
	fdConn              // the FUSE connection
	fdReady             // one line goes back: "ok", or why not
)

const ready = "ok"

// config is what Mount tells the serving process.
type config struct {
	Spec    json.RawMessage `json:"spec"`
	Scratch string          `json:"scratch"`
}

// Opener opens the view that spec describes. A view that is an io.Closer is closed at the end.
type Opener func(ctx context.Context, spec json.RawMessage) (block.Device, error)

// Overlay puts a writable device over a read-only one; changes go to a scratch
// file in dir that should have no name any more (so that kill -9 leaves
// nothing) and is gone when the device, an io.Closer, is closed.
type Overlay func(view block.Device, dir string) (block.Device, error)

// ServeMain is the whole of the serving process, which Mount starts: it opens
// the view, puts the overlay on it and serves it until the kernel lets go of
// it, that is, until the tree is unmounted. It must not be called in the
// process that mounts.
func ServeMain(open Opener, overlay Overlay) error {
	if err := becomeFlusher(); err != nil {
		return err
	}
	tell := os.NewFile(fdReady, "ready")
	dev, done, err := prepare(open, overlay)
	if err != nil {
		fmt.Fprintln(tell, strings.Join(strings.Fields(err.Error()), " ")) // one line
		return errors.Join(err, tell.Close())
	}
	defer done()
	fmt.Fprintln(tell, ready)
	if err := tell.Close(); err != nil {
		return err
	}
	return fuseloop.Serve(os.NewFile(fdConn, "conn"), dev)
}

func prepare(open Opener, overlay Overlay) (block.Device, func(), error) {
	in := os.NewFile(fdConfig, "config")
	defer in.Close()
	var c config
	if err := json.NewDecoder(in).Decode(&c); err != nil {
		return nil, nil, fmt.Errorf("reading what to serve: %w", err)
	}
	view, err := open(context.Background(), c.Spec)
	if err != nil {
		return nil, nil, err
	}
	dev, err := overlay(view, c.Scratch)
	if err != nil {
		closeDevice(view)
		return nil, nil, fmt.Errorf("scratch space in %s: %w", c.Scratch, err)
	}
	return dev, func() { closeDevice(dev); closeDevice(view) }, nil
}

// closeDevice ends a device at the end of the process: nobody is left to tell of an error.
func closeDevice(d block.Device) {
	if c, ok := d.(io.Closer); ok {
		_ = c.Close()
	}
}

// becomeFlusher makes this process one whose memory needs never wait for the
// device that it serves. The flag is a thread's and is inherited by exec, so
// the program is executed once more, to have it on all threads. Where it may not be
// set, the process serves without.
func becomeFlusher() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if on, err := unix.PrctlRetInt(unix.PR_GET_IO_FLUSHER, 0, 0, 0, 0); err != nil || on != 0 {
		return nil
	}
	if err := unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0); err != nil {
		return nil
	}
	return unix.Exec("/proc/self/exe", os.Args, os.Environ())
}
