// Package spool is the durable queue of sealed segments between the capture and
// those who drain it. Segments are appended by one producer and handed out at
// cursors: a consumer gets the segment at its cursor, again and again, until it
// commits it. A segment's file goes when every cursor has passed it; the newest
// stays, as its footer says where the capture was.
package spool

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"tidemark/internal/segment"
)

// Errors that callers branch on.
var (
	ErrFull   = errors.New("the spool is full")
	ErrInUse  = errors.New("the spool is in use by another process")
	ErrCommit = errors.New("not the segment at the cursor")
	ErrClosed = errors.New("the spool is closed")
)

// Options of a spool.
type Options struct {
	MaxBytes int64 // bound of all segments together
}

// Report says what Open had to mend.
type Report struct {
	Torn []string // files that a crash left unfinished, removed; the ring still holds their records
}

// Item is a segment to be drained.
type Item struct {
	Sequence uint64
	Path     string
	Summary  segment.Summary
}

// Spool is an open queue. Append is called by one goroutine; all else concurrently.
type Spool struct {
	dir     string
	options Options
	lock    *os.File

	mu      sync.Mutex
	items   []Item // in order of sequence, without a hole
	bytes   int64
	cursors map[string]*Cursor
	changed chan struct{} // closed and replaced when something was appended
	closed  bool
}

// Cursor is one consumer's place.
type Cursor struct {
	s    *Spool
	name string
	next uint64
}

// Open opens, or makes, the spool in dir. One process at a time has it: ErrInUse.
func Open(dir string, o Options) (*Spool, Report, error) {
	var report Report
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, report, err
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, report, err
	}
	s := &Spool{dir: dir, options: o, lock: lock, cursors: map[string]*Cursor{}, changed: make(chan struct{})}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		return nil, report, fmt.Errorf("%s: %w", dir, ErrInUse)
	}
	if err := s.load(&report); err != nil {
		lock.Close()
		return nil, report, err
	}
	return s, report, nil
}

func (s *Spool) path(sequence uint64) string {
	return filepath.Join(s.dir, fmt.Sprintf("%016x.seg", sequence))
}

// load finds the segments. Only the newest can be torn: each is stable before
// the next is begun.
func (s *Spool) load(report *Report) error {
	names, err := filepath.Glob(filepath.Join(s.dir, "*.seg"))
	if err != nil {
		return err
	}
	slices.Sort(names)
	for i, name := range names {
		item, err := read(name)
		if err != nil && i == len(names)-1 && errors.Is(err, segment.ErrDamaged) {
			report.Torn = append(report.Torn, filepath.Base(name))
			if err := errors.Join(os.Remove(name), s.sync()); err != nil {
				return err
			}
			break
		}
		if err != nil {
			return fmt.Errorf("spool segment %s: %w", filepath.Base(name), err)
		}
		if n := len(s.items); n > 0 && item.Sequence != s.items[n-1].Sequence+1 {
			return fmt.Errorf("spool %s: segment %d is missing: %w", s.dir, s.items[n-1].Sequence+1, segment.ErrDamaged)
		}
		s.items = append(s.items, item)
		s.bytes += item.Summary.Size
	}
	return s.loadCursors()
}

func read(name string) (Item, error) {
	f, err := os.Open(name)
	if err != nil {
		return Item{}, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return Item{}, err
	}
	g, err := segment.Open(f, st.Size())
	if err != nil {
		return Item{}, err
	}
	g.Check(func(_, _ uint64, e error) { err = e })
	sum := g.Summary()
	return Item{Sequence: sum.Sequence, Path: name, Summary: sum}, err
}

func (s *Spool) sync() error {
	d, err := os.Open(s.dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Append puts a segment behind the newest and returns when it is stable, file
// and folder. ErrFull, and any other error, changes nothing.
func (s *Spool) Append(g *segment.Sealed) error {
	s.mu.Lock()
	last, full := s.last(), len(s.items) > 1 && s.bytes+g.Summary.Size > s.options.MaxBytes
	s.mu.Unlock()
	if full {
		return fmt.Errorf("%d of %d bytes are waiting: %w", s.bytes, s.options.MaxBytes, ErrFull)
	}
	if last != 0 && g.Summary.Sequence != last+1 {
		return fmt.Errorf("segment %d appended behind %d", g.Summary.Sequence, last)
	}
	path := s.path(g.Summary.Sequence)
	if err := write(path, g); err != nil {
		if rm := os.Remove(path); rm != nil && !errors.Is(rm, fs.ErrNotExist) {
			err = errors.Join(err, rm)
		}
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			return fmt.Errorf("%w: %w", ErrFull, err)
		}
		return err
	}
	if err := s.sync(); err != nil {
		return errors.Join(err, os.Remove(path))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.items = append(s.items, Item{Sequence: g.Summary.Sequence, Path: path, Summary: g.Summary})
	s.bytes += g.Summary.Size
	close(s.changed)
	s.changed = make(chan struct{})
	return s.trim()
}

func write(path string, g io.WriterTo) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = g.WriteTo(f)
	return errors.Join(err, f.Sync(), f.Close())
}

func (s *Spool) last() uint64 {
	if n := len(s.items); n > 0 {
		return s.items[n-1].Sequence
	}
	return 0
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

// Bytes is how much is waiting to be drained, or stays as the newest.
func (s *Spool) Bytes() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bytes
}

// Room says whether another segment of n bytes fits.
func (s *Spool) Room(n int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.items) <= 1 || s.bytes+n <= s.options.MaxBytes
}

