package ublk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	abi "tidemark/internal/abi/ublk"
	"tidemark/internal/uring"
)

// queue is one of the device's queues: a thread with a ring, and a slot for
// each request that it can hold.
//
//	kernel ──completion──▶ thread ──start──▶ slot's goroutine
//	   ▲                     │ ▲                  │
//	   └──commit and fetch───┘ └──ended, eventfd──┘
//
// The kernel insists that all of a queue's commands come from one thread, and
// takes its end for the server's.
type queue struct {
	server *Server
	number int
	ring   *uring.Ring
	descs  []byte // mapped, written by the kernel
	memory []byte // the slots' buffers
	slots  []slot
	waker  int    // an eventfd
	woken  []byte // what reading it gives

	mu    sync.Mutex
	ends  []int // slots whose request has ended, not yet committed
	leave bool

	// The thread's own.
	spare   []int
	fetched int // slots whose command is with the kernel
	busy    int // slots whose request is with us
	arming  bool
}

// wakeup is the user data of the read of the eventfd; slots have their tag.
const wakeup = 1 << 32

func newQueue(s *Server, number int) (*queue, error) {
	q := &queue{server: s, number: number, waker: -1, slots: make([]slot, s.depth), ends: make([]int, 0, s.depth), spare: make([]int, 0, s.depth)}
	var err error
	page := os.Getpagesize()
	size := (s.depth*int(unsafe.Sizeof(abi.Desc{})) + page - 1) / page * page
	if q.descs, err = unix.Mmap(s.fd, abi.DescOffset(number), size, unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		return q, fmt.Errorf("mapping queue %d: %w", number, err)
	}
	if q.memory, err = uring.Memory(s.depth*s.maxIO + page); err != nil {
		return q, err
	}
	// All of it now: a request must not wait for memory that it is to free.
	if err = unix.Madvise(q.memory, unix.MADV_POPULATE_WRITE); err != nil {
		return q, fmt.Errorf("%d bytes of memory for the requests of queue %d: %w", len(q.memory), number, err)
	}
	if q.waker, err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
		return q, fmt.Errorf("eventfd: %w", err)
	}
	q.woken = q.memory[s.depth*s.maxIO:][:8]
	for i := range q.slots {
		q.slots[i] = slot{queue: q, tag: i, buf: q.memory[i*s.maxIO:][:s.maxIO:s.maxIO], start: make(chan struct{}, 1)}
		if s.zeroCopy {
			q.slots[i].ring, _ = newRing() // data is copied where there can be none
		}
	}
	return q, nil
}

// free gives back what newQueue took; the thread and the slots have ended.
func (q *queue) free() error {
	var errs []error
	if q.waker >= 0 {
		errs = append(errs, unix.Close(q.waker))
	}
	for i := range q.slots {
		if r := q.slots[i].ring; r != nil {
			errs = append(errs, r.Close())
		}
	}
	if q.descs != nil {
		errs = append(errs, unix.Munmap(q.descs))
	}
	return errors.Join(append(errs, uring.Free(q.memory))...)
}

// run is the queue's thread, from the first fetch to the last abort. It ends the
// slots' goroutines, and with the goroutine ends the thread.
func (q *queue) run() error {
	runtime.LockOSThread() // and never unlocked: the thread's state goes with it
	// Memory for this thread must not be got by writing to the device. Refused
	// without CAP_SYS_RESOURCE, without which there is no ublk either.
	_ = unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0)
	var workers sync.WaitGroup
	for i := range q.slots {
		workers.Go(q.slots[i].work)
	}
	err := q.serve()
	for i := range q.slots {
		close(q.slots[i].start)
	}
	workers.Wait()
	if q.ring != nil {
		err = errors.Join(err, q.ring.Close())
	}
	return err
}

func (q *queue) serve() (err error) {
	if q.ring, err = uring.New(uring.Config{Entries: len(q.slots) + 1, OneThread: true}); err != nil {
		return err
	}
	for tag := range q.slots {
		q.command(abi.IOFetch, tag, 0)
	}
	for {
		if !q.arming {
			q.next().Read(q.waker, q.woken, -1, wakeup)
			q.arming = true
		}
		if err := q.ring.Submit(1); err != nil {
			return err
		}
		leave := q.leaving()
		if err := q.reap(leave); err != nil {
			return err
		}
		q.commit()
		if q.busy == 0 && (leave || q.fetched == 0) {
			return q.last()
		}
	}
}

// last hands over what was committed in the end.
func (q *queue) last() error { return q.ring.Submit(0) }

// reap starts what has arrived. When the server leaves it stays with the
// kernel, which gives it to the next one.
func (q *queue) reap(leave bool) error {
	for c, ok := q.ring.Reap(); ok; c, ok = q.ring.Reap() {
		if c.UserData == wakeup {
			q.arming = false
			continue
		}
		tag := int(c.UserData)
		q.fetched--
		switch {
		case c.Res == abi.ResOK && !leave:
			q.busy++
			q.slots[tag].start <- struct{}{}
		case c.Res == abi.ResOK, c.Res == abi.ResAbort, c.Res == -int32(unix.ECANCELED):
		default:
			return fmt.Errorf("fetching requests of queue %d: %w", q.number, unix.Errno(-c.Res))
		}
	}
	return nil
}

// commit hands back what has ended, and asks for more in its place.
func (q *queue) commit() {
	q.mu.Lock()
	q.ends, q.spare = q.spare[:0], q.ends
	q.mu.Unlock()
	for _, tag := range q.spare {
		q.busy--
		q.command(abi.IOCommitAndFetch, tag, q.slots[tag].res)
	}
}

func (q *queue) command(nr uint32, tag int, res int32) {
	op := nr
	if q.server.encoded {
		op = abi.Encode(nr)
	}
	cmd := abi.IOCmd{QueueID: uint16(q.number), Tag: uint16(tag), Result: res}
	if !q.server.userCopy {
		cmd.Addr = uint64(uintptr(unsafe.Pointer(&q.slots[tag].buf[0])))
	}
	*(*abi.IOCmd)(q.next().Cmd(q.server.fd, op, uint64(tag))) = cmd
	q.fetched++
}

// next is never nil: the ring has an entry for each slot and the eventfd.
func (q *queue) next() *uring.SQE { return q.ring.Next() }

// ended says, from a slot's goroutine, that its request has ended.
func (q *queue) ended(tag int) {
	q.mu.Lock()
	q.ends = append(q.ends, tag) // of the capacity for all slots
	first := len(q.ends) == 1
	q.mu.Unlock()
	if first {
		q.wake()
	}
}

func (q *queue) wake() {
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	for {
		if _, err := unix.Write(q.waker, one[:]); !errors.Is(err, unix.EINTR) {
			return // an eventfd takes it always
		}
	}
}

// setLeave has the thread end once the requests that it has are done.
func (q *queue) setLeave() {
	q.mu.Lock()
	q.leave = true
	q.mu.Unlock()
	q.wake()
}

func (q *queue) leaving() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.leave
}
