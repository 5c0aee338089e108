package live

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// TestModel: random writers of every kind, each in a region of its own, against
// a model in memory. At quiet moments a bookmark is the model exactly; at any
// other position every region is at some step of its writer, and no step is cut
// but at the ends of its bios.
func TestModel(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		testkit.Need(t, "root", "tap", "loop")
		m := newModel(t, rng)
		m.d = program.New(t)
		m.d.Protect("g", m.paths...)
		m.names = diskNames(m.d.Group("g"))
		const rounds = 3
		for round := range rounds {
			m.run(8 + rng.IntN(12))
			m.d.Run("bookmark", "g", fmt.Sprint("quiet-", round))
			for _, r := range m.regions {
				r.quiet = append(r.quiet, len(r.steps))
			}
			if rng.IntN(2) == 0 {
				m.d.Restart()
				m.d.Await("g", "taken over", online)
			}
		}
		if g := m.d.Settle("g"); g.Disks[0].Lost > 0 {
			t.Fatalf("%d writes lost: this ring holds all of them", g.Disks[0].Lost)
		}
		m.d.Run("verify", "--vault", m.d.Vault, "--live")
		for round := range rounds {
			m.check(fmt.Sprint("quiet-", round), func(r *region, part []byte) error { return r.exactly(part, r.quiet[round], false) })
		}
		all := stretches(t, m.d, "g")
		if len(all) != 1 {
			t.Errorf("%d stretches, want one: %v", len(all), all)
		}
		for _, p := range all[0].positions(rng, 8) {
			m.check(seq(p), (*region).somewhere)
		}
	})
}

// model is a group of disks, cut into regions.
type model struct {
	t       *testing.T
	d       *program.Daemon
	paths   []string
	names   []string
	regions []*region
}

// sizes are odd on purpose: no multiple of the map's blocks, or of anything.
var modelDisks = []struct{ size, sector int64 }{
	{15*mib + 5*512, 512},
	{13*mib + 3*4096, 4096},
	{9*mib + 4096 + 512, 512},
}

func newModel(t *testing.T, rng *rand.Rand) *model {
	m := &model{t: t}
	for i, is := range modelDisks {
		disk := testkit.NewDiskOf(t, is.size, int(is.sector))
		learn(t, disk.Path)
		m.paths = append(m.paths, disk.Path)
		kinds := []func(testing.TB, *region, string){direct, buffered, mapped}
		rng.Shuffle(len(kinds), func(a, b int) { kinds[a], kinds[b] = kinds[b], kinds[a] })
		for k, kind := range kinds {
			r := &region{disk: i, sector: is.sector, rng: fork(rng)}
			r.first = is.size / 3 * int64(k) &^ 4095
			if r.end = is.size / 3 * int64(k+1) &^ 4095; k == len(kinds)-1 {
				r.end = is.size
			}
			kind(t, r, disk.Path)
			m.regions = append(m.regions, r)
		}
	}
	return m
}

// learn has a loop device on tmpfs find out that its file cannot zero a range:
// what is on its way at that moment fails, and later ones write zeroes.
func learn(t *testing.T, path string) {
	f := open(t, path, unix.O_DIRECT)
	if err := unix.Fallocate(int(f.Fd()), zeroRange, 0, 4096); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		t.Fatal(err)
	}
}

// run has every writer make some steps. Afterwards all of it is on the disks.
func (m *model) run(steps int) {
	m.t.Helper()
	var all sync.WaitGroup
	for _, r := range m.regions {
		all.Go(func() {
			for range steps {
				if err := r.step(); err != nil {
					m.t.Errorf("writing disk %d at %d: %v", r.disk, r.first, err)
					return
				}
			}
		})
	}
	all.Wait()
	if m.t.Failed() {
		m.t.FailNow()
	}
}

// check holds every region of every disk at a point against its model.
func (m *model) check(at string, region func(*region, []byte) error) {
	m.t.Helper()
	for i, name := range m.names {
		whole := image(m.t, m.d, "g", name, at)
		if int64(len(whole)) != modelDisks[i].size {
			m.t.Fatalf("disk %s at %s has %d bytes, want %d", name, at, len(whole), modelDisks[i].size)
		}
		for _, r := range m.regions {
			if r.disk != i {
				continue
			}
			if err := region(r, whole[r.first:r.end]); err != nil {
				m.t.Errorf("disk %s at %s, %s writer from %d: %v", name, at, r.kind, r.first, err)
			}
		}
	}
}

type stepKind int

const (
	stepWrite stepKind = iota
	stepZero
	stepDiscard
)

// step is one thing that a writer did; its number, from 1, is what the sectors carry.
type step struct {
	kind       stepKind
	first, end int64 // sectors of the region
}

// region is a part of a disk with one writer, which does one thing after the
// other, and all that it did.
type region struct {
	disk       int
	kind       string
	sector     int64
	first, end int64 // bytes on the disk
	rng        *rand.Rand
	steps      []step
	quiet      []int // steps at the bookmarks

	file  *os.File
	buf   []byte
	write func(p []byte, off int64) error
}

