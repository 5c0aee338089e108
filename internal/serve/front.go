package serve

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"

	"tidemark/internal/block"
	"tidemark/internal/front/nbd"
)

// The fronts by name, in the order in which Auto tries them.
const (
	Auto           = "auto"
	FrontUblk      = "ublk"
	FrontNBD       = "nbd"        // /dev/nbdN of the kernel
	FrontLoop      = "loop"       // a FUSE file under a loop device
	FrontNBDServer = "nbd-server" // no device: NBD clients connect
)

// Fronts are the names without Auto.
var Fronts = []string{FrontUblk, FrontNBD, FrontLoop, FrontNBDServer}

// front is a way to show a device.
type front interface {
	// probe says why it cannot be had on this machine, nil where it can.
	probe() error
	// serve shows the device. memory is that of the process before, which may
	// have been killed, nil for a new device.
	serve(ctx context.Context, spec Spec, dev shown, memory json.RawMessage) (served, error)
	// forget removes what a process that was killed has left of a device.
	forget(ctx context.Context, spec Spec, memory json.RawMessage) error
}

// served is a device that is being shown.
type served interface {
	kernel() string          // its node as the kernel calls it; "" where there is none
	uri() string             // where NBD clients connect; "" where they do not
	memory() json.RawMessage // for serve or forget of a later process
	open() bool              // somebody uses it
	outlives() bool          // requests wait for the next process instead of failing
	resized(ctx context.Context) error
	pause(ctx context.Context) error  // this process ends
	remove(ctx context.Context) error // the device ends; ErrInUse where it must not
	end(ctx context.Context) error    // the device ends, also for who has it open: errors from then on
}

// shown is what a front shows.
type shown struct {
	dev
	limits  block.Limits
	bitmaps func() []nbd.Bitmap // nil where nothing is tracked
}

// dev is a device with every ability that fronts use: a stack or, for a guard, the backing itself.
type dev interface {
	block.Device
	block.Zeroer
	block.Discarder
	block.FUAWriter
}

// Limits are the backing's: the filters change none.
func (s shown) Limits() block.Limits { return s.limits }

func newFronts(env *Env) map[string]front {
	return map[string]front{
		FrontUblk:      ublkFront{},
		FrontNBD:       nbdFront{env.Log},
		FrontLoop:      loopFront{env.Helper},
		FrontNBDServer: nbdServer{filepath.Join(env.StateDir, "devices"), env.Log},
	}
}

// front is one that has been checked to exist, or one that does nothing.
func (s *Server) front(name string) front {
	if f := s.fronts[name]; f != nil {
		return f
	}
	return none(name)
}

// best is the first front that this machine has.
func (s *Server) best() string {
	for _, name := range Fronts {
		if f := s.fronts[name]; f != nil && f.probe() == nil {
			return name
		}
	}
	return ""
}

// none is a front that a damaged or later record names.
type none string

func (n none) probe() error {
	return fmt.Errorf("%q: %w: want %s", string(n), ErrFront, strings.Join(Fronts, ", "))
}

func (n none) serve(context.Context, Spec, shown, json.RawMessage) (served, error) {
	return nil, n.probe()
}
func (n none) forget(context.Context, Spec, json.RawMessage) error { return nil }
