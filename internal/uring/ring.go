// Package uring is a small io_uring of our own: a ring with ordinary or big
// submission entries, the handful of operations that serving block devices
// needs, and nothing that allocates for a request.
//
// A Ring belongs to one goroutine at a time, but for Wait: it has no locks. Fill entries
// got from Next, Submit them and wait, then take completions with Reap:
//
//	for q := r.Next(); q != nil; q = ... { q.Read(fd, buf, off, tag) }
//	err := r.Submit(1)
//	for c := r.Reap(); c != nil; c = r.Reap() { ... }
//
// The kernel reads and writes memory after Submit has returned, so what is
// handed to it must stay in place and reachable until the completion: memory
// from Memory, or the heap's, never the stack's. What the kernel and the
// program share are the heads and tails of two rings: each side publishes its
// own with a release store and reads the other's with an acquire load, for which
// sync/atomic's sequentially consistent ones serve.
package uring

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Errors that callers branch on.
var (
	// ErrUnavailable: the kernel has no io_uring, or does not let this process use it.
	ErrUnavailable = errors.New("io_uring cannot be used here")
	// ErrTimeout: nothing completed in time.
	ErrTimeout = errors.New("io_uring: nothing completed in time")
)

// Config of a ring.
type Config struct {
	Entries     int  // submissions that wait at a time; the kernel rounds up to a power of two
	Completions int  // completions that wait at a time; 0 is twice the entries
	Big         bool // entries of 128 bytes, which ublk's control commands need
	// OneThread promises that only the thread that called New ever uses the
	// ring: the kernel then runs completions only when that thread enters it.
	// Lock the goroutine to its thread.
	OneThread bool
}

// Ring is one io_uring.
type Ring struct {
	fd                             int
	entry                          uintptr // bytes of a submission entry
	rings, sqes                    []byte
	sqHead, sqTail, cqHead, cqTail *uint32
	sqMask, cqMask                 uint32
	sqEntries                      uint32
	cqes                           unsafe.Pointer
	tail                           uint32 // our submission tail, published by Submit
	extArg                         bool
	ts                             *unix.Timespec
	arg                            *getEventsArg
}

// New makes a ring.
func New(c Config) (*Ring, error) {
	p := params{flags: setupClamp}
	if c.Big {
		p.flags |= setupSQE128
	}
	if c.Completions > 0 {
		p.flags |= setupCQSize
		p.cqEntries = uint32(c.Completions)
	}
	wanted := []uint32{0}
	if c.OneThread { // the newer the better; each is only faster than the next
		wanted = []uint32{setupSingleIssuer | setupCoopTaskrun, setupCoopTaskrun, 0}
	}
	var fd int
	var err error
	for _, flags := range wanted {
		try := p
		try.flags |= flags
		if fd, err = setup(c.Entries, &try); err == nil {
			p = try
			break
		}
	}
	if err != nil {
		return nil, err
	}
	r := &Ring{fd: fd, entry: sqeSize, ts: new(unix.Timespec), arg: new(getEventsArg)}
	if c.Big {
		r.entry = bigSQESize
	}
	if err := r.mapRings(&p); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

func setup(entries int, p *params) (int, error) {
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, uintptr(entries), uintptr(unsafe.Pointer(p)), 0)
	switch errno {
	case 0:
	case unix.ENOSYS:
		return -1, fmt.Errorf("%w: the kernel has none", ErrUnavailable)
	case unix.EPERM:
		return -1, fmt.Errorf("%w: not permitted (see sysctl kernel.io_uring_disabled, and the seccomp profile of a container)", ErrUnavailable)
	case unix.ENOMEM:
		return -1, fmt.Errorf("io_uring_setup: %w (raise the limit of locked memory, ulimit -l)", errno)
	default:
		return -1, fmt.Errorf("io_uring_setup of %d entries, flags %#x: %w", entries, p.flags, errno)
	}
	if need := uint32(featSingleMmap | featNoDrop); p.features&need != need {
		unix.Close(int(fd))
		return -1, fmt.Errorf("%w: it is older than 5.5", ErrUnavailable)
	}
	unix.CloseOnExec(int(fd))
	return int(fd), nil
}

