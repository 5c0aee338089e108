package snapshot

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"tidemark/internal/block"
	"tidemark/internal/diff"
	"tidemark/internal/sim"
)

func example() *manifest {
	return &manifest{Version: 1, ID: FormatID(ID{1, 2}), State: stateTaken, Boot: "b", Chunk: 65536, Low: 1, Buffers: 8,
		Devices: []manifestDevice{{Name: "d", Size: 4096}},
		Sources: []manifestSource{{Path: "/x", File: true, Limit: 9, Size: 8, Extents: []block.Range{{Off: 4096, Len: 8192}}}},
		Areas:   []manifestArea{{0, 0, 8192}}}
}

// TestDamagedManifest: any changed byte is found, and the others' snapshots go on.
func TestDamagedManifest(t *testing.T) {
	cfg := Config{Dir: t.TempDir()}
	name := filepath.Join(cfg.Dir, FormatID(ID{1, 2})+".json")
	if err := save(name, example()); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if m, id, err := load(name); err != nil || id != (ID{1, 2}) || !reflect.DeepEqual(&m, example()) {
		t.Fatalf("%+v, %v", m, err)
	}
	for i := range b {
		bad := append([]byte(nil), b...)
		bad[i] ^= 1
		if _, err := decode(bad); !errors.Is(err, diff.ErrCorrupt) {
			t.Fatalf("byte %d changed: %v", i, err)
		}
		if _, err := decode(b[:i]); !errors.Is(err, diff.ErrCorrupt) {
			t.Fatalf("cut at %d: %v", i, err)
		}
	}
	if err := os.WriteFile(name, b[:len(b)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	r := newRig(t, Config{}, sim.NewDisk(mib))
	cfg.Device = r.cfg.Device
	var told error
	cfg.Trouble = func(_ string, err error) { told = err }
	set, err := Open(cfg)
	if !errors.Is(told, diff.ErrCorrupt) || err != nil {
		t.Fatalf("%v, told %v", err, told)
	}
	if _, err := set.Create(Request{Devices: []string{"d0"}}); err != nil {
		t.Error(err)
	}
}

// FuzzManifest: whatever stands there with a right checksum is refused or can be used.
func FuzzManifest(f *testing.F) {
	dir := f.TempDir()
	if err := save(filepath.Join(dir, "m"), example()); err != nil {
		f.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "m"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decode(b)
		if err != nil {
			return
		}
		for _, a := range m.Areas {
			_ = m.Sources[a.Source]
		}
	})
}