func (r *region) step() error {
	s := step{kind: stepWrite}
	if dice := r.rng.IntN(12); dice < 4 {
		s.kind = []stepKind{stepZero, stepZero, stepDiscard, stepDiscard}[dice]
	}
	unit := r.sector
	if s.kind != stepWrite {
		unit = 4096 // the page cache forgets whole pages
	}
	// As many small as large ones: 1 sector, 2 to 3, 4 to 7 ... 4 MiB.
	most := min(int64(4*mib), r.end-r.first) / unit
	n := int64(1)
	for n < most && r.rng.IntN(5) > 0 {
		n = min(most, 2*n+r.rng.Int64N(2))
	}
	off := r.rng.Int64N((r.end-r.first)/unit-n+1) * unit
	s.first, s.end = off/testkit.Sector, (off+n*unit)/testkit.Sector
	r.steps = append(r.steps, s) // before it is done: a position may show half of it
	return r.do(s, uint64(len(r.steps)))
}

func (r *region) do(s step, number uint64) error {
	off, n := r.first+s.first*testkit.Sector, (s.end-s.first)*testkit.Sector
	switch s.kind {
	case stepZero:
		if number%2 == 0 {
			err := unix.Fallocate(int(r.file.Fd()), unix.FALLOC_FL_KEEP_SIZE|unix.FALLOC_FL_PUNCH_HOLE, off, n)
			if !errors.Is(err, unix.EOPNOTSUPP) { // as it is where the file cannot zero a range
				return err
			}
		}
		return unix.Fallocate(int(r.file.Fd()), zeroRange, off, n)
	case stepDiscard:
		return discard(r.file, off, n)
	}
	testkit.Fill(r.buf[:n], r.disk, off, number)
	return r.write(r.buf[:n], off)
}

// exactly compares an image of the region with the model after n steps. With
// cut the last of them may be there in parts.
func (r *region) exactly(image []byte, n int, cut bool) error {
	have, err := testkit.Check(image, r.disk, r.first)
	if err != nil {
		return err
	}
	want, before := make([]uint64, len(have)), make([]uint64, len(have))
	for i, s := range r.steps[:n] {
		if i == n-1 {
			copy(before, want)
		}
		for at := s.first; at < s.end; at++ {
			switch s.kind {
			case stepWrite:
				want[at] = uint64(i + 1)
			case stepZero:
				want[at] = 0
			case stepDiscard:
				want[at] = undefined
			}
		}
	}
	for at := range have {
		if agrees(have[at], want[at]) || cut && agrees(have[at], before[at]) {
			continue
		}
		return fmt.Errorf("sector %d has number %d, want %d (after %d steps)", at, have[at], int64(want[at]), n)
	}
	return nil
}

const zeroRange = unix.FALLOC_FL_KEEP_SIZE | unix.FALLOC_FL_ZERO_RANGE

const undefined = ^uint64(0)

func agrees(have, want uint64) bool { return have == want || want == undefined }

// somewhere finds a step of the writer that the image is at.
func (r *region) somewhere(image []byte) error {
	if r.kind != "direct" {
		return nil // the kernel writes its pages back when and as often as it likes
	}
	have, err := testkit.Check(image, r.disk, r.first)
	if err != nil {
		return err
	}
	newest := 0
	for _, n := range have {
		newest = max(newest, int(n))
	}
	// Zeroes and discards leave no number, and cover those of others: any later step may fit.
	for n := newest; n <= len(r.steps); n++ {
		if err = r.exactly(image, n, true); err == nil {
			return nil
		}
	}
	return fmt.Errorf("the image is at no step of its writer; its newest number is %d: %w", newest, err)
}

// direct writes past the page cache.
func direct(t testing.TB, r *region, path string) {
	r.kind, r.file, r.buf = "direct", open(t, path, unix.O_DIRECT), aligned(t, 4*mib)
	r.write = func(p []byte, off int64) error {
		_, err := r.file.WriteAt(p, off)
		return err
	}
}

// buffered writes into the page cache and has it written back.
func buffered(t testing.TB, r *region, path string) {
	r.kind, r.file, r.buf = "buffered", open(t, path, 0), aligned(t, 4*mib)
	r.write = func(p []byte, off int64) error {
		if _, err := r.file.WriteAt(p, off); err != nil {
			return err
		}
		return r.file.Sync()
	}
}

// mapped writes into memory that is the disk's.
func mapped(t testing.TB, r *region, path string) {
	r.kind, r.file, r.buf = "mapped", open(t, path, 0), aligned(t, 4*mib)
	memory, err := unix.Mmap(int(r.file.Fd()), r.first, int(r.end-r.first), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(memory) })
	r.write = func(p []byte, off int64) error {
		copy(memory[off-r.first:], p)
		return unix.Msync(memory, unix.MS_SYNC)
	}
}
