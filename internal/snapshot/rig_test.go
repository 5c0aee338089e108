package snapshot

import (
	"bytes"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/cbt"
	"tidemark/internal/filter/barrier"
	"tidemark/internal/filter/cow"
	"tidemark/internal/filter/track"
	"tidemark/internal/health"
	"tidemark/internal/stack"
)

// rig is served devices as the assembly makes them, with the snapshots over them.
type rig struct {
	system  *stack.System
	stacks  []*stack.Stack
	devices map[string]Device
	set     *Set
	cfg     Config
}

// newRig serves devices named d0, d1 … and opens the set, as a daemon that starts.
func newRig(t *testing.T, cfg Config, disks ...block.Device) *rig {
	t.Helper()
	r := &rig{system: stack.New(stack.Config{}, &health.Set{}), devices: map[string]Device{}}
	t.Cleanup(func() { _ = r.system.Close() })
	for i, disk := range disks {
		name := fmt.Sprint("d", i)
		s, err := r.system.Add(name, begun(t, disk))
		if err != nil {
			t.Fatal(err)
		}
		d := Device{Name: name, Changes: cbt.New(disk.Size())}
		for _, f := range []struct {
			name     string
			altitude int
			driver   stack.Driver
		}{
			{barrier.Name, barrier.Altitude, barrier.Driver(func(f *barrier.Filter) { d.Barrier = f })},
			{cow.Name, cow.Altitude, cow.Driver(func(f *cow.Filter) { d.Cow = f })},
			{track.Name, track.Altitude, track.Driver(d.Changes)},
		} {
			if _, err := s.Attach(f.name, f.altitude, f.driver); err != nil {
				t.Fatal(err)
			}
		}
		r.stacks, r.devices[name] = append(r.stacks, s), d
	}
	if cfg.Dir == "" {
		cfg.Dir = filepath.Join(t.TempDir(), "snapshots")
	}
	cfg.Patience = 8 * time.Second
	cfg.Device = func(name string) (Device, error) {
		if d, ok := r.devices[name]; ok {
			return d, nil
		}
		return Device{}, fmt.Errorf("%s: %w", name, ErrNoDevice)
	}
	var err error
	if r.set, err = Open(cfg); err != nil {
		t.Fatal(err)
	}
	r.cfg = cfg
	return r
}

func (r *rig) taken(t *testing.T, q Request) (ID, []ImageOf) {
	t.Helper()
	id, err := r.set.Create(q)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.set.Take(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	images, err := r.set.Images(id)
	if err != nil {
		t.Fatal(err)
	}
	return id, images
}

func wantAll(t *testing.T, m block.Device, b byte, what string) {
	t.Helper()
	p := make([]byte, m.Size())
	if _, err := m.ReadAt(p, 0); err != nil {
		t.Errorf("%s: %v", what, err)
		return
	}
	if rest := bytes.TrimLeft(p, string(rune(b))); len(rest) > 0 {
		t.Errorf("%s: differs at %d", what, len(p)-len(rest))
	}
}

func fill(t *testing.T, d block.Device, b byte) {
	t.Helper()
	if _, err := d.WriteAt(bytes.Repeat([]byte{b}, int(d.Size())), 0); err != nil {
		t.Fatal(err)
	}
}
