package snapshot

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"tidemark/internal/diff"
	"tidemark/internal/filter/cow"
)

// restore takes up what an earlier process left.
func (t *Set) restore() error {
	if err := os.MkdirAll(t.cfg.Dir, 0o700); err != nil {
		return err
	}
	names, err := filepath.Glob(filepath.Join(t.cfg.Dir, "*.json"))
	if err != nil {
		return err
	}
	for _, name := range names {
		man, id, err := load(name)
		if err != nil {
			t.cfg.Trouble(filepath.Base(name), err)
			continue
		}
		s := &Snapshot{set: t, id: id, man: man}
		switch man.State {
		case stateDestroyed, stateMaking:
			err = s.giveBackInTime()
		case stateCreated:
			if again := s.prepared(); again != nil {
				err = errors.Join(again, s.giveBackInTime())
			} else {
				t.m[id] = s
			}
		default:
			if lost := s.goOn(); lost != nil {
				err = s.lose(lost)
			}
			t.m[id] = s
		}
		if err != nil {
			t.cfg.Trouble(man.ID, err)
		}
	}
	return nil
}

// giveBackInTime gives back what is left of a snapshot that nobody has: now, or in
// Settle where that means to touch a device that is not served yet.
func (s *Snapshot) giveBackInTime() error {
	if slices.ContainsFunc(s.man.Sources, func(src manifestSource) bool { return src.File && src.On != "" }) {
		s.letGo()
		s.set.later = append(s.set.later, s)
		return nil
	}
	return s.giveBack()
}

// Settle does what Open could not, as the devices were not served yet: it gives
// back what killed processes left on them, and looks whether files that lie on
// them are where they were. It is called once, and may take long.
func (t *Set) Settle() {
	t.mu.Lock()
	later := t.later
	t.later = nil
	t.mu.Unlock()
	for _, s := range later {
		if err := s.giveBack(); err != nil {
			t.cfg.Trouble(FormatID(s.id), err)
		}
	}
	for _, s := range t.all() {
		if err := s.look(); err != nil {
			t.cfg.Trouble(FormatID(s.id), err)
		}
	}
}

