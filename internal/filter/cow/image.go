package cow

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/diff"
	"tidemark/internal/stack"
)

// Errors that callers branch on.
var (
	// ErrClosed: the snapshot was destroyed.
	ErrClosed = errors.New("the snapshot was destroyed")
)

// Config is what an image is made with.
type Config struct {
	Device   uint32        // index of the device in the snapshot
	Storage  *diff.Storage // of the snapshot
	Pending  *diff.Pending // its buffers
	Patience time.Duration // that a write has with the storage before the image is spoiled; twice that is well below the stack's Stall
	// Notify is told, once, when the image is spoiled; it must not wait.
	Notify func(diff.Event)
	// Changed is told of ranges that were written to the image; nil: nobody is.
	Changed func(r block.Range)
}

const shardCount = 64

// Image is a device as it was at one moment: a block.Device, writable with
// private changes. All methods may be called concurrently.
type Image struct {
	cfg     Config
	filter  *Filter
	size    int64
	chunk   int64
	settled bits
	changed bits          // chunks with private changes
	began   atomic.Uint64 // private changes so far, also those that failed
	ended   atomic.Uint64
	shards  [shardCount]shard
	work    work // what is under way in it

	spoiled atomic.Pointer[error]
	noted   chan struct{} // closed when that is noted, and writes may go past the image
	past    atomic.Bool   // the same, at a glance
}

// shard is the chunks whose number has one remainder.
type shard struct {
	mu     sync.RWMutex // of the map, and of the content of its chunks
	at     map[int64]*place
	copies map[int64]chan struct{} // being copied; closed at its end
	writes sync.Mutex              // one private change at a time
}

// place is where a settled chunk is. Its slot is given back when it is stored
// and what replaces it is too: not before, as both stores may be under way.
type place struct {
	slot     diff.Slot
	version  uint64
	buffer   *diff.Buffer // until it is stored
	replaced bool
}

// New makes an image of a device that has not begun.
func New(f *Filter, cfg Config) *Image {
	m := &Image{cfg: cfg, filter: f, size: f.below.Size(), chunk: cfg.Storage.Config().Chunk, noted: make(chan struct{})}
	m.resize(m.size)
	for i := range m.shards {
		m.shards[i].at, m.shards[i].copies = map[int64]*place{}, map[int64]chan struct{}{}
	}
	m.work.idle.L = &m.work.mu
	return m
}

// resize is called before anybody uses the image.
func (m *Image) resize(size int64) {
	m.size = size
	m.settled, m.changed = newBits((size+m.chunk-1)/m.chunk), newBits((size+m.chunk-1)/m.chunk)
}

func (m *Image) shard(c int64) *shard { return &m.shards[c%shardCount] }

// extent is a chunk's range; the last one can be short.
func (m *Image) extent(c int64) block.Range {
	off := c * m.chunk
	return block.Range{Off: off, Len: min(m.chunk, m.size-off)}
}

// Size is the device's when the image was made, in bytes.
func (m *Image) Size() int64 { return m.size }

// Private lists the chunks whose content is the image's own, changed since its
// moment, and gives a number that is another one as soon as there are more
// changes; false while one is under way.
func (m *Image) Private() (ranges []block.Range, number uint64, quiet bool) {
	ended := m.ended.Load()
	number = m.began.Load()
	var set block.Set
	for c := int64(0); c*m.chunk < m.size; c++ {
		if c%64 == 0 && m.changed[c/64].Load() == 0 {
			c += 63
			continue
		}
		if m.changed.has(c) {
			set.Add(m.extent(c))
		}
	}
	return set.Ranges(), number, ended == number
}

// Err says why the image can no longer be read; nil: it can.
func (m *Image) Err() error {
	if e := m.spoiled.Load(); e != nil {
		return *e
	}
	return nil
}

// minds says whether a write must wait for the image.
func (m *Image) minds(r block.Range) bool {
	r = r.Intersect(block.Range{Len: m.size})
	if r.Empty() || m.past.Load() {
		return false
	}
	return !m.settled.all(chunks(r, m.chunk))
}

// settleAll settles what a write is about to change.
func (m *Image) settleAll(r block.Range, next stack.Next) {
	r = r.Intersect(block.Range{Len: m.size})
	if r.Empty() {
		return
	}
	first, last := chunks(r, m.chunk)
	for c := first; c <= last && !m.past.Load(); c++ {
		if m.settled.has(c) {
			continue
		}
		if _, err := m.settle(c, next.Read, next.Wait); err != nil {
			m.Spoil(err)
		}
	}
}

