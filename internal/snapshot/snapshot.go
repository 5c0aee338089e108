// Package snapshot holds snapshots of several devices: images of one instant,
// their difference storage, and what has to be known about them.
//
//	create ──▶ created ──take──▶ taken ──▶ (each image sound or spoiled) ──destroy──▶ gone
//
// A snapshot's manifest is a file in the state folder, written before anything
// that it must name is used. After the daemon was killed the taken snapshots go
// on: what was not stored yet is in memory that outlives it. After a crash of the
// machine that holds for durable ones; others are declared spoiled then, by name,
// and are there to be destroyed. After a stop in order all of them go on.
package snapshot

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/cbt"
	"tidemark/internal/diff"
	"tidemark/internal/filter/barrier"
	"tidemark/internal/filter/cow"
)

// Errors that callers branch on.
var (
	ErrNoSuch    = errors.New("no such snapshot")
	ErrRequest   = errors.New("not a snapshot that can be made")
	ErrNoDevice  = errors.New("no such device")
	ErrTaken     = errors.New("the snapshot was taken already")
	ErrNotTaken  = errors.New("the snapshot was not taken yet")
	ErrNoStorage = errors.New("the snapshot has no difference storage")
	ErrStopped   = errors.New("the daemon is stopping")
)

// Device is a served device as snapshots need it.
type Device struct {
	Name    string
	Barrier *barrier.Filter
	Cow     *cow.Filter
	Changes *cbt.Map // nil: changes are not tracked
	// Foreign: after a stop in order somebody else wrote to what is behind it.
	Foreign bool
}

// Place says what a path of difference storage is.
type Place struct {
	// Device is the block device that the path names, or, for a file, the one that
	// its file system lies on: as seen from below the snapshots' filters, where it
	// is a served one. Nil, for a file: it is written through its file system, which
	// lies on no snapshotted device.
	Device block.Device
	File   bool
	// Served says that Device is a served one that the path names itself: what it
	// holds would be overwritten, so that only ranges of it are taken.
	Served bool
	// On names the served device that Device is below of, "" where it is another one:
	// a restart finds it by that, as nobody may touch the path before it is served again.
	On string
	// Name tells the device from others, whatever path named it.
	Name string
}

// Config is what the assembly supplies.
type Config struct {
	Dir      string        // for manifests; stable
	Memory   string        // for chunks on their way; a folder on a tmpfs. Empty: they do not outlive the process
	BootID   string        // of this boot of the machine
	Patience time.Duration // that a write has with difference storage, and destroy with an image's last requests; 5 s
	HoldMax  time.Duration // how long writes are held for a take at most; 10 s
	// Trouble is told what could not be taken up again, or not be given back, of what
	// an earlier process left; nil: nobody is.
	Trouble func(id string, err error)
	// Device finds a served device by name.
	Device func(name string) (Device, error)
	// Locate says what a path of difference storage is; nil: all are files, through their file systems.
	Locate func(path string) (Place, error)
	// Files does what has to be done to files that lie on served devices; nil: this process.
	Files diff.Doer
	// Freeze freezes the file systems of devices, together, and says how many those
	// are; thaw ends it. Nil: none are.
	Freeze func(ctx context.Context, devices []string) (thaw func() error, frozen int, err error)
}

// ID is a snapshot's: 32 hexadecimal digits.
type ID = diff.ID

// FormatID and ParseID are an ID's text.
func FormatID(id ID) string { return hex.EncodeToString(id[:]) }

// ParseID reads what FormatID gives.
func ParseID(s string) (ID, error) {
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || len(b) != len(ID{}) {
		return ID{}, fmt.Errorf("snapshot %q: want 32 hexadecimal digits: %w", s, ErrNoSuch)
	}
	return ID(b), nil
}

// Set is the snapshots of one daemon. All methods may be called concurrently.
type Set struct {
	cfg     Config
	mu      sync.Mutex
	m       map[ID]*Snapshot
	stopped bool
	later   []*Snapshot // to be given back when devices are served
}

// Open gives the set of the snapshots that an earlier process left, which go on or
// are declared spoiled. It is called when the devices are there with their
// filters, and before their first requests.
func Open(cfg Config) (*Set, error) {
	if cfg.Patience == 0 {
		cfg.Patience = 5 * time.Second
	}
	if cfg.HoldMax == 0 {
		cfg.HoldMax = 10 * time.Second
	}
	if cfg.Trouble == nil {
		cfg.Trouble = func(string, error) {}
	}
	if cfg.Locate == nil {
		cfg.Locate = func(string) (Place, error) { return Place{File: true}, nil }
	}
	t := &Set{cfg: cfg, m: map[ID]*Snapshot{}}
	return t, t.restore()
}

// Snapshot is one of them.
type Snapshot struct {
	set     *Set
	id      ID
	devices []Device
	storage *diff.Storage
	events  events

	mu      sync.Mutex // one verb at a time; never held in a write's way
	man     manifest
	pending *diff.Pending
	images  []*cow.Image
	changes []*cbt.Changes
	files   []*diff.File
	lost    error // why none of its images can be read; nil: each says for itself
	ended   error // why no verb does anything any more: it was destroyed, or the set was stopped

	manMu sync.Mutex // of man, between verbs and growth
}

// Request is what a snapshot is made from.
type Request struct {
	Devices []string
	Storage []Storage
	Chunk   int64 // bytes: a power of two from 4 KiB; 0: 64 KiB
	Low     int64 // bytes left at which more is needed; 0: a quarter of the limits, 64 MiB at most
	Durable bool  // survives a power loss; a first write waits for the old data to be stored
}

