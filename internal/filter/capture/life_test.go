package capture

import (
	"bytes"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/source"
	"tidemark/internal/stream"
)

// write writes n bytes of a value at an offset of disk 0.
func (g *group) write(t testing.TB, value byte, off int64, n int) {
	t.Helper()
	if _, err := g.stacks[0].WriteAt(bytes.Repeat([]byte{value}, n), off); err != nil {
		t.Fatal(err)
	}
}

func (g *group) lostWrites(t testing.TB) uint64 {
	t.Helper()
	c, err := g.ring.Counters()
	if err != nil {
		t.Fatal(err)
	}
	return c.Disks[0].Lost
}

// fill leaves no room for a write of 16 KiB.
func (g *group) fill(t testing.TB) {
	t.Helper()
	g.write(t, 1, 0, 32*kib)
	g.write(t, 2, 32*kib, 24*kib)
}

// TestImpatience: a write that has waited in vain is a gap, and those after it
// do not wait, until something was let go of.
func TestImpatience(t *testing.T) {
	g := newGroup(t, t.TempDir(), Config{RingBytes: 64 * kib, Patience: 20 * time.Millisecond}, 1)
	g.fill(t)
	g.write(t, 3, 0, 16*kib)
	if n := g.lostWrites(t); n != 1 || !g.ring.tired {
		t.Fatalf("%d writes lost, tired %v: want one, and that nobody waits", n, g.ring.tired)
	}
	g.ring.cfg.Patience = time.Hour
	g.write(t, 4, 16*kib, 16*kib)
	if n := g.lostWrites(t); n != 2 {
		t.Fatalf("%d writes lost, want 2", n)
	}
	g.ring.Commit(g.ring.Producer())
	g.write(t, 5, 32*kib, 16*kib)
	if n := g.lostWrites(t); n != 2 {
		t.Fatalf("%d writes lost with room in the ring, want 2", n)
	}
}

// TestMarkWaits: with back-pressure a bookmark waits for room too.
func TestMarkWaits(t *testing.T) {
	g := newGroup(t, t.TempDir(), Config{RingBytes: 64 * kib}, 1)
	g.fill(t)
	name := strings.Repeat("x", stream.NameMax)
	var err error
	for err == nil {
		_, err = g.ring.Bookmark(source.Mark{Name: name})
	}
	if !errors.Is(err, source.ErrFull) {
		t.Fatal(err)
	}
	g.ring.cfg.Patience = time.Hour
	marked := make(chan error)
	go func() { _, err := g.ring.Bookmark(source.Mark{Name: name}); marked <- err }()
	g.ring.Commit(g.ring.Producer())
	if err := <-marked; err != nil {
		t.Error(err)
	}
}

// TestEnds: devices that end in order lose nothing; one that ends otherwise is a
// gap as a whole, and so is one that is made anew under its name.
func TestEnds(t *testing.T) {
	whole := block.Range{Len: diskSize}
	for _, c := range []struct {
		name string
		rest bool
	}{{"in order", true}, {"otherwise", false}} {
		t.Run(c.name, func(t *testing.T) {
			g := newGroup(t, t.TempDir(), Config{RingBytes: 1 << 20}, 2)
			g.write(t, 1, 0, 4*kib)
			if c.rest {
				g.ring.Rest()
			}
			if err := g.system.Remove("d0"); err != nil {
				t.Fatal(err)
			}
			peek, err := g.ring.PeekGaps()
			if err != nil {
				t.Fatal(err)
			}
			lost := len(peek.Ranges) == 1 && peek.Ranges[0] == block.DiskRange{Disk: 0, Range: whole} && g.ring.Lost() != nil
			if lost == c.rest || c.rest && len(peek.Ranges) > 0 {
				t.Errorf("gaps %v, lost %v", peek.Ranges, g.ring.Lost())
			}
		})
	}
	t.Run("made anew", func(t *testing.T) {
		g := newGroup(t, t.TempDir(), Config{RingBytes: 1 << 20}, 1)
		again, err := g.system.Add("again", g.files[0])
		if err == nil {
			_, err = again.Attach(Name, Altitude, g.ring.Driver(0))
		}
		if err != nil {
			t.Fatal(err)
		}
		if peek, err := g.ring.PeekGaps(); err != nil || len(peek.Ranges) != 1 || g.ring.Lost() == nil {
			t.Errorf("gaps %v (%v), lost %v", peek.Ranges, err, g.ring.Lost())
		}
	})
}

// TestReadsBelow: what fills read is the device below the filter.
func TestReadsBelow(t *testing.T) {
	g := newGroup(t, t.TempDir(), Config{RingBytes: 1 << 20}, 1)
	g.write(t, 7, 8*kib, 4*kib)
	have := make([]byte, 4*kib)
	if _, err := g.ring.ReadAt(0, have, 8*kib); err != nil || !bytes.Equal(have, bytes.Repeat([]byte{7}, 4*kib)) {
		t.Errorf("it reads %x... (%v)", have[:8], err)
	}
	if err := g.stacks[0].Detach(Name); err != nil {
		t.Fatal(err)
	}
	if _, err := g.ring.ReadAt(0, have, 8*kib); err == nil {
		t.Error("it reads though the filter is gone")
	}
}

// TestCloseUnderLoad: writes that wait for room, and those that come while the
// ring closes, reach the disk; none touches the ring's memory afterwards.
func TestCloseUnderLoad(t *testing.T) {
	g := newGroup(t, t.TempDir(), Config{RingBytes: 64 * kib, Patience: time.Hour}, 1)
	var writers sync.WaitGroup
	for w := range 4 {
		writers.Go(func() {
			for i := range 50 {
				p := bytes.Repeat([]byte{byte(i)}, 4*kib)
				if _, err := g.stacks[0].WriteAt(p, int64(w)*4*kib); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for g.ring.Producer() == 0 {
		time.Sleep(time.Millisecond)
	}
	if err := g.ring.Close(); err != nil {
		t.Fatal(err)
	}
	writers.Wait()
	have := make([]byte, 16*kib)
	if _, err := g.files[0].ReadAt(have, 0); err != nil || !bytes.Equal(have, bytes.Repeat([]byte{49}, 16*kib)) {
		t.Errorf("the disk holds %x (%v)", have[:8], err)
	}
	if _, err := g.ring.Bookmark(source.Mark{Name: "late"}); !errors.Is(err, ErrClosed) {
		t.Errorf("a bookmark after Close: %v, want ErrClosed", err)
	}
}