func (r *Ring) mapRings(p *params) error {
	size := max(uintptr(p.sq.array)+uintptr(p.sqEntries)*4, uintptr(p.cq.cqes)+uintptr(p.cqEntries)*unsafe.Sizeof(CQE{}))
	var err error
	const prot, flags = unix.PROT_READ | unix.PROT_WRITE, unix.MAP_SHARED | unix.MAP_POPULATE
	if r.rings, err = unix.Mmap(r.fd, offSQRing, int(size), prot, flags); err != nil {
		return fmt.Errorf("mapping the rings of an io_uring: %w", err)
	}
	if r.sqes, err = unix.Mmap(r.fd, offSQEs, int(uintptr(p.sqEntries)*r.entry), prot, flags); err != nil {
		return fmt.Errorf("mapping the submissions of an io_uring: %w", err)
	}
	at := func(off uint32) *uint32 { return (*uint32)(unsafe.Pointer(&r.rings[off])) }
	r.sqHead, r.sqTail, r.cqHead, r.cqTail = at(p.sq.head), at(p.sq.tail), at(p.cq.head), at(p.cq.tail)
	r.sqMask, r.cqMask, r.sqEntries = *at(p.sq.ringMask), *at(p.cq.ringMask), p.sqEntries
	r.cqes = unsafe.Pointer(&r.rings[p.cq.cqes])
	for i := range p.sqEntries { // entry i is always in slot i
		*at(p.sq.array + i*4) = i
	}
	r.tail = atomic.LoadUint32(r.sqTail)
	r.extArg = p.features&featExtArg != 0
	return nil
}

// Close ends the ring; the kernel cancels what has not completed.
func (r *Ring) Close() error {
	var errs []error
	for _, m := range [][]byte{r.rings, r.sqes} {
		if m != nil {
			errs = append(errs, unix.Munmap(m))
		}
	}
	r.rings, r.sqes = nil, nil
	return errors.Join(append(errs, os.NewSyscallError("close io_uring", unix.Close(r.fd)))...)
}

// Next gives the next free entry, zeroed, or nil where Submit must come first.
// It is submitted as it is at the next Submit.
func (r *Ring) Next() *SQE {
	if r.tail-atomic.LoadUint32(r.sqHead) == r.sqEntries {
		return nil
	}
	p := unsafe.Pointer(&r.sqes[uintptr(r.tail&r.sqMask)*r.entry])
	clear(unsafe.Slice((*byte)(p), r.entry))
	r.tail++
	return (*SQE)(p)
}

// Pending is how many entries wait for Submit.
func (r *Ring) Pending() int { return int(r.tail - atomic.LoadUint32(r.sqHead)) }

// Submit hands all entries to the kernel and returns when at least wait
// completions can be reaped. Where the kernel takes no more entries because
// completions wait, it returns without error: reap, and Submit again.
func (r *Ring) Submit(wait int) error { return r.submit(wait, nil) }

// SubmitFor is Submit with a bound on the wait, after which it gives ErrTimeout.
func (r *Ring) SubmitFor(wait int, timeout time.Duration) error {
	if !r.extArg {
		return fmt.Errorf("%w: waits with a bound need 5.11", ErrUnavailable)
	}
	*r.ts = unix.NsecToTimespec(timeout.Nanoseconds())
	r.arg.ts = uint64(uintptr(unsafe.Pointer(r.ts)))
	return r.submit(wait, r.arg)
}

func (r *Ring) submit(wait int, arg *getEventsArg) error {
	atomic.StoreUint32(r.sqTail, r.tail)
	flags, size := uintptr(0), uintptr(0)
	if wait > 0 {
		flags = enterGetEvents
	}
	if arg != nil {
		flags, size = flags|enterExtArg, unsafe.Sizeof(*arg)
	}
	for {
		pending := r.tail - atomic.LoadUint32(r.sqHead)
		if pending == 0 && (wait == 0 || r.ready() >= wait) {
			return nil
		}
		_, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(pending), uintptr(wait), flags, uintptr(unsafe.Pointer(arg)), size)
		switch errno {
		case 0, unix.EINTR: // the runtime interrupts threads to preempt them
		case unix.EAGAIN, unix.EBUSY:
			if r.ready() > 0 {
				return nil
			}
		case unix.ETIME:
			return ErrTimeout
		default:
			return fmt.Errorf("io_uring_enter: %w", errno)
		}
	}
}

// Wait returns when at least n completions can be reaped; it submits nothing.
// One goroutine may Wait and Reap while another fills entries and submits, but
// not where the ring is of OneThread.
func (r *Ring) Wait(n int) error {
	for r.ready() < n {
		_, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), 0, uintptr(n), enterGetEvents, 0, 0)
		if errno != 0 && errno != unix.EINTR {
			return fmt.Errorf("io_uring_enter: %w", errno)
		}
	}
	return nil
}

func (r *Ring) ready() int { return int(atomic.LoadUint32(r.cqTail) - atomic.LoadUint32(r.cqHead)) }

// Reap takes the next completion; ok is false where there is none.
func (r *Ring) Reap() (c CQE, ok bool) {
	head := *r.cqHead // ours alone to write
	if head == atomic.LoadUint32(r.cqTail) {
		return CQE{}, false
	}
	c = *(*CQE)(unsafe.Add(r.cqes, uintptr(head&r.cqMask)*unsafe.Sizeof(c)))
	atomic.StoreUint32(r.cqHead, head+1)
	return c, true
}
