package snapshot

import (
	"context"
	"errors"
	"fmt"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/cbt"
	"tidemark/internal/filter/barrier"
	"tidemark/internal/filter/cow"
)

// Take makes the images, of one instant over all devices. Where it fails the
// snapshot is what it was before. In order:
//  1. the storage stops growing: nothing is allocated in a file system that is frozen;
//  2. files written by extent are looked at again;
//  3. everything that needs memory is made;
//  4. file systems are frozen, then writes of all devices held;
//  5. every image begins and every change map switches: the instant;
//  6. writes go on, file systems are thawed, the storage grows again;
//  7. that the snapshot is taken becomes stable.
func (t *Set) Take(ctx context.Context, id ID) error {
	s, err := t.find(id)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.ended != nil:
		return s.ended
	case s.lost != nil:
		return s.lost
	case len(s.images) > 0:
		return fmt.Errorf("snapshot %s: %w", FormatID(id), ErrTaken)
	case s.storage.Stats().Capacity == 0:
		return fmt.Errorf("snapshot %s: %w", FormatID(id), ErrNoStorage)
	}
	for i, d := range s.devices { // a filter may have been lost since, and another be there
		if s.devices[i], err = t.cfg.Device(d.Name); err != nil {
			return fmt.Errorf("snapshot %s: %w", FormatID(id), err)
		}
	}
	resume := s.storage.HoldGrowth()
	defer resume()
	for _, f := range s.files {
		if err := f.Check(); err != nil {
			return err
		}
	}
	if err := s.prepare(); err != nil {
		return err
	}
	now, err := s.instant(ctx)
	if err != nil {
		return errors.Join(fmt.Errorf("snapshot %s: %w", FormatID(id), err), s.undo())
	}
	err = s.change(func(m *manifest) {
		m.State, m.TakenAt, m.Boot, m.Clean, m.Frozen = stateTaken, now.at, t.cfg.BootID, false, now.frozen > 0
		m.Memory = t.cfg.Memory != ""
		for i, c := range s.changes {
			m.Devices[i].Size = s.images[i].Size()
			if c != nil {
				m.Devices[i].Generation, m.Devices[i].Number = c.Info().Generation.String(), c.Info().Number
			}
		}
	})
	if err != nil {
		return errors.Join(err, s.undo())
	}
	return nil
}

// prepare makes the buffers and the images.
func (s *Snapshot) prepare() error {
	if err := s.emptyBuffers(); err != nil {
		return err
	}
	for i := range s.devices {
		s.images = append(s.images, cow.New(s.devices[i].Cow, s.image(i)))
	}
	return nil
}

func (s *Snapshot) image(i int) cow.Config {
	cfg := cow.Config{Device: uint32(i), Storage: s.storage, Pending: s.pending, Patience: s.set.cfg.Patience, Notify: s.events.add}
	if m := s.devices[i].Changes; m != nil {
		// What an image was changed in differs from what a backup of the instant has.
		cfg.Changed = func(r block.Range) { _ = m.MarkDirty(r) } // beyond the end: the device shrank, and its generation ended
	}
	return cfg
}

// moment is when an instant was, and how many file systems were frozen then.
type moment struct {
	at     time.Time
	frozen int
}

// instant freezes, holds, switches, releases and thaws.
func (s *Snapshot) instant(ctx context.Context) (now moment, err error) {
	if s.set.cfg.Freeze != nil {
		var names []string
		for _, d := range s.devices {
			names = append(names, d.Name)
		}
		thaw, n, refused := s.set.cfg.Freeze(ctx, names)
		if refused != nil {
			return now, fmt.Errorf("freezing file systems: %w", refused)
		}
		now.frozen = n
		defer func() { err = errors.Join(err, thaw()) }()
	}
	var filters []*barrier.Filter
	for _, d := range s.devices {
		filters = append(filters, d.Barrier)
	}
	up, err := barrier.Raise(ctx, s.set.cfg.HoldMax, filters...)
	if err != nil {
		return now, err
	}
	now.at = time.Now()
	s.changes = make([]*cbt.Changes, len(s.devices))
	for i, d := range s.devices {
		d.Cow.Begin(s.images[i])
		if d.Changes != nil {
			s.changes[i] = d.Changes.Take()
		}
	}
	return now, up.Release()
}

// undo ends the images of a take that failed.
func (s *Snapshot) undo() error {
	for _, m := range s.images {
		m.Close()
	}
	err := s.pending.Close()
	s.images, s.changes, s.pending = nil, nil, nil
	return err
}

// Destroy ends a snapshot, also while its images are open: they answer with
// errors from then on. What still is under way in them is waited for, for a
// bounded time, and otherwise ends behind the caller's back, before the storage
// is given back.
func (t *Set) Destroy(id ID) error {
	s, err := t.find(id)
	if err != nil {
		return err
	}
	t.mu.Lock()
	delete(t.m, id)
	t.mu.Unlock()
	s.events.close()
	done := make(chan error, 1)
	go func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		done <- s.destroy()
	}()
	timer := time.NewTimer(t.cfg.Patience)
	defer timer.Stop()
	select {
	case err := <-done:
		return err
	case <-timer.C:
		return nil
	}
}

// destroy is Destroy, after nobody finds the snapshot any more.
func (s *Snapshot) destroy() error {
	if s.ended != nil { // somebody else was faster
		return s.ended
	}
	s.ended = fmt.Errorf("snapshot %s: %w", FormatID(s.id), ErrNoSuch)
	// From here on a restart gives back what is left.
	err := s.change(func(m *manifest) { m.State = stateDestroyed })
	for _, m := range s.images {
		m.Close()
	}
	if s.pending != nil {
		err = errors.Join(err, s.pending.Close())
	}
	return errors.Join(err, s.discard())
}

// Stop ends the work of all snapshots in order, so that the taken ones go on
// after the next Open, be it after a reboot. No request may come any more.
// Every verb is refused from then on.
func (t *Set) Stop() error {
	var errs []error
	all := t.all()
	t.mu.Lock()
	t.stopped = true
	t.mu.Unlock()
	for _, s := range all {
		errs = append(errs, s.stop())
	}
	return errors.Join(errs...)
}

func (s *Snapshot) stop() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.events.close()
	if s.ended != nil {
		return nil
	}
	s.ended = ErrStopped
	if s.lost != nil {
		return nil
	}
	sound := true
	for _, m := range s.images {
		m.Close()
		sound = sound && m.Err() == nil
	}
	var err error
	if s.pending != nil {
		err = s.pending.Close()
	}
	s.storage.Close()
	if err == nil && sound && len(s.images) > 0 {
		if err = s.storage.Flush(); err == nil {
			err = s.change(func(m *manifest) { m.Clean = true })
		}
	}
	for _, f := range s.files {
		err = errors.Join(err, f.Close())
	}
	return err
}
