package fill

import (
	"math/rand/v2"

	"tidemark/internal/block"
)

// bio is one write as the simulated kernel sees it. Times are steps of the
// simulation; a bio's program and its completion take several each, so that
// every interleaving with the daemon can happen. A sector is one byte here.
type bio struct {
	id       int // the value that it writes; 0 is what disks hold at first
	key      int // its pointer
	disk     int
	off, n   int
	q0, q1   int  // queue program began, returned
	done     int  // the submitter learnt of its end; never: far in the future
	fail     bool // ends in an error, half applied
	void     bool // ends in an error, not applied at all
	missed   bool // the completion program is skipped
	slow     bool // waits long before each step
	bioPath  bool // leaves the map before its error is marked
	dropped  bool
	captured bool
	drops    uint64
	noted    Place
	applied  []bool
	left     []int // sectors still to apply
	program  []func()
}

const never = 1 << 40

type flight struct {
	place   Place
	disk    int
	off, n  int
	dropped bool
}

type ringRecord struct {
	place, end Place
	b          *bio
	busy       bool
	drops      uint64
}

// kernel is what outlives the daemon.
type kernel struct {
	rng       *rand.Rand
	now       int
	disks     []Disk
	content   [][]int
	history   [][][]*bio // by disk and sector, in the order of submission
	ring      []ringRecord
	producer  Place
	consumer  Place
	ringSize  Place
	drops     uint64
	bits      [][]bool
	inflight  map[int]*flight
	mapMax    int
	ends      bool
	active    []*bio
	lastBio   int
	dropRate  float64
	failRate  float64
	missRate  float64
	quiet     bool // writers have stopped
	overlap   bool // the same sector may be in flight twice: only settling is checked
	missFails bool // the end that is missed may be a failure
	met       *coverage
}

func newKernel(rng *rand.Rand, o ownerFault) *kernel {
	k := &kernel{rng: rng, inflight: map[int]*flight{}, ends: true, mapMax: 100,
		disks: []Disk{{Size: int64(8 + rng.IntN(12)), BlockSize: 4}, {Size: int64(3 + rng.IntN(8)), BlockSize: 2}}}
	switch rng.IntN(5) {
	case 4: // many blocks
		k.disks[0] = Disk{Size: int64(12 + rng.IntN(16)), BlockSize: 2}
	case 0:
		k.disks = k.disks[:1]
	case 1: // all on one or two blocks
		k.disks = []Disk{{Size: int64(2 + rng.IntN(4)), BlockSize: 2}}
	}
	k.ringSize = Place(20 + rng.IntN(200)<<rng.IntN(3))
	k.dropRate = []float64{0, 0.02, 0.1, 0.4, 0.9}[rng.IntN(5)]
	k.failRate = []float64{0, 0, 0.05, 0.2}[rng.IntN(4)]
	k.missRate = []float64{0, 0, 0.05}[rng.IntN(3)]
	if o == ownerScansEarly || o == ownerNotesEarly { // these need a ring that stands still: try nothing else
		k.dropRate, k.disks = 0.9, k.disks[:1]
		k.disks[0] = Disk{Size: 4, BlockSize: 2}
	}
	for _, d := range k.disks {
		k.content = append(k.content, make([]int, d.Size))
		k.history = append(k.history, make([][]*bio, d.Size))
		k.bits = append(k.bits, make([]bool, (d.Size+d.BlockSize-1)/d.BlockSize))
	}
	k.overlap = rng.IntN(20) == 0
	if rng.IntN(3) == 0 {
		k.mapMax = 1 + rng.IntN(3)
	}
	for range rng.IntN(3) { // older than the tap
		if b := k.newBio(); b != nil {
			b.missed, b.program = false, nil
			b.q1 = k.now
			k.issue(b)
		}
	}
	return k
}

func (k *kernel) newBio() *bio {
	disk := k.rng.IntN(len(k.disks))
	size := int(k.disks[disk].Size)
	n := 1 + k.rng.IntN(4)
	if k.rng.IntN(3) == 0 {
		n = 4 + k.rng.IntN(6)
	}
	n = min(n, size)
	off := k.rng.IntN(size - n + 1)
	if k.rng.IntN(2) == 0 {
		off &^= int(k.disks[disk].BlockSize) - 1
		n = min(n, size-off)
	}
	for _, b := range k.active {
		if !k.overlap && b.disk == disk && b.off < off+n && off < b.off+b.n {
			return nil // never the same sector twice in flight
		}
	}
	key := k.rng.IntN(12)
	for _, b := range k.active {
		if b.key == key {
			return nil
		}
	}
	k.lastBio++
	b := &bio{id: k.lastBio, key: key, disk: disk, off: off, n: n, q0: k.now, q1: never, done: never,
		applied: make([]bool, n), missed: k.rng.Float64() < k.missRate, bioPath: k.rng.IntN(4) == 0, slow: k.rng.IntN(8) == 0}
	if k.rng.Float64() < k.failRate {
		b.fail, b.missed = true, b.missed && k.missFails
		b.void = k.rng.IntN(2) == 0
	}
	for s := off; s < off+n; s++ {
		k.history[disk][s] = append(k.history[disk][s], b)
	}
	k.active = append(k.active, b)
	b.program = []func(){func() { k.enter(b) }}
	return b
}

