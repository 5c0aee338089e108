// Package cbt is the change map of a device: for each block the number of the
// snapshot after which it was last changed.
//
// # Numbers and generations
//
// A map has two tables. Writes mark the write table with the active number, which
// begins at 1. Take, at the instant of a snapshot, makes the read table a copy of
// it, numbered with the active number, and counts that up. A block has changed
// between snapshots M and N > M of one generation exactly if the byte in the
// table of N is above M.
//
// Numbers reach from 1 to 255 and never decrease within a generation. After 255
// the write table begins a new generation at 1, empty; the table of number 255
// still belongs to the old one, so that every snapshot of a generation can be
// compared with every earlier one. A new size, or Reset, begins a new generation
// too. What is asked about another generation gets ErrFullCopy.
//
// The map never misses a change; it may name more than changed: whole blocks are
// marked, and before the write is done, whether it succeeds or not.
//
// When nobody marks any more (Blind) it claims nothing: each snapshot begins a
// generation of its own, and every question gets ErrFullCopy until Sighted.
//
// # Block size
//
// A table has a byte a block and at most 16 Mi of them: blocks are 4 KiB up to a
// device of 64 GiB, and double with the size from there (64 KiB at 1 TiB). The
// peers' 64 KiB for every size make increments of small random writes up to 16
// times too large; below 64 GiB the map takes 32 MiB at most for its two tables.
//
// # Restarts
//
// Open removes the file that Save left before it returns, so a map that was not
// saved - a crash - is not found, and a new generation begins.
package cbt

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"tidemark/internal/block"
)

// ErrFullCopy: what changed since then is not known.
var ErrFullCopy = errors.New("not known any more: take a full copy")

const (
	blockSmallest = 4 << 10
	blocksMax     = 16 << 20
	numberMax     = 255
)

// Generation identifies an unbroken history of numbers.
type Generation [16]byte

func newGeneration() (g Generation) {
	if _, err := rand.Read(g[:]); err != nil {
		panic(err) // crypto/rand does not fail on Linux
	}
	return g
}

// String is 32 hexadecimal digits.
func (g Generation) String() string { return hex.EncodeToString(g[:]) }

// ParseGeneration reads what String gives.
func ParseGeneration(s string) (g Generation, err error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(g) {
		return g, fmt.Errorf("generation %q: want 32 hexadecimal digits", s)
	}
	return Generation(b), nil
}

// BlockSize gives the size of a map's blocks, in bytes, for a device of a size.
func BlockSize(size int64) int64 {
	b := int64(blockSmallest)
	for size > b*blocksMax {
		b *= 2
	}
	return b
}

// Info describes a map as of its newest snapshot.
type Info struct {
	Size       int64      // of the device, in bytes
	BlockSize  int64      // in bytes
	Blocks     int64      // rounded up
	Generation Generation // of the newest snapshot; of the writes where there is none
	Number     uint8      // of the newest snapshot; 0: none in this generation
}

// side is one table with what its numbers mean.
type side struct {
	size       int64
	generation Generation
	number     uint32 // write side: the active one; read side: the snapshot's
	blocks     *table
}

// Map is the change map of one device. All methods may be called concurrently.
type Map struct {
	write atomic.Pointer[side]
	read  atomic.Pointer[side]
	mu    sync.Mutex // changes of the sides, and of blind
	blind bool       // nobody marks
}

// New gives a map of a new generation in which nothing is known yet: its first
// snapshot is a full copy.
func New(size int64) *Map {
	m := &Map{}
	m.begin(size)
	return m
}

// begin starts a new generation on both sides. m.mu is held, or m is new.
func (m *Map) begin(size int64) {
	w := &side{size: size, generation: newGeneration(), number: 1, blocks: newTable(size)}
	m.read.Store(&side{size: size, generation: w.generation, blocks: newTable(0)})
	m.write.Store(w)
}

