package tap

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

const bpffs = "/sys/fs/bpf"

var component = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_-]{0,63}$`)

// pins is the folder of one group below bpffs.
type pins struct{ dir string }

func pinsOf(instance, group string) (pins, error) {
	for _, c := range []string{instance, group} {
		if !component.MatchString(c) {
			return pins{}, fmt.Errorf("%q: want 1 to 64 of letters, digits, - and _: %w", c, ErrConfig)
		}
	}
	return pins{filepath.Join(bpffs, "tidemark", instance, group)}, nil
}

func (p pins) path(name string) string { return filepath.Join(p.dir, name) }

// remove takes the pins away: links first, so that nothing is attached to half a tap.
func (p pins) remove() error {
	entries, err := os.ReadDir(p.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, prefix := range []string{"link_", ""} {
		for _, e := range entries {
			if len(e.Name()) >= len(prefix) && e.Name()[:len(prefix)] == prefix {
				if err := os.Remove(p.path(e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
					errs = append(errs, err)
				}
			}
		}
	}
	errs = append(errs, os.Remove(p.dir))
	for dir := filepath.Dir(p.dir); dir != bpffs; dir = filepath.Dir(dir) {
		_ = os.Remove(dir) // stays while other groups or instances are in it
	}
	return errors.Join(errs...)
}

// mountBPFFS mounts the BPF file system where it is absent.
func mountBPFFS() error {
	var st unix.Statfs_t
	if err := unix.Statfs(bpffs, &st); err == nil && st.Type == unix.BPF_FS_MAGIC {
		return nil
	}
	if err := os.MkdirAll(bpffs, 0o700); err != nil {
		return err
	}
	if err := unix.Mount("bpf", bpffs, "bpf", 0, "mode=0700"); err != nil {
		return fmt.Errorf("mounting the BPF file system at %s: %w", bpffs, err)
	}
	return nil
}

// meta is what Adopt needs to know; it is kept, as JSON, in a pinned map.
type meta struct {
	Layout   int
	Identity [16]byte
	Targets  []Target
	Ring     int
	Options  Options
	Note     string `json:",omitempty"` // SetNote's
	Programs string `json:",omitempty"` // digest of the object that all of the tap's programs are from; empty where they may be from two
}

const metaSize = 64 << 10

func newMetaMap(m meta) (*ebpf.Map, error) {
	em, err := ebpf.NewMap(&ebpf.MapSpec{Name: "meta", Type: ebpf.Array, KeySize: 4, ValueSize: metaSize, MaxEntries: 1})
	if err != nil {
		return nil, err
	}
	if err := m.put(em); err != nil {
		em.Close()
		return nil, err
	}
	return em, nil
}

func (m meta) put(in *ebpf.Map) error {
	text, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if len(text) >= metaSize {
		return fmt.Errorf("the tap's description has %d bytes: at most %d: %w", len(text), metaSize-1, ErrConfig)
	}
	value := make([]byte, metaSize)
	copy(value, text)
	return in.Put(uint32(0), value)
}

func (p pins) meta() (meta, error) {
	em, err := ebpf.LoadPinnedMap(p.path("meta"), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return meta{}, ErrNoPins
	}
	if err != nil {
		return meta{}, err
	}
	defer em.Close()
	value, err := em.LookupBytes(uint32(0))
	if err != nil {
		return meta{}, err
	}
	var m meta
	end := 0
	for end < len(value) && value[end] != 0 {
		end++
	}
	if err := json.Unmarshal(value[:end], &m); err != nil {
		return meta{}, fmt.Errorf("%s: %w: %w", p.dir, ErrLayout, err)
	}
	if m.Layout < layoutOldest || m.Layout > layout {
		return m, fmt.Errorf("%s has layout %d, this build takes %d to %d: %w", p.dir, m.Layout, layoutOldest, layout, ErrLayout)
	}
	return m, nil
}

// Note is what SetNote kept; empty: nothing.
func (t *Tap) Note() string { return t.meta.Note }

// SetNote keeps a text, of at most a few KiB, beside the tap. Who adopts it finds it again.
func (t *Tap) SetNote(note string) error {
	if t.meta.Note == note {
		return nil
	}
	t.meta.Note = note
	return t.pins.replaceMeta(t.meta)
}

// SetNote is the method of the same name for a tap that nobody has adopted. ErrNoPins.
func SetNote(instance, group, note string) error {
	p, err := pinsOf(instance, group)
	if err != nil {
		return err
	}
	m, err := p.meta()
	if err != nil || m.Note == note {
		return err
	}
	m.Note = note
	return p.replaceMeta(m)
}

func (p pins) replaceMeta(m meta) error {
	em, err := ebpf.LoadPinnedMap(p.path("meta"), nil)
	if err != nil {
		return fmt.Errorf("the tap's description: %w", err)
	}
	defer em.Close()
	if err := m.put(em); err != nil {
		return fmt.Errorf("the tap's description: %w", err)
	}
	return nil
}

// Pin is one tap found pinned, whoever started it.
type Pin struct {
	Instance, Group string
	Targets         []Target
	Err             error // why its description cannot be read
}

// Pinned lists every tap pinned on this machine.
func Pinned() ([]Pin, error) {
	dirs, err := filepath.Glob(filepath.Join(bpffs, "tidemark", "*", "*"))
	if err != nil {
		return nil, err
	}
	var out []Pin
	for _, d := range dirs {
		m, err := pins{d}.meta()
		out = append(out, Pin{Instance: filepath.Base(filepath.Dir(d)), Group: filepath.Base(d), Targets: m.Targets, Err: err})
	}
	return out, nil
}

// Discard removes a pinned tap without adopting it. What its ring still holds is lost.
func Discard(instance, group string) error {
	p, err := pinsOf(instance, group)
	if err != nil {
		return err
	}
	return p.remove()
}
