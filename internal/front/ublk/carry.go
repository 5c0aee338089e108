package ublk

import (
	"errors"
	"fmt"
	"io"
	"runtime"

	"golang.org/x/sys/unix"

	abi "tidemark/internal/abi/ublk"
	"tidemark/internal/block"
	"tidemark/internal/uring"
)

// zeroCopyFlags are what the kernel must offer for requests whose data does not
// come into this process. Buffers that any thread may register came with 6.17, as did
// the assurance that a device whose server has died is handed to the next
// one only when nothing that was submitted with a request's buffer is under way any more:
// a write of the dead one could otherwise overtake those of its successor.
const zeroCopyFlags = abi.FlagZeroCopy | abi.FlagRegisterAnywhere | abi.FlagUserCopy

// canZeroCopy says whether the kernel can serve requests without a copy.
func (c *control) canZeroCopy() bool { return c.features&zeroCopyFlags == zeroCopyFlags }

// The steps of carry, each an entry of the slot's ring.
const (
	stepRegister = iota
	stepMove
	stepUnregister
	steps
)

// newRing gives a ring for Carry, with a place for the buffer of one request.
func newRing() (*uring.Ring, error) {
	r, err := uring.New(uring.Config{Entries: steps + 1})
	if err != nil {
		return nil, err
	}
	if err := r.RegisterTable(1); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

// move does a read or write with the device, which decides whether the data
// comes into this process: then by Data, else by Carry.
func (s *slot) move(op block.Op, r block.Range, stable bool) (int, error) {
	p, err := s.data(r)
	if err != nil {
		return 0, err
	}
	s.op, s.piece, s.here = op, p, false
	if err := s.queue.server.dev.mover.Move(op, r, stable, s); err != nil {
		return 0, err
	}
	if op == block.OpRead && s.here {
		return len(p), s.give(p)
	}
	return len(p), nil
}

// Data implements block.Load.
func (s *slot) Data() ([]byte, error) {
	s.here = true
	if s.op == block.OpRead {
		return s.piece, nil
	}
	return s.piece, s.take(s.piece)
}

// Carry implements block.Load: the kernel lends the request's own pages to the
// slot's ring, moves them, and takes them back, in one call.
func (s *slot) Carry(fd int, off int64) error {
	if s.ring == nil {
		return errors.ErrUnsupported
	}
	// What a thread has submitted ends when the thread does, so it must be this one that waits.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	s.lend(abi.IORegisterBuf, stepRegister).Link()
	move := s.ring.Next()
	if s.op == block.OpRead {
		move.ReadBuffer(fd, 0, len(s.piece), off, stepMove)
	} else {
		move.WriteBuffer(fd, 0, len(s.piece), off, stepMove)
	}
	move.LinkAlways()
	s.lend(abi.IOUnregisterBuf, stepUnregister)
	res, err := s.results()
	if err != nil || res[stepRegister] == 0 && res[stepUnregister] != 0 {
		// The kernel may have the pages still: with the ring they come back.
		err = errors.Join(err, s.ring.Close(), fmt.Errorf("a request's pages do not come back: %w", unix.Errno(-res[stepUnregister])))
		s.ring = nil
		return err
	}
	for _, n := range []int32{res[stepRegister], res[stepMove]} {
		if n < 0 {
			return unix.Errno(-n)
		}
	}
	if int(res[stepMove]) != len(s.piece) {
		return io.ErrUnexpectedEOF
	}
	return nil
}

// lend prepares the command that puts the request's pages into place 0 of the
// ring's table, or takes them out.
func (s *slot) lend(nr uint32, step uint64) *uring.SQE {
	e := s.ring.Next() // never nil: all steps of the last one have ended
	*(*abi.IOCmd)(e.Cmd(s.queue.server.fd, abi.Encode(nr), step)) = abi.IOCmd{QueueID: uint16(s.queue.number), Tag: uint16(s.tag)}
	return e
}

// results waits for all steps.
func (s *slot) results() (res [steps]int32, err error) {
	for ended := 0; ended < steps; {
		if err := s.ring.Submit(steps - ended); err != nil {
			return res, err
		}
		for c, ok := s.ring.Reap(); ok; c, ok = s.ring.Reap() {
			res[c.UserData] = c.Res
			ended++
		}
	}
	return res, nil
}