// cursorState is what a cursor's file holds.
type cursorState struct {
	Next  uint64 `json:"next"`
	CRC32 uint32 `json:"crc32c"`
}

func (c cursorState) sum() uint32 {
	return crc32.Checksum(fmt.Appendf(nil, "next %d", c.Next), crc32.MakeTable(crc32.Castagnoli))
}

func (s *Spool) loadCursors() error {
	names, err := filepath.Glob(filepath.Join(s.dir, "*.cursor"))
	if err != nil {
		return err
	}
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		var st cursorState
		if err := json.Unmarshal(b, &st); err != nil || st.sum() != st.CRC32 {
			return fmt.Errorf("%s: %w: remove it to have its consumer begin again", name, segment.ErrDamaged)
		}
		who := strings.TrimSuffix(filepath.Base(name), ".cursor")
		s.cursors[who] = &Cursor{s: s, name: who, next: st.Next}
	}
	return nil
}

// Cursor opens a consumer's cursor. A new one begins at the oldest segment kept.
func (s *Spool) Cursor(name string) (*Cursor, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c, ok := s.cursors[name]; ok {
		return c, nil
	}
	c := &Cursor{s: s, name: name}
	if len(s.items) > 0 {
		c.next = s.items[0].Sequence
	}
	if err := c.save(c.next); err != nil {
		return nil, err
	}
	s.cursors[name] = c
	return c, nil
}

// save makes the cursor's place durable.
func (c *Cursor) save(next uint64) error {
	st := cursorState{Next: next}
	st.CRC32 = st.sum()
	b, err := json.Marshal(st)
	if err != nil {
		return err
	}
	path := filepath.Join(c.s.dir, c.name+".cursor")
	if err := errors.Join(os.RemoveAll(path+".new"), write(path+".new", bytesTo(b)), os.Rename(path+".new", path)); err != nil {
		return err
	}
	return c.s.sync()
}

type bytesTo []byte

func (b bytesTo) WriteTo(w io.Writer) (int64, error) {
	n, err := w.Write(b)
	return int64(n), err
}

// Next waits for a segment at the cursor and gives it, the same until Commit.
func (c *Cursor) Next(ctx context.Context) (Item, error) {
	for {
		c.s.mu.Lock()
		item, ok := c.at()
		changed, closed := c.s.changed, c.s.closed
		c.s.mu.Unlock()
		switch {
		case closed:
			return Item{}, ErrClosed
		case ok:
			return item, nil
		}
		select {
		case <-ctx.Done():
			return Item{}, ctx.Err()
		case <-changed:
		}
	}
}

func (c *Cursor) at() (Item, bool) {
	for _, i := range c.s.items {
		if i.Sequence >= c.next {
			return i, true
		}
	}
	return Item{}, false
}

// Commit moves the cursor past the segment that Next gives. ErrCommit: it is
// another, and nothing is changed.
func (c *Cursor) Commit(sequence uint64) error {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	item, ok := c.at()
	if !ok || item.Sequence != sequence {
		return fmt.Errorf("cursor %s: commit of segment %d, which is at %d: %w", c.name, sequence, item.Sequence, ErrCommit)
	}
	if err := c.save(sequence + 1); err != nil {
		return err
	}
	c.next = sequence + 1
	return c.s.trim()
}

// Drained says whether the cursor has passed everything.
func (c *Cursor) Drained() bool {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	_, ok := c.at()
	return !ok
}

// trim removes what every cursor has passed, but never the newest segment.
func (s *Spool) trim() error {
	for len(s.items) > 1 && len(s.cursors) > 0 {
		for _, c := range s.cursors {
			if c.next <= s.items[0].Sequence {
				return nil
			}
		}
		if err := os.Remove(s.items[0].Path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		s.bytes -= s.items[0].Summary.Size
		s.items = s.items[1:]
	}
	return nil
}

// Close ends the use of the spool; everything in it stays.
func (s *Spool) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.closed = true
		close(s.changed)
	}
	return s.lock.Close()
}
