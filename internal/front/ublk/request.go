package ublk

import (
	"errors"
	"fmt"
	"io"
	"unsafe"

	"golang.org/x/sys/unix"

	abi "tidemark/internal/abi/ublk"
	"tidemark/internal/block"
	"tidemark/internal/uring"
)

// slot is the place of one request in a queue. Its buffer is its own.
type slot struct {
	queue *queue
	tag   int
	buf   []byte
	start chan struct{} // one request at a time
	res   int32         // bytes or -errno, for the queue's thread once the request has ended

	ring  *uring.Ring // for Carry; nil: data is copied
	op    block.Op    // of the request that is moved
	piece []byte      // of buf, for its data
	here  bool        // it has come into this process
}

// work does the slot's requests until start is closed.
func (s *slot) work() {
	for range s.start {
		n, err := s.do(s.queue.desc(s.tag))
		s.res = int32(n)
		if err != nil {
			s.res = -int32(errnoOf(err))
		}
		s.queue.ended(s.tag)
	}
}

// do does one request with the device and gives how many bytes it was of.
func (s *slot) do(d abi.Desc) (int, error) {
	dev := s.queue.server.dev
	r := block.Range{Off: int64(d.StartSector) * block.SectorSize, Len: int64(d.Sectors) * block.SectorSize}
	switch d.Op() {
	case abi.OpRead:
		if s.ring != nil {
			return s.move(block.OpRead, r, false)
		}
		p, err := s.data(r)
		if err != nil {
			return 0, err
		}
		if n, err := dev.ReadAt(p, r.Off); n < len(p) {
			return 0, errors.Join(err, io.ErrUnexpectedEOF)
		}
		return len(p), s.give(p)
	case abi.OpWrite:
		if s.ring != nil {
			return s.move(block.OpWrite, r, d.FUA())
		}
		p, err := s.data(r)
		if err != nil {
			return 0, err
		}
		if err := s.take(p); err != nil {
			return 0, err
		}
		return len(p), s.write(p, r.Off, d.FUA())
	case abi.OpFlush:
		return 0, dev.Flush()
	case abi.OpDiscard:
		if dev.discarder == nil {
			return 0, errors.ErrUnsupported
		}
		return 0, dev.discarder.Discard(r)
	case abi.OpWriteZeroes:
		return 0, s.zero(r, d.FUA())
	}
	return 0, errors.ErrUnsupported
}

func (s *slot) data(r block.Range) ([]byte, error) {
	if r.Len > int64(len(s.buf)) {
		return nil, fmt.Errorf("a request of %d bytes, more than was agreed on", r.Len)
	}
	return s.buf[:r.Len], nil
}

func (s *slot) write(p []byte, off int64, stable bool) error {
	dev := s.queue.server.dev
	if stable && dev.fua != nil {
		_, err := dev.fua.WriteFUA(p, off)
		return err
	}
	_, err := dev.WriteAt(p, off)
	if err == nil && stable {
		err = dev.Flush()
	}
	return err
}

func (s *slot) zero(r block.Range, stable bool) error {
	dev := s.queue.server.dev
	if dev.zeroer == nil {
		return errors.ErrUnsupported
	}
	err := dev.zeroer.WriteZeroes(r)
	if err == nil && stable {
		err = dev.Flush()
	}
	return err
}

// take gets the data of a write from the kernel; without user copy it is there already.
func (s *slot) take(p []byte) error {
	return s.copyData(p, unix.Pread)
}

// give hands the data of a read to the kernel; without user copy it fetches it itself.
func (s *slot) give(p []byte) error {
	return s.copyData(p, unix.Pwrite)
}

func (s *slot) copyData(p []byte, f func(fd int, p []byte, off int64) (int, error)) error {
	if !s.queue.server.userCopy {
		return nil
	}
	at := abi.DataOffset(s.queue.number, s.tag)
	for done := 0; done < len(p); {
		n, err := f(s.queue.server.fd, p[done:], at+int64(done))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrUnexpectedEOF
		}
		done += n
	}
	return nil
}

// errnoOf is what the kernel is told of an error: it knows only a few.
func errnoOf(err error) unix.Errno {
	switch {
	case errors.Is(err, errors.ErrUnsupported), errors.Is(err, unix.EOPNOTSUPP):
		return unix.EOPNOTSUPP
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return unix.ENOSPC
	case errors.Is(err, unix.ETIMEDOUT):
		return unix.ETIMEDOUT
	}
	return unix.EIO
}

// desc is a copy of what a slot's request asks for; the kernel wrote it before
// the completion that was reaped.
func (q *queue) desc(tag int) abi.Desc {
	return *(*abi.Desc)(unsafe.Pointer(&q.descs[tag*int(unsafe.Sizeof(abi.Desc{}))]))
}
