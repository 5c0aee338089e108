package cbt

import (
	"slices"
	"sync/atomic"

	"tidemark/internal/block"
)

// table is a byte for each block, eight to a word. Bytes are only ever raised.
type table struct {
	size  int64 // of the device
	shift uint
	words []uint64
}

const (
	ones  = 0x0101010101010101
	highs = 0x8080808080808080
)

func newTable(size int64) *table {
	t := &table{size: size}
	for b := BlockSize(size); b > 1; b /= 2 {
		t.shift++
	}
	t.words = make([]uint64, (t.blocks()+7)/8)
	return t
}

func (t *table) blocks() int64 { return (t.size + 1<<t.shift - 1) >> t.shift }

// at is a block's byte.
func (t *table) at(i int64) uint8 {
	return uint8(atomic.LoadUint64(&t.words[i>>3]) >> (8 * (i & 7)))
}

// raise makes the bytes of a range's blocks at least v. Concurrent raises and
// reads see each byte whole.
func (t *table) raise(r block.Range, v uint8) {
	if r.Empty() {
		return
	}
	first, last := r.Off>>t.shift, (r.End()-1)>>t.shift
	if first == last && t.at(first) >= v { // as mostly: marked since the snapshot already
		return
	}
	for w := first >> 3; w <= last>>3; w++ {
		mask := ^uint64(0)
		if w == first>>3 {
			mask &= ^uint64(0) << (8 * (first & 7))
		}
		if w == last>>3 {
			mask &= ^uint64(0) >> (8 * (7 - last&7))
		}
		raiseWord(&t.words[w], ones*uint64(v)&mask)
	}
}

// raiseWord makes each byte of a word at least that of want.
func raiseWord(p *uint64, want uint64) {
	for {
		old := atomic.LoadUint64(p)
		next := larger(old, want)
		if next == old || atomic.CompareAndSwapUint64(p, old, next) {
			return
		}
	}
}

// larger takes the larger of each of eight bytes.
func larger(a, b uint64) uint64 {
	// The seven low bits are compared without borrows between bytes, then the highest ones.
	low := (a&^highs | highs) - b&^highs // high bit of a byte: its low bits in a are >= those in b
	ge := (a&^b | ^(a^b)&low) & highs    // high bit of a byte: a >= b
	keep := ge >> 7 * 0xff
	return a&keep | b&^keep
}

func (t *table) clone() *table {
	c := &table{size: t.size, shift: t.shift, words: make([]uint64, len(t.words))}
	for i := range t.words {
		c.words[i] = atomic.LoadUint64(&t.words[i])
	}
	return c
}

// same says whether eight blocks all are, or all are not, above a number.
func same(word uint64, above uint8) (dirty, all bool) {
	limit := ones * uint64(above)
	changed := larger(word, limit) ^ limit // a byte that is not zero is above
	if changed == 0 {
		return false, true
	}
	// A byte is zero where both its low bits and its high bit are.
	nonzero := (changed&^highs + ^uint64(highs) | changed) & highs
	return true, nonzero == highs
}

// next gives the end of the run of blocks, all above the number or all not, that
// begins at block i, up to block end.
func (t *table) next(i, end int64, above uint8) (to int64, dirty bool) {
	dirty = t.at(i) > above
	for i++; i < end; {
		if i&7 == 0 && i+8 <= end {
			if d, all := same(atomic.LoadUint64(&t.words[i>>3]), above); all {
				if d != dirty {
					return i, dirty
				}
				i += 8
				continue
			}
		}
		if t.at(i) > above != dirty {
			return i, dirty
		}
		i++
	}
	return end, dirty
}

// bytes gives a copy of blocks from i on, as many as p holds.
func (t *table) bytes(p []byte, i int64) int {
	n := int(max(0, min(int64(len(p)), t.blocks()-i)))
	for k := range p[:n] {
		p[k] = t.at(i + int64(k))
	}
	return n
}

func (t *table) equal(o *table) bool { return t.size == o.size && slices.Equal(t.words, o.words) }
