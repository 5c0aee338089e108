package diff

import "sync"

// AddSource has the storage grow by itself.
func (s *Storage) AddSource(src Source) {
	s.mu.Lock()
	s.sources = append(s.sources, src)
	s.quiet = false
	events := s.judge()
	s.mu.Unlock()
	s.tell(events)
}

// Silence gives no low-space event until Announce: the storage is still being made.
func (s *Storage) Silence() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.silent = true
}

// Announce tells of the room as it is by now.
func (s *Storage) Announce() {
	s.mu.Lock()
	s.silent = false
	events := s.judge()
	s.mu.Unlock()
	s.tell(events)
}

// judge sees whether room runs out, and has the storage grow or gives the event.
// s.mu is held.
func (s *Storage) judge() []Event {
	left := int64(s.capacity)*s.cfg.Chunk - s.used*s.cfg.Chunk
	if left > s.cfg.Low || s.closed {
		return nil
	}
	var room int64
	for _, src := range s.sources {
		room += src.Room()
	}
	if room > 0 && !s.growing && s.held == 0 {
		s.growing = true
		go s.grow()
	}
	if left+room > s.cfg.Low || s.quiet || s.silent {
		return nil
	}
	s.quiet = true
	return []Event{{Kind: LowSpace, Bytes: max(s.cfg.Low*2-left-room, s.cfg.Chunk), Err: s.why}}
}

func (s *Storage) tell(events []Event) {
	for _, e := range events {
		s.cfg.Notify(e)
	}
}

// grow asks the sources, one after the other, until there is enough.
func (s *Storage) grow() {
	s.mu.Lock()
	sources := append([]Source(nil), s.sources...)
	s.mu.Unlock()
	for _, src := range sources {
		if src.Room() == 0 {
			continue
		}
		space, err := src.Grow(max(2*s.cfg.Low, 8*s.cfg.Chunk))
		if err == nil {
			err = s.Append(space)
		}
		if err == nil {
			break
		}
		s.drop(src, err)
	}
	s.mu.Lock()
	s.growing = false
	s.idle.Broadcast()
	events := s.judge()
	s.mu.Unlock()
	s.tell(events)
}

// drop forgets a source that fails; the low-space event that follows says why.
func (s *Storage) drop(bad Source, why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.why = why
	var kept []Source
	for _, src := range s.sources {
		if src != bad {
			kept = append(kept, src)
		}
	}
	s.sources = kept
}

// HoldGrowth keeps the storage from growing until the function that it gives is
// called: nothing may be allocated in a file system that is frozen. It returns
// when no growth is going on.
func (s *Storage) HoldGrowth() (resume func()) {
	s.mu.Lock()
	s.held++
	for s.growing {
		s.idle.Wait()
	}
	s.mu.Unlock()
	return sync.OnceFunc(func() {
		s.mu.Lock()
		s.held--
		events := s.judge()
		s.mu.Unlock()
		s.tell(events)
	})
}
