package cbt

import (
	"bytes"
	"errors"
	"flag"
	"math/rand/v2"
	"os"
	"testing"

	"tidemark/internal/block"
	"tidemark/internal/sim"
	"tidemark/internal/vfs"
)

var update = flag.Bool("update", false, "write the golden file anew")

// is the identity this one?
func is(identity string) func(string) bool {
	return func(was string) bool { return was == identity }
}

func equal(a, b *Map) bool {
	for _, p := range [][2]*side{{a.write.Load(), b.write.Load()}, {a.read.Load(), b.read.Load()}} {
		if p[0].size != p[1].size || p[0].generation != p[1].generation || p[0].number != p[1].number || !p[0].blocks.equal(p[1].blocks) {
			return false
		}
	}
	return true
}

func random(rng *rand.Rand) *Map {
	m := New(1 + rng.Int64N(1<<22))
	for range rng.IntN(30) {
		m.Mark(block.Range{Off: rng.Int64N(1 << 22), Len: rng.Int64N(1 << 16)})
		if rng.IntN(3) == 0 {
			m.Take()
		}
	}
	return m
}

// TestCleanRestart: a saved map goes on, in its generation, with both tables -
// once: the file is gone as soon as it was opened.
func TestCleanRestart(t *testing.T) {
	for seed := range sim.Seeds(30) {
		fsys := sim.New(seed)
		m := random(rand.New(rand.NewPCG(seed, 3)))
		size := m.write.Load().size
		if err := m.Save(fsys, "/d.cbt", "disk"); err != nil {
			t.Fatal(err)
		}
		fsys = fsys.Crash()
		got, why, err := Open(fsys, "/d.cbt", is("disk"), size)
		if err != nil || why != "" || !equal(m, got) {
			t.Fatalf("seed %d: %q, %v", seed, why, err)
		}
		got, why, err = Open(fsys.Crash(), "/d.cbt", is("disk"), size)
		if err != nil || why == "" || got.Info().Generation == m.Info().Generation {
			t.Fatalf("seed %d: after a crash the map of before is believed: %q, %v", seed, why, err)
		}
	}
}

// TestCrashWhileSaving: whatever the moment and the fault, the next Open has the
// whole map or a new generation.
func TestCrashWhileSaving(t *testing.T) {
	var kept, begun int
	for seed := range sim.Seeds(20) {
		for at := 1; at <= 8; at++ {
			for _, crash := range []bool{true, false} {
				fsys := sim.New(seed)
				m := random(rand.New(rand.NewPCG(seed, 4)))
				if crash {
					fsys.CrashAt(at)
				} else {
					fsys.Fail(at, 1, errors.New("full"))
				}
				saved := m.Save(fsys, "/d.cbt", "disk") == nil
				got, why, err := Open(fsys.Crash(), "/d.cbt", is("disk"), m.write.Load().size)
				switch {
				case err != nil:
					t.Fatalf("seed %d, step %d: %v", seed, at, err)
				case why == "" && equal(m, got):
					kept++
				case why != "" && got.Info().Number == 0 && got.Info().Generation != m.Info().Generation && !saved:
					begun++
				default:
					t.Fatalf("seed %d, step %d, saved %v: %q", seed, at, saved, why)
				}
			}
		}
	}
	if kept == 0 || begun == 0 {
		t.Errorf("kept %d, begun %d", kept, begun)
	}
}

// TestOpenBeginsAnew where the file is not of this very device, or not whole.
func TestOpenBeginsAnew(t *testing.T) {
	for what, c := range map[string]struct {
		identity string
		size     int64
		spoil    func(b []byte) []byte
	}{
		"nothing":          {"disk", 1 << 20, func([]byte) []byte { return nil }},
		"another device":   {"other", 1 << 20, func(b []byte) []byte { return b }},
		"another size":     {"disk", 1 << 21, func(b []byte) []byte { return b }},
		"a flipped bit":    {"disk", 1 << 20, func(b []byte) []byte { b[40] ^= 4; return b }},
		"cut short":        {"disk", 1 << 20, func(b []byte) []byte { return b[:len(b)-7] }},
		"something behind": {"disk", 1 << 20, func(b []byte) []byte { return append(b, 0) }},
	} {
		fsys := vfs.OS{}
		name := t.TempDir() + "/d.cbt"
		m := New(1 << 20)
		m.Take()
		if err := m.Save(fsys, name, "disk"); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, c.spoil(b), 0o600); err != nil {
			t.Fatal(err)
		}
		got, why, err := Open(fsys, name, is(c.identity), c.size)
		if err != nil || why == "" || got.Info().Generation == m.Info().Generation || got.Info().Size != c.size {
			t.Errorf("%s: %q, %v", what, why, err)
		}
		if _, err := os.Stat(name); !os.IsNotExist(err) {
			t.Errorf("%s: the file is still there", what)
		}
	}
}

func golden() *Map {
	m := &Map{}
	m.write.Store(&side{size: 40 * 4096, generation: Generation{1, 2, 3}, number: 3, blocks: newTable(40 * 4096)})
	m.read.Store(&side{size: 40 * 4096, generation: Generation{1, 2, 3}, number: 2, blocks: newTable(40 * 4096)})
	m.write.Load().blocks.raise(block.Range{Off: 8192, Len: 4096 * 20}, 3)
	m.read.Load().blocks.raise(block.Range{Off: 4096, Len: 1}, 2)
	return m
}

// TestGolden pins the format.
func TestGolden(t *testing.T) {
	b := golden().encode("golden")
	if *update {
		if err := os.WriteFile("testdata/map.v1", b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile("testdata/map.v1")
	if err != nil || !bytes.Equal(b, want) {
		t.Errorf("the format changed: % x, %v", b, err)
	}
	if m, identity, err := decode(want); err != nil || identity != "golden" || !equal(m, golden()) {
		t.Errorf("decoded: %v", err)
	}
}

// FuzzDecode: anything is refused or is a map that encodes to itself again.
func FuzzDecode(f *testing.F) {
	f.Add(golden().encode("golden"))
	f.Add(random(rand.New(rand.NewPCG(1, 1))).encode(""))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 4 { // a right checksum, so that what is behind it is reached
			b = resum(b)
		}
		m, identity, err := decode(b)
		if err != nil {
			if !errors.Is(err, ErrDamaged) {
				t.Errorf("not ErrDamaged: %v", err)
			}
			return
		}
		again, was, err := decode(m.encode(identity))
		if err != nil || was != identity || !equal(m, again) {
			t.Errorf("decoded, encoded, decoded: %v", err)
		}
	})
}

func resum(b []byte) []byte {
	m := append([]byte(nil), b[:len(b)-4]...)
	return appendSum(m)
}
