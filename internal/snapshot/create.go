package snapshot

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"
	"sort"

	"tidemark/internal/block"
	"tidemark/internal/diff"
	"tidemark/internal/vfs"
)

// Create makes a snapshot that is not taken yet. Where it fails nothing stays.
func (t *Set) Create(r Request) (ID, error) {
	s := &Snapshot{set: t, id: newID()}
	var places []Place
	for _, p := range r.Storage {
		place, err := t.cfg.Locate(p.Path)
		if err != nil {
			return ID{}, err
		}
		places = append(places, place)
	}
	if err := s.admit(r, places); err != nil {
		return ID{}, err
	}
	var err error
	if s.storage, err = diff.New(s.diffConfig()); err != nil {
		return ID{}, err
	}
	s.storage.Silence()
	err = s.change(func(*manifest) {})
	for i, p := range r.Storage {
		if err == nil {
			err = s.append(p, places[i])
		}
	}
	if err == nil {
		err = s.change(func(m *manifest) { m.State = stateCreated })
	}
	if err != nil {
		return ID{}, errors.Join(err, s.discard())
	}
	s.storage.Announce()
	t.mu.Lock()
	stopped := t.stopped
	if !stopped {
		t.m[s.id] = s
	}
	t.mu.Unlock()
	if stopped {
		return ID{}, errors.Join(ErrStopped, s.discard())
	}
	return s.id, nil
}

func (s *Snapshot) diffConfig() diff.Config {
	return diff.Config{ID: s.id, Chunk: s.man.Chunk, Durable: s.man.Durable, Low: s.man.Low, Notify: s.events.add, Record: s.record}
}

// admit checks a request and fills in what it leaves open.
func (s *Snapshot) admit(r Request, places []Place) error {
	if len(r.Devices) == 0 {
		return fmt.Errorf("a snapshot of no device: %w", ErrRequest)
	}
	var limits int64
	for i, p := range r.Storage {
		if places[i].File {
			limits += cmp.Or(p.Limit, limitDefault)
			continue
		}
		for _, part := range p.of(places[i]) {
			limits += part.Len
		}
	}
	chunk := cmp.Or(r.Chunk, chunkDefault)
	if chunk < diff.Align || chunk > chunkMax || chunk&(chunk-1) != 0 {
		return fmt.Errorf("chunks of %d bytes, want a power of two from 4 KiB to %d MiB: %w", chunk, chunkMax>>20, ErrRequest)
	}
	low := cmp.Or(r.Low, max(min(limits/4, lowMax), 8*chunk))
	if r.Low == 0 && limits == 0 {
		low = lowMax
	}
	s.man = manifest{Version: 1, ID: FormatID(s.id), State: stateMaking, Boot: s.set.cfg.BootID, Durable: r.Durable,
		Chunk: chunk, Low: low, Buffers: int(min(max(buffersBytes/chunk, 4), buffersMax)), Memory: s.set.cfg.Memory != ""}
	for i, name := range r.Devices {
		if slices.Contains(r.Devices[:i], name) {
			return fmt.Errorf("device %s is named twice: %w", name, ErrRequest)
		}
		d, err := s.set.cfg.Device(name)
		if err != nil {
			return err
		}
		s.devices = append(s.devices, d)
		s.man.Devices = append(s.man.Devices, manifestDevice{Name: d.Name, Size: d.Cow.Below().Size()})
	}
	return nil
}

// Append adds difference storage, before the snapshot is taken or while it is held.
func (t *Set) Append(id ID, place Storage) error {
	s, err := t.find(id)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := cmp.Or(s.ended, s.lost); err != nil {
		return err
	}
	at, err := t.cfg.Locate(place.Path)
	if err != nil {
		return err
	}
	return s.append(place, at)
}

// of gives the ranges of a device that a request is about.
func (p Storage) of(place Place) []block.Range {
	if len(p.Ranges) > 0 {
		return p.Ranges
	}
	return []block.Range{block.Range{Len: min(place.Device.Size(), cmp.Or(p.Limit, place.Device.Size()))}.Inward(diff.Align)}
}

// append adds a place. s.mu is held, or nobody knows s.
func (s *Snapshot) append(p Storage, place Place) error {
	if !place.File {
		return s.appendDevice(p, place)
	}
	f, err := diff.OpenFile(p.Path, cmp.Or(p.Limit, limitDefault), s.set.whereOf(place))
	if err != nil {
		return cmp.Or(s.set.named(s, p.Path), err)
	}
	source := len(s.manifest().Sources)
	if err := s.change(func(m *manifest) {
		m.Sources = append(m.Sources, manifestSource{Path: p.Path, File: true, Limit: cmp.Or(p.Limit, limitDefault), On: place.On, Inode: f.Kept().Inode})
	}); err != nil {
		return errors.Join(err, f.Remove())
	}
	s.files = append(s.files, f)
	r := grower{f, source}
	// The first part now: what cannot work fails here.
	space, err := r.Grow(max(2*s.man.Low, atOnce))
	if err == nil {
		err = s.storage.Append(space)
	}
	if err != nil {
		s.files = s.files[:len(s.files)-1]
		return errors.Join(fmt.Errorf("difference storage %s: %w", p.Path, err), f.Remove(), s.dropSource())
	}
	s.storage.AddSource(r)
	return nil
}

