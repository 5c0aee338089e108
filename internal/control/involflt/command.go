package involflt

import (
	"context"
	"errors"
	"syscall"

	"tidemark/internal/abi/involflt"
)

// Bounds of what one call, or all of them, may want.
const (
	volumesMax = 1024
	tagsMax    = involflt.TagRecordsMax / 8
	disksMax   = 4096
)

// memory is a caller's.
type memory interface {
	Read(addr uint64, b []byte) error
	Write(addr uint64, b []byte) error
}

// command answers one command. Every error has an errno in it.
func (f *file) command(ctx context.Context, cmd uint32, arg uint64, m memory) (int32, error) {
	n, err := f.answer(ctx, cmd, arg, m)
	return n, to(err)
}

func (f *file) answer(ctx context.Context, cmd uint32, arg uint64, m memory) (int32, error) {
	s := f.s
	switch cmd {
	case involflt.StartFiltering:
		return 0, f.start(ctx, arg, m)
	case involflt.StopFiltering:
		return 0, f.stop(ctx, arg, m)
	case involflt.UnstackAll:
		return 0, f.stopAll(ctx)
	case involflt.ClearDifferentials:
		return 0, s.clear(ctx, arg, m)
	case involflt.ProtectedVolumes:
		return 0, s.list(arg, m)
	case involflt.ProcessStart:
		return 0, f.lease(&s.drainer)
	case involflt.ServiceStart:
		return 0, f.startService(arg, m)
	case involflt.GetDirtyBlocks, involflt.GetDirtyBlocksV2:
		return 0, f.get(ctx, arg, m)
	case involflt.CommitDirtyBlocks:
		return 0, f.commit(ctx, arg, m)
	case involflt.WaitForBlocks:
		return 0, f.wait(ctx, arg, m)
	case involflt.WaitForBlocksOld:
		return 0, s.waitByName(ctx, arg, m)
	case involflt.WakeupAllThreads:
		s.wakeAll()
		return 0, nil
	case involflt.NotifyThreshold:
		return 0, s.threshold(arg, m)
	case involflt.ResyncStart, involflt.ResyncEnd:
		return 0, s.resync(ctx, cmd, arg, m)
	case involflt.FreezeVolume:
		return 0, s.freeze(ctx, arg, m)
	case involflt.ThawVolume:
		return 0, s.thaw(ctx, arg, m)
	case involflt.TagVolume:
		return s.tag(ctx, arg, m, false)
	case involflt.BarrierTag:
		return s.tag(ctx, arg, m, true)
	case involflt.TagCommit:
		return s.verdict(ctx, arg, m)
	case involflt.CreateBarrier:
		return 0, s.createBarrier(ctx, arg, m)
	case involflt.RemoveBarrier:
		return 0, s.removeBarrier(ctx, arg, m)
	case involflt.DriverVersion:
		return 0, put(m, arg, version)
	case involflt.GlobalStats:
		return 0, s.globalStats(ctx, arg, m)
	case involflt.VolumeStats:
		return 0, s.volumeStats(ctx, arg, m)
	case involflt.AdditionalStats:
		return 0, s.additional(ctx, arg, m)
	}
	return 0, syscall.EINVAL // as the driver, not ENOTTY
}

// version is the driver's that this interface is of.
var version = involflt.Version{Driver: [4]uint16{2, 3, 0x4f, 0x3f}}

// get reads a structure of abi/involflt.
func get(m memory, addr uint64, v any) error {
	b := make([]byte, involflt.Size(v))
	if err := m.Read(addr, b); err != nil {
		return syscall.EFAULT
	}
	return involflt.Decode(b, v)
}

func put(m memory, addr uint64, v any) error {
	if err := m.Write(addr, involflt.Bytes(v)); err != nil {
		return syscall.EFAULT
	}
	return nil
}

// to finds the errno of an error.
func to(err error) error {
	if err == nil {
		return nil
	}
	for _, known := range []struct {
		is    error
		errno syscall.Errno
	}{{ErrNoDevice, syscall.ENODEV}, {ErrRefused, syscall.EINVAL}, {ErrVerdict, syscall.EAGAIN}, {ErrNoOrder, syscall.EAGAIN}, {ErrFrozen, syscall.EPERM},
		{context.Canceled, syscall.EINTR}, {context.DeadlineExceeded, syscall.EAGAIN}} {
		if errors.Is(err, known.is) {
			return known.errno
		}
	}
	var e syscall.Errno
	if errors.As(err, &e) && e != 0 {
		return e
	}
	return syscall.EIO
}

// lease gives the descriptor one of the two that there are once.
func (f *file) lease(holder **file) error {
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	if *holder != nil {
		return syscall.EINVAL
	}
	*holder = f
	return nil
}

func (f *file) startService(arg uint64, m memory) error {
	var flags uint32
	if err := get(m, arg, &flags); err != nil {
		return err
	}
	if err := f.lease(&f.s.service); err != nil {
		return err
	}
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	f.s.services++
	return nil
}
