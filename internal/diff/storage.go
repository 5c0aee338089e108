package diff

import (
	"errors"
	"fmt"
	"hash/crc32"
	"sort"
	"sync"
	"sync/atomic"
)

// Config is what a storage is made with.
type Config struct {
	ID      ID
	Chunk   int64 // bytes of a slot: a power of two from Align on
	Durable bool
	// Low is how many bytes left are too few: sources are asked for more then, and
	// an event tells where they have none.
	Low int64
	// Notify is told of events; it must not wait or call back.
	Notify func(Event)
	// Record, if set, is told of each space that is appended, in order, when its
	// header is written and before anything else is: what it notes can be recovered.
	Record func(Space) error
}

// Storage is the difference storage of one snapshot. All methods may be called concurrently.
type Storage struct {
	cfg     Config
	version atomic.Uint64
	appends sync.Mutex // one at a time; never taken in a write's way

	mu       sync.Mutex
	areas    []*area
	next     Slot   // the first one never used
	capacity Slot   // slots there are
	free     []Slot // given back
	used     int64
	sums     map[Slot]entry
	overhead int64
	sources  []Source
	quiet    bool  // a low-space event stands
	silent   bool  // none are given yet
	why      error // a source failed
	full     bool  // an overflow event was sent
	growing  bool
	idle     sync.Cond // it no longer grows
	held     int       // growth waits
	closed   bool
}

// New gives a storage without room.
func New(cfg Config) (*Storage, error) {
	if cfg.Chunk < Align || cfg.Chunk&(cfg.Chunk-1) != 0 || cfg.Chunk > 1<<30 {
		return nil, fmt.Errorf("chunks of %d bytes: want a power of two from %d to 1 GiB: %w", cfg.Chunk, Align, ErrRefused)
	}
	if cfg.Notify == nil {
		cfg.Notify = func(Event) {}
	}
	s := &Storage{cfg: cfg, sums: map[Slot]entry{}}
	s.idle.L = &s.mu
	return s, nil
}

// Append adds a space; everything in it is overwritten in time.
func (s *Storage) Append(space Space) error {
	s.appends.Lock()
	defer s.appends.Unlock()
	s.mu.Lock()
	a := layOut(space, header{id: s.cfg.ID, chunk: s.cfg.Chunk, index: uint32(len(s.areas))}, s.cfg.Durable, s.capacity)
	s.mu.Unlock()
	if a == nil {
		return fmt.Errorf("%d bytes are too few for one chunk of %d: %w", space.Size(), s.cfg.Chunk, ErrRefused)
	}
	if err := a.writeHeader(); err != nil {
		return err
	}
	if s.cfg.Record != nil {
		if err := s.cfg.Record(space); err != nil {
			return err
		}
	}
	s.mu.Lock()
	s.adopt(a)
	events := s.judge()
	s.mu.Unlock()
	s.tell(events)
	return nil
}

// adopt makes an area part of the storage. s.mu is held.
func (s *Storage) adopt(a *area) {
	s.areas = append(s.areas, a)
	s.capacity += Slot(a.slots)
	s.overhead += a.space.Size() - a.slots*s.cfg.Chunk
	s.quiet = false // whoever appended less than was asked for is told again
}

// Reserve takes a slot. It waits for nothing: without room it is ErrFull, and an
// event tells, once.
func (s *Storage) Reserve() (Slot, error) {
	slot, err := s.reserve(0)
	if err == nil {
		return slot, nil
	}
	s.mu.Lock()
	first := !s.full
	s.full = true
	s.mu.Unlock()
	if first {
		s.cfg.Notify(Event{Kind: Overflow, Err: ErrFull})
	}
	return 0, err
}

// TryReserve is Reserve for who can do without: there is no event, and an eighth
// of the storage is left to others.
func (s *Storage) TryReserve() (Slot, error) { return s.reserve(8) }

// reserve takes a slot; a part (1/n) of all is not for the caller, 0: none.
func (s *Storage) reserve(n int64) (Slot, error) {
	s.mu.Lock()
	if n > 0 && int64(s.capacity)-s.used <= int64(s.capacity)/n {
		s.mu.Unlock()
		return 0, ErrFull
	}
	var slot Slot
	switch n := len(s.free); {
	case n > 0:
		slot, s.free = s.free[n-1], s.free[:n-1]
	case s.next < s.capacity:
		slot = s.next
		s.next++
	default:
		s.mu.Unlock()
		return 0, ErrFull
	}
	s.used++
	events := s.judge()
	s.mu.Unlock()
	s.tell(events)
	return slot, nil
}