// Mark notes, before it is done, that a range changes. It locks and allocates
// nothing. What lies beyond the device's known size is left to Resize.
func (m *Map) Mark(r block.Range) {
	w := m.write.Load()
	w.blocks.raise(w.clip(r), uint8(atomic.LoadUint32(&w.number)))
}

func (s *side) clip(r block.Range) block.Range { return r.Intersect(block.Range{Len: s.size}) }

// MarkDirty notes a change that no write told of: it shows in the newest
// snapshot's table too, at once.
func (m *Map) MarkDirty(r block.Range) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	w, rd := m.write.Load(), m.read.Load()
	if err := block.CheckBounds(r, w.size); err != nil {
		return err
	}
	w.blocks.raise(r, uint8(w.number))
	if rd.blocks.size != 0 {
		rd.blocks.raise(rd.clip(r), uint8(rd.number))
	}
	return nil
}

// Take is the switch of tables at the instant of a snapshot: no write may be
// under way, between its mark and its end. It gives the snapshot's own table, which later snapshots
// leave alone. It copies at most 16 MiB.
func (m *Map) Take() *Changes {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.blind { // what changed since the one before is not known
		m.begin(m.write.Load().size)
	}
	w := m.write.Load()
	rd := &side{size: w.size, generation: w.generation, number: w.number, blocks: w.blocks.clone()}
	m.read.Store(rd)
	if w.number == numberMax {
		m.write.Store(&side{size: w.size, generation: newGeneration(), number: 1, blocks: newTable(w.size)})
	} else {
		atomic.AddUint32(&w.number, 1)
	}
	return &Changes{rd, 0}
}

// Reset begins a new generation.
func (m *Map) Reset() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.begin(m.write.Load().size)
}

// Blind says that nobody marks from now on. The generation ends.
func (m *Map) Blind() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.blind = true
	m.begin(m.write.Load().size)
}

// Sighted says that every change is marked again, from now on. After Blind a new
// generation begins, otherwise nothing does.
func (m *Map) Sighted() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.blind {
		m.blind = false
		m.begin(m.write.Load().size)
	}
}

func (m *Map) isBlind() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.blind
}

// errBlind is why a blind map answers nothing.
var errBlind = fmt.Errorf("nothing tracks its changes, as the filter for that was taken out: %w", ErrFullCopy)

// Resize begins a new generation where the size, in bytes, is another one. It is
// called before the first write to what is new.
func (m *Map) Resize(size int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.write.Load().size != size {
		m.begin(size)
	}
}

// Info describes the map as of the newest snapshot.
func (m *Map) Info() Info { return m.read.Load().info() }

func (s *side) info() Info {
	b := BlockSize(s.size)
	return Info{Size: s.size, BlockSize: b, Blocks: (s.size + b - 1) / b, Generation: s.generation, Number: uint8(s.number)}
}

// Newest gives the table of the newest snapshot; false: there was none in this
// generation, or the map is blind.
func (m *Map) Newest() (*Changes, bool) {
	rd := m.read.Load()
	if rd.number == 0 || m.isBlind() {
		return nil, false
	}
	return &Changes{rd, 0}, true
}

// Since gives what changed between an earlier snapshot and the newest one.
func (m *Map) Since(g Generation, number uint8) (*Changes, error) {
	if m.isBlind() {
		return nil, errBlind
	}
	rd := m.read.Load()
	return (&Changes{rd, 0}).Since(g, number)
}

// Live gives what changed between a snapshot and now, in a copy of the write
// table: a write under way may be in it or not.
func (m *Map) Live(g Generation, number uint8) (*Changes, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.blind {
		return nil, errBlind
	}
	w := m.write.Load()
	live := &side{size: w.size, generation: w.generation, number: w.number - 1, blocks: w.blocks.clone()}
	return (&Changes{live, 0}).Since(g, number)
}

// Writing describes the write table; Number is the one that the next snapshot gets.
func (m *Map) Writing() Info { return m.write.Load().info() }
