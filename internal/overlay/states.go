package overlay

import (
	"sync"
	"sync/atomic"

	"tidemark/internal/block"
)

// state is where a block's content is.
type state uint8

const (
	below   state = 0
	scratch state = 1
	zero    state = 2
)

const (
	pageBlocks = 32768 // blocks of a page of states: 128 MiB of the device, 8 KiB of memory
	wordBlocks = 32    // blocks of a word, two bits each
)

type page [pageBlocks / wordBlocks]uint64

// states holds the state of every block; a page that is missing says below
// throughout. A word never belongs to two stripes, so that the stripes' locks
// cover the words; only pages come into being concurrently.
type states struct {
	pages []atomic.Pointer[page]
}

func newStates(size int64) states {
	const bytes = pageBlocks * blockSize
	return states{pages: make([]atomic.Pointer[page], (size+bytes-1)/bytes)}
}

// at gives the state of the block that holds a byte.
func (t *states) at(off int64) state {
	b := off / blockSize
	p := t.pages[b/pageBlocks].Load()
	if p == nil {
		return below
	}
	return state(p[b%pageBlocks/wordBlocks] >> (b % wordBlocks * 2) & 3)
}

// run gives how far from off the blocks have the state of the first, at most to end.
func (t *states) run(off, end int64) (to int64, s state) {
	s = t.at(off)
	b, last := off/blockSize, (end-1)/blockSize
	for b++; b <= last; b++ {
		if p := t.pages[b/pageBlocks].Load(); p == nil {
			if s != below {
				break
			}
			b |= pageBlocks - 1 // the loop goes on at the next page
		} else if w := p[b%pageBlocks/wordBlocks]; b%wordBlocks == 0 && w == uint64(s)*0x5555555555555555 {
			b |= wordBlocks - 1
		} else if state(w>>(b%wordBlocks*2)&3) != s {
			break
		}
	}
	return min(b*blockSize, end), s
}

// set gives all blocks that r touches a state. The caller holds their stripes.
func (t *states) set(r block.Range, s state) {
	for b := r.Off / blockSize; b <= (r.End()-1)/blockSize; b++ {
		slot := &t.pages[b/pageBlocks]
		p := slot.Load()
		if p == nil {
			slot.CompareAndSwap(nil, new(page))
			p = slot.Load()
		}
		w, shift := &p[b%pageBlocks/wordBlocks], b%wordBlocks*2
		*w = *w&^(3<<shift) | uint64(s)<<shift
	}
}

const (
	stripeCount = 64
	stripeBytes = 256 << 10 // a multiple of what a word of states covers
)

// stripes are locks for regions of the device. An operation holds those of its
// whole range, taken in the order of their numbers: it cannot deadlock with
// another, and no reader sees half of a write.
type stripes [stripeCount]sync.RWMutex

// mask has a bit for each stripe that r touches.
func (l *stripes) mask(r block.Range) (m uint64) {
	first, last := r.Off/stripeBytes, (max(r.End(), r.Off+1)-1)/stripeBytes
	if last-first >= stripeCount {
		return ^uint64(0)
	}
	for i := first; i <= last; i++ {
		m |= 1 << (i % stripeCount)
	}
	return m
}

func (l *stripes) read(r block.Range) (unlock func()) {
	m := l.mask(r)
	each(m, func(i int) { l[i].RLock() })
	return func() { each(m, func(i int) { l[i].RUnlock() }) }
}

func (l *stripes) write(r block.Range) (unlock func()) {
	m := l.mask(r)
	each(m, func(i int) { l[i].Lock() })
	return func() { each(m, func(i int) { l[i].Unlock() }) }
}

func each(mask uint64, fn func(i int)) {
	for i := range stripeCount {
		if mask>>i&1 != 0 {
			fn(i)
		}
	}
}
