package cuse

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Call is one ioctl. Its memory is the caller's and can be used until Ioctl returns.
type Call struct {
	Caller
	Cmd uint32
	Arg uint64 // as passed: a number or a pointer

	mu     sync.Mutex
	closed bool
	mem    *os.File
	err    error // why there is none
}

// ErrFault: the caller passed a pointer to what it may not read or write.
var ErrFault error = syscall.EFAULT

var errAnswered = errors.New("the request has been answered; its caller's memory is not ours any more")

const waitForCaller = 5 * time.Second // until its thread sleeps in the ioctl

// Read fills b from the caller's memory, as copy_from_user would: ErrFault where
// part of it cannot be read.
func (c *Call) Read(addr uint64, b []byte) error { return c.transfer(addr, b, 'r') }

// Write puts b into the caller's memory, as copy_to_user would: ErrFault where
// part of it cannot be written; then nothing was.
func (c *Call) Write(addr uint64, b []byte) error { return c.transfer(addr, b, 'w') }

func (c *Call) transfer(addr uint64, b []byte, how byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(b) == 0 {
		return nil
	}
	if addr > math.MaxInt64-uint64(len(b)) {
		return ErrFault
	}
	if err := c.open(); err != nil {
		return err
	}
	// The kernel lets a debugger write what the process itself may not.
	if ok, err := allowed(c.PID, addr, addr+uint64(len(b)), how); err != nil || !ok {
		return errors.Join(err, ErrFault)
	}
	var n int
	var err error
	if how == 'r' {
		n, err = c.mem.ReadAt(b, int64(addr))
	} else {
		n, err = c.mem.WriteAt(b, int64(addr))
	}
	if n < len(b) {
		if err == nil || errors.Is(err, io.EOF) || errors.Is(err, syscall.EIO) {
			err = ErrFault
		}
		return fmt.Errorf("memory of thread %d: %d of %d bytes: %w", c.PID, n, len(b), err)
	}
	return nil
}

// open gets hold of the caller's memory. The open file means this memory and no
// other, also when the number of the thread is used again. Until the request is
// answered the thread can only wait; that it does, in this very ioctl, is looked
// at after the opening.
func (c *Call) open() error {
	switch {
	case c.closed:
		return errAnswered
	case c.mem != nil || c.err != nil:
		return c.err
	case c.PID == 0:
		c.err = fmt.Errorf("the caller's thread is not visible from here (another PID name space): %w", syscall.EPERM)
		return c.err
	}
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", c.PID), os.O_RDWR, 0)
	if err == nil {
		if err = c.awaitWaiting(); err != nil {
			f.Close()
		}
	}
	if err != nil {
		c.err = fmt.Errorf("memory of thread %d: %w", c.PID, err)
		return c.err
	}
	c.mem = f
	return nil
}

var errOther = fmt.Errorf("it does not wait for this request: %w", syscall.ESRCH)

// awaitWaiting looks whether the thread sleeps in this request. It may still be on its way there.
func (c *Call) awaitWaiting() error {
	want := fmt.Sprintf("%d ", unix.SYS_IOCTL)
	for end := time.Now().Add(waitForCaller); ; time.Sleep(100 * time.Microsecond) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/syscall", c.PID))
		if err != nil {
			return err
		}
		line := string(b)
		if !strings.HasPrefix(line, "running") {
			var fd, cmd, arg uint64
			rest, ok := strings.CutPrefix(line, want)
			if _, err := fmt.Sscanf(rest, "0x%x 0x%x 0x%x", &fd, &cmd, &arg); !ok || err != nil || uint32(cmd) != c.Cmd || arg != c.Arg {
				return errOther
			}
			return nil
		}
		if time.Now().After(end) {
			return errOther
		}
	}
}

// close lets the memory go, before the caller is answered.
func (c *Call) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	if c.mem != nil {
		c.mem.Close()
		c.mem = nil
	}
}

// allowed says whether a thread may itself read or write all of its memory from one address to another.
func allowed(pid uint32, from, end uint64, how byte) (bool, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return false, err
	}
	defer f.Close()
	return covered(f, from, end, how)
}

// covered is allowed of the lines of a maps file (proc_pid_maps(5)), which are in the order of addresses.
func covered(maps io.Reader, from, end uint64, how byte) (bool, error) {
	at := strings.IndexByte("rw", how)
	lines := bufio.NewScanner(maps)
	for lines.Scan() {
		var lo, hi uint64
		var perms string
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x %s", &lo, &hi, &perms); err != nil || len(perms) < 2 {
			return false, fmt.Errorf("not a line of a maps file: %.80q", lines.Text())
		}
		if hi <= from {
			continue
		}
		if lo > from || perms[at] != how {
			return false, nil
		}
		if from = hi; from >= end {
			return true, nil
		}
	}
	return false, lines.Err()
}
