// Package restore writes a view, a disk as it was at a point, to a real disk
// or to a file, and compares disks with views.
//
// The work is cut into units of a few MiB. A batch of units is written by
// several workers, flushed, read back past the page cache and compared by hash;
// then the batch is noted in a small state file (see state.go), so that a run
// that was interrupted goes on where it was. What an earlier run noted is read
// back again before it is believed. Nothing is written before every check of
// the target has passed.
package restore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"tidemark/internal/block"
)

// Refusals and failures that callers branch on. The error's text names the
// target, what is wrong, and the remedy.
var (
	ErrInUse       = errors.New("target is in use")
	ErrProtected   = errors.New("target is protected by a tap")
	ErrTooSmall    = errors.New("target is too small")
	ErrNotEmpty    = errors.New("target is not empty")
	ErrDirectory   = errors.New("target is a directory")
	ErrKind        = errors.New("target is neither a block device nor a regular file")
	ErrVault       = errors.New("target is in the vault itself")
	ErrInterrupted = errors.New("restore was interrupted")
	ErrVerify      = errors.New("target gave back something other than what was written")
)

// Options of Write. The zero value is sensible.
type Options struct {
	// Force overwrites a target that is not empty. It never overrides ErrInUse,
	// ErrProtected or ErrVault.
	Force bool
	// Parallel is how many units are read and written at one time: 1 to 64; 0 chooses.
	// Each takes a buffer of 4 MiB.
	Parallel int
	// Progress is told how far it is, from one goroutine at a time, once a unit at most.
	Progress func(Progress)
	// Identity says what is restored: group, disk, position and a digest of what
	// it is made of. Only a run with the same one is continued; with none,
	// nothing is kept for a later run.
	Identity string
	// StateDir is where the state of a restore to a device is kept; "" is
	// /run/tidemark. That of a restore to a file stands next to it, as PATH.tidemark-restore.
	StateDir string
	// Protected says whether a tap is on the device at path (or on one that
	// overlaps it), and names its group.
	Protected func(path string) (group string, yes bool)
	// Vault is the folder of the vault that the view is read from, if it is one.
	Vault string
}

// Progress counts bytes of the view.
type Progress struct {
	Written  int64 // zeroes, holes and what an earlier run did included
	Verified int64
	Total    int64
}

// Report is what Write did, in bytes of the view.
type Report struct {
	Target    string        `json:"target"`
	Size      int64         `json:"size_bytes"`
	Data      int64         `json:"data_bytes"`      // written as data
	Zero      int64         `json:"zero_bytes"`      // zeroed, or left as holes
	Undefined int64         `json:"undefined_bytes"` // had no content at that point; zeroed, or left as holes
	Resumed   int64         `json:"resumed_bytes"`   // done by an earlier run and found sound
	Verified  int64         `json:"verified_bytes"`  // read back and compared; holes of a new file are not read
	Duration  time.Duration `json:"duration_ns"`
}

// Check opens the target and applies every check that Write does, and changes nothing.
func Check(view block.Device, path string, o Options) error {
	t, err := openTarget(view, path, o)
	if err != nil {
		return err
	}
	return t.Close()
}

// Write makes the block device or regular file at path hold what view holds.
// A file is made where there is none, and is sparse; a device that is larger
// than the view keeps the rest as it is.
//
// It returns ErrInterrupted (wrapping ctx's error) when ctx ends; the next call
// with the same Options.Identity and target goes on. After any other failure no
// state is left, a file is removed (or emptied, where it was there before), and
// a device is partly overwritten.
func Write(ctx context.Context, view block.Device, path string, o Options) (Report, error) {
	start := time.Now()
	t, err := openTarget(view, path, o)
	if err != nil {
		return Report{}, err
	}
	defer t.Close()
	j := &job{view: view, target: t, size: view.Size(), parallel: parallel(o.Parallel), force: o.Force, progress: o.Progress}
	if err := t.begin(j.size); err != nil {
		return Report{}, errors.Join(err, t.abandon())
	}
	err = j.run(ctx)
	if err == nil {
		err = t.finish()
	}
	j.report.Target, j.report.Size, j.report.Duration = path, j.size, time.Since(start)
	switch {
	case err == nil:
		return j.report, nil
	case errors.Is(err, ErrNotEmpty): // found late, but before anything was written
		return j.report, err
	case ctx.Err() != nil && o.Identity != "":
		return j.report, fmt.Errorf("%s: %w; the same command goes on where it was: %w", path, ErrInterrupted, ctx.Err())
	case ctx.Err() != nil:
		err = fmt.Errorf("%s: %w: %w", path, ErrInterrupted, ctx.Err())
	}
	return j.report, errors.Join(err, t.abandon())
}

func parallel(n int) int {
	if n <= 0 {
		n = max(4, runtime.GOMAXPROCS(0))
	}
	return min(n, 64)
}

// removeIfThere removes a file; one that is not there is fine.
func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
