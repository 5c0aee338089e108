package diff

import "fmt"

// Found is a slot that a storage had when its process ended.
type Found struct {
	Slot    Slot
	Version uint64
	Changed bool // the content is the image's own
}

// Recover gives the storage that lies in spaces, in the order in which they were
// appended, and the newest slot of each key. ErrSpoiled: it was marked so.
// ErrCorrupt: an area is not one of this snapshot. What was reserved and not
// stored is free again; contents are checked when they are read.
func Recover(cfg Config, spaces []Space) (*Storage, map[Key]Found, error) {
	s, err := New(cfg)
	if err != nil {
		return nil, nil, err
	}
	found := map[Key]Found{}
	var used []Slot
	for i, space := range spaces {
		b := make([]byte, Align)
		if n, err := space.ReadAt(b, 0); n < len(b) {
			return nil, nil, fmt.Errorf("area %d: its header cannot be read: %w", i, err)
		}
		h, err := decodeHeader(b)
		if err != nil {
			return nil, nil, fmt.Errorf("area %d: %w", i, err)
		}
		if h.id != cfg.ID || h.chunk != cfg.Chunk || h.index != uint32(i) {
			return nil, nil, fmt.Errorf("area %d belongs to another snapshot or place: %w", i, ErrCorrupt)
		}
		if h.spoiled {
			return nil, nil, ErrSpoiled
		}
		a := layOut(space, h, cfg.Durable, s.capacity)
		if a == nil {
			return nil, nil, fmt.Errorf("area %d of %d bytes has no slot: %w", i, space.Size(), ErrCorrupt)
		}
		if used, err = s.readTable(a, found, used); err != nil {
			return nil, nil, fmt.Errorf("area %d: %w", i, err)
		}
		s.adopt(a)
	}
	s.settle(found, used)
	return s, found, nil
}

// readTable notes every entry of this snapshot; of one key the newest.
func (s *Storage) readTable(a *area, found map[Key]Found, used []Slot) ([]Slot, error) {
	page := make([]byte, Align)
	for at := int64(0); at < a.slots; at += entries {
		if n, err := a.space.ReadAt(page, Align+at/entries*Align); n < len(page) {
			return nil, fmt.Errorf("its table cannot be read: %w", err)
		}
		for i := range min(entries, a.slots-at) {
			e, ok := getEntry(s.cfg.ID, page[i*entrySize:][:entrySize])
			if !ok {
				continue
			}
			if int64(e.length) > s.cfg.Chunk {
				return nil, fmt.Errorf("slot %d holds %d bytes: %w", at+i, e.length, ErrCorrupt)
			}
			slot := a.first + Slot(at+i)
			copy(a.block(at / entries).data[i*entrySize:], page[i*entrySize:][:entrySize])
			s.sums[slot] = e
			used = append(used, slot)
			s.version.Store(max(s.version.Load(), e.version))
			if old, ok := found[e.key]; !ok || old.Version < e.version {
				found[e.key] = Found{slot, e.version, e.changed}
			}
		}
	}
	return used, nil
}

// settle frees what no key has any more, and every slot that was never used.
func (s *Storage) settle(found map[Key]Found, used []Slot) {
	keep := map[Slot]bool{}
	for _, f := range found {
		keep[f.Slot] = true
	}
	s.used = int64(len(keep))
	for _, slot := range used {
		s.next = max(s.next, slot+1)
	}
	for slot := range s.next {
		if !keep[slot] {
			delete(s.sums, slot)
			s.free = append(s.free, slot)
		}
	}
}

// Claim reserves a certain slot again, after Recover: one whose content is still
// to be stored. It says false where that slot holds something.
func (s *Storage) Claim(slot Slot) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if slot < 0 || slot >= s.capacity {
		return false
	}
	for ; s.next <= slot; s.next++ {
		s.free = append(s.free, s.next)
	}
	for i, f := range s.free {
		if f == slot {
			s.free = append(s.free[:i], s.free[i+1:]...)
			s.used++
			return true
		}
	}
	return false
}
