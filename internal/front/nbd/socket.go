package nbd

import (
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// socket is a client's connection whose reader waits in the kernel, on its own
// thread. Go's poller, which the connections of package net wait with, wakes a second thread
// for each piece that arrives: that takes longer than a small request does.
//
// One goroutine reads and one writes at a time. A deadline holds for what begins
// after it was set; hangUp interrupts a reader that waits already.
type socket struct {
	local, remote net.Addr

	mu     sync.RWMutex // held for writing by who closes what follows
	fd     int
	wake   int // an eventfd: the reader is to look again
	closed atomic.Bool

	readBy, writeBy atomic.Int64 // deadlines, by the clock of sinceStart; 0: none

	dry bool          // the last read took all that was there; the reader's
	two [2]unix.Iovec // the reader's
	iov []unix.Iovec  // the writer's
}

var processStart = time.Now()

// sinceStart is a clock that nobody sets.
func sinceStart() time.Duration { return time.Since(processStart) }

// newSocket takes a connection over. One that is no socket stays as it is.
func newSocket(conn net.Conn) net.Conn {
	c, ok := conn.(syscall.Conn)
	if !ok {
		return conn
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return conn
	}
	s := &socket{local: conn.LocalAddr(), remote: conn.RemoteAddr(), fd: -1}
	if s.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return conn
	}
	if raw.Control(func(fd uintptr) { s.fd, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) }) != nil || err != nil {
		_ = unix.Close(s.wake)
		return conn
	}
	_ = conn.Close() // takes it out of the poller; ours is another hold on the same socket
	return s
}

// Read reads what is there, and waits where that is nothing.
func (s *socket) Read(p []byte) (int, error) { return s.readBoth(p, nil) }

// readBoth is Read into p and, where more is there than that, into q.
func (s *socket) readBoth(p, q []byte) (int, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for {
		by := time.Duration(s.readBy.Load())
		switch {
		case s.closed.Load():
			return 0, net.ErrClosed
		case by != 0 && by <= sinceStart():
			return 0, os.ErrDeadlineExceeded
		case len(p) == 0:
			return 0, nil
		}
		if !s.dry {
			if n, err := s.read(p, q); err != unix.EAGAIN {
				return n, err
			}
		}
		s.dry = false
		s.await(-1, by)
	}
}

// tryRead is Read that waits no longer than a moment. Where nothing comes it gives 0.
func (s *socket) tryRead(p []byte, moment time.Duration) (int, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed.Load() {
		return 0, net.ErrClosed
	}
	if moment > 0 {
		s.await(moment, 0)
	}
	n, err := s.read(p, nil)
	if err == unix.EAGAIN {
		s.dry = true
		return 0, nil
	}
	return n, err
}

// read gives EAGAIN, as it is, where nothing is there.
func (s *socket) read(p, q []byte) (int, error) {
	iov := s.two[:1]
	iov[0] = vector(p)
	if len(q) > 0 {
		iov = s.two[:2]
		iov[1] = vector(q)
	}
	defer clear(s.two[:])
	for {
		n, err := vectored(unix.SYS_READV, s.fd, iov)
		switch {
		case n > 0:
			s.dry = n < len(p)+len(q)
			return n, nil
		case err == nil && s.closed.Load():
			return 0, net.ErrClosed
		case err == nil:
			return 0, io.EOF
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			return 0, unix.EAGAIN
		default:
			return 0, os.NewSyscallError("readv", err)
		}
	}
}

// await returns when there may be something to read, for a moment at most, or,
// where that is negative, until a deadline; 0: there is none.
func (s *socket) await(moment, by time.Duration) {
	if moment < 0 && by != 0 {
		moment = max(by-sinceStart(), 0)
	}
	fds := [2]unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN}, {Fd: int32(s.wake), Events: unix.POLLIN}}
	var limit *unix.Timespec
	if moment >= 0 {
		t := unix.NsecToTimespec(int64(moment))
		limit = &t
	}
	_, _ = unix.Ppoll(fds[:], limit, nil) // whatever it says: the caller looks
	if fds[1].Revents != 0 {
		var count [8]byte
		_, _ = unix.Read(s.wake, count[:])
	}
}

