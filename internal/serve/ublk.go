package serve

import (
	"context"
	"encoding/json"
	"fmt"

	"tidemark/internal/block"
	"tidemark/internal/front/ublk"
)

// ublkFront shows a device through the kernel's ublk driver. Its requests wait
// for the next process when this one ends, however it ends.
type ublkFront struct{}

type ublkServed struct{ *ublk.Server }

func (ublkFront) probe() error { return ublk.Probe() }

// moving is a device that takes data without a copy.
type moving struct {
	shown
	block.Mover
}

func (f ublkFront) serve(ctx context.Context, spec Spec, show shown, _ json.RawMessage) (served, error) {
	left, err := f.left(ctx, spec)
	if err != nil {
		return nil, err
	}
	var dev block.Device = show
	if m, ok := show.dev.(block.Mover); ok {
		dev = moving{show, m}
	}
	var s *ublk.Server
	switch {
	case left != nil && left.Started:
		s, err = ublk.Recover(ctx, left.Number, dev)
	case left != nil:
		err = ublk.Forget(ctx, left.Number)
		fallthrough
	default:
		if err == nil {
			s, err = ublk.Add(ctx, dev, ublk.Config{Token: spec.token(), Copy: spec.Copy})
		}
	}
	if err != nil {
		return nil, err
	}
	return ublkServed{s}, nil
}

// left is the device of an earlier process, found by the token that the kernel keeps.
func (ublkFront) left(ctx context.Context, spec Spec) (*ublk.Info, error) {
	all, err := ublk.List(ctx)
	for i := range all {
		if all[i].Token == spec.token() {
			return &all[i], nil
		}
	}
	return nil, err
}

func (f ublkFront) forget(ctx context.Context, spec Spec, _ json.RawMessage) error {
	if f.probe() != nil {
		return nil // nothing can be left of it
	}
	left, err := f.left(ctx, spec)
	if err != nil || left == nil {
		return err
	}
	return ublk.Forget(ctx, left.Number)
}

func (s ublkServed) kernel() string { return s.Path() }
func (s ublkServed) uri() string    { return "" }
func (s ublkServed) open() bool     { return openBy(s.Path()) != "" }
func (s ublkServed) outlives() bool { return true }

func (s ublkServed) memory() json.RawMessage { return nil }

func (s ublkServed) resized(ctx context.Context) error { return s.Resize(ctx) }
func (s ublkServed) pause(ctx context.Context) error   { return s.Leave(ctx) }

func (s ublkServed) remove(ctx context.Context) error {
	if who := openBy(s.Path()); who != "" {
		return fmt.Errorf("%s is %w by %s", s.Path(), ErrInUse, who)
	}
	return s.Delete(ctx)
}

func (s ublkServed) end(ctx context.Context) error { return s.Delete(ctx) }
