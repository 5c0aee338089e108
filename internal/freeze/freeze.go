// Package freeze brings file systems to a standstill for the moment of a
// bookmark, and sees to it that they come out of it again.
//
//	hooks "freeze" ─▶ watchdog armed ─▶ FIFREEZE, inner first ─▶ (the mark) ─▶ FITHAW, outer first ─▶ hooks "thaw"
//
// All freezing and thawing is done by the watchdog: a process of its own,
// outside the caller's control group, that has every mount open and its memory
// locked before the first freeze. So it knows of itself which file systems are
// frozen by us, and a freeze that takes long holds up no thread of the caller.
// It thaws what it froze when it is told to, when the time is over, and when
// the caller dies. Should the watchdog die, the caller thaws in its place.
//
// What stays frozen is what somebody else froze: that is an error for us
// (ErrForeign), and never thawed. One doubt is left: the watchdog is killed
// between the announcement of a freeze and its answer. Then the file system is
// thawed, for our own freeze takes as long as a sync, while somebody else's is
// answered at once; and one of ours that nobody thaws would be the greater harm.
//
// Hooks are thawed by the caller only: a hook that quiesces an application
// needs a time limit of its own for the case that the caller is killed.
package freeze

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Errors that callers branch on.
var (
	// ErrForeign: somebody else has frozen the file system; it is left as it is.
	ErrForeign = errors.New("frozen by somebody else")
	// ErrUnsupported: the file system cannot be frozen, so the consistency that was asked for cannot be had.
	ErrUnsupported = errors.New("file system cannot be frozen")
	// ErrOwn: the caller itself would be stopped by the freeze.
	ErrOwn = errors.New("file system holds files that this process writes")
	// ErrHook: a hook failed or took too long.
	ErrHook = errors.New("hook failed")
	// ErrTimeout: the file systems were not all frozen within the time.
	ErrTimeout = errors.New("not frozen in time")
	// ErrNotHeld: a file system was thawed before Thaw.
	ErrNotHeld = errors.New("the freeze did not hold")
	// ErrWatchdog: the watchdog cannot be started; without it nothing is frozen.
	ErrWatchdog = errors.New("the watchdog of the freeze does not work")
)

// Request says what to freeze. Zero durations mean the defaults.
type Request struct {
	Mounts      []string      // mount points; several of one file system count once
	HookDir     string        // executables to run; "" is none
	MoreHooks   []string      // more such folders, gone through after HookDir
	Timeout     time.Duration // from the first freeze to the thaw at the most
	HookTimeout time.Duration // of each hook
	Own         []string      // folders that the caller writes to, beyond the files that it has open
}

// Defaults and bounds of Request.
const (
	DefaultTimeout     = 10 * time.Second
	DefaultHookTimeout = 30 * time.Second
	mountsMax          = 256
)

// Frozen is a standstill that lasts until Thaw, or until its time is over. Its
// methods may be called concurrently.
type Frozen struct {
	dog   *dog
	hooks *hooks
	names []string // mount points, as frozen: inner first
	once  sync.Once
	err   error
}

// Freeze runs the hooks, then freezes the mounted file systems, inner ones
// first. On an error nothing is frozen, except what a freeze that hangs in the
// kernel may still reach: the watchdog then thaws it at once.
func Freeze(ctx context.Context, r Request) (*Frozen, error) {
	if r.Timeout <= 0 {
		r.Timeout = DefaultTimeout
	}
	if r.HookTimeout <= 0 {
		r.HookTimeout = DefaultHookTimeout
	}
	targets, err := plan(r)
	if err != nil {
		return nil, err
	}
	d, err := startDog(ctx, targets, r.Timeout)
	if err != nil {
		closeAll(targets)
		return nil, err
	}
	f := &Frozen{dog: d, hooks: &hooks{dir: r.HookDir, more: r.MoreHooks, timeout: r.HookTimeout}}
	if err := f.hooks.freeze(ctx); err != nil {
		return nil, errors.Join(err, f.Thaw())
	}
	for i, t := range targets {
		f.names = append(f.names, t.mount.Point)
		if err := d.freeze(ctx, i); err != nil {
			err = fmt.Errorf("freezing %s: %w", t.mount.Point, explain(err))
			thaw := f.Thaw()
			if errors.Is(thaw, ErrNotHeld) {
				thaw = nil // err says why
			}
			return nil, errors.Join(err, thaw)
		}
	}
	return f, nil
}

// explain puts the sentinel and the remedy to what FIFREEZE answered.
func explain(err error) error {
	switch {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w: %w (a backup program or fsfreeze -f; wait until it is done, or fsfreeze -u)", ErrForeign, err)
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOTTY):
		return fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	return err
}

// Mounts are the mount points of what is frozen, inner first.
func (f *Frozen) Mounts() []string { return f.names }

// Hooks is how many hooks ran and succeeded.
func (f *Frozen) Hooks() int { return len(f.hooks.ran) }

// HooksIn is how many of them are in a folder.
func (f *Frozen) HooksIn(dir string) (n int) {
	for _, p := range f.hooks.ran {
		if filepath.Dir(p) == filepath.Clean(dir) {
			n++
		}
	}
	return n
}

// Still says whether everything has been frozen all the time until now, as far
// as we are concerned. What others thaw, Thaw finds out.
func (f *Frozen) Still() bool { return f.dog.still() }

// Thaw ends the standstill and runs the hooks' other half. ErrNotHeld: something
// had been thawed before. All is thawed all the same; a second call does nothing.
func (f *Frozen) Thaw() error {
	f.once.Do(func() { f.err = errors.Join(f.dog.end(), f.hooks.thaw()) })
	return f.err
}
