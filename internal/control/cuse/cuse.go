// Package cuse serves character devices from user space, through the kernel's
// CUSE (module cuse, Documentation/filesystems/fuse and fs/fuse/cuse.c). A
// device takes ioctls of any number with any argument: what they point to, and
// what that points to, is read and written in the caller's own memory (Call), so
// there is no limit to its size, and a bad pointer is the handler's to answer.
//
//	s, err := cuse.Start(ctx, cuse.Device{Name: "blksnap", Open: func(cuse.Caller) (cuse.File, error) { return file{}, nil }})
//	...
//	s.Close(ctx)
//
// Each request runs in a goroutine of its own, also those of one descriptor. A
// caller that gets a signal ends its request's context; the caller waits, and
// cannot be killed, until its request is answered: handlers must return then.
package cuse

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"regexp"
	"runtime/debug"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"tidemark/internal/abi/fuse"
)

var (
	// ErrUnavailable: this kernel has no CUSE, or we may not use it.
	ErrUnavailable = errors.New("character devices in user space (CUSE) cannot be had")
	// ErrExists: somebody else has a device of that name.
	ErrExists = errors.New("there is such a device already")
	// ErrName: not a name for a device.
	ErrName = errors.New("a device's name is 1 to 31 letters, digits, _ and -")
)

// Device is what is to be served as /dev/Name.
type Device struct {
	Name string
	// Open is asked for each open of the node and may be called by several
	// goroutines at a time. Its error should be a syscall.Errno. Who is not root
	// does not get here.
	Open func(Caller) (File, error)
	Log  *slog.Logger // nil: nothing is logged
}

// Caller is who opened the device or makes a request: a thread.
type Caller struct{ UID, GID, PID uint32 }

// File is an open descriptor and all its copies.
type File interface {
	// Ioctl answers one request; ioctl returns result, or fails with the errno in
	// err (EIO where there is none in it; the kernel makes ENOSYS ENOTTY). ctx ends when the caller gets a signal
	// (answer EINTR) or the device goes away. Concurrent.
	Ioctl(ctx context.Context, c *Call) (result int32, err error)
	// Close tells that the last copy of the descriptor is closed, or the device
	// gone: no request is under way any more, but for ones that would not end in time.
	Close()
}

// Server is a device that is being served.
type Server struct {
	dev  Device
	conn io.ReadWriteCloser
	end  context.CancelFunc
	node func() // takes away the node, where it is ours
	read chan struct{}

	mu      sync.Mutex
	closing bool
	files   map[uint64]File
	next    uint64
	calls   map[uint64]*running
	all     sync.WaitGroup
}

// running is a request under way; call is nil while it opens.
type running struct {
	cancel context.CancelFunc
	call   *Call
}

const bufferSize = fuse.MinReadBuffer + 4096 // of one request; writes of more than 4096 bytes come in pieces

var nameRule = regexp.MustCompile(`^[A-Za-z0-9_-]{1,31}$`)

// Start makes the device and returns when its node is there. The server lives
// until Close, also after ctx has ended.
func Start(ctx context.Context, d Device) (*Server, error) {
	if !nameRule.MatchString(d.Name) {
		return nil, fmt.Errorf("%q: %w", d.Name, ErrName)
	}
	if err := free(d.Name); err != nil {
		return nil, err
	}
	fd, err := unix.Open("/dev/cuse", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: /dev/cuse: %w (modprobe cuse, as root)", ErrUnavailable, err)
	}
	s := newServer(d, os.NewFile(uintptr(fd), "/dev/cuse"))
	if err := s.introduce(); err != nil {
		s.conn.Close()
		return nil, fmt.Errorf("making /dev/%s: %w", d.Name, err)
	}
	s.serve()
	if s.node, err = s.awaitNode(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("making /dev/%s: %w", d.Name, err), s.Close(ctx))
	}
	return s, nil
}

func newServer(d Device, conn io.ReadWriteCloser) *Server {
	return &Server{dev: d, conn: conn, read: make(chan struct{}), files: map[uint64]File{}, calls: map[uint64]*running{}, node: func() {}}
}