// Storage is a place for difference storage.
type Storage struct {
	Path   string
	Limit  int64         // bytes; 0: 1 GiB of a file, all of a device
	Ranges []block.Range // of a device; none: all of it
}

const (
	chunkDefault = 64 << 10
	chunkMax     = 64 << 20
	limitDefault = 1 << 30
	lowMax       = 64 << 20
	atOnce       = 64 << 20 // a file with a limit up to this is allocated at once
	buffersBytes = 32 << 20
	buffersMax   = 1024
)

// Info describes a snapshot.
type Info struct {
	ID       string       `json:"id"`
	State    string       `json:"state"` // created, taken or spoiled
	Reason   string       `json:"reason,omitempty"`
	Devices  []DeviceInfo `json:"devices"`
	Durable  bool         `json:"durable"`
	Chunk    int64        `json:"chunk"`
	TakenAt  time.Time    `json:"taken_at,omitzero"`
	Used     int64        `json:"used"`
	Capacity int64        `json:"capacity"`
	Room     int64        `json:"room"` // that it can grow by itself
	// Filesystem says that there were mounted file systems, all frozen at the instant.
	Filesystem bool `json:"filesystem"`
}

// DeviceInfo is one device of a snapshot.
type DeviceInfo struct {
	Name       string `json:"name"`
	Size       int64  `json:"size,omitempty"`
	Spoiled    string `json:"spoiled,omitempty"` // why its image cannot be read
	Generation string `json:"generation,omitempty"`
	Number     uint8  `json:"number,omitempty"` // of the change map's table at the instant
}

func (t *Set) find(id ID) (*Snapshot, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.stopped {
		return nil, fmt.Errorf("snapshot %s: %w", FormatID(id), ErrStopped)
	}
	if s := t.m[id]; s != nil {
		return s, nil
	}
	return nil, fmt.Errorf("snapshot %s: %w", FormatID(id), ErrNoSuch)
}

func (t *Set) all() []*Snapshot {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []*Snapshot
	for _, s := range t.m {
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b *Snapshot) int { return slices.Compare(a.id[:], b.id[:]) })
	return out
}

// List describes all snapshots.
func (t *Set) List() []Info {
	out := []Info{}
	for _, s := range t.all() {
		out = append(out, s.info())
	}
	return out
}

func (s *Snapshot) info() Info {
	s.mu.Lock()
	defer s.mu.Unlock()
	man := s.manifest()
	i := Info{ID: FormatID(s.id), State: man.State, Durable: man.Durable, Chunk: man.Chunk, TakenAt: man.TakenAt, Filesystem: man.Frozen}
	if s.storage != nil {
		st := s.storage.Stats()
		i.Used, i.Capacity, i.Room = st.Used, st.Capacity, st.Room
	}
	for k, d := range man.Devices {
		di := DeviceInfo{Name: d.Name, Size: d.Size, Generation: d.Generation, Number: d.Number}
		if k < len(s.images) {
			if err := s.images[k].Err(); err != nil {
				di.Spoiled = err.Error()
				i.State, i.Reason = "spoiled", err.Error()
			}
		}
		i.Devices = append(i.Devices, di)
	}
	if s.lost != nil {
		i.State, i.Reason = "spoiled", s.lost.Error()
	}
	return i
}

// ImageOf is a device and its image.
type ImageOf struct {
	Device  string
	Image   *cow.Image
	Changes *cbt.Changes // the device's change map at the instant; nil: it is not tracked, or from before a restart

	Generation string // of the change map at the instant; "": it is not tracked
	Number     uint8
	tracked    *cbt.Map
}

// Since gives what changed on the device after an earlier snapshot of it, up to
// this one or, where its own table was lost with a restart, to a later moment.
// cbt.ErrFullCopy: that is not known.
func (o ImageOf) Since(generation string, number uint8) (*cbt.Changes, error) {
	g, err := cbt.ParseGeneration(generation)
	switch {
	case err != nil:
		return nil, err
	case o.Changes != nil:
		return o.Changes.Since(g, number)
	case o.tracked == nil || generation != o.Generation:
		return nil, fmt.Errorf("changes since %s:%d, of a generation that has ended: %w", generation, number, cbt.ErrFullCopy)
	}
	if newest, ok := o.tracked.Newest(); ok && newest.Info().Generation == g && newest.Info().Number == o.Number {
		return newest.Since(g, number)
	}
	return o.tracked.Live(g, number)
}

// Images gives the images of a taken snapshot, in the order of its devices.
func (t *Set) Images(id ID) ([]ImageOf, error) {
	s, err := t.find(id)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := cmp.Or(s.ended, s.lost); err != nil {
		return nil, err
	}
	if len(s.images) == 0 {
		return nil, fmt.Errorf("snapshot %s: %w", FormatID(id), ErrNotTaken)
	}
	var out []ImageOf
	for i, m := range s.images {
		kept := s.manifest().Devices[i]
		o := ImageOf{Device: s.devices[i].Name, Image: m, Generation: kept.Generation, Number: kept.Number, tracked: s.devices[i].Changes}
		if i < len(s.changes) {
			o.Changes = s.changes[i]
		}
		out = append(out, o)
	}
	return out, nil
}

func newID() (id ID) {
	if _, err := rand.Read(id[:]); err != nil {
		panic(err) // crypto/rand does not fail on Linux
	}
	return id
}
