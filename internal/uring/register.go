package uring

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

func (r *Ring) register(op uintptr, arg unsafe.Pointer, n int) error {
	_, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.fd), op, uintptr(arg), uintptr(n), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// RegisterBuffers pins memory in the kernel, for SQE.Fixed by index: it spares
// looking up its pages at each request.
func (r *Ring) RegisterBuffers(bufs [][]byte) error {
	iov := make([]unix.Iovec, len(bufs))
	for i, b := range bufs {
		iov[i].Base = unsafe.SliceData(b)
		iov[i].SetLen(len(b))
	}
	if err := r.register(registerBuffers, unsafe.Pointer(unsafe.SliceData(iov)), len(iov)); err != nil {
		return fmt.Errorf("registering %d buffers with an io_uring: %w", len(bufs), err)
	}
	return nil
}

// RegisterTable makes a table of n buffers that drivers fill (5.19).
func (r *Ring) RegisterTable(n int) error {
	arg := &rsrcRegister{nr: uint32(n), flags: rsrcSparse}
	if err := r.register(registerBuffers2, unsafe.Pointer(arg), int(unsafe.Sizeof(*arg))); err != nil {
		return fmt.Errorf("registering a table of %d buffers with an io_uring: %w", n, err)
	}
	return nil
}

// UnregisterBuffers lets go of them.
func (r *Ring) UnregisterBuffers() error { return r.register(unregisterBuffers, nil, 0) }

// RegisterFiles gives descriptors numbers from 0, for SQE.FixedFile: it spares
// taking and dropping a reference at each request. The ring keeps the files open.
func (r *Ring) RegisterFiles(fds []int) error {
	n := make([]int32, len(fds))
	for i, fd := range fds {
		n[i] = int32(fd)
	}
	if err := r.register(registerFiles, unsafe.Pointer(unsafe.SliceData(n)), len(n)); err != nil {
		return fmt.Errorf("registering %d files with an io_uring: %w", len(fds), err)
	}
	return nil
}

// Probe says why operations cannot be used here: an error that wraps
// ErrUnavailable and names what is missing, or nil.
func Probe(ops ...Op) error {
	r, err := New(Config{Entries: 2})
	if err != nil {
		return err
	}
	defer r.Close()
	p := new(probe)
	if err := r.register(registerProbe, unsafe.Pointer(p), len(p.ops)); err != nil {
		return fmt.Errorf("%w: it cannot say what it can (5.6 and newer can): %w", ErrUnavailable, err)
	}
	defer runtime.KeepAlive(p)
	for _, op := range ops {
		if op > Op(p.lastOp) || p.ops[op].flags&opSupported == 0 {
			return fmt.Errorf("%w: it lacks operation %d", ErrUnavailable, op)
		}
	}
	return nil
}

// Memory gives n bytes outside of Go's heap, page-aligned and zero, that stay
// in place until Free. Pages take room when they are first touched.
func Memory(n int) ([]byte, error) {
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, fmt.Errorf("%d bytes of memory for I/O: %w", n, err)
	}
	return b, nil
}

// Free gives back what Memory gave.
func Free(b []byte) error {
	if b == nil {
		return nil
	}
	return unix.Munmap(b)
}