// introduce answers the kernel's first request, which makes the device.
func (s *Server) introduce() error {
	buf := make([]byte, bufferSize)
	n, err := s.conn.Read(buf)
	if err != nil {
		return err
	}
	h, body, err := header(buf[:n])
	if err != nil {
		return err
	}
	var in fuse.CuseInitIn
	if h.Opcode != fuse.OpCuseInit || take(&body, &in) != nil || in.Major != fuse.Major {
		return fmt.Errorf("%w: the kernel began with request %d, protocol %d.%d; %d.x is known", ErrUnavailable, h.Opcode, in.Major, in.Minor, fuse.Major)
	}
	out := fuse.CuseInitOut{Major: fuse.Major, Minor: fuse.Minor, Flags: fuse.CuseUnrestrictedIoctl, MaxRead: 4096, MaxWrite: 4096}
	return s.answer(h.Unique, 0, out, []byte("DEVNAME="+s.dev.Name+"\x00"))
}

// serve begins to take requests.
func (s *Server) serve() {
	ctx, cancel := context.WithCancel(context.Background())
	s.end = cancel
	go func() {
		defer close(s.read)
		if err := s.requests(ctx); err != nil {
			s.log("a character device is served no more", "error", err)
		}
		cancel()
	}()
}

// requests reads until the device is gone. One goroutine reads, so that an
// interrupt is seen after the request that it means.
func (s *Server) requests(ctx context.Context) error {
	buf := make([]byte, bufferSize)
	for {
		n, err := s.conn.Read(buf)
		switch {
		case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.EINTR):
			continue // the caller took it back
		case errors.Is(err, os.ErrClosed), errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
		if err := s.request(ctx, buf[:n]); err != nil {
			return err
		}
	}
}

// request begins one. Its error is the end of the device.
func (s *Server) request(ctx context.Context, b []byte) error {
	h, body, err := header(b)
	if err != nil {
		return err
	}
	who := Caller{UID: h.UID, GID: h.GID, PID: h.PID}
	switch h.Opcode {
	case fuse.OpOpen:
		s.run(ctx, h.Unique, nil, func(context.Context) error { return s.open(h.Unique, who) })
	case fuse.OpIoctl:
		var in fuse.IoctlIn
		if err := take(&body, &in); err != nil {
			return err
		}
		c := &Call{Caller: who, Cmd: in.Cmd, Arg: in.Arg}
		s.run(ctx, h.Unique, c, func(ctx context.Context) error { return s.ioctl(ctx, h.Unique, in, c) })
	case fuse.OpRelease:
		var in fuse.ReleaseIn
		if err := take(&body, &in); err != nil {
			return err
		}
		s.release(in.Handle)
		return s.answer(h.Unique, 0)
	case fuse.OpInterrupt:
		var in fuse.InterruptIn
		if err := take(&body, &in); err != nil {
			return err
		}
		s.interrupt(in.Unique) // has no answer
	case fuse.OpRead, fuse.OpWrite:
		return s.answer(h.Unique, syscall.EINVAL)
	default:
		return s.answer(h.Unique, syscall.ENOSYS)
	}
	return nil
}

// run gives a request its goroutine.
func (s *Server) run(ctx context.Context, unique uint64, call *Call, work func(context.Context) error) {
	ctx, cancel := context.WithCancel(ctx)
	s.mu.Lock()
	s.calls[unique] = &running{cancel: cancel, call: call}
	s.mu.Unlock()
	s.all.Go(func() {
		defer cancel()
		if err := work(ctx); err != nil {
			s.log("answering a request", "device", s.dev.Name, "error", err)
		}
	})
}

// done ends a request before its answer: the kernel may use its number again after it.
func (s *Server) done(unique uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.calls, unique)
}

func (s *Server) interrupt(unique uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.calls[unique]; r != nil {
		r.cancel()
	}
}

func (s *Server) open(unique uint64, who Caller) error {
	f, err := s.opened(who)
	s.done(unique)
	if err != nil {
		return s.answer(unique, errno(err))
	}
	s.mu.Lock()
	s.next++
	handle := s.next
	s.files[handle] = f
	s.mu.Unlock()
	err = s.answer(unique, 0, fuse.OpenOut{Handle: handle})
	if err != nil { // the caller is gone, and no release will come
		s.release(handle)
	}
	return err
}

func (s *Server) opened(who Caller) (f File, err error) {
	defer s.rescue(&err)
	if who.UID != 0 {
		return nil, syscall.EACCES
	}
	return s.dev.Open(who)
}