// look declares a snapshot spoiled whose storage is somebody else's by now.
func (s *Snapshot) look() error {
	s.mu.Lock()
	files := slices.Clone(s.files)
	s.mu.Unlock()
	for _, f := range files {
		err := f.Check() // without the lock: it may take long
		if err == nil || errors.Is(err, os.ErrNotExist) {
			continue // as where its file system is not mounted
		}
		if !errors.Is(err, diff.ErrCorrupt) && !errors.Is(err, diff.ErrRefused) {
			return err
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if cmp.Or(s.ended, s.lost) != nil {
			return nil
		}
		return errors.Join(err, s.lose(err))
	}
	return nil
}

// giveBack removes what is left of a snapshot that nobody has.
func (s *Snapshot) giveBack() error {
	s.letGo()
	if err := s.reopen(); err != nil {
		return fmt.Errorf("giving back its storage: %w", err)
	}
	return s.discard()
}

// letGo forgets what was opened.
func (s *Snapshot) letGo() {
	if s.storage != nil {
		s.storage.Close()
		s.storage = nil
	}
	for _, f := range s.files {
		_ = f.Close() // it was only looked at
	}
	s.files, s.devices = nil, nil
}

// prepared takes up one that was not taken yet.
func (s *Snapshot) prepared() error {
	err := s.reopen()
	if err != nil {
		return err
	}
	for _, d := range s.man.Devices {
		dev, err := s.set.cfg.Device(d.Name)
		if err != nil {
			return err
		}
		s.devices = append(s.devices, dev)
	}
	spaces, err := s.spaces()
	if err != nil {
		return err
	}
	if s.storage, _, err = diff.Recover(s.diffConfig(), spaces); err != nil {
		return err
	}
	s.grows()
	return nil
}

// grows has the storage grow by itself again.
func (s *Snapshot) grows() {
	for i, f := range s.files {
		s.storage.AddSource(grower{f, s.source(i)})
	}
}

// lose declares a snapshot spoiled as a whole. Where one of its devices is there,
// which will be written to past the snapshot, that holds for good.
func (s *Snapshot) lose(why error) error {
	s.lost = fmt.Errorf("snapshot %s: %w: %w", FormatID(s.id), diff.ErrSpoiled, why)
	for _, d := range s.man.Devices {
		s.events.add(diff.Event{Kind: diff.Corrupt, Device: d.Name, Err: why})
	}
	var err error
	for _, d := range s.man.Devices {
		if _, there := s.set.cfg.Device(d.Name); there == nil && s.man.Lost == "" {
			if err = s.change(func(m *manifest) { m.Lost = why.Error() }); err != nil && s.storage != nil {
				err = errors.Join(err, s.storage.Spoil())
			}
		}
	}
	for _, m := range s.images {
		m.Close()
	}
	if s.images = nil; s.pending != nil {
		err = errors.Join(err, s.pending.Close())
		s.pending = nil
	}
	return err
}

// Bypassed spoils for good what is held of a device that was written to past its
// filters. One that was only prepared is of the device as it is when it is taken.
func (t *Set) Bypassed(device string, why error) error {
	var errs []error
	for _, s := range t.all() {
		errs = append(errs, s.bypassed(device, why))
	}
	return errors.Join(errs...)
}

func (s *Snapshot) bypassed(device string, why error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	man := s.manifest()
	i := slices.IndexFunc(man.Devices, func(d manifestDevice) bool { return d.Name == device })
	switch {
	case i < 0 || s.ended != nil || man.State != stateTaken || man.Lost != "":
		return nil
	case i < len(s.images):
		s.images[i].Spoil(why) // which is noted in the storage
		return nil
	}
	return s.change(func(m *manifest) { m.Lost = why.Error() })
}

// reopen takes the files over again, where they are to be found.
func (s *Snapshot) reopen() error {
	var errs []error
	for _, src := range s.man.Sources {
		if !src.File {
			continue
		}
		place, err := s.place(src)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		f, err := diff.ReopenFile(diff.Kept{Path: src.Path, Limit: src.Limit, Size: src.Size, Inode: src.Inode, Extents: src.Extents}, s.set.whereOf(place))
		if errors.Is(err, os.ErrNotExist) && s.man.State != stateTaken {
			continue // given back already
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		s.files = append(s.files, f)
	}
	return errors.Join(errs...)
}

// place finds a source again. What lies on a served device is not touched.
func (s *Snapshot) place(src manifestSource) (Place, error) {
	if src.On == "" {
		return s.set.cfg.Locate(src.Path)
	}
	d, err := s.set.cfg.Device(src.On)
	if err != nil {
		return Place{}, fmt.Errorf("difference storage %s: %w", src.Path, err)
	}
	return Place{Device: d.Cow.Below(), File: src.File, On: src.On}, nil
}

// goOn restores a taken snapshot, its images begun.
func (s *Snapshot) goOn() error {
	// The files first: also those of a snapshot that is spoiled are given back in the end.
	if err := s.reopen(); err != nil {
		return err
	}
	sameBoot := s.man.Boot == s.set.cfg.BootID
	switch {
	case s.man.Lost != "":
		return errors.New(s.man.Lost)
	case s.man.Durable || s.man.Clean || sameBoot && s.man.Memory:
	case sameBoot:
		return errors.New("the daemon was killed, and had no memory that outlives it")
	default:
		return errors.New("the machine was not shut down in order, and the snapshot is not durable")
	}
	spaces, err := s.spaces()
	if err != nil {
		return err
	}
	var found map[diff.Key]diff.Found
	if s.storage, found, err = diff.Recover(s.diffConfig(), spaces); err != nil {
		return err
	}
	sealed, err := s.buffers(sameBoot, found)
	if err != nil {
		return err
	}
	if err := s.begin(found, sealed); err != nil {
		return err
	}
	if err := s.change(func(m *manifest) { m.Clean, m.Boot, m.Memory = false, s.set.cfg.BootID, s.set.cfg.Memory != "" }); err != nil {
		return err
	}
	s.grows()
	return nil
}

// source is the index in the manifest of the i-th file.
func (s *Snapshot) source(i int) int {
	for k, src := range s.man.Sources {
		if src.File {
			if i == 0 {
				return k
			}
			i--
		}
	}
	return -1
}

// spaces gives the areas, in the order in which they were appended.
func (s *Snapshot) spaces() ([]diff.Space, error) {
	var out []diff.Space
	for _, a := range s.man.Areas {
		src := s.man.Sources[a.Source]
		if src.File {
			i := slices.IndexFunc(s.files, func(f *diff.File) bool { return f.Name() == src.Path })
			space, err := s.files[i].Space(a.Off, a.Len)
			if err != nil {
				return nil, err
			}
			out = append(out, space)
			continue
		}
		place, err := s.place(src)
		if err != nil {
			return nil, err
		}
		space, err := diff.NewLinear(place.Device, src.Extents)
		if err != nil {
			return nil, err
		}
		out = append(out, space)
	}
	return out, nil
}

// buffers takes over the chunks that a killed process had in memory. Where there
// are none that matter it begins with empty ones.
func (s *Snapshot) buffers(sameBoot bool, found map[diff.Key]diff.Found) ([]*diff.Buffer, error) {
	if !s.man.Memory || s.man.Clean || !sameBoot {
		return nil, s.emptyBuffers()
	}
	file, err := os.OpenFile(s.set.memory(s.id), os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) && s.man.Durable { // all of it was stored
		return nil, s.emptyBuffers()
	}
	if err != nil {
		return nil, err
	}
	defer file.Close()
	var sealed []*diff.Buffer
	s.pending, sealed, err = diff.RecoverPending(s.storage, s.man.Buffers, file, found)
	return sealed, err
}

// emptyBuffers makes new ones, in memory that outlives the process where there is such.
func (s *Snapshot) emptyBuffers() (err error) {
	var file *os.File
	if s.set.cfg.Memory != "" {
		if err := os.MkdirAll(s.set.cfg.Memory, 0o700); err != nil { // it goes with every start of the machine
			return err
		}
		if file, err = os.OpenFile(s.set.memory(s.id), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600); err != nil {
			return err
		}
		defer file.Close()
	}
	s.pending, err = diff.NewPending(s.storage, s.man.Buffers, file)
	return err
}

func (s *Snapshot) begin(found map[diff.Key]diff.Found, sealed []*diff.Buffer) error {
	for i, d := range s.man.Devices {
		dev, err := s.set.cfg.Device(d.Name)
		if err != nil {
			return err
		}
		s.devices = append(s.devices, dev)
		m := cow.Restore(dev.Cow, s.image(i), d.Size, found, sealed)
		s.images = append(s.images, m)
		dev.Cow.Begin(m)
		if dev.Foreign {
			m.Spoil(errors.New("what is behind the device was written to while nobody served it"))
		}
	}
	return nil
}
