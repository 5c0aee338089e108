package involflt

import (
	"context"
	"errors"
	"slices"
	"syscall"
	"testing"
	"time"

	"tidemark/internal/abi/involflt"
)

// arguments of every command that has one, right but for where they lie.
func arguments() map[uint32]any {
	return map[uint32]any{
		involflt.StartFiltering: info("/dev/b", "nb"), involflt.StopFiltering: named("/dev/a"), involflt.ClearDifferentials: named("/dev/a"),
		involflt.ServiceStart: uint32(0), involflt.GetDirtyBlocks: involflt.DirtyBlock{}, involflt.GetDirtyBlocksV2: involflt.DirtyBlock{},
		involflt.CommitDirtyBlocks: commitOf(1), involflt.WaitForBlocks: involflt.Wait{Device: named("/dev/a")}, involflt.WaitForBlocksOld: involflt.Wait{Device: named("/dev/a")},
		involflt.NotifyThreshold: involflt.Threshold{Device: named("/dev/a")}, involflt.ResyncStart: involflt.Resync{Device: named("/dev/a")},
		involflt.ResyncEnd: involflt.Resync{Device: named("/dev/a")}, involflt.DriverVersion: involflt.Version{},
		involflt.GlobalStats: [involflt.StatsBytes]byte{}, involflt.VolumeStats: involflt.Stats{Device: named("/dev/a"), Buffer: array, Length: 4096},
		involflt.AdditionalStats: involflt.Additional{Device: named("/dev/a")}, involflt.ProtectedVolumes: involflt.List{Buffer: array, Length: 4096},
		involflt.FreezeVolume: involflt.Freeze{Volumes: 1, Timeout: 10, Array: array}, involflt.ThawVolume: involflt.Thaw{Volumes: 1, Array: array},
		involflt.TagVolume: withTag(tagInfo(10, 0)), involflt.BarrierTag: withTag(tagInfo(10, 0)),
		involflt.TagCommit: verdict(1), involflt.CreateBarrier: barrier(10), involflt.RemoveBarrier: involflt.BarrierEnd{},
	}
}

func withTag(in involflt.TagInfo) involflt.TagInfo {
	in.Volumes, in.Tags, in.Array, in.TagArray = 1, 1, array, tags
	return in
}

// TestBadPointers: each command with its argument one byte too near to the end
// of the caller's memory, then with what that points to.
func TestBadPointers(t *testing.T) {
	for cmd, arg := range arguments() {
		m := newSystem("/dev/a", "/dev/b")
		c := newClient(t, m)
		f := c.started("/dev/a")
		m.queues["/dev/a"].write(1, 512)
		before := m.changed
		sp, b := newSpace(), involflt.Bytes(arg)
		at := len(sp.b) - len(b) + 1
		copy(sp.b[at:], b)
		for _, addr := range []uint64{base + uint64(at), 0, base - 1, 1<<64 - 8} {
			if n, err := f.command(t.Context(), cmd, addr, sp); err != syscall.EFAULT || n != 0 {
				t.Errorf("%#x at %#x: %d, %v", cmd, addr, n, err)
			}
		}
		if m.changed != before || len(m.marks) > 0 || m.held > 0 || len(m.frozen) > 0 || c.s.find("/dev/a").given != nil || len(c.s.all()) != 1 {
			t.Errorf("%#x: a failed call has changed something", cmd)
		}
		if b := c.mustBlock(f); b.Transaction != 1 { // and no number was used up
			t.Errorf("%#x: transaction %d", cmd, b.Transaction)
		}
	}
	const nowhere = base - 1
	m := newSystem("/dev/a")
	c := newClient(t, m)
	f := c.started("/dev/a")
	in := withTag(tagInfo(10, 0))
	in.Array = nowhere
	c.is(syscall.EFAULT, f, involflt.TagVolume, in)
	in = withTag(tagInfo(10, 0))
	in.TagArray = nowhere
	c.is(syscall.EFAULT, f, involflt.TagVolume, in)
	c.is(syscall.EFAULT, f, involflt.FreezeVolume, involflt.Freeze{Volumes: 1, Timeout: 10, Array: nowhere})
	c.is(syscall.EFAULT, f, involflt.ThawVolume, involflt.Thaw{Volumes: 1, Array: nowhere})
	c.is(syscall.EFAULT, f, involflt.VolumeStats, involflt.Stats{Device: named("/dev/a"), Buffer: nowhere, Length: 1})
	c.is(syscall.EFAULT, f, involflt.ProtectedVolumes, involflt.List{Buffer: nowhere, Length: 4096})
	if len(m.marks) > 0 || len(m.frozen) > 0 {
		t.Error("a failed call has changed something")
	}
}

