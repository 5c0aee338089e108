package capture

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/health"
	"tidemark/internal/source"
	"tidemark/internal/stack"
	"tidemark/internal/stream"
)

const (
	kib      = 1 << 10
	diskSize = 256 * kib
)

// file is a device in a file: what is written survives the process.
type file struct {
	*os.File
	size int64
	fail atomic.Bool
	n    atomic.Int64
}

var errDisk = errors.New("the disk fails")

func (f *file) WriteAt(p []byte, off int64) (int, error) {
	if f.fail.Load() && f.n.Add(1)%100 == 0 {
		n, _ := f.File.WriteAt(p[:len(p)/2], off) // half of it
		return n, errDisk
	}
	return f.File.WriteAt(p, off)
}
func (f *file) WriteZeroes(r block.Range) error {
	_, err := f.WriteAt(make([]byte, r.Len), r.Off)
	return err
}
func (f *file) Flush() error { return nil }
func (f *file) Size() int64  { return f.size }

func newFile(t testing.TB, path string, size int64) *file {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err == nil {
		err = f.Truncate(size)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return &file{File: f, size: size}
}

// group is some devices with one ring.
type group struct {
	ring   *Ring
	fresh  bool
	files  []*file
	stacks []*stack.Stack
	system *stack.System
}

func newGroup(t testing.TB, dir string, cfg Config, disks int) *group {
	t.Helper()
	g := &group{system: stack.New(stack.Config{}, &health.Set{})}
	cfg.Path = filepath.Join(dir, "ring")
	for i := range disks {
		cfg.Disks = append(cfg.Disks, Disk{Name: fmt.Sprint("d", i), Size: diskSize, BlockSize: 4 * kib})
		g.files = append(g.files, newFile(t, filepath.Join(dir, fmt.Sprint("disk", i)), diskSize))
	}
	var err error
	if g.ring, g.fresh, err = Open(cfg); err != nil {
		t.Fatal(err)
	}
	for i, f := range g.files {
		s, err := g.system.Add(cfg.Disks[i].Name, f)
		if err == nil {
			_, err = s.Attach("capture", Altitude, g.ring.Driver(i))
		}
		if err != nil {
			t.Fatal(err)
		}
		g.stacks = append(g.stacks, s)
	}
	t.Cleanup(func() {
		if err := errors.Join(g.system.Close(), g.ring.Remove()); err != nil {
			t.Error(err)
		}
	})
	return g
}

// replica is what records make of disks.
type replica [][]byte

func newReplica(disks int) replica {
	r := make(replica, disks)
	for i := range r {
		r[i] = make([]byte, diskSize)
	}
	return r
}

func (p replica) apply(r *source.Record) error {
	if r.Kind != source.Write {
		return nil
	}
	on := p[r.Disk][r.Range.Off:r.Range.End()]
	if r.Op == block.OpWrite {
		copy(on, r.Payload)
	} else {
		clear(on)
	}
	return nil
}

// differs gives the first block outside the gap bits in which disks and replica differ.
func (p replica) differs(t testing.TB, g *group) string {
	t.Helper()
	peek, err := g.ring.PeekGaps()
	if err != nil {
		t.Fatal(err)
	}
	for i, f := range g.files {
		have := make([]byte, diskSize)
		if _, err := f.ReadAt(have, 0); err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		for _, r := range peek.Ranges {
			if r.Disk == i {
				copy(have[r.Off:r.End()], p[i][r.Off:r.End()])
			}
		}
		for b := 0; b < diskSize; b += 512 {
			if !bytes.Equal(have[b:b+512], p[i][b:b+512]) {
				return fmt.Sprintf("disk %d at %d holds %.16x, the records %.16x", i, b, have[b:b+16], p[i][b:b+16])
			}
		}
	}
	return ""
}

// writers write over parts of their own until stop, as fast as they can.
func (g *group) writers(seed uint64, steps int, stop *atomic.Bool) {
	var all sync.WaitGroup
	const each = 4
	for i, s := range g.stacks {
		for w := range each {
			all.Go(func() {
				rng := rand.New(rand.NewPCG(seed, uint64(i*each+w)))
				part := int64(diskSize / each)
				buf := make([]byte, 16*kib)
				for n := 0; n < steps && !stop.Load(); n++ {
					size := 512 * (1 + rng.Int64N(32))
					r := block.Range{Off: int64(w)*part + rng.Int64N((part-size)/512+1)*512, Len: size}
					if rng.IntN(8) == 0 {
						_ = s.WriteZeroes(r)
						continue
					}
					binary.LittleEndian.PutUint64(buf, uint64(n)+1)
					for at := int64(512); at < size; at += 512 {
						copy(buf[at:at+512], buf[:512])
					}
					_, _ = s.WriteAt(buf[:size], r.Off) // some fail, on purpose
				}
			})
		}
	}
	all.Wait()
}

// TestReplica: what the records make of empty disks is what the disks hold, but
// for the gap bits, with a ring that has room and with one that has not, with a
// disk that fails now and then.
func TestReplica(t *testing.T) {
	for _, c := range []struct {
		name     string
		ring     int64
		patience time.Duration
		lazy     bool // nobody commits
		fail     bool
		gaps     bool
	}{
		{"room", 1 << 20, 0, false, false, false},
		{"tiny", 64 * kib, 0, true, false, true},
		{"back-pressure", 64 * kib, time.Minute, false, false, false},
		{"failing", 1 << 20, 0, false, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newGroup(t, t.TempDir(), Config{RingBytes: c.ring, Patience: c.patience}, 2)
			if !g.fresh {
				t.Error("the ring is not fresh")
			}
			var stop, done atomic.Bool
			p := newReplica(2)
			var reader sync.WaitGroup
			reader.Go(func() {
				place, drops := g.ring.Consumer(), uint64(0)
				for last := false; !last; {
					last = done.Load()
					next, err := g.ring.Read(place, func(r *source.Record) error {
						if r.Drops < drops {
							return fmt.Errorf("drops fell from %d to %d", drops, r.Drops)
						}
						drops = r.Drops
						return p.apply(r)
					})
					if err != nil {
						t.Error(err)
						stop.Store(true)
						return
					}
					if place = next; !c.lazy {
						g.ring.Commit(place)
					}
				}
			})
			g.files[0].fail.Store(c.fail)
			steps := 1500
			if c.ring < 1<<20 {
				steps = 200
			}
			if c.ring == 1<<20 {
				g.ring.cfg.Patience = time.Minute // the race detector's reader is slow
			}
			g.writers(1, steps, &stop)
			done.Store(true)
			reader.Wait()
			if what := p.differs(t, g); what != "" {
				t.Error(what)
			}
			if got := g.ring.Drops() > 0; got != c.gaps {
				t.Errorf("drops: %d, want some: %v", g.ring.Drops(), c.gaps)
			}
			if s, err := g.ring.ScanInFlight(); err != nil || s.InFlight != 0 || s.Low != g.ring.Producer() {
				t.Errorf("at rest %+v (%v), want nothing in flight", s, err)
			}
			if err := g.ring.Lost(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestOrder: a counter that goes from disk to disk, each write waiting for the
// one before, stands in the ring in that order, among other writes.
func TestOrder(t *testing.T) {
	g := newGroup(t, t.TempDir(), Config{RingBytes: 64 << 20}, 3)
	var stop atomic.Bool
	var others sync.WaitGroup
	others.Go(func() { g.writers(2, 300, &stop) })
	const count = 900
	token := []byte("counter!")
	for n := range count {
		sector := bytes.Repeat(binary.LittleEndian.AppendUint64(bytes.Clone(token), uint64(n)), 32)
		if _, err := g.stacks[n%3].WriteAt(sector, int64(n%4)*512); err != nil {
			t.Fatal(err)
		}
		if n%100 == 0 {
			if _, err := g.ring.Bookmark(source.Mark{Name: strconv.Itoa(n), Consistency: stream.Crash, Token: uint64(n)}); err != nil {
				t.Fatal(err)
			}
		}
	}
	others.Wait()
	seen, marks := 0, 0
	if _, err := g.ring.Read(g.ring.Consumer(), func(r *source.Record) error {
		if r.Kind == source.Bookmark {
			if r.Name != strconv.Itoa(seen-1) || r.Token != uint64(seen-1) {
				return fmt.Errorf("bookmark %s (%d) behind write %d", r.Name, r.Token, seen-1)
			}
			marks++
		} else if len(r.Payload) == 512 && bytes.HasPrefix(r.Payload, token) {
			if n := int(binary.LittleEndian.Uint64(r.Payload[8:])); n != seen || r.Disk != n%3 {
				return fmt.Errorf("write %d of disk %d where %d was to be", n, r.Disk, seen)
			}
			seen++
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if seen != count || marks != 9 {
		t.Errorf("%d writes and %d bookmarks, want %d and 9", seen, marks, count)
	}
}

// TestKilled: the process is killed at any instant. What the ring and the gap
// bits of the next one say of the disks is true.
func TestKilled(t *testing.T) {
	if dir := os.Getenv("TIDEMARK_CAPTURE"); dir != "" {
		g := newGroup(t, dir, Config{RingBytes: 1 << 20}, 2)
		seed, err := strconv.ParseUint(os.Getenv("TIDEMARK_CAPTURE_SEED"), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		var stop atomic.Bool
		fmt.Println("ready")
		g.writers(seed, 1<<30, &stop)
	}
	rounds := 6
	if n, err := strconv.Atoi(os.Getenv("TIDEMARK_SEEDS")); err == nil {
		rounds = n
	}
	inFlight := 0
	for round := range rounds {
		dir := t.TempDir()
		cmd := exec.Command(os.Args[0], "-test.run", "^TestKilled$")
		cmd.Env = append(os.Environ(), "TIDEMARK_CAPTURE="+dir, fmt.Sprint("TIDEMARK_CAPTURE_SEED=", round))
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(out, make([]byte, 5)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(rand.IntN(20_000)) * time.Microsecond)
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		g := newGroup(t, dir, Config{RingBytes: 1 << 20}, 2)
		if g.fresh {
			t.Fatal("the ring of the killed process was not taken over")
		}
		p := newReplica(2)
		if _, err := g.ring.Read(g.ring.Consumer(), p.apply); err != nil {
			t.Fatal(err)
		}
		if what := p.differs(t, g); what != "" {
			t.Errorf("round %d: %s", round, what)
		}
		if g.ring.Drops() > 0 {
			inFlight++
		}
		var stop atomic.Bool
		g.writers(uint64(round), 5, &stop) // and it goes on
		if s, err := g.ring.ScanInFlight(); err != nil || s.InFlight != 0 {
			t.Errorf("after the kill %+v (%v)", s, err)
		}
	}
	if inFlight == 0 {
		t.Error("no process was killed with a write in flight: this has shown nothing")
	}
}

// TestRefused: what is not this ring is replaced, what cannot be is refused.
func TestRefused(t *testing.T) {
	dir := t.TempDir()
	cfg := Config{Path: filepath.Join(dir, "ring"), RingBytes: 64 * kib, Disks: []Disk{{"a", diskSize, 4096}}}
	for name, change := range map[string]func(*Config){
		"ring size":  func(c *Config) { c.RingBytes = 65000 },
		"no disks":   func(c *Config) { c.Disks = nil },
		"block size": func(c *Config) { c.Disks = []Disk{{"a", diskSize, 100}} },
	} {
		bad := cfg
		change(&bad)
		if _, _, err := Open(bad); !errors.Is(err, ErrConfig) {
			t.Errorf("%s: %v, want %v", name, err, ErrConfig)
		}
	}
	open := func(c Config) bool {
		t.Helper()
		r, fresh, err := Open(c)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(r.SetNote("note"), r.Close()); err != nil {
			t.Fatal(err)
		}
		return fresh
	}
	if !open(cfg) || open(cfg) {
		t.Error("a ring is fresh once")
	}
	other := cfg
	other.Disks = []Disk{{"b", diskSize, 4096}}
	if !open(other) {
		t.Error("the ring of other disks was taken over")
	}
	b, err := os.ReadFile(cfg.Path)
	if err != nil {
		t.Fatal(err)
	}
	for at := range 96 { // the header, but for its note
		bad := bytes.Clone(b)
		bad[at] ^= 0xff
		if err := os.WriteFile(cfg.Path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		r, _, err := Open(other)
		if err != nil {
			continue
		}
		_, err = r.Read(r.Consumer(), func(*source.Record) error { return nil })
		if err := errors.Join(err, r.Close()); err != nil {
			t.Logf("byte %d: %v", at, err)
		}
	}
	g := newGroup(t, t.TempDir(), Config{RingBytes: 64 * kib}, 1)
	if _, err := g.ring.Bookmark(source.Mark{Name: string(make([]byte, stream.NameMax+1))}); err == nil {
		t.Error("a name that is too long")
	}
	for err = nil; err == nil; {
		_, err = g.ring.Bookmark(source.Mark{Name: "full"})
	}
	if !errors.Is(err, source.ErrFull) {
		t.Errorf("a full ring: %v, want %v", err, source.ErrFull)
	}
}

// TestResized: a device that becomes larger is no longer what the history is of.
func TestResized(t *testing.T) {
	g := newGroup(t, t.TempDir(), Config{RingBytes: 64 * kib}, 1)
	g.files[0].size += 4096
	g.stacks[0].Resized()
	if g.ring.Lost() == nil {
		t.Error("nothing is said of the new size")
	}
	if _, err := g.stacks[0].WriteAt(make([]byte, 4096), diskSize); err != nil {
		t.Error(err)
	}
}

func BenchmarkWrite(b *testing.B) {
	g := newGroup(b, b.TempDir(), Config{RingBytes: 16 << 20}, 1)
	buf := make([]byte, 4*kib)
	b.SetBytes(int64(len(buf)))
	b.ReportAllocs()
	f := &filter{ring: g.ring}
	q := &stack.Request{Op: block.OpWrite, Range: block.Range{Len: 4 * kib}, Data: buf}
	for b.Loop() {
		slot := g.ring.submit(f, q)
		g.ring.end(0, slot, nil)
		g.ring.Commit(g.ring.Producer())
	}
}
