package freeze

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	readyWithin = 10 * time.Second // to start a process on a busy machine
	endWithin   = 10 * time.Second // for thaws that take long; the watchdog goes on after that
)

// dog is the caller's side of a watchdog. Its reader closes the targets when
// the watchdog is gone.
type dog struct {
	conn    net.Conn
	limit   time.Duration
	targets []target
	flag    flag

	ready   chan unix.Errno
	replies chan message  // of freezes
	gone    chan struct{} // closed when the watchdog has ended and, if need be, been replaced

	mu        sync.Mutex
	announced []bool // may be frozen by us
	asked     bool   // Thaw was called
	broken    bool   // thawed without being asked
	thaws     []error
}

// startDog starts a watchdog and waits until it is armed. From then on the
// targets are the dog's.
func startDog(ctx context.Context, targets []target, limit time.Duration) (*dog, error) {
	d := &dog{limit: limit, targets: targets, announced: make([]bool, len(targets)),
		ready: make(chan unix.Errno, 1), replies: make(chan message, len(targets)+1), gone: make(chan struct{})}
	if err := d.spawn(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrWatchdog, err)
	}
	wait := time.NewTimer(readyWithin)
	defer wait.Stop()
	var why error
	select {
	case errno := <-d.ready:
		if errno == 0 {
			return d, nil
		}
		why = fmt.Errorf("%w: arming it: %w", ErrWatchdog, errno)
	case <-d.gone:
		why = fmt.Errorf("%w: it ended at once (main has to call freeze.WatchdogMain)", ErrWatchdog)
	case <-ctx.Done():
		why = ctx.Err()
	case <-wait.C:
		why = fmt.Errorf("%w: it was not ready within %v", ErrWatchdog, readyWithin)
	}
	d.conn.Close() // it ends by that; its reader closes the targets
	d.flag.unmap()
	return nil, why
}

func (d *dog) spawn() error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "watchdog"), os.NewFile(uintptr(pair[1]), "caller")
	defer ours.Close() // net has its own copy
	defer theirs.Close()
	fd, err := unix.MemfdCreate("tidemark-freeze", unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	shared := os.NewFile(uintptr(fd), "flag")
	defer shared.Close()
	if err := shared.Truncate(int64(unix.Getpagesize())); err != nil {
		return err
	}
	if d.flag, err = mapFlag(fd); err != nil {
		return err
	}
	if d.conn, err = net.FileConn(ours); err != nil {
		return err
	}
	cmd := exec.Command("/proc/self/exe", WatchdogVerb, strconv.Itoa(len(d.targets)), d.limit.String())
	cmd.Args[0] = "tidemark"
	cmd.Env = []string{}
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{theirs, shared}
	for _, t := range d.targets {
		cmd.ExtraFiles = append(cmd.ExtraFiles, t.file)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		d.conn.Close()
		return err
	}
	go d.read(cmd, d.targets) // "watchdog's answers": ends with the watchdog
	return nil
}

// read takes the watchdog's answers until it is gone, and takes its place
// where it left something frozen.
func (d *dog) read(cmd *exec.Cmd, targets []target) {
	defer close(d.gone)
	buf := make([]byte, messageSize+1)
	for {
		n, err := d.conn.Read(buf)
		m, ok := decode(buf[:n])
		if err != nil || !ok || m.op == opEnd {
			break
		}
		d.heard(m)
	}
	d.thawLeft(targets)
	d.conn.Close()
	_ = cmd.Wait() // reaps it; how it ended was seen already
	closeAll(targets)
}

func (d *dog) heard(m message) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch m.op {
	case opReady:
		d.ready <- m.errno
	case opFreeze:
		if m.errno != 0 && m.errno != unix.ETIMEDOUT {
			d.announced[m.index] = false
		}
		d.replies <- m
	case opThaw:
		d.announced[m.index] = false
		d.noteThaw(int(m.index), m.errno)
	}
}

// noteThaw is called with mu held.
func (d *dog) noteThaw(i int, errno unix.Errno) {
	name := d.targets[i].mount.Point
	switch errno {
	case 0:
	case unix.EINVAL:
		d.thaws = append(d.thaws, fmt.Errorf("%s was thawed by somebody else: %w", name, ErrNotHeld))
	default:
		d.thaws = append(d.thaws, fmt.Errorf("thawing %s: %w (try fsfreeze -u %s)", name, errno, name))
	}
}

// thawLeft thaws, in the watchdog's place, what it may have left frozen.
func (d *dog) thawLeft(targets []target) {
	d.mu.Lock()
	left := slices.Clone(d.announced)
	d.broken = d.broken || !d.asked || slices.Contains(left, true)
	d.mu.Unlock()
	for i, t := range slices.Backward(targets) {
		if !left[i] {
			continue
		}
		errno := ioctl(int(t.file.Fd()), fiThaw)
		d.mu.Lock()
		d.noteThaw(i, errno)
		d.mu.Unlock()
	}
}

// freeze has the watchdog freeze one file system. The answer is FIFREEZE's error.
func (d *dog) freeze(ctx context.Context, i int) error {
	d.mu.Lock()
	d.announced[i] = true
	d.mu.Unlock()
	if _, err := d.conn.Write(message{op: opFreeze, index: uint16(i)}.encode()); err != nil {
		return fmt.Errorf("%w: %w", ErrWatchdog, err)
	}
	over := time.NewTimer(d.limit)
	defer over.Stop()
	select {
	case m := <-d.replies:
		switch m.errno {
		case 0:
			return nil
		case unix.ETIMEDOUT:
			return fmt.Errorf("%w (%v)", ErrTimeout, d.limit)
		}
		return m.errno
	case <-d.gone:
		return fmt.Errorf("%w: it ended", ErrNotHeld)
	case <-ctx.Done():
		return ctx.Err()
	case <-over.C:
		return fmt.Errorf("%w (%v)", ErrTimeout, d.limit)
	}
}

func (d *dog) still() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return !d.broken && !d.flag.up()
}

// end has everything thawed and waits for it.
func (d *dog) end() error {
	d.mu.Lock()
	d.asked = true
	d.mu.Unlock()
	_, _ = d.conn.Write(message{op: opThaw}.encode()) // fails where it is gone, which is waited for anyway
	wait := time.NewTimer(endWithin)
	defer wait.Stop()
	select {
	case <-d.gone:
	case <-wait.C:
		return fmt.Errorf("not thawed within %v; the watchdog goes on trying", endWithin)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	err := errors.Join(d.thaws...)
	d.broken = d.broken || d.flag.up()
	d.flag.unmap()
	if d.broken {
		err = errors.Join(fmt.Errorf("%w until the end: its time (%v) was over, or its watchdog ended", ErrNotHeld, d.limit), err)
	}
	return err
}
