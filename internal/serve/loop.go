package serve

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	fuseloop "tidemark/internal/front/loop"
	"tidemark/internal/loop"
)

// loopFront shows a device as a loop device over a FUSE file. It needs nothing
// but those two, and cannot outlive its server: requests fail when that ends.
type loopFront struct{ helper []string }

type loopServed struct{ *fuseloop.Presented }

func (f loopFront) probe() error {
	for _, name := range []string{"/dev/fuse", "/dev/loop-control"} {
		file, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		file.Close()
	}
	return nil
}

// serve begins anew: a loop device of the process before gives nothing but I/O errors.
func (f loopFront) serve(ctx context.Context, spec Spec, dev shown, memory json.RawMessage) (served, error) {
	if err := f.forget(ctx, spec, memory); err != nil {
		return nil, err
	}
	p, err := fuseloop.Present(ctx, f.helper, dev, loop.Options{DirectIO: true, ReadOnly: spec.ReadOnly, PartScan: true, BlockSize: int(dev.limits.LogicalBlock)})
	if err != nil {
		return nil, err
	}
	return loopServed{p}, nil
}

// loopMemory tells a loop device from a later one with the same number.
type loopMemory struct {
	Path string `json:"path"`
	Seq  uint64 `json:"disk_sequence"`
}

func (f loopFront) forget(ctx context.Context, _ Spec, memory json.RawMessage) error {
	var m loopMemory
	if len(memory) == 0 {
		return nil
	}
	if err := json.Unmarshal(memory, &m); err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if m.Seq == 0 || diskSeq(m.Path) != m.Seq {
		return nil // long gone
	}
	return fuseloop.Forget(ctx, f.helper, m.Path)
}

func (s loopServed) kernel() string { return s.Path }
func (s loopServed) uri() string    { return "" }
func (s loopServed) outlives() bool { return false }

func (s loopServed) memory() json.RawMessage {
	b, _ := json.Marshal(loopMemory{s.Path, diskSeq(s.Path)}) // strings and numbers always can be
	return b
}

func (s loopServed) open() bool {
	return openBy(s.Path) != ""
}

func (s loopServed) resized(ctx context.Context) error { return s.Resized(ctx) }

// pause cannot keep the device: who has it open gets I/O errors.
func (s loopServed) pause(ctx context.Context) error {
	if err := s.Detach(ctx); err != nil && !errors.Is(err, loop.ErrBusy) {
		return err
	}
	return nil
}

func (s loopServed) remove(ctx context.Context) error {
	if who := openBy(s.Path); who != "" {
		return fmt.Errorf("%s is %w by %s", s.Path, ErrInUse, who)
	}
	err := s.Detach(ctx)
	if errors.Is(err, loop.ErrBusy) {
		return fmt.Errorf("%s: %w", s.Path, ErrInUse)
	}
	return err
}

// end leaves a device that is open to its last user.
func (s loopServed) end(ctx context.Context) error { return s.pause(ctx) }

// diskSeq tells an attachment from a later one under the same number; 0: it is gone.
func diskSeq(path string) uint64 {
	i, err := loop.Status(path)
	if err != nil {
		return 0
	}
	return i.DiskSeq
}
