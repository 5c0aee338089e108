package snapshot

import (
	"errors"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

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

// TestGoldenManifest pins the format of docs/formats/difference.md.
func TestGoldenManifest(t *testing.T) {
	name := filepath.Join(t.TempDir(), "manifest")
	full := example()
	full.TakenAt, full.Frozen, full.Lost = time.Unix(1e9, 0).UTC(), true, "why"
	full.Devices[0].Generation, full.Devices[0].Number = "0102", 3
	full.Sources = append(full.Sources, manifestSource{Path: "/dev/disk/by-id/x", Disk: "/dev/sdx", Size: 4096, Extents: []block.Range{{Len: 4096}}},
		manifestSource{Path: "/mnt/diff", File: true, Limit: 9, On: "d", Inode: 12, Size: 4096, Extents: []block.Range{{Off: 8192, Len: 4096}}})
	if err := save(name, full); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := errors.Join(os.MkdirAll("testdata", 0o755), os.WriteFile("testdata/manifest.v1", got, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile("testdata/manifest.v1")
	if err != nil || string(got) != string(want) {
		t.Errorf("the format changed: %s, %v", got, err)
	}
	if m, err := decode(want); err != nil || !reflect.DeepEqual(&m, full) {
		t.Errorf("%+v, %v", m, err)
	}
}

var update = flag.Bool("update", false, "write the golden file anew")

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
