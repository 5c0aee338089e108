package timeline

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"tidemark/internal/segment"
	"tidemark/internal/sim/story"
	"tidemark/internal/stream"
	"tidemark/internal/vault"
)

const bs = story.Block

// sizes of the disks; the second one's last block is short.
var sizes = [2]int64{64 << 10, 44<<10 + 3*512}

// written is a vault with a random history, and the history itself.
type written struct {
	v       *vault.Vault
	records []stream.Record
	stretch []Stretch
}

// history makes a stream that keeps the rules of internal/stream, of about n
// writes, cuts it into segments at random and puts them into a vault.
func history(t testing.TB, seed uint64, n int) *written {
	t.Helper()
	return kept(t, tell(seed, n), seed, 15)
}

func tell(seed uint64, n int) *story.Story {
	s := story.New(seed)
	s.Begin()
	s.Run(n)
	return s
}

func kept(t testing.TB, s *story.Story, seed uint64, every int) *written {
	t.Helper()
	w := keep(t, s.Records, seed, every)
	for _, st := range s.Stretches() {
		w.stretch = append(w.stretch, Stretch{First: st.First, Last: st.Last})
	}
	return w
}

// keep puts a story into a vault, in segments of about every records each.
func keep(t testing.TB, records []stream.Record, seed uint64, every int) *written {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 11))
	w := &written{records: records}
	dir := memoryDir(t)
	v, err := vault.Create(t.Context(), filepath.Join(dir, "vault"))
	if err != nil {
		t.Fatal(err)
	}
	w.v = v
	lock, err := v.Lock(t.Context(), "g", vault.Holder{PID: os.Getpid(), Host: "h"})
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Unlock()
	b := segment.NewBuilder(1 << 16)
	var prev segment.Summary
	var last stream.Position
	put := func() {
		h := segment.Header{Group: "g", GroupID: [16]byte{1}, Sequence: prev.Sequence + 1, Previous: prev.Digest,
			Disks: []segment.Disk{{Name: "a", Size: sizes[0], SectorSize: 512, BlockSize: bs}, {Name: "b", Size: sizes[1], SectorSize: 512, BlockSize: bs}}}
		// A ring is new after each reboot: that must mean nothing here.
		s, err := b.Seal(h, segment.State{Last: last, Source: segment.Source{Ring: [16]byte{byte(r.IntN(3))}, Place: r.Uint64()}})
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, fmt.Sprint(h.Sequence))
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.WriteTo(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
		for range 2 { // the same segment again is nothing
			if err := v.Put(t.Context(), lock, path, s.Summary); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		prev = s.Summary
		b.Reset()
	}
	for i := range w.records {
		if err := b.Append(&w.records[i]); err != nil {
			t.Fatal(err)
		}
		if w.records[i].Kind.TakesPosition() {
			last = w.records[i].Position
		}
		if r.IntN(every) == 0 {
			put()
		}
	}
	put()
	return w
}