// Release gives a slot back whose content nobody needs.
func (s *Storage) Release(slot Slot) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.sums, slot)
	s.free = append(s.free, slot)
	s.used--
}

func (s *Storage) area(slot Slot) (*area, int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := sort.Search(len(s.areas), func(i int) bool { return s.areas[i].first > slot }) - 1
	if slot < 0 || slot >= s.capacity || i < 0 {
		return nil, 0, fmt.Errorf("no slot %d: %w", slot, ErrCorrupt)
	}
	return s.areas[i], int64(slot - s.areas[i].first), nil
}

// Version gives a number above all that it gave before.
func (s *Storage) Version() uint64 { return s.version.Add(1) }

// Store writes a chunk's content into a reserved slot, and then whose it is.
// p is at most a chunk, of whole sectors. Where the storage is durable both are
// stable when it returns.
func (s *Storage) Store(slot Slot, key Key, version uint64, p []byte) error {
	return s.store(slot, entry{key: key, length: uint32(len(p)), version: version, sum: crc32.Checksum(p, castagnoli)}, p)
}

func (s *Storage) store(slot Slot, e entry, p []byte) error {
	a, at, err := s.area(slot)
	if err != nil {
		return err
	}
	if err := a.write(p, a.at(at)); err != nil {
		return err
	}
	if err := a.commit(at, e); err != nil {
		return err
	}
	s.mu.Lock()
	s.sums[slot] = e
	s.mu.Unlock()
	return nil
}

// Load reads what Store wrote, and checks it.
func (s *Storage) Load(slot Slot, key Key, p []byte) error {
	a, at, err := s.area(slot)
	if err != nil {
		return err
	}
	s.mu.Lock()
	e, ok := s.sums[slot]
	s.mu.Unlock()
	if !ok || e.key != key || int(e.length) != len(p) {
		return fmt.Errorf("slot %d does not hold %d bytes of chunk %d of device %d: %w", slot, len(p), key.Chunk, key.Device, ErrCorrupt)
	}
	if n, err := a.space.ReadAt(p, a.at(at)); n < len(p) {
		return errors.Join(fmt.Errorf("difference storage: reading chunk %d of device %d", key.Chunk, key.Device), err)
	}
	if crc32.Checksum(p, castagnoli) != e.sum {
		return fmt.Errorf("difference storage: chunk %d of device %d in slot %d: checksum: %w", key.Chunk, key.Device, slot, ErrCorrupt)
	}
	return nil
}

// Spoil notes in the areas that the snapshot is spoiled: one of them is enough. An
// error says that none took it: after a crash the snapshot could be taken for a
// good one.
func (s *Storage) Spoil() error {
	s.mu.Lock()
	areas := append([]*area(nil), s.areas...)
	s.mu.Unlock()
	var errs []error
	for _, a := range areas {
		h := a.head
		h.spoiled = true
		err := a.write(h.encode(), 0)
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Stats is the account.
func (s *Storage) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := Stats{Chunk: s.cfg.Chunk, Capacity: int64(s.capacity) * s.cfg.Chunk, Used: s.used * s.cfg.Chunk, Overhead: s.overhead}
	for _, src := range s.sources {
		out.Room += src.Room()
	}
	return out
}

// Config is what the storage was made with.
func (s *Storage) Config() Config { return s.cfg }

// Close ends growth; it waits for what is going on. What the storage lies in is
// the caller's.
func (s *Storage) Close() {
	s.mu.Lock()
	s.closed = true
	for s.growing {
		s.idle.Wait()
	}
	s.mu.Unlock()
}

// Flush makes stable what was stored.
func (s *Storage) Flush() error {
	s.mu.Lock()
	areas := append([]*area(nil), s.areas...)
	s.mu.Unlock()
	var errs []error
	for _, a := range areas {
		errs = append(errs, a.space.Flush())
	}
	return errors.Join(errs...)
}
