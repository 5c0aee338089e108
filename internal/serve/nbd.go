package serve

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"tidemark/internal/front/nbd"
	"tidemark/internal/front/nbdk"
)

// nbdWait is how long requests wait for the next process before they fail.
const nbdWait = time.Hour

// nbdFront shows a device through the kernel's NBD client. Its requests wait
// for the next process, for nbdWait at most.
type nbdFront struct{ log *slog.Logger }

type nbdKernelServed struct {
	*nbdk.Device
	dev shown
}

func (nbdFront) identity(spec Spec) string { return "tidemark-" + spec.ID }

func (nbdFront) probe() error { return nbdk.Probe() }

func (f nbdFront) serve(ctx context.Context, spec Spec, dev shown, _ json.RawMessage) (served, error) {
	server := &nbd.Server{Log: f.log}
	if err := server.Add(nbd.Export{Name: spec.Name, Device: dev, ReadOnly: spec.ReadOnly, BlockSize: dev.limits.LogicalBlock}); err != nil {
		return nil, err
	}
	d, err := nbdk.Reattach(ctx, server, spec.Name, f.identity(spec))
	if errors.Is(err, nbdk.ErrNotFound) {
		d, err = nbdk.Attach(ctx, server, spec.Name, nbdk.Options{Identity: f.identity(spec), Wait: nbdWait + spec.GiveBack, BlockSize: dev.limits.LogicalBlock})
	}
	if err != nil {
		return nil, err
	}
	return nbdKernelServed{d, dev}, nil
}

func (f nbdFront) forget(ctx context.Context, spec Spec, _ json.RawMessage) error {
	err := nbdk.Forget(ctx, f.identity(spec))
	if errors.Is(err, nbdk.ErrNotFound) || errors.Is(err, nbdk.ErrNoKernel) {
		return nil
	}
	return err
}

func (s nbdKernelServed) kernel() string          { return s.Path }
func (s nbdKernelServed) uri() string             { return "" }
func (s nbdKernelServed) memory() json.RawMessage { return nil }
func (s nbdKernelServed) open() bool              { return openBy(s.Path) != "" }
func (s nbdKernelServed) outlives() bool          { return true }

func (s nbdKernelServed) resized(ctx context.Context) error { return s.Resize(ctx, s.dev.Size()) }
func (s nbdKernelServed) pause(context.Context) error       { s.Release(); return nil }

func (s nbdKernelServed) remove(ctx context.Context) error {
	err := s.Detach(ctx)
	if errors.Is(err, nbdk.ErrBusy) {
		return fmt.Errorf("%s is %w by %s", s.Path, ErrInUse, openBy(s.Path))
	}
	return err
}

func (s nbdKernelServed) lingers() <-chan struct{} { return s.Done() }

// end leaves a device that is open to its last user: until then it gives errors.
func (s nbdKernelServed) end(ctx context.Context) error {
	err := s.Detach(ctx)
	if !errors.Is(err, nbdk.ErrBusy) {
		return err
	}
	go func() { // ends with the last user, or with this process
		for err := err; errors.Is(err, nbdk.ErrBusy); err = s.Detach(context.Background()) {
			select {
			case <-s.Done():
				return
			case <-time.After(time.Second):
			}
		}
	}()
	return nil
}