// enter is the program's beginning: the drop counter, the place, the map.
func (k *kernel) enter(b *bio) {
	b.drops = k.drops
	b.program = append(b.program, func() {
		b.noted = k.producer
		b.program = append(b.program, func() {
			if k.ends {
				k.track(b)
			}
			b.program = append(b.program, func() { k.capture(b) })
		})
	})
}

func (k *kernel) track(b *bio) {
	if _, again := k.inflight[b.key]; again || len(k.inflight) < k.mapMax {
		k.inflight[b.key] = &flight{place: b.noted, disk: b.disk, off: b.off, n: b.n, dropped: b.dropped}
	}
}

func (k *kernel) capture(b *bio) {
	size := Place(2 + b.n)
	if k.producer+size-k.consumer > k.ringSize || k.rng.Float64() < k.dropRate {
		b.dropped = true
		b.program = append(b.program,
			func() { k.ends = true },
			func() { k.track(b) },
			func() { k.setBits(b) },
			func() { k.drops++ },
			func() { k.issue(b) })
		return
	}
	b.captured = true
	i := len(k.ring)
	k.ring = append(k.ring, ringRecord{place: k.producer, end: k.producer + size, b: b, busy: true, drops: b.drops})
	k.producer += size
	b.program = append(b.program,
		func() { k.ring[i].busy = false },
		func() { k.issue(b) })
}

func (k *kernel) setBits(b *bio) {
	bs := int(k.disks[b.disk].BlockSize)
	for i := b.off / bs; i <= (b.off+b.n-1)/bs; i++ {
		k.bits[b.disk][i] = true
	}
}

func (k *kernel) issue(b *bio) {
	b.q1 = k.now
	b.left = k.rng.Perm(b.n)
	if b.void {
		b.left = nil
	} else if b.fail {
		b.left = b.left[:b.n/2]
	}
}

// step lets one bio go on by one step.
func (k *kernel) step() {
	if len(k.active) == 0 {
		return
	}
	b := k.active[k.rng.IntN(len(k.active))]
	if b.slow && !k.quiet && k.rng.IntN(30) != 0 {
		return
	}
	switch {
	case len(b.program) > 0:
		next := b.program[0]
		b.program = b.program[1:]
		next()
	case len(b.left) > 0:
		s := b.left[0]
		b.left = b.left[1:]
		b.applied[s] = true
		k.content[b.disk][b.off+s] = b.id
	default:
		k.end(b)
	}
}

// end begins the completion program.
func (k *kernel) end(b *bio) {
	leave := func() { delete(k.inflight, b.key) }
	mark := []func(){func() { k.setBits(b) }, func() { k.drops++ }}
	f := k.inflight[b.key]
	tracked := f != nil
	var steps []func()
	switch {
	case b.missed && tracked: // the entry stays
	case b.fail && b.bioPath:
		steps = append([]func(){leave}, mark...)
	case b.fail:
		steps = append(mark, leave)
	case tracked && k.ends:
		steps = []func(){leave}
	case !tracked && k.ends:
		steps = mark
	}
	b.program = append(steps, func() {
		b.done = k.now
		for i, o := range k.active {
			if o == b {
				k.active = append(k.active[:i], k.active[i+1:]...)
				break
			}
		}
	})
}

// untracked says whether a bio is in flight that no scan would see.
func (k *kernel) untracked() bool {
	for _, b := range k.active {
		if k.inflight[b.key] == nil {
			return true
		}
	}
	return false
}

// peek copies the gap bits of one disk.
func (k *kernel) peek(disk int) (out []block.DiskRange) {
	bs := k.disks[disk].BlockSize
	for i, set := range k.bits[disk] {
		if set {
			out = append(out, block.DiskRange{Disk: disk, Range: block.Range{Off: int64(i) * bs, Len: bs}})
		}
	}
	return out
}
