package spool

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"tidemark/internal/segment"
)

// Ends of the names in the folder.
const (
	segmentEnd = ".seg"
	cursorEnd  = ".cursor"
	unfinished = ".new" // being written; of no meaning unless it can be finished
)

// load finds what is there: first the cursors, as what they have passed does
// not count, then the segments, then what a crash left unfinished.
func (s *Spool) load(report *Report) error {
	entries, err := s.fs.ReadDir(s.dir)
	if err != nil {
		return err
	}
	var sequences []uint64
	var torn []string
	for _, e := range entries {
		name := e.Name()
		if who, ok := strings.CutSuffix(name, cursorEnd); ok {
			if err := s.loadCursor(who, report); err != nil {
				return err
			}
		} else if n, ok := sequenceOf(name); ok {
			sequences = append(sequences, n)
		} else if strings.HasSuffix(name, unfinished) {
			torn = append(torn, name)
		}
	}
	for _, c := range s.cursors {
		s.floor = max(s.floor, c.next)
	}
	if err := s.loadSegments(sequences, report); err != nil {
		return err
	}
	for _, name := range torn {
		if err := s.mend(name, report); err != nil {
			return err
		}
	}
	// What was renamed but not synced before a crash is as good as appended from
	// now on, so it must stay.
	if err := s.fs.SyncDir(s.dir); err != nil {
		return err
	}
	s.trim()
	return nil
}

func sequenceOf(name string) (uint64, bool) {
	hex, ok := strings.CutSuffix(name, segmentEnd)
	if !ok || len(hex) != 16 {
		return 0, false
	}
	n, err := strconv.ParseUint(hex, 16, 64)
	return n, err == nil
}

// loadSegments takes the segments in order. Those that every cursor has passed
// may have holes between them, as removals need not be stable in their order;
// they are removed, but for the newest. A hole or damage after them is a named
// error for the cursor that comes to it.
func (s *Spool) loadSegments(sequences []uint64, report *Report) error {
	from := s.passed()
	for i, n := range sequences {
		newest := i == len(sequences)-1
		if n < from && !newest {
			if err := ignoreAbsent(s.fs.Remove(s.path(n))); err != nil {
				return err
			}
			continue
		}
		for len(s.items) > 0 && s.items[len(s.items)-1].Sequence+1 < n {
			if uint64(len(s.items))+(n-s.items[len(s.items)-1].Sequence) > 1<<20 {
				return fmt.Errorf("segments from %d on are missing: %w", s.items[len(s.items)-1].Sequence+1, segment.ErrDamaged)
			}
			s.addDamaged(s.items[len(s.items)-1].Sequence+1, fmt.Errorf("it is missing: %w", segment.ErrDamaged), report)
		}
		item, err := s.read(s.path(n), newest)
		if err == nil && item.Sequence != n {
			err = fmt.Errorf("it is segment %d: %w", item.Sequence, segment.ErrDamaged)
		}
		if err == nil {
			s.items = append(s.items, item)
			continue
		}
		if !errors.Is(err, segment.ErrDamaged) {
			return &DamagedError{n, s.path(n), err}
		}
		if newest && item.Summary.Sequence != n {
			return s.setAside(n, err, report)
		}
		s.addDamaged(n, err, report)
		s.items[len(s.items)-1].Summary = item.Summary
	}
	return nil
}

func (s *Spool) addDamaged(n uint64, err error, report *Report) {
	d := &DamagedError{n, s.path(n), err}
	report.Damaged = append(report.Damaged, d)
	s.items = append(s.items, Item{Sequence: n, Path: s.path(n), fs: s.fs, damage: d})
}

// setAside handles a newest segment whose very footer is damaged, so that it
// does not even tell where the capture was. It was whole once, so a consumer may
// have had it: then its number cannot be used again and only a person can
// decide. Otherwise it is treated as one that was never finished.
func (s *Spool) setAside(n uint64, cause error, report *Report) error {
	if s.floor > n {
		return &DamagedError{n, s.path(n), cause}
	}
	report.Damaged = append(report.Damaged, &DamagedError{n, s.path(n), cause})
	name := filepath.Base(s.path(n)) + unfinished
	if err := s.fs.Rename(s.path(n), filepath.Join(s.dir, name)); err != nil {
		return err
	}
	return s.mend(name, report)
}

// read opens a segment's file. Payloads are checked where whole is set. With an
// error the item still has the summary where the footer is good.
func (s *Spool) read(path string, whole bool) (Item, error) {
	item := Item{Path: path, fs: s.fs}
	f, err := s.fs.OpenFile(path, os.O_RDONLY, 0)
	if err != nil {
		return item, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return item, err
	}
	if item.Summary, err = segment.ReadSummary(f, size); err != nil {
		return item, err
	}
	g, err := segment.Open(f, size)
	if err != nil {
		return item, err
	}
	item.Sequence = g.Summary().Sequence
	if whole {
		g.Check(func(_, _ uint64, e error) { err = errors.Join(err, e) })
	}
	return item, err
}

// mend finishes what a crash left unfinished: it is appended as far as it is
// whole and follows the newest, and removed.
func (s *Spool) mend(name string, report *Report) error {
	path := filepath.Join(s.dir, name)
	n, isSegment := sequenceOf(strings.TrimSuffix(name, unfinished))
	follows := isSegment && (len(s.items) == 0 && n >= max(s.floor, 1) || len(s.items) > 0 && n == s.items[len(s.items)-1].Sequence+1)
	if isSegment {
		report.Torn = append(report.Torn, name)
	}
	if !follows {
		return ignoreAbsent(s.fs.Remove(path))
	}
	whole, cut, err := s.recover(path)
	if err != nil && !errors.Is(err, segment.ErrDamaged) && !errors.Is(err, segment.ErrVersion) {
		return err
	}
	if err == nil && cut.Sequence == n {
		// Written anew: what is read here may be in the page cache only.
		again := s.path(n) + ".cut" + unfinished
		if err := s.fill(again, whole); err != nil {
			return err
		}
		if err := s.fs.Rename(again, s.path(n)); err != nil {
			return err
		}
		if err := s.fs.SyncDir(s.dir); err != nil {
			return err
		}
		item, err := s.read(s.path(n), true)
		if err != nil {
			return err
		}
		s.items = append(s.items, item)
		report.Kept = append(report.Kept, cut)
	}
	return ignoreAbsent(s.fs.Remove(path))
}

// recover gives what of an unfinished segment can be kept: all of it, or what
// lies before its last good mark.
func (s *Spool) recover(path string) (io.WriterTo, Cut, error) {
	b, err := s.fs.ReadFile(path)
	if err != nil {
		return nil, Cut{}, err
	}
	r := bytes.NewReader(b)
	if g, err := segment.Open(r, r.Size()); err == nil {
		g.Check(func(_, _ uint64, e error) { err = e })
		if err == nil {
			return bytesTo(b), Cut{g.Summary().Sequence, g.Len(), g.Len()}, nil
		}
	}
	sealed, found, err := segment.Recover(r, r.Size())
	return sealed, Cut{found.Sequence, found.Records, found.Kept}, err
}