// lookAgain is how long a writer waits before it looks whether it still may.
const lookAgain = 250 * time.Millisecond

// Write writes all of p.
func (s *socket) Write(p []byte) (int, error) {
	one := [1][]byte{p}
	n, err := s.writeAll(one[:])
	return int(n), err
}

// vectorMax is as many pieces as the kernel takes at one time.
const vectorMax = 1024

// writeAll writes all of the pieces, in as few calls as it takes.
func (s *socket) writeAll(pieces [][]byte) (done int64, err error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for len(pieces) > 0 {
		some := pieces[:min(len(pieces), vectorMax)]
		pieces = pieces[len(some):]
		s.iov = s.iov[:0]
		for _, p := range some {
			if len(p) > 0 {
				s.iov = append(s.iov, vector(p))
			}
		}
		n, err := s.writeVector(s.iov)
		clear(s.iov) // keeps nobody's memory
		if done += n; err != nil {
			return done, err
		}
	}
	return done, nil
}

func (s *socket) writeVector(iov []unix.Iovec) (done int64, err error) {
	for len(iov) > 0 {
		by := time.Duration(s.writeBy.Load())
		switch {
		case s.closed.Load():
			return done, net.ErrClosed
		case by != 0 && by <= sinceStart():
			return done, os.ErrDeadlineExceeded
		}
		n, err := vectored(unix.SYS_WRITEV, s.fd, iov)
		switch err {
		case nil:
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			fds := [1]unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLOUT}}
			_, _ = unix.Poll(fds[:], int(lookAgain.Milliseconds()))
			continue
		default:
			return done, os.NewSyscallError("writev", err)
		}
		done += int64(n)
		iov = beyond(iov, n)
	}
	return done, nil
}

// beyond is what is left of a vector after n bytes.
func beyond(iov []unix.Iovec, n int) []unix.Iovec {
	for len(iov) > 0 && uint64(n) >= iov[0].Len {
		n -= int(iov[0].Len)
		iov = iov[1:]
	}
	if n > 0 {
		iov[0] = vector(unsafe.Slice(iov[0].Base, iov[0].Len)[n:])
	}
	return iov
}

// vector is a piece of memory as the kernel wants to be told of it.
func vector(p []byte) unix.Iovec {
	v := unix.Iovec{Base: unsafe.SliceData(p)}
	v.SetLen(len(p))
	return v
}

// vectored is readv or writev; those of x/sys make a vector of their own each time.
func vectored(call uintptr, fd int, iov []unix.Iovec) (int, error) {
	n, _, errno := unix.Syscall(call, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(iov))), uintptr(len(iov)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// Close interrupts who reads or writes, and closes when they have let go.
func (s *socket) Close() error {
	if s.closed.Swap(true) {
		return net.ErrClosed
	}
	_ = unix.Shutdown(s.fd, unix.SHUT_RDWR) // fails where the other end is gone
	s.look()
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = unix.Close(s.wake)
	return os.NewSyscallError("close", unix.Close(s.fd))
}

// hangUp has a reader look at its deadline again.
func (s *socket) hangUp() {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if !s.closed.Load() {
		s.look()
	}
}

func (s *socket) look() { _, _ = unix.Write(s.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0}) }

func (s *socket) LocalAddr() net.Addr  { return s.local }
func (s *socket) RemoteAddr() net.Addr { return s.remote }

func (s *socket) SetDeadline(t time.Time) error {
	set(&s.readBy, t)
	set(&s.writeBy, t)
	return nil
}

func (s *socket) SetReadDeadline(t time.Time) error  { set(&s.readBy, t); return nil }
func (s *socket) SetWriteDeadline(t time.Time) error { set(&s.writeBy, t); return nil }

func set(by *atomic.Int64, t time.Time) {
	if t.IsZero() {
		by.Store(0)
		return
	}
	by.Store(max(int64(t.Sub(processStart)), 1))
}
