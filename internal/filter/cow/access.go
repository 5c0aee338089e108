package cow

import (
	"errors"
	"fmt"
	"io"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/diff"
)

var (
	_ block.Device    = (*Image)(nil)
	_ block.Zeroer    = (*Image)(nil)
	_ block.Discarder = (*Image)(nil)
)

// ReadAt reads the device as it was, with the private changes.
func (m *Image) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off > m.size {
		return 0, fmt.Errorf("read at %d of an image of %d bytes: %w", off, m.size, block.ErrBounds)
	}
	if !m.work.enter() {
		return 0, ErrClosed
	}
	defer m.work.leave()
	var short error
	if int64(len(p)) > m.size-off {
		p, short = p[:m.size-off], io.EOF
	}
	done := 0
	for done < len(p) {
		// What was read from the device counts if no write can have gone past the image meanwhile.
		n, err := m.readSome(p[done:], off+int64(done))
		if spoiled := m.Err(); spoiled != nil {
			return 0, spoiled
		}
		if err != nil {
			return done, err
		}
		done += n
	}
	return len(p), short
}

// readSome reads up to the end of a run of untouched chunks, or of one settled chunk.
func (m *Image) readSome(p []byte, off int64) (int, error) {
	c := off / m.chunk
	if m.held(c) {
		r := m.extent(c)
		n := int(min(r.End()-off, int64(len(p))))
		return n, m.readChunk(c, p[:n], off-r.Off)
	}
	last := (off + int64(len(p)) - 1) / m.chunk
	to := c + 1
	for to <= last && !m.held(to) {
		to++
	}
	n := int(min(to*m.chunk-off, int64(len(p))))
	if k, err := m.filter.below.ReadAt(p[:n], off); k < n {
		return 0, errors.Join(fmt.Errorf("image of %s", m.filter.Device()), err)
	}
	for i := c; i < to; i++ {
		if m.held(i) { // written to meanwhile, but settled first: up to there it is the old content
			if i == c {
				return m.readSome(p, off)
			}
			return int(i*m.chunk - off), nil
		}
	}
	return n, nil
}

// held says whether a chunk's content is the image's own. A durable one is so
// before writers may go on.
func (m *Image) held(c int64) bool {
	if m.settled.has(c) {
		return true
	}
	if !m.cfg.Storage.Config().Durable {
		return false
	}
	s := m.shard(c)
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.at[c] != nil
}

// readChunk reads a part of a chunk that the image holds.
func (m *Image) readChunk(c int64, p []byte, at int64) error {
	s := m.shard(c)
	s.mu.RLock() // the buffer and the slot stay while it is held
	err := m.load(c, s.at[c], p, at)
	s.mu.RUnlock()
	if err != nil {
		m.Spoil(err)
	}
	return err
}

// load reads a part of a chunk from its place. The shard is locked.
func (m *Image) load(c int64, from *place, p []byte, at int64) error {
	if from.buffer != nil {
		copy(p, from.buffer.Bytes()[at:])
		return nil
	}
	key, r := diff.Key{Device: m.cfg.Device, Chunk: c}, m.extent(c)
	if int64(len(p)) == r.Len {
		return m.cfg.Storage.Load(from.slot, key, p)
	}
	whole := make([]byte, r.Len) // the checksum is of all of it
	if err := m.cfg.Storage.Load(from.slot, key, whole); err != nil {
		return err
	}
	copy(p, whole[at:])
	return nil
}

// WriteAt changes the image alone.
func (m *Image) WriteAt(p []byte, off int64) (int, error) {
	err := m.change(block.Range{Off: off, Len: int64(len(p))}, func(to []byte, at int64) { copy(to, p[at-off:]) })
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// WriteZeroes changes the image alone.
func (m *Image) WriteZeroes(r block.Range) error {
	return m.change(r, func(to []byte, _ int64) { clear(to) })
}

// Discard does nothing: what is discarded may be read as it was.
func (m *Image) Discard(r block.Range) error { return block.CheckBounds(r, m.size) }

// Flush makes the private changes as stable as the storage is.
func (m *Image) Flush() error {
	if err := m.Err(); err != nil {
		return err
	}
	return nil
}

// change has fill give the new content of a range, chunk by chunk.
func (m *Image) change(r block.Range, fill func(to []byte, at int64)) error {
	if err := block.CheckBounds(r, m.size); err != nil || r.Empty() {
		return err
	}
	if !m.work.enter() {
		return ErrClosed
	}
	defer m.work.leave()
	if m.cfg.Changed != nil {
		m.cfg.Changed(r)
	}
	first, last := chunks(r, m.chunk)
	for c := first; c <= last; c++ {
		if err := m.changeChunk(c, r.Intersect(m.extent(c)), fill); err != nil {
			return err
		}
	}
	return m.Err()
}

// changeChunk puts a new version of one chunk in place of what the image has. A
// failure is the change's alone: the image is what it was.
func (m *Image) changeChunk(c int64, part block.Range, fill func(to []byte, at int64)) error {
	s, r := m.shard(c), m.extent(c)
	s.writes.Lock()
	defer s.writes.Unlock()
	m.changed.set(c) // before the content: a restart takes it from there
	m.began.Add(1)
	defer m.ended.Add(1)
	patch := func(p []byte) { fill(p[part.Off-r.Off:part.End()-r.Off], part.Off) }
	first, err := m.settle(c, func(p []byte, off int64) error {
		if part != r {
			if _, err := m.filter.below.ReadAt(p, off); err != nil {
				return err
			}
		}
		patch(p)
		return nil
	}, m.waitAnyhow)
	if err := errors.Join(err, m.Err()); err != nil {
		return fmt.Errorf("image of %s: a private change: %w", m.filter.Device(), err)
	}
	if first {
		return nil
	}
	if !m.held(c) {
		return ErrClosed // while it waited
	}
	b, err := m.takeAgain()
	if err != nil {
		return fmt.Errorf("image of %s: a private change: %w", m.filter.Device(), err)
	}
	s.mu.RLock()
	old := s.at[c]
	if part != r {
		err = m.load(c, old, b.Bytes()[:r.Len], 0)
	}
	s.mu.RUnlock()
	if err != nil {
		m.cfg.Storage.Release(b.Slot())
		b.Drop() // last: somebody else has it from here on
		m.Spoil(err)
		return err
	}
	patch(b.Bytes()[:r.Len])
	return m.put(c, b, old)
}

// takeAgain is take for a chunk that has a slot already, which it gives back when
// the new version is stored: where there is no room it waits for others that do so.
func (m *Image) takeAgain() (*diff.Buffer, error) {
	for end := time.Now().Add(m.cfg.Patience); time.Now().Before(end) && !m.cfg.Pending.Idle(); time.Sleep(time.Millisecond) {
		slot, err := m.cfg.Storage.TryReserve()
		if err == nil {
			return m.fetch(slot)
		}
	}
	return m.take()
}

func (m *Image) waitAnyhow(done <-chan struct{}) error {
	select {
	case <-done:
		return nil
	case <-m.filter.below.Gone():
		return diff.ErrSpoiled
	}
}
