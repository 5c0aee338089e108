package protect

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"tidemark/internal/disk"
	"tidemark/internal/vfs"
)

// Settings are what a user may choose for a group; zero fields mean the defaults.
type Settings struct {
	RingBytes    int           `json:"ring_bytes"`
	SegmentBytes int           `json:"segment_bytes"` // a segment is sealed when it has this much, ...
	SealEvery    time.Duration `json:"seal_every"`    // ... or when its first record is this old
	SpoolBytes   int64         `json:"spool_bytes"`
	FillRate     int64         `json:"fill_rate"` // bytes a second read from the disks while filling
	HookDir      string        `json:"hook_dir,omitempty"`
	Metadata     bool          `json:"metadata_only,omitempty"`
	BackPressure bool          `json:"back_pressure,omitempty"` // writes wait for room in the ring; served devices only
	Force        bool          `json:"force,omitempty"`         // shared disks and cluster file systems were accepted
}

// Bounds and defaults of Settings.
const (
	ringDefault, ringMin, ringMax          = 128 << 20, 64 << 10, 1 << 30
	segmentDefault, segmentMin, segmentMax = 8 << 20, 64 << 10, 64 << 20
	sealDefault, sealMin, sealMax          = time.Second, 10 * time.Millisecond, time.Minute
	spoolDefault, spoolMin                 = 4 << 30, 1 << 20
	fillDefault, fillMin                   = 400 << 20, 64 << 10
)

// withDefaults fills zero fields in and refuses what is out of bounds.
func (s Settings) withDefaults() (Settings, error) {
	def(&s.RingBytes, ringDefault)
	def(&s.SegmentBytes, segmentDefault)
	def(&s.SealEvery, sealDefault)
	def(&s.SpoolBytes, spoolDefault)
	def(&s.FillRate, fillDefault)
	switch {
	case s.RingBytes < ringMin || s.RingBytes > ringMax || s.RingBytes&(s.RingBytes-1) != 0:
		return s, fmt.Errorf("ring size %d: want a power of two from %d to %d bytes: %w", s.RingBytes, ringMin, ringMax, ErrSettings)
	case s.SegmentBytes < segmentMin || s.SegmentBytes > segmentMax:
		return s, fmt.Errorf("segment size %d: want %d to %d bytes: %w", s.SegmentBytes, segmentMin, segmentMax, ErrSettings)
	case s.SealEvery < sealMin || s.SealEvery > sealMax:
		return s, fmt.Errorf("seal interval %s: want %s to %s: %w", s.SealEvery, sealMin, sealMax, ErrSettings)
	case s.SpoolBytes < spoolMin:
		return s, fmt.Errorf("spool size %d: want at least %d bytes: %w", s.SpoolBytes, spoolMin, ErrSettings)
	case s.FillRate < fillMin:
		return s, fmt.Errorf("fill rate %d: want at least %d bytes a second: %w", s.FillRate, fillMin, ErrSettings)
	}
	return s, nil
}

func def[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// Config is what a daemon keeps of a group in its state directory.
type Config struct {
	Version  int          `json:"version"`
	Name     string       `json:"name"`
	ID       [16]byte     `json:"id"`
	Vault    string       `json:"vault"`
	Disks    []DiskConfig `json:"disks"`
	Settings Settings     `json:"settings"`
}

// DiskConfig is one disk as it was when it was protected. Name never changes.
type DiskConfig struct {
	Name       string        `json:"name"`
	Path       string        `json:"path"`
	Identity   disk.Identity `json:"identity"`
	Size       int64         `json:"size"`
	SectorSize int64         `json:"sector_size"`
	BlockSize  int64         `json:"block_size"`
	Served     string        `json:"served,omitempty"` // name of the served device; empty: a disk that is tapped
}

const configName = "group.json"

// envelope puts a checksum beside what it covers.
type envelope struct {
	CRC32C string          `json:"crc32c"`
	Config json.RawMessage `json:"config"`
}

func checksum(b []byte) string {
	return fmt.Sprintf("%08x", crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
}

// save makes the configuration durable in dir, whole or not at all.
func (c *Config) save(dir string) error {
	body, err := json.Marshal(c)
	if err != nil {
		return err
	}
	data, err := json.Marshal(envelope{CRC32C: checksum(body), Config: body})
	if err != nil {
		return err
	}
	if err := vfs.WriteWhole(vfs.OS{}, filepath.Join(dir, configName), data); err != nil {
		return err
	}
	return vfs.OS{}.SyncDir(filepath.Dir(dir))
}

// LoadConfig reads the configuration in dir. ErrNoGroup: there is none.
func LoadConfig(dir string) (*Config, error) {
	path := filepath.Join(dir, configName)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w", path, ErrNoGroup)
	}
	if err != nil {
		return nil, err
	}
	var e envelope
	if err := json.Unmarshal(data, &e); err != nil {
		return nil, fmt.Errorf("%s is damaged: %w", path, err)
	}
	if got := checksum(e.Config); got != e.CRC32C {
		return nil, fmt.Errorf("%s is damaged: checksum %s, content has %s", path, e.CRC32C, got)
	}
	var c Config
	if err := json.Unmarshal(e.Config, &c); err != nil {
		return nil, fmt.Errorf("%s is damaged: %w", path, err)
	}
	if c.Version != 1 {
		return nil, fmt.Errorf("%s has version %d: this build reads version 1", path, c.Version)
	}
	return &c, nil
}

// blockSize is the unit of a disk's change and gap map: 4 KiB while that needs
// no more than 32 Mi blocks (128 GiB), then the smallest power of two that does.
func blockSize(size int64) int64 {
	const blocksMax = 32 << 20
	b := int64(4096)
	for size/b > blocksMax {
		b *= 2
	}
	return b
}
