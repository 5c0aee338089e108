// Package spool is the durable queue of sealed segments between the capture and
// those who drain it. Segments are appended by one producer and handed out at
// cursors: a consumer gets the segment at its cursor, again and again, until it
// commits it. A segment's file goes when every cursor has passed it; the newest
// stays, as its footer says where the capture was.
//
// A segment is written under a name of its own, synced, renamed to its sequence,
// and the folder is synced: a file with a sequence as its name is whole, and one
// that is not was damaged later. docs/formats/spool.md describes the folder.
package spool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"tidemark/internal/segment"
	"tidemark/internal/vfs"
)

// Errors that callers branch on.
var (
	ErrFull     = errors.New("the spool is full")
	ErrInUse    = errors.New("the spool is in use by another process")
	ErrCommit   = errors.New("not the segment at the cursor")
	ErrClosed   = errors.New("the spool is closed")
	ErrSequence = errors.New("not the segment that follows the newest")
)

// DamagedError says which segment of the spool cannot be used. It wraps
// segment.ErrDamaged or what reading the file returned.
type DamagedError struct {
	Sequence uint64
	Path     string
	Err      error
}

func (e *DamagedError) Error() string {
	return fmt.Sprintf("spool segment %d, file %s: %v: its records reach no consumer; remove the group's spool and protect it anew where the file cannot be mended",
		e.Sequence, e.Path, e.Err)
}

func (e *DamagedError) Unwrap() error { return e.Err }

// Options of a spool.
type Options struct {
	MaxBytes int64  // bound of the segments that some cursor has not passed, together
	FS       vfs.FS // nil: the operating system's
}

// Report says what Open found and had to mend.
type Report struct {
	Torn    []string // files that a crash left unfinished, cut back or removed; the ring still holds what they lack
	Kept    []Cut    // those of Torn of which records were kept
	Damaged []error  // *DamagedError of segments that were whole once; a cursor stops at them
	Cursors []string // consumers whose cursor was damaged: they begin again at the oldest segment
}

// Cut says how much of a torn segment was kept. Last tells where to continue.
type Cut struct {
	Sequence      uint64
	Records, Kept int
}

// Item is a segment to be drained.
type Item struct {
	Sequence uint64
	Path     string
	Summary  segment.Summary

	fs     vfs.FS
	damage error
}

// Open opens the segment's file. It stays readable when the cursor moves on.
func (i Item) Open() (vfs.File, error) { return i.fs.OpenFile(i.Path, os.O_RDONLY, 0) }

// Spool is an open queue. Append is called by one goroutine; all else concurrently.
type Spool struct {
	dir     string
	fs      vfs.FS
	options Options
	lock    io.Closer

	appending sync.Mutex // one Append at a time; taken before mu

	mu      sync.Mutex
	items   []Item // in order of sequence, without a hole
	cursors map[string]*Cursor
	floor   uint64        // a sequence that a cursor has passed is not used again
	changed chan struct{} // closed and replaced when something was appended or removed
	closed  bool
}

// Open opens, or makes, the spool in dir. One process at a time has it: ErrInUse.
func Open(dir string, o Options) (*Spool, Report, error) {
	var report Report
	if o.FS == nil {
		o.FS = vfs.OS{}
	}
	if err := makeDir(o.FS, filepath.Clean(dir)); err != nil {
		return nil, report, err
	}
	lock, err := o.FS.Lock(filepath.Join(dir, "lock"))
	if errors.Is(err, vfs.ErrLocked) {
		return nil, report, fmt.Errorf("%s: %w", dir, ErrInUse)
	}
	if err != nil {
		return nil, report, err
	}
	s := &Spool{dir: dir, fs: o.FS, options: o, lock: lock, cursors: map[string]*Cursor{}, changed: make(chan struct{})}
	if err := s.load(&report); err != nil {
		lock.Close()
		return nil, report, fmt.Errorf("spool %s: %w", dir, err)
	}
	return s, report, nil
}

// makeDir makes a folder, and what is missing above it, stable; one that is
// there too: whoever made it may have been killed before it was.
func makeDir(f vfs.FS, dir string) error {
	parent := filepath.Dir(dir)
	switch _, err := f.Stat(dir); {
	case err == nil && parent == dir:
		return nil
	case errors.Is(err, fs.ErrNotExist):
		if err := makeDir(f, parent); err != nil {
			return err
		}
		if err := f.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	case err != nil:
		return err
	}
	if err := f.SyncDir(parent); err != nil && !errors.Is(err, fs.ErrPermission) {
		return err
	}
	return nil
}

func (s *Spool) path(sequence uint64) string {
	return filepath.Join(s.dir, fmt.Sprintf("%016x%s", sequence, segmentEnd))
}

