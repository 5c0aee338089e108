package diff

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"sync"
)

const (
	headerMagic = "TMDIFF01"
	entrySize   = 32
	entries     = Align / entrySize // in a table block
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// header is the first block of an area, all integers little endian:
//
//	magic 8 | id 16 | chunk u64 | index u32 | spoiled u32 | CRC-32C of these
type header struct {
	id      ID
	chunk   int64
	index   uint32
	spoiled bool
}

func (h header) encode() []byte {
	le := binary.LittleEndian
	b := make([]byte, Align)
	copy(b, headerMagic)
	copy(b[8:], h.id[:])
	le.PutUint64(b[24:], uint64(h.chunk))
	le.PutUint32(b[32:], h.index)
	if h.spoiled {
		le.PutUint32(b[36:], 1)
	}
	le.PutUint32(b[40:], crc32.Checksum(b[:40], castagnoli))
	return b
}

func decodeHeader(b []byte) (h header, err error) {
	le := binary.LittleEndian
	if len(b) < 44 || string(b[:8]) != headerMagic || le.Uint32(b[40:]) != crc32.Checksum(b[:40], castagnoli) {
		return h, fmt.Errorf("an area's header is not one: %w", ErrCorrupt)
	}
	return header{ID(b[8:24]), int64(le.Uint64(b[24:])), le.Uint32(b[32:]), le.Uint32(b[36:]) != 0}, nil
}

// entry says what a slot holds:
//
//	chunk u64 | device u32 | length u32 | version u64 | CRC-32C of the content u32 | CRC-32C of id and these u32
//
// The highest bit of length says that the content is an image's own, changed
// since the instant. Of two entries with one key that with the higher version counts.
type entry struct {
	key     Key
	length  uint32
	version uint64
	sum     uint32
	changed bool
}

// changedBit is that of an entry's length.
const changedBit = 1 << 31

func (e entry) put(id ID, b []byte) {
	le := binary.LittleEndian
	le.PutUint64(b, uint64(e.key.Chunk))
	le.PutUint32(b[8:], e.key.Device)
	length := e.length
	if e.changed {
		length |= changedBit
	}
	le.PutUint32(b[12:], length)
	le.PutUint64(b[16:], e.version)
	le.PutUint32(b[24:], e.sum)
	le.PutUint32(b[28:], crc32.Update(crc32.Checksum(id[:], castagnoli), castagnoli, b[:28]))
}

// getEntry says false for what is not an entry of this snapshot.
func getEntry(id ID, b []byte) (e entry, ok bool) {
	le := binary.LittleEndian
	if le.Uint32(b[28:]) != crc32.Update(crc32.Checksum(id[:], castagnoli), castagnoli, b[:28]) {
		return e, false
	}
	length := le.Uint32(b[12:])
	return entry{Key{le.Uint32(b[8:]), int64(le.Uint64(b))}, length &^ changedBit, le.Uint64(b[16:]), le.Uint32(b[24:]), length&changedBit != 0}, true
}

// area is one space with its layout.
type area struct {
	space   Space
	head    header
	durable bool
	first   Slot // its first one in the storage
	slots   int64
	content int64 // byte where slots begin

	mu     sync.Mutex
	blocks map[int64]*tableBlock // those with entries
}

// layOut gives the area of a space; nil: it is too small for a slot.
func layOut(space Space, h header, durable bool, first Slot) *area {
	left := space.Size()/Align*Align - Align
	n := left / (h.chunk*entries + Align) * entries // whole table blocks with their slots
	rest := left - n*h.chunk - n/entries*Align
	if more := (rest - Align) / h.chunk; more > 0 {
		n += more
	}
	if n <= 0 {
		return nil
	}
	return &area{space: space, head: h, durable: durable, first: first, slots: n,
		content: Align + (n+entries-1)/entries*Align, blocks: map[int64]*tableBlock{}}
}

// write is stable when it returns, where the storage is durable.
func (a *area) write(p []byte, off int64) error {
	put := a.space.WriteAt
	if a.durable {
		put = a.space.WriteFUA
	}
	n, err := put(p, off)
	if n < len(p) {
		return errors.Join(fmt.Errorf("difference storage: write of %d bytes at %d", len(p), off), err)
	}
	return err
}

func (a *area) writeHeader() error { return a.write(a.head.encode(), 0) }

// tableBlock is 128 entries that are written together. Whoever needs it written
// while that is going on has its entry written with the next round.
type tableBlock struct {
	mu      sync.Mutex
	turn    sync.Cond
	data    [Align]byte
	entered uint64 // changes made
	written uint64 // changes written
	busy    bool
}

func (a *area) block(i int64) *tableBlock {
	a.mu.Lock()
	defer a.mu.Unlock()
	b := a.blocks[i]
	if b == nil {
		b = &tableBlock{}
		b.turn.L = &b.mu
		a.blocks[i] = b
	}
	return b
}

// commit writes a slot's entry. The content has been written before.
func (a *area) commit(slot int64, e entry) error {
	b := a.block(slot / entries)
	b.mu.Lock()
	defer b.mu.Unlock()
	e.put(a.head.id, b.data[slot%entries*entrySize:][:entrySize])
	b.entered++
	for mine := b.entered; b.written < mine; {
		if b.busy {
			b.turn.Wait()
			continue
		}
		b.busy = true
		page, upTo := b.data, b.entered
		b.mu.Unlock()
		err := a.write(page[:], Align+slot/entries*Align)
		b.mu.Lock()
		b.busy = false
		b.turn.Broadcast()
		if err != nil {
			return err
		}
		b.written = upTo
	}
	return nil
}

// at is the byte of a slot's content.
func (a *area) at(slot int64) int64 { return a.content + slot*a.head.chunk }
