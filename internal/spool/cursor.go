package spool

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"sync"

	"tidemark/internal/segment"
)

// Cursor is one consumer's place. Its methods may be called concurrently.
type Cursor struct {
	s    *Spool
	name string

	saving sync.Mutex // one Commit at a time; taken before s.mu
	turn   uint64     // of the slot written last; of saving
	next   uint64     // sequence of the segment to drain; 0: the oldest. s.mu
}

var cursorName = regexp.MustCompile(`^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}$`)

// A cursor's file: two slots, written in turn and in place, so that a commit
// needs no room on a full disk and a torn slot leaves the one before.
// Little-endian.
const (
	slotSize   = 32
	slotEvery  = 4096 // bytes between the slots: no write touches both
	slotFormat = 1
)

var (
	slotMagic  = []byte("TIDECUR1")
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

// slot is what a cursor's file says: the newer of two.
type slot struct{ turn, next uint64 }

func (v slot) encode() []byte {
	b := make([]byte, slotSize)
	copy(b, slotMagic)
	binary.LittleEndian.PutUint32(b[8:], slotFormat)
	binary.LittleEndian.PutUint64(b[12:], v.turn)
	binary.LittleEndian.PutUint64(b[20:], v.next)
	binary.LittleEndian.PutUint32(b[28:], crc32.Checksum(b[:28], castagnoli))
	return b
}

// decodeCursor gives the newer good slot of a cursor's file.
func decodeCursor(file []byte) (best slot, ok bool) {
	for at := 0; at+slotSize <= len(file) && at <= slotEvery; at += slotEvery {
		b := file[at : at+slotSize]
		if !bytes.Equal(b[:8], slotMagic) || binary.LittleEndian.Uint32(b[8:]) != slotFormat ||
			crc32.Checksum(b[:28], castagnoli) != binary.LittleEndian.Uint32(b[28:]) {
			continue
		}
		v := slot{binary.LittleEndian.Uint64(b[12:]), binary.LittleEndian.Uint64(b[20:])}
		if !ok || v.turn > best.turn {
			best, ok = v, true
		}
	}
	return best, ok
}

func (s *Spool) cursorPath(name string) string { return filepath.Join(s.dir, name+cursorEnd) }

// loadCursor reads a cursor. A damaged one begins again at the oldest segment:
// what a consumer gets twice it must tolerate anyway.
func (s *Spool) loadCursor(name string, report *Report) error {
	b, err := s.fs.ReadFile(s.cursorPath(name))
	if err != nil {
		return err
	}
	v, ok := decodeCursor(b)
	c := &Cursor{s: s, name: name, turn: v.turn, next: v.next}
	if !ok {
		report.Cursors = append(report.Cursors, name)
		if err := c.create(); err != nil {
			return err
		}
	}
	s.cursors[name] = c
	return nil
}

// Cursor opens a consumer's cursor. A new one begins at the oldest segment kept.
func (s *Spool) Cursor(name string) (*Cursor, error) {
	if !cursorName.MatchString(name) {
		return nil, fmt.Errorf("cursor %q: want 1 to 64 of letters, digits, ., - and _, not beginning with a dot", name)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrClosed
	}
	if c, ok := s.cursors[name]; ok {
		return c, nil
	}
	c := &Cursor{s: s, name: name}
	if len(s.items) > 0 {
		c.next = s.items[0].Sequence
	}
	if err := c.create(); err != nil {
		return nil, err
	}
	s.cursors[name] = c
	return c, nil
}

// Forget removes a consumer's cursor, so that nothing is kept for it any more.
func (s *Spool) Forget(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := ignoreAbsent(s.fs.Remove(s.cursorPath(name))); err != nil {
		return err
	}
	delete(s.cursors, name)
	if len(s.cursors) > 0 {
		s.trim()
	}
	s.wake()
	return s.fs.SyncDir(s.dir)
}

// create makes the cursor's file, which appears whole or not at all.
func (c *Cursor) create() error {
	b := make([]byte, 2*slotEvery)
	copy(b[c.turn%2*slotEvery:], slot{c.turn, c.next}.encode())
	return c.s.write(c.s.cursorPath(c.name), bytesTo(b))
}

// save makes the cursor's place durable. After an error the slot before still
// counts, and is not the one that is tried again.
func (c *Cursor) save(next uint64) error {
	f, err := c.s.fs.OpenFile(c.s.cursorPath(c.name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	v := slot{c.turn + 1, next}
	_, err = f.WriteAt(v.encode(), int64(v.turn%2*slotEvery))
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	c.turn++
	return nil
}

type bytesTo []byte

func (b bytesTo) WriteTo(w io.Writer) (int64, error) {
	n, err := w.Write(b)
	return int64(n), err
}

// Next waits for a segment at the cursor and gives it, the same until Commit.
// *DamagedError: the segment at the cursor is damaged or missing.
func (c *Cursor) Next(ctx context.Context) (item Item, err error) {
	err = c.s.await(ctx, func() (ok bool, err error) {
		item, ok, err = c.at()
		return ok, err
	})
	if err != nil {
		return Item{}, err
	}
	return item, nil
}

// at is the segment at the cursor. s.mu is held.
func (c *Cursor) at() (Item, bool, error) {
	for _, i := range c.s.items {
		if i.Sequence < c.next {
			continue
		}
		if c.next != 0 && i.Sequence > c.next {
			return Item{}, false, &DamagedError{c.next, c.s.path(c.next), fmt.Errorf("it is missing: %w", segment.ErrDamaged)}
		}
		return i, i.damage == nil, i.damage
	}
	return Item{}, false, nil
}

// Commit moves the cursor past the segment that Next gives and returns when
// that is stable. ErrCommit: it is another, and nothing is changed.
func (c *Cursor) Commit(sequence uint64) error {
	c.saving.Lock()
	defer c.saving.Unlock()
	c.s.mu.Lock()
	item, ok, err := c.at()
	closed := c.s.closed
	c.s.mu.Unlock()
	switch {
	case closed:
		return ErrClosed
	case err != nil:
		return err
	case !ok:
		return fmt.Errorf("cursor %s: commit of segment %d, and none is at the cursor, which waits for %d: %w", c.name, sequence, max(c.next, 1), ErrCommit)
	case item.Sequence != sequence:
		return fmt.Errorf("cursor %s: commit of segment %d, and segment %d is at the cursor: %w", c.name, sequence, item.Sequence, ErrCommit)
	}
	if err := c.save(sequence + 1); err != nil {
		return err
	}
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.next = sequence + 1
	c.s.floor = max(c.s.floor, c.next)
	c.s.trim()
	c.s.wake()
	return nil
}

// Drained says whether the cursor has passed everything.
func (c *Cursor) Drained() bool {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	_, ok, err := c.at()
	return !ok && err == nil
}