func (s *Server) ioctl(ctx context.Context, unique uint64, in fuse.IoctlIn, c *Call) error {
	result, err := s.handled(ctx, in, c)
	c.close()
	s.done(unique)
	if err != nil {
		result = -int32(errno(err))
	}
	return s.answer(unique, 0, fuse.IoctlOut{Result: result})
}

func (s *Server) handled(ctx context.Context, in fuse.IoctlIn, c *Call) (result int32, err error) {
	defer s.rescue(&err)
	s.mu.Lock()
	f := s.files[in.Handle]
	s.mu.Unlock()
	switch {
	case f == nil:
		return 0, syscall.EBADF
	case in.Flags&(fuse.IoctlCompat|fuse.Ioctl32Bit) != 0: // its structures are others
		return 0, syscall.ENOTTY
	}
	return f.Ioctl(ctx, c)
}

// rescue makes a handler's panic its caller's error.
func (s *Server) rescue(err *error) {
	if p := recover(); p != nil {
		s.log("a request's handler panicked", "device", s.dev.Name, "panic", p, "stack", string(debug.Stack()))
		*err = syscall.EIO
	}
}

// release ends a descriptor. The kernel sends it when no request is under way on it.
func (s *Server) release(handle uint64) {
	s.mu.Lock()
	f := s.files[handle]
	delete(s.files, handle)
	s.mu.Unlock()
	if f != nil {
		f.Close()
	}
}

// Close takes the device away: requests under way are told to end and waited for
// until ctx ends; descriptors that are still open fail from then on. Safe to
// call more than once.
func (s *Server) Close(ctx context.Context) error {
	s.mu.Lock()
	again := s.closing
	s.closing = true
	s.mu.Unlock()
	if again {
		return nil
	}
	s.end()
	ended := make(chan struct{})
	go func() { s.all.Wait(); close(ended) }()
	var err error
	select {
	case <-ended:
	case <-ctx.Done():
		err = fmt.Errorf("/dev/%s: requests would not end: %w", s.dev.Name, ctx.Err())
	}
	s.mu.Lock()
	files, calls := s.files, s.calls
	s.files, s.calls = map[uint64]File{}, map[uint64]*running{}
	s.mu.Unlock()
	for _, r := range calls {
		if r.call != nil {
			r.call.close() // nobody writes to a caller that is let go now
		}
	}
	err = errors.Join(err, s.conn.Close())
	<-s.read
	for _, f := range files {
		f.Close()
	}
	s.node()
	return err
}

// Gone is closed when the device is served no more, whoever ended it.
func (s *Server) Gone() <-chan struct{} { return s.read }

func (s *Server) log(what string, args ...any) {
	if s.dev.Log != nil {
		s.dev.Log.Error(what, args...)
	}
}

// answer sends the answer to a request in one piece.
func (s *Server) answer(unique uint64, e syscall.Errno, parts ...any) error {
	h := fuse.OutHeader{Unique: unique, Error: -int32(e)}
	var b bytes.Buffer
	for _, p := range append([]any{h}, parts...) {
		if err := binary.Write(&b, binary.NativeEndian, p); err != nil {
			return err
		}
	}
	binary.NativeEndian.PutUint32(b.Bytes(), uint32(b.Len()))
	_, err := s.conn.Write(b.Bytes())
	if errors.Is(err, syscall.ENOENT) {
		return nil // the caller is gone already
	}
	return err
}

var errShort = errors.New("the kernel's request is shorter than it says")

// header splits a request.
func header(b []byte) (h fuse.InHeader, body []byte, err error) {
	body = b
	if err := take(&body, &h); err != nil {
		return h, nil, err
	}
	if int64(h.Len) != int64(len(b)) {
		return h, nil, fmt.Errorf("%w: %d of %d bytes", errShort, len(b), h.Len)
	}
	return h, body, nil
}

// take decodes the structure that b begins with.
func take(b *[]byte, to any) error {
	n, err := binary.Decode(*b, binary.NativeEndian, to)
	if err != nil {
		return fmt.Errorf("%w: %w", errShort, err)
	}
	*b = (*b)[n:]
	return nil
}

// errno is what a caller is told.
func errno(err error) syscall.Errno {
	var e syscall.Errno
	switch {
	case errors.As(err, &e) && e != 0:
		return e
	case errors.Is(err, context.Canceled):
		return syscall.EINTR
	case errors.Is(err, context.DeadlineExceeded):
		return syscall.ETIMEDOUT
	}
	return syscall.EIO
}
