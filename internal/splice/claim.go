package splice

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// ErrClaimed: another process serves what lies under the volume.
var ErrClaimed = errors.New("another process serves the device under this volume")

// claims holds a file for each spliced volume. It is in memory: whoever waits
// for a lock there waits for no disk.
const claims = "/run/tidemark/splices"

// Claim is the right to serve the device under a spliced volume, and to swap
// the volume's table back. One process at a time has it; it ends with the
// process. It is a lock on the first byte of a file; the second byte is locked
// by who is waiting, so that a guard can make way, the third by guards.
type Claim struct{ file *os.File }

// OpenClaim opens the claim of a splice, without taking it.
func OpenClaim(s *Splice) (*Claim, error) {
	if err := os.MkdirAll(claims, 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(claimPath(s), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	return &Claim{f}, nil
}

func claimPath(s *Splice) string {
	return filepath.Join(claims, fmt.Sprintf("%d-%d", s.Major, s.Minor))
}

const (
	byteHeld   = 0
	byteWanted = 1
	byteGuard  = 2
)

// Guard says that a guard stands by, as long as this process lives.
func (c *Claim) Guard() error { return c.lock(unix.F_RDLCK, byteGuard) }

func (c *Claim) lock(kind int16, at int64) error {
	l := unix.Flock_t{Type: kind, Start: at, Len: 1}
	for {
		err := unix.FcntlFlock(c.file.Fd(), unix.F_OFD_SETLK, &l)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			return ErrClaimed
		}
		return err
	}
}

// Try takes the claim where nobody has it; else ErrClaimed.
func (c *Claim) Try() error { return c.lock(unix.F_WRLCK, byteHeld) }

// Take takes the claim, and asks a guard that has it to make way. ErrClaimed
// where that has not come to pass when ctx ends.
func (c *Claim) Take(ctx context.Context) error {
	asked := c.lock(unix.F_WRLCK, byteWanted) // who else waits asks for the same
	defer func() {
		if asked == nil {
			_ = c.lock(unix.F_UNLCK, byteWanted) // unlocking does not fail
		}
	}()
	for {
		if err := c.Try(); !errors.Is(err, ErrClaimed) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ErrClaimed, context.Cause(ctx))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Contested: somebody else has the claim, or waits for it. It reads no disk.
func (c *Claim) Contested() bool { return c.others(byteHeld, byteWanted) }

// Left: nobody has the claim, and no guard stands by.
func (c *Claim) Left() bool { return !c.others(byteHeld, byteGuard) }

func (c *Claim) others(first, last int64) bool {
	l := unix.Flock_t{Type: unix.F_WRLCK, Start: first, Len: last - first + 1}
	err := unix.FcntlFlock(c.file.Fd(), unix.F_OFD_GETLK, &l)
	return err == nil && l.Type != unix.F_UNLCK
}

// Close gives the claim up, where it was taken.
func (c *Claim) Close() error {
	if c == nil {
		return nil
	}
	return c.file.Close()
}