// Append puts a segment behind the newest and returns when it is stable, file
// and folder. After an error nothing is appended, and the same sequence may be
// appended again, with other content too. ErrFull: the bound is reached, or the
// file system is full. ErrSequence: it does not follow the newest.
func (s *Spool) Append(g *segment.Sealed) error {
	s.appending.Lock()
	defer s.appending.Unlock()
	if err := s.admit(&g.Summary); err != nil {
		return err
	}
	path := s.path(g.Summary.Sequence)
	if err := s.write(path, g); err != nil {
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			return fmt.Errorf("%w: %w", ErrFull, err)
		}
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.items = append(s.items, Item{Sequence: g.Summary.Sequence, Path: path, Summary: g.Summary, fs: s.fs})
	s.wake()
	s.trim()
	return nil
}

func (s *Spool) admit(g *segment.Summary) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := len(s.items)
	switch {
	case s.closed:
		return ErrClosed
	case n > 0 && g.Sequence != s.items[n-1].Sequence+1:
		return fmt.Errorf("segment %d appended behind %d: %w", g.Sequence, s.items[n-1].Sequence, ErrSequence)
	case g.Sequence == 0 || n == 0 && g.Sequence < s.floor:
		return fmt.Errorf("segment %d appended, and consumers have had those before %d: %w", g.Sequence, s.floor, ErrSequence)
	case !s.room(g.Size):
		return fmt.Errorf("segment of %d bytes, and %d of %d bytes are waiting: %w", g.Size, s.waiting(), s.options.MaxBytes, ErrFull)
	}
	return nil
}

// write makes a file appear whole and stable under its name, or, after an
// error, not at all.
func (s *Spool) write(path string, g io.WriterTo) error {
	tmp := path + unfinished
	if err := s.fill(tmp, g); err != nil {
		return errors.Join(err, ignoreAbsent(s.fs.Remove(tmp)))
	}
	if err := s.fs.Rename(tmp, path); err != nil {
		return errors.Join(err, ignoreAbsent(s.fs.Remove(tmp)))
	}
	return s.fs.SyncDir(s.dir)
}

func (s *Spool) fill(path string, g io.WriterTo) error {
	f, err := s.fs.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY|vfs.Uncached, 0o600)
	if err != nil {
		return err
	}
	_, err = g.WriteTo(f)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func ignoreAbsent(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Last is the summary of the newest segment, drained or not.
func (s *Spool) Last() (segment.Summary, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := len(s.items); n > 0 {
		return s.items[n-1].Summary, true
	}
	return segment.Summary{}, false
}

// At is a segment that is still there, whatever the cursors. *DamagedError: it
// cannot be used.
func (s *Spool) At(sequence uint64) (Item, bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.items) == 0 || sequence < s.items[0].Sequence || sequence-s.items[0].Sequence >= uint64(len(s.items)) {
		return Item{}, false, nil
	}
	i := s.items[sequence-s.items[0].Sequence] // they are without a hole
	return i, i.damage == nil, i.damage
}

// Changed is closed at the next change, or when the spool is.
func (s *Spool) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

// Bytes is how much is there: what waits to be drained, and the newest.
func (s *Spool) Bytes() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	var n int64
	for i := range s.items {
		n += s.items[i].Summary.Size
	}
	return n
}

// Capacity is the bound in bytes.
func (s *Spool) Capacity() int64 { return s.options.MaxBytes }

// Room says whether another segment of n bytes fits. One always fits where
// nothing waits, however large it is: the bound slows, it never blocks for good.
func (s *Spool) Room(n int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.room(n)
}

func (s *Spool) room(n int64) bool {
	w := s.waiting()
	return w == 0 || w+n <= s.options.MaxBytes
}

// waiting is the size of what some cursor has yet to pass.
func (s *Spool) waiting() int64 {
	from := s.passed()
	var n int64
	for i := range s.items {
		if s.items[i].Sequence >= from {
			n += s.items[i].Summary.Size
		}
	}
	return n
}

// passed is the sequence that the slowest cursor stands at; 0 without cursors.
func (s *Spool) passed() uint64 {
	var least uint64
	first := true
	for _, c := range s.cursors {
		if first || c.next < least {
			least, first = c.next, false
		}
	}
	return least
}

// WaitRoom returns when a segment of n bytes fits.
func (s *Spool) WaitRoom(ctx context.Context, n int64) error {
	return s.await(ctx, func() (bool, error) { return s.room(n), nil })
}

// await calls done, under the lock, now and after each change until it is true.
func (s *Spool) await(ctx context.Context, done func() (bool, error)) error {
	for {
		s.mu.Lock()
		ok, err := done()
		changed, closed := s.changed, s.closed
		s.mu.Unlock()
		switch {
		case closed:
			return ErrClosed
		case ok || err != nil:
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}

// wake tells all who wait that something has changed. mu is held.
func (s *Spool) wake() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// trim removes what every cursor has passed, but never the newest segment. A
// file that cannot be removed now is removed at the next change or the next
// Open: nobody reads it again. mu is held.
func (s *Spool) trim() {
	from := s.passed()
	for len(s.items) > 1 && s.items[0].Sequence < from {
		if ignoreAbsent(s.fs.Remove(s.items[0].Path)) != nil {
			return
		}
		s.items = s.items[1:]
	}
}

// Close ends the use of the spool; everything in it stays.
func (s *Spool) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	close(s.changed)
	return s.lock.Close()
}
