package cow

import "tidemark/internal/diff"

// Restore makes an image of what a storage holds of it after the process was
// killed, or the power failed: found are the slots of the device's chunks, sealed
// the buffers that were not stored yet, which are stored now. It must have begun
// before the device's first write.
func Restore(f *Filter, cfg Config, size int64, found map[diff.Key]diff.Found, sealed []*diff.Buffer) *Image {
	m := New(f, cfg)
	m.resize(size)
	for key, at := range found {
		if key.Device == cfg.Device {
			m.shard(key.Chunk).at[key.Chunk] = &place{slot: at.Slot, version: at.Version}
			m.settled.set(key.Chunk)
			if at.Changed {
				m.changed.set(key.Chunk)
			}
		}
	}
	newest := map[int64]*diff.Buffer{}
	for _, b := range sealed {
		if c := b.Key().Chunk; b.Key().Device == cfg.Device && (newest[c] == nil || newest[c].Version() < b.Version()) {
			newest[c] = b
		}
	}
	for _, b := range sealed {
		switch c := b.Key().Chunk; {
		case b.Key().Device != cfg.Device:
		case newest[c] != b: // an older private change
			cfg.Storage.Release(b.Slot())
			b.Drop()
		default:
			m.adopt(c, b)
		}
	}
	return m
}

// adopt stores a chunk that another process left in memory.
func (m *Image) adopt(c int64, b *diff.Buffer) {
	s := m.shard(c)
	s.mu.Lock()
	old := s.at[c]
	p := &place{slot: b.Slot(), version: b.Version(), buffer: b}
	s.at[c] = p
	s.mu.Unlock()
	if b.Changed() {
		m.changed.set(c)
	}
	m.settled.set(c)
	m.work.more()
	b.Store(func(err error) {
		defer m.work.leave()
		m.stored(c, p, old, err)
	})
}
