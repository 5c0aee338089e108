package ublk

import (
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	abi "tidemark/internal/abi/ublk"
	"tidemark/internal/block"
)

// plainDevice has no ability but the ones that every device has.
type plainDevice struct{ size int64 }

func (d plainDevice) ReadAt(p []byte, off int64) (int, error)  { return len(p), nil }
func (d plainDevice) WriteAt(p []byte, off int64) (int, error) { return len(p), nil }
func (d plainDevice) Flush() error                             { return nil }
func (d plainDevice) Size() int64                              { return d.size }

type richDevice struct {
	plainDevice
	limits block.Limits
}

func (d richDevice) WriteFUA(p []byte, off int64) (int, error) { return len(p), nil }
func (d richDevice) WriteZeroes(r block.Range) error           { return nil }
func (d richDevice) Discard(r block.Range) error               { return nil }
func (d richDevice) Limits() block.Limits                      { return d.limits }

// TestParams: what the kernel is told follows from what the device can.
func TestParams(t *testing.T) {
	p := paramsOf(abilitiesOf(plainDevice{1<<20 + 100}), 64<<10)
	if p.Types != abi.ParamBasic || p.Attrs != abi.AttrVolatileCache || p.LogicalShift != 9 || p.PhysicalShift != 9 || p.DevSectors != 2048 || p.MaxSectors != 128 {
		t.Errorf("a plain device: %+v", p)
	}
	rich := richDevice{plainDevice{1 << 20}, block.Limits{LogicalBlock: 4096, PhysicalBlock: 16384, OptIO: 3 << 16, Discard: 1 << 20, MaxDiscard: 5<<20 + 4096, Rotational: true}}
	p = paramsOf(abilitiesOf(rich), 1<<20)
	if p.Types != abi.ParamBasic|abi.ParamDiscard || p.Attrs != abi.AttrVolatileCache|abi.AttrFUA|abi.AttrRotational || p.LogicalShift != 12 || p.PhysicalShift != 14 ||
		p.IOMinShift != 14 || p.IOOptShift != 17 || p.DiscardGranularity != 1<<20 || p.MaxDiscardSectors != 5<<20/512 || p.MaxZeroesSectors != longest/512 || p.MaxDiscardSegments != 1 {
		t.Errorf("a rich device: %+v", p)
	}
	rich.limits = block.Limits{}
	if p = paramsOf(abilitiesOf(rich), 1<<20); p.MaxDiscardSectors != 0 || p.MaxZeroesSectors == 0 || p.DiscardGranularity != 512 {
		t.Errorf("a device that offers no discards: %+v", p)
	}
	rich.limits = block.Limits{ReadOnly: true, Discard: 4096}
	if p = paramsOf(abilitiesOf(rich), 1<<20); p.Attrs&abi.AttrReadOnly == 0 || p.MaxDiscardSectors|p.MaxZeroesSectors != 0 {
		t.Errorf("a read-only device: %+v", p)
	}
}

func TestErrno(t *testing.T) {
	for err, want := range map[error]unix.Errno{
		errors.New("any"): unix.EIO, unix.EBADF: unix.EIO, unix.EAGAIN: unix.EIO,
		fmt.Errorf("x: %w", errors.ErrUnsupported): unix.EOPNOTSUPP, fmt.Errorf("x: %w", unix.ENOSPC): unix.ENOSPC, unix.ETIMEDOUT: unix.ETIMEDOUT,
	} {
		if got := errnoOf(err); got != want {
			t.Errorf("%v: %v, want %v", err, got, want)
		}
	}
}

func TestConfig(t *testing.T) {
	c, err := Config{}.normal(16)
	if err != nil || c.Queues != 4 || c.Depth != 32 || c.MaxIO != 256<<10 {
		t.Errorf("%+v, %v", c, err)
	}
	for _, bad := range []Config{{Queues: -1}, {Queues: 65}, {Depth: 4097}, {MaxIO: 4095}, {MaxIO: 12 << 10}, {MaxIO: 64 << 20}} {
		if _, err := bad.normal(1); err == nil {
			t.Errorf("%+v was taken", bad)
		}
	}
}
