package serve

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"tidemark/internal/disk"
	"tidemark/internal/vfs"
)

// recordSuffix ends the names of the files, one a device, that remember them.
const recordSuffix = ".json"

// record is a device as it is remembered. Made is false while it is being made:
// a record that is found so belongs to a process that was killed.
type record struct {
	Spec   Spec            `json:"spec"`
	Made   bool            `json:"made"`
	Memory json.RawMessage `json:"memory,omitempty"` // the front's own
	// Disk is the backing's identity when it was last looked at; nil of a file.
	Disk *disk.Identity `json:"disk,omitempty"`
	// GivenBack is when a guard gave a spliced volume its own table back.
	GivenBack time.Time `json:"given_back,omitzero"`
}

// recordFile is its form on disk.
type recordFile struct {
	Format int             `json:"format"` // 1
	Record json.RawMessage `json:"record"`
	CRC32C uint32          `json:"crc32c"` // of the record's JSON, compact
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func encodeRecord(r record) ([]byte, error) {
	text, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	return json.Marshal(recordFile{1, text, crc32.Checksum(text, castagnoli)})
}

// decodeRecord returns ErrDamaged for anything that encodeRecord does not give.
func decodeRecord(b []byte) (record, error) {
	var f recordFile
	if err := json.Unmarshal(b, &f); err != nil {
		return record{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if f.Format != 1 {
		return record{}, fmt.Errorf("%w: format %d, want 1", ErrDamaged, f.Format)
	}
	if crc32.Checksum(f.Record, castagnoli) != f.CRC32C {
		return record{}, fmt.Errorf("%w: its checksum is wrong", ErrDamaged)
	}
	var r record
	if err := json.Unmarshal(f.Record, &r); err != nil {
		return record{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	device, _, _ := strings.Cut(r.Spec.Name, "@") // an image is NAME@SNAPSHOT
	return r, CheckName(device)
}

func (s *Server) path(name string) string { return filepath.Join(s.folder, name+recordSuffix) }

func (s *Server) load(name string) (record, error) {
	b, err := os.ReadFile(s.path(name))
	if err != nil {
		return record{}, err
	}
	r, err := decodeRecord(b)
	if err == nil && r.Spec.Name != name {
		err = fmt.Errorf("%w: it is about %s", ErrDamaged, r.Spec.Name)
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", s.path(name), err)
	}
	return r, err
}

// save makes a record durable, whole or not at all.
func (s *Server) save(r record) error {
	b, err := encodeRecord(r)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(s.folder, 0o700); err != nil {
		return err
	}
	return vfs.WriteWhole(vfs.OS{}, s.path(r.Spec.Name), b)
}

func (s *Server) erase(name string) error {
	if err := os.Remove(s.path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return s.sync()
}

func (s *Server) sync() error {
	dir, err := os.Open(s.folder)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
