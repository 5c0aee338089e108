package snapshot

import (
	"encoding/json"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/diff"
	"tidemark/internal/vfs"
)

// States of a snapshot in its manifest.
const (
	stateMaking    = "making" // nobody was told of it yet
	stateCreated   = "created"
	stateTaken     = "taken"
	stateDestroyed = "destroyed" // what it used is being given back
)

// manifest is what is kept of a snapshot, in DIR/ID.json.
type manifest struct {
	Version int              `json:"version"`
	ID      string           `json:"id"`
	State   string           `json:"state"`
	Boot    string           `json:"boot"`  // that it was written in
	Clean   bool             `json:"clean"` // everything was stored at a stop in order
	Durable bool             `json:"durable"`
	Chunk   int64            `json:"chunk"`
	Low     int64            `json:"low"`
	Buffers int              `json:"buffers"`
	Memory  bool             `json:"memory"` // chunks on their way are in memory that outlives the process
	TakenAt time.Time        `json:"taken_at,omitzero"`
	Frozen  bool             `json:"frozen,omitempty"` // file systems were, at the instant
	Lost    string           `json:"lost,omitempty"`   // why it is spoiled as a whole
	Devices []manifestDevice `json:"devices"`
	Sources []manifestSource `json:"sources"`
	Areas   []manifestArea   `json:"areas"`
}

type manifestDevice struct {
	Name       string `json:"name"`
	Size       int64  `json:"size"`
	Generation string `json:"generation,omitempty"`
	Number     uint8  `json:"number,omitempty"`
}

// manifestSource is one path; where it is written by extent or is a device, with its ranges.
type manifestSource struct {
	Path    string        `json:"path"`
	File    bool          `json:"file"`
	Disk    string        `json:"disk,omitempty"`  // the device's name, whatever path named it
	On      string        `json:"on,omitempty"`    // the served device that it lies on
	Inode   uint64        `json:"inode,omitempty"` // of a file on a served device
	Limit   int64         `json:"limit,omitempty"`
	Size    int64         `json:"size,omitempty"`
	Extents []block.Range `json:"extents,omitempty"`
}

// manifestArea is one area: a part of a source.
type manifestArea struct {
	Source int   `json:"source"`
	Off    int64 `json:"offset"`
	Len    int64 `json:"length"`
}

func (t *Set) file(id ID) string   { return filepath.Join(t.cfg.Dir, FormatID(id)+".json") }
func (t *Set) memory(id ID) string { return filepath.Join(t.cfg.Memory, FormatID(id)+".chunks") }

// manifest is a copy of what is kept.
func (s *Snapshot) manifest() manifest {
	s.manMu.Lock()
	defer s.manMu.Unlock()
	return s.man
}

// change edits the manifest and makes it stable; where that fails it stays as it was.
func (s *Snapshot) change(edit func(m *manifest)) error {
	s.manMu.Lock()
	defer s.manMu.Unlock()
	next := s.man
	next.Devices = append([]manifestDevice(nil), s.man.Devices...)
	next.Sources = append([]manifestSource(nil), s.man.Sources...)
	next.Areas = append([]manifestArea(nil), s.man.Areas...)
	edit(&next)
	if err := save(s.set.file(s.id), &next); err != nil {
		return fmt.Errorf("snapshot %s: its manifest: %w", FormatID(s.id), err)
	}
	s.man = next
	return nil
}

// A manifest's file is its JSON and a last line with the JSON's checksum.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func save(name string, m *manifest) error {
	b, err := json.MarshalIndent(m, "", "\t")
	if err != nil {
		return err
	}
	b = fmt.Appendf(b, "\ncrc32c %08x\n", crc32.Checksum(b, castagnoli))
	return vfs.WriteWhole(vfs.OS{}, name, b)
}

func load(name string) (m manifest, id ID, err error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return m, id, err
	}
	if m, err = decode(b); err == nil {
		id, err = ParseID(m.ID)
	}
	if err != nil {
		err = fmt.Errorf("manifest %s: %w", name, err)
	}
	return m, id, err
}

func decode(b []byte) (m manifest, err error) {
	const last = len("\ncrc32c 00000000\n")
	body := b[:max(0, len(b)-last)]
	if string(b[len(body):]) != fmt.Sprintf("\ncrc32c %08x\n", crc32.Checksum(body, castagnoli)) {
		return m, fmt.Errorf("checksum: %w", diff.ErrCorrupt)
	}
	if err := json.Unmarshal(body, &m); err != nil {
		return m, fmt.Errorf("%w: %w", err, diff.ErrCorrupt)
	}
	return m, m.check()
}

// check refuses what this version did not write.
func (m *manifest) check() error {
	if m.Version != 1 {
		return fmt.Errorf("version %d, want 1: %w", m.Version, diff.ErrCorrupt)
	}
	sound := m.Buffers > 0 && m.Buffers <= buffersMax && len(m.Devices) > 0
	for _, a := range m.Areas {
		sound = sound && a.Source >= 0 && a.Source < len(m.Sources) && a.Off >= 0 && a.Len > 0
	}
	for _, d := range m.Devices {
		sound = sound && d.Size >= 0
	}
	if !sound {
		return fmt.Errorf("numbers that cannot be: %w", diff.ErrCorrupt)
	}
	return nil
}

// part is a space with its place in the manifest.
type part struct {
	diff.Space
	area manifestArea
	file *diff.File // nil: a device
}

// record notes an area before it is used.
func (s *Snapshot) record(space diff.Space) error {
	p := space.(part)
	return s.change(func(m *manifest) {
		if p.file != nil {
			src, kept := &m.Sources[p.area.Source], p.file.Kept()
			src.Size, src.Extents = kept.Size, kept.Extents
		}
		m.Areas = append(m.Areas, p.area)
	})
}

// grower is a file that grows in parts.
type grower struct {
	*diff.File
	source int
}

// Grow grows the file.
func (g grower) Grow(bytes int64) (diff.Space, error) {
	before := g.Size()
	space, err := g.File.Grow(bytes)
	if err != nil {
		return nil, err
	}
	return part{space, manifestArea{g.source, before, space.Size()}, g.File}, nil
}