// TestErrors: what is wrong in itself, or of no disk.
func TestErrors(t *testing.T) {
	m := newSystem("/dev/a")
	c := newClient(t, m)
	f := c.open()
	c.is(syscall.EINVAL, f, 0x5699, uint32(0)) // not ENOTTY
	c.is(syscall.EINVAL, f, 0xc560fe43, uint32(0))
	for what, in := range map[string]involflt.DeviceInfo{
		"another type": {Type: 1, Device: long("/dev/a"), Persistent: long("na")},
		"no name":      info("", "na"),
		"a slash":      info("/dev/a", "n/a"),
		"a name that does not end": {Type: 2, Device: long("/dev/a"),
			Persistent: involflt.LongName(slices.Repeat([]byte{'x'}, 256))},
		"a name that others have no room for": info("/dev/"+string(slices.Repeat([]byte{'x'}, 128)), "na"),
	} {
		if n, err := c.call(f, involflt.StartFiltering, in); err != syscall.EINVAL || n != 0 {
			t.Errorf("%s: %v", what, err)
		}
	}
	c.is(syscall.EINVAL, f, involflt.GetDirtyBlocks, involflt.DirtyBlock{})
	c.is(syscall.EINVAL, f, involflt.CommitDirtyBlocks, commitOf(1))
	c.is(syscall.ENODEV, f, involflt.StopFiltering, named("/dev/a"))
	c.is(syscall.EINVAL, f, involflt.StopFiltering, named(""))
	for _, cmd := range []uint32{involflt.NotifyThreshold, involflt.ResyncStart, involflt.ResyncEnd, involflt.AdditionalStats} {
		arg := arguments()[cmd]
		c.is(syscall.ENODEV, f, cmd, arg)
	}
	c.is(nil, f, involflt.WakeupAllThreads, [0]byte{})
	c.is(nil, f, involflt.UnstackAll, [0]byte{})
	for _, ms := range []int32{0, -1, 60001} {
		c.is(syscall.EINVAL, f, involflt.FreezeVolume, involflt.Freeze{Volumes: 1, Timeout: ms, Array: array})
	}
	c.is(syscall.EINVAL, f, involflt.FreezeVolume, involflt.Freeze{Timeout: 1, Array: array})
	c.is(syscall.EINVAL, f, involflt.ThawVolume, involflt.Thaw{Volumes: 1, Array: array})
	c.is(syscall.EINVAL, f, involflt.RemoveBarrier, involflt.BarrierEnd{})
	m.failing = ErrRefused
	c.is(syscall.EINVAL, f, involflt.StartFiltering, info("/dev/a", "na"))
	m.failing = nil
	c.is(nil, f, involflt.StartFiltering, info("/dev/a", "")) // as clients name it
	if d := c.s.find("_dev_a"); d == nil {
		t.Error("a disk without a name got none")
	}
	for err, want := range map[error]error{errors.New("?"): syscall.EIO, context.Canceled: syscall.EINTR, syscall.ENOSPC: syscall.ENOSPC} {
		if got := to(err); got != want {
			t.Errorf("%v is told as %v", err, got)
		}
	}
}

// FuzzCommand: no bytes of a caller crash, hang, or change anything where the answer is an error.
func FuzzCommand(f *testing.F) {
	sp := newSpace()
	for cmd, arg := range arguments() {
		f.Add(cmd, involflt.Bytes(arg), involflt.Bytes(involflt.VolumeInfo{Device: long("/dev/a")}), uint16(0))
	}
	f.Add(uint32(involflt.UnstackAll), []byte{}, []byte{}, uint16(1))
	f.Add(uint32(0x5699), []byte{}, []byte{}, uint16(0))
	f.Fuzz(func(t *testing.T, cmd uint32, arg, volume []byte, off uint16) {
		m := newSystem("/dev/a", "/dev/b")
		c := newClient(t, m)
		file := c.started("/dev/a")
		m.queues["/dev/a"].write(1, 512)
		before := m.changed
		clear(sp.b)
		copy(sp.b[array-base:], volume)
		copy(sp.b[tags-base:], involflt.Bytes(involflt.Tag{Length: 3}))
		copy(sp.b[min(int(off), len(sp.b)):], arg)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond) // a caller's signal
		defer cancel()
		n, err := file.command(ctx, cmd, base+uint64(off), sp)
		var errno syscall.Errno
		if err != nil && (!errors.As(err, &errno) || errno == 0) {
			t.Errorf("%#x: %v has no errno", cmd, err)
		}
		if n < 0 || n > 1 || err != nil && n != 0 {
			t.Errorf("%#x returns %d, %v", cmd, n, err)
		}
		if err != nil && (m.changed != before || len(m.marks) > 0 || m.held > 0 || len(m.frozen) > 0 || len(c.s.all()) != 1 || c.s.find("/dev/a").given != nil) && cmd != involflt.FreezeVolume {
			t.Errorf("%#x: %v, and something is another", cmd, err)
		}
	})
}