func (s *Snapshot) appendDevice(p Storage, place Place) error {
	ranges := p.of(place)
	if len(p.Ranges) == 0 && place.Served {
		return fmt.Errorf("difference storage %s: it is a served device, and what it holds would be overwritten: name a file on it, or another disk: %w", p.Path, diff.ErrRefused)
	}
	space, err := diff.NewLinear(place.Device, ranges)
	if err != nil {
		return fmt.Errorf("difference storage %s: %w", p.Path, err)
	}
	if err := s.set.apart(s, place, ranges); err != nil {
		return fmt.Errorf("difference storage %s: %w", p.Path, err)
	}
	source := len(s.manifest().Sources)
	if err := s.change(func(m *manifest) {
		m.Sources = append(m.Sources, manifestSource{Path: p.Path, Disk: place.Name, On: place.On, Size: space.Size(), Extents: ranges})
	}); err != nil {
		return err
	}
	if err := s.storage.Append(part{space, manifestArea{source, 0, space.Size()}, nil}); err != nil {
		return errors.Join(fmt.Errorf("difference storage %s: %w", p.Path, err), s.dropSource())
	}
	return nil
}

// dropSource forgets the newest source, which no area names.
func (s *Snapshot) dropSource() error {
	return s.change(func(m *manifest) { m.Sources = m.Sources[:len(m.Sources)-1] })
}

// named says why a file cannot be difference storage where it is that already.
func (t *Set) named(mine *Snapshot, path string) error {
	named := func(s *Snapshot) bool {
		return slices.ContainsFunc(s.manifest().Sources, func(src manifestSource) bool { return src.File && src.Path == path })
	}
	for _, s := range t.all() {
		if named(s) {
			return fmt.Errorf("difference storage %s: snapshot %s has it already: name another file: %w", path, FormatID(s.id), diff.ErrRefused)
		}
	}
	if named(mine) {
		return fmt.Errorf("difference storage %s is named twice: name each file once: %w", path, diff.ErrRefused)
	}
	return nil
}

// apart refuses ranges of a device that hold difference storage already.
func (t *Set) apart(mine *Snapshot, place Place, ranges []block.Range) error {
	all := t.all()
	if !slices.Contains(all, mine) {
		all = append(all, mine)
	}
	sorted := slices.SortedFunc(slices.Values(ranges), func(a, b block.Range) int { return cmp.Compare(a.Off, b.Off) })
	for _, s := range all {
		for _, src := range s.manifest().Sources {
			if (place.Name == "" || src.Disk != place.Name) && (place.On == "" || src.On != place.On) {
				continue
			}
			for _, have := range src.Extents {
				i := sort.Search(len(sorted), func(i int) bool { return sorted[i].End() > have.Off })
				if i < len(sorted) && sorted[i].Overlaps(have) {
					return fmt.Errorf("%s of it hold difference storage of snapshot %s: %w", have, FormatID(s.id), diff.ErrRefused)
				}
			}
		}
	}
	return nil
}

func (t *Set) whereOf(place Place) diff.Where {
	return diff.Where{Device: place.Device, Do: t.cfg.Files}
}

// Disks names the devices that hold difference storage, as Locate named them.
func (t *Set) Disks() map[string]bool {
	out := map[string]bool{}
	for _, s := range t.all() {
		for _, src := range s.manifest().Sources {
			if !src.File {
				out[src.Disk] = true
			}
		}
	}
	return out
}

// discard gives back everything that a snapshot has on disk. Nothing uses it any more.
func (s *Snapshot) discard() error {
	if s.storage != nil {
		s.storage.Close()
	}
	var errs []error
	for _, f := range s.files {
		err := f.Remove()
		if errors.Is(err, os.ErrNotExist) {
			s.set.cfg.Trouble(FormatID(s.id), fmt.Errorf("%s is not to be found and was not removed; if its file system is only not mounted, remove it there (chattr -i, then rm): %w", f.Name(), err))
			continue
		}
		errs = append(errs, err)
	}
	if s.set.cfg.Memory != "" {
		errs = append(errs, remove(s.set.memory(s.id)))
	}
	if err := errors.Join(errs...); err != nil {
		return err // the manifest says what is left: the next Open tries again
	}
	return errors.Join(remove(s.set.file(s.id)), vfs.OS{}.SyncDir(s.set.cfg.Dir))
}

func remove(name string) error {
	if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
