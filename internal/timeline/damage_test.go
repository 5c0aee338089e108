package timeline

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"tidemark/internal/segment"
	"tidemark/internal/sim/story"
	"tidemark/internal/stream"
	"tidemark/internal/vault"
)

// victim is a small vault that is damaged in every way, with the truth of some
// of its points.
type victim struct {
	*written
	t      *testing.T
	seed   uint64
	dir    string
	files  map[string][]byte // as they were, by path below dir
	points []truePoint
	last   stream.Position
}

type truePoint struct {
	disk    int
	at      stream.Position
	content []byte
}

func newVictim(t *testing.T, seed uint64) *victim {
	t.Helper()
	old := sizes
	sizes = [2]int64{12 << 10, 8<<10 + 3*512}
	t.Cleanup(func() { sizes = old })
	s := story.New(seed)
	s.Sizes, s.SectorMax = sizes, 4
	s.Begin()
	s.Run(12)
	s.Gap(stream.CauseContinuity, true)
	s.Fill()
	s.Run(12)
	v := &victim{written: kept(t, s, seed, 8), t: t, seed: seed, files: map[string][]byte{}}
	v.dir = v.v.Dir()
	err := filepath.WalkDir(v.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		v.files[strings.TrimPrefix(path, v.dir+"/")] = b
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, st := range v.stretch {
		for i, at := range []stream.Position{st.Last, (st.First + st.Last) / 2} {
			disk := (len(v.points)/2 + i) % 2
			v.points = append(v.points, truePoint{disk, at, truth(v.records, disk, at)})
		}
		v.last = st.Last
	}
	return v
}

// objects are the segments' files, in order.
func (v *victim) objects() (out []string) {
	refs, err := v.v.Segments(v.t.Context(), "g")
	if err != nil {
		v.t.Fatal(err)
	}
	for _, r := range refs {
		out = append(out, segments+r.Name)
	}
	return out
}

const segments = "groups/g/segments/L00/"

func (v *victim) put(name string, b []byte) {
	v.t.Helper()
	if err := os.WriteFile(filepath.Join(v.dir, name), b, 0o600); err != nil {
		v.t.Fatal(err)
	}
}

func (v *victim) remove(name string) {
	v.t.Helper()
	if err := os.Remove(filepath.Join(v.dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		v.t.Fatal(err)
	}
}

// verify gives what is found; a vault that does not open is found as a whole.
func (v *victim) verify(what string) ([]Damage, bool) {
	v.t.Helper()
	opened, err := vault.Open(v.t.Context(), v.dir)
	if errors.Is(err, segment.ErrDamaged) {
		return nil, false
	}
	if err != nil {
		v.t.Fatalf("%s: %v", what, err)
	}
	r, err := Verify(v.t.Context(), opened, "g", func(int64, int64) {})
	if err != nil {
		v.t.Fatalf("%s: verify: %v", what, err)
	}
	return r.Damage, true
}

// examine holds what a damaged vault gives against the truth: right bytes or an
// error, an error only where verify names the point, and no older point for a
// newer one. It gives what verify found.
func (v *victim) examine(what string) []Damage {
	v.t.Helper()
	damage, opens := v.verify(what)
	if !opens {
		return []Damage{{Object: "tidemark-vault"}}
	}
	h, err := Load(v.t.Context(), v.v, "g")
	if err != nil {
		v.t.Fatalf("%s: load: %v", what, err)
	}
	if p, err := h.Resolve(stream.Spec{Latest: true}); err == nil && p.Position != v.last {
		v.t.Fatalf("%s: latest is silently %d instead of %d", what, p.Position, v.last)
	}
	for _, p := range v.points {
		got, err := v.read(h, p)
		switch {
		case err != nil && !errors.Is(err, segment.ErrDamaged):
			v.t.Fatalf("%s: disk %d at %d: %v", what, p.disk, p.at, err)
		case err != nil && !named(damage, h, p):
			v.t.Fatalf("%s: disk %d at %d cannot be read (%v), and verify does not name it: %v", what, p.disk, p.at, err, damage)
		case err == nil && !bytes.Equal(got, p.content):
			v.t.Fatalf("%s: disk %d at %d has wrong bytes", what, p.disk, p.at)
		}
	}
	return damage
}

// read gives a disk at a point, as a restore would.
func (v *victim) read(h *History, p truePoint) ([]byte, error) {
	at, err := h.Resolve(stream.Spec{Position: p.at})
	if err != nil {
		return nil, err
	}
	view, err := h.View(v.t.Context(), p.disk, at.Position)
	if err != nil {
		return nil, err
	}
	defer view.Close()
	b := make([]byte, view.Size())
	if _, err := view.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return b, nil
}

// named says whether verify names a point as spoiled.
func named(damage []Damage, h *History, p truePoint) bool {
	for _, d := range damage {
		if d.From <= p.at && p.at <= d.To && (d.Disk == "" || d.Disk == []string{"a", "b"}[p.disk]) {
			return true
		}
	}
	return false
}

// TestEveryByte flips a bit in bytes of every file of a vault: each byte where
// TIDEMARK_SEEDS is set.
func TestEveryByte(t *testing.T) {
	v := newVictim(t, 5)
	if damage := v.examine("untouched"); len(damage) != 0 {
		t.Fatalf("untouched: %v", damage)
	}
	for name, good := range v.files {
		stride := 1
		if os.Getenv("TIDEMARK_SEEDS") == "" {
			stride = 1 + len(good)/20
		}
		payloads := 0
		for at := len(good) % 3; at < len(good); at += stride {
			b := bytes.Clone(good)
			b[at] ^= 1 << (at % 8)
			v.put(name, b)
			damage := v.examine(name + " flipped")
			if len(damage) == 0 {
				t.Fatalf("%s: a flipped bit in byte %d is not found", name, at)
			}
			for _, d := range damage {
				if d.Object != filepath.Base(name) {
					t.Fatalf("%s, byte %d: verify names %v", name, at, d)
				}
				if d.Disk != "" && !d.Range.Empty() {
					payloads++
				}
			}
		}
		if strings.HasPrefix(name, segments) && len(good) > 4000 && payloads == 0 {
			t.Errorf("%s: no damage of payloads was told by disk and range", name)
		}
		v.put(name, good)
	}
}

// TestLostAndMixedUp: objects cut, gone, exchanged, copied, renamed, replaced
// and lengthened.
func TestLostAndMixedUp(t *testing.T) {
	v := newVictim(t, 6)
	other := newVictim(t, 7) // of the same group, if one believes its name
	names := v.objects()
	check := func(what string) {
		t.Helper()
		if damage := v.examine(what); len(damage) == 0 {
			t.Errorf("%s: verify finds nothing", what)
		}
		for name, good := range v.files {
			v.put(name, good)
		}
	}
	for i, name := range names {
		good := v.files[name]
		for _, n := range []int{0, len(good) / 2, len(good) - 1} {
			v.put(name, good[:n])
			check(name + " cut")
		}
		v.put(name, append(bytes.Clone(good), 0))
		check(name + " lengthened")
		v.remove(name)
		if damage, _ := v.verify(name); !slices.ContainsFunc(damage, func(d Damage) bool { return strings.Contains(d.Detail, "missing") }) {
			t.Errorf("%s removed: verify says %v", name, damage)
		}
		check(name + " removed")
		next := names[(i+1)%len(names)]
		v.put(name, v.files[next])
		v.put(next, good)
		check(name + " and the next exchanged")
		v.put(name, v.files[next])
		check(name + " replaced by another")
		for _, stray := range []string{"copy.seg", filepath.Base(name) + ".bak", "ffffffffffffffff" + filepath.Base(name)[16:], filepath.Base(name)[:34] + "00000000000000ff.seg", "letter.txt"} {
			v.put(segments+stray, good)
			check(name + " copied to " + stray)
			v.remove(name)
			check(name + " renamed to " + stray)
			v.remove(segments + stray)
		}
	}
	for _, name := range names {
		v.remove(name)
	}
	if groups, err := v.v.Groups(t.Context()); err != nil || len(groups) != 1 {
		t.Errorf("with all objects removed the groups are %v, %v", groups, err)
	}
	check("all removed")
	twins := forged(t, v)
	for i, name := range names { // the very same name and positions, and every checksum fits
		v.put(name, twins[i])
		check(name + " replaced by a twin")
	}
	for i, name := range other.objects() {
		v.put(segments+filepath.Base(name), other.files[name])
		damage := v.examine("an object of another history")
		if len(damage) == 0 {
			t.Errorf("object %d of another history is not found", i)
		}
		if v.files[name] == nil {
			v.remove(name)
		} else {
			v.put(name, v.files[name])
		}
	}
}

// forged gives the objects of a history like v's, with other content.
func forged(t *testing.T, v *victim) (out [][]byte) {
	t.Helper()
	var records []stream.Record
	for _, r := range v.records {
		r.Payload = bytes.Clone(r.Payload)
		for i := range r.Payload {
			r.Payload[i]++
		}
		records = append(records, r)
	}
	twin := keep(t, records, v.seed, 8)
	for _, name := range v.objects() {
		b, err := os.ReadFile(filepath.Join(twin.v.Dir(), name))
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, b)
	}
	return out
}