// settle copies a chunk's old content, or waits for whoever does. read reads from
// below, wait waits for somebody who does. Without an error the chunk is settled
// (first: by this call), or the image is spoiled or closed.
func (m *Image) settle(c int64, read func(p []byte, off int64) error, wait func(<-chan struct{}) error) (first bool, err error) {
	s := m.shard(c)
	for {
		s.mu.Lock()
		if m.settled.has(c) {
			s.mu.Unlock()
			return false, nil
		}
		if m.spoiled.Load() != nil {
			s.mu.Unlock()
			return false, wait(m.noted)
		}
		done, busy := s.copies[c]
		if !busy {
			break
		}
		s.mu.Unlock()
		if err := wait(done); err != nil {
			return false, err
		}
	}
	done := make(chan struct{})
	s.copies[c] = done
	s.mu.Unlock()
	defer func() { // also after a panic: others wait
		s.mu.Lock()
		delete(s.copies, c)
		s.mu.Unlock()
		close(done)
	}()
	if !m.work.enter() {
		return false, nil // closed: nobody minds
	}
	defer m.work.leave()
	return true, m.copy(c, read)
}

// copy puts a chunk's old content into a buffer and on its way to the storage.
func (m *Image) copy(c int64, read func(p []byte, off int64) error) error {
	b, err := m.take()
	if err != nil {
		return err
	}
	r := m.extent(c)
	if err := read(b.Bytes()[:r.Len], r.Off); err != nil {
		m.cfg.Storage.Release(b.Slot())
		b.Drop() // last: somebody else has it from here on
		return fmt.Errorf("reading the old content of chunk %d: %w", c, err)
	}
	return m.put(c, b, nil)
}

// take reserves a slot and a buffer for it.
func (m *Image) take() (*diff.Buffer, error) {
	slot, err := m.cfg.Storage.Reserve()
	if err != nil {
		return nil, err
	}
	return m.fetch(slot)
}

// fetch takes a buffer for a slot.
func (m *Image) fetch(slot diff.Slot) (*diff.Buffer, error) {
	b, err := m.cfg.Pending.Take(m.cfg.Patience)
	if err != nil {
		m.cfg.Storage.Release(slot)
		return nil, err
	}
	b.For(slot)
	return b, nil
}

// put makes a filled buffer the content of a chunk, in place of old, and has it
// stored. Where the storage is durable the chunk is settled when it is there, and
// put waits for that.
func (m *Image) put(c int64, b *diff.Buffer, old *place) error {
	p := &place{slot: b.Slot(), version: m.cfg.Storage.Version(), buffer: b}
	b.Seal(b.Slot(), diff.Key{Device: m.cfg.Device, Chunk: c}, p.version, int(m.extent(c).Len), m.changed.has(c))
	s := m.shard(c)
	s.mu.Lock()
	s.at[c] = p
	s.mu.Unlock()
	durable := m.cfg.Storage.Config().Durable
	if !durable {
		m.settled.set(c)
	}
	m.work.more()
	stored := make(chan error, 1)
	b.Store(func(err error) {
		defer m.work.leave()
		m.stored(c, p, old, err)
		stored <- err
	})
	if !durable {
		return nil
	}
	t := time.NewTimer(m.cfg.Patience)
	defer t.Stop()
	select {
	case err := <-stored:
		if err == nil {
			m.settled.set(c)
		}
		return err
	case <-t.C:
		return diff.ErrBusy
	}
}

// stored lets go of a chunk's buffer, and of what it replaces.
func (m *Image) stored(c int64, p, old *place, err error) {
	if err != nil {
		m.Spoil(fmt.Errorf("storing chunk %d: %w", c, err))
	}
	s := m.shard(c)
	s.mu.Lock()
	p.buffer.Drop()
	p.buffer = nil
	if old != nil {
		old.replaced = true
		m.release(old)
	}
	m.release(p)
	s.mu.Unlock()
}

// release gives a slot back that nobody will read or write any more. The shard is locked.
func (m *Image) release(p *place) {
	if p.replaced && p.buffer == nil {
		m.cfg.Storage.Release(p.slot)
	}
}

// Spoil makes the image unreadable, for good. Where its storage outlives this
// process that is noted there before a write goes past the image.
func (m *Image) Spoil(cause error) {
	why := fmt.Errorf("image of %s: %w: %w", m.filter.Device(), diff.ErrSpoiled, cause)
	if !m.spoiled.CompareAndSwap(nil, &why) {
		return
	}
	if err := m.note(); err != nil {
		cause = fmt.Errorf("%w; that could not be noted in the difference storage: %w", cause, err)
	}
	m.past.Store(true)
	close(m.noted)
	if m.cfg.Notify != nil {
		m.cfg.Notify(diff.Event{Kind: diff.Corrupt, Device: m.filter.Device(), Err: cause})
	}
}

// note marks the storage as spoiled, for no longer than the patience lasts.
func (m *Image) note() error {
	done := make(chan error, 1)
	m.work.more()
	go func() {
		defer m.work.leave()
		done <- m.cfg.Storage.Spoil()
	}()
	t := time.NewTimer(m.cfg.Patience)
	defer t.Stop()
	select {
	case err := <-done:
		return err
	case <-t.C:
		return diff.ErrBusy
	}
}

// Close ends the image: readers get ErrClosed, and when it returns nothing uses
// the storage any more.
func (m *Image) Close() {
	m.filter.end(m)
	m.work.close()
}
