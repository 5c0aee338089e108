// Package ublk serves a block.Device as a disk of the kernel's own, /dev/ublkbN,
// through its ublk driver.
//
// The kernel lays each request into a slot of a queue; one thread a queue takes
// it from an io_uring of its own, a goroutine for each slot does it with the
// device, and the thread hands back the result together with the wish for the
// next. Data is copied by reading and writing the character device
// /dev/ublkcN where the kernel has that (6.5), else the kernel copies it to and
// from the slot's buffer. Where the kernel lends a request's pages to an io_uring
// (6.17) and the device is a block.Mover, data that nobody needs to see goes to and
// from the backing without a copy: each slot then has a ring of its own.
//
//	Add ──▶ live ──▶ Delete ──▶ gone
//	         │ ▲
//	 Leave,  │ │ Recover
//	 kill -9 ▼ │
//	       waiting ──▶ Forget ──▶ gone
//
// A device outlives its server. When that leaves, or is killed, the kernel holds
// requests, and hands those that were under way to the next server anew: users
// notice a pause and no error. What was under way may be done twice with the
// same data, before anybody was told that it was done once.
//
// # What would hang
//
// The process that serves is in the way of the kernel's writeback: it must not
// wait for memory that only its own device could free (the daemon sets
// PR_SET_IO_FLUSHER and locks its memory), and must not open or sync the disk
// that it serves: a thread that waits for its own process cannot be killed, and
// until it is, nobody can recover the device.
// Every control command has a bound in time.
package ublk

import (
	"errors"
	"time"

	"tidemark/internal/block"
)

// Errors that callers branch on.
var (
	// ErrUnavailable: the kernel has no ublk, or it may not be used.
	ErrUnavailable = errors.New("ublk cannot be used here")
	// ErrNoDevice: there is no device of that number.
	ErrNoDevice = errors.New("no such ublk device")
	// ErrServed: another process still serves the device.
	ErrServed = errors.New("is still served by another process")
	// ErrResize: the kernel cannot change the size of a device while it is there.
	ErrResize = errors.New("the kernel cannot resize a ublk device (6.16 and newer can): remove the device and create it again")
	// ErrLeft is what Wait gives after Leave.
	ErrLeft = errors.New("the server has left its device")
)

// Config of a device. Zeroes are defaults. Serving takes Queues times Depth
// times MaxIO of memory, 32 MiB at most by default.
type Config struct {
	Queues int    // 1 to 64; default: as many as processors, 4 at most
	Depth  int    // requests at a time in each queue, 1 to 4096; default 32
	MaxIO  int    // bytes of the largest request, a power of two from 4096; default 256 KiB
	Token  uint64 // the caller's own, kept by the kernel: see Info
	Copy   bool   // data is copied even where the kernel and the device can do without; Recover keeps to that

	plain bool // for tests: what a kernel without ioctl encoding and user copy gets
}

const (
	queuesMax   = 64
	depthMax    = 4096
	defaultMax  = 256 << 10
	commandWait = 20 * time.Second // for the kernel to answer where no context bounds it
)

func (c Config) normal(processors int) (Config, error) {
	set := func(n *int, v int) {
		if *n == 0 {
			*n = v
		}
	}
	set(&c.Queues, min(processors, 4))
	set(&c.Depth, 32)
	set(&c.MaxIO, defaultMax)
	if c.Queues < 1 || c.Queues > queuesMax || c.Depth < 1 || c.Depth > depthMax ||
		c.MaxIO < 4096 || c.MaxIO > 32<<20 || c.MaxIO&(c.MaxIO-1) != 0 {
		return c, errors.New("ublk: queues, depth or size of requests out of range")
	}
	return c, nil
}

// abilities are what the device offers beyond block.Device, found once.
type abilities struct {
	block.Device
	zeroer    block.Zeroer
	discarder block.Discarder
	fua       block.FUAWriter
	mover     block.Mover
	limits    block.Limits
}

func abilitiesOf(dev block.Device) *abilities {
	a := &abilities{Device: dev}
	a.zeroer, _ = dev.(block.Zeroer)
	a.discarder, _ = dev.(block.Discarder)
	a.fua, _ = dev.(block.FUAWriter)
	a.mover, _ = dev.(block.Mover)
	if l, ok := dev.(block.Limiter); ok {
		a.limits = l.Limits()
	}
	l := &a.limits
	if l.LogicalBlock == 0 {
		l.LogicalBlock = block.SectorSize
	}
	l.PhysicalBlock = max(l.PhysicalBlock, l.LogicalBlock)
	return a
}
