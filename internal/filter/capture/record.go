package capture

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"unsafe"

	"tidemark/internal/block"
	"tidemark/internal/source"
	"tidemark/internal/stream"
)

// A record is a word of length and flags, a word that is free, recordHead bytes
// and the payload, filled up to 8 bytes. The length counts from recordHead on.
const (
	busyBit    = 1 << 31 // being written
	skipBit    = 1 << 30 // of a process that died
	recordHead = 56
)

// next is how far the record after one of n bytes lies.
func next(n uint64) uint64 { return (n + 8 + 7) &^ 7 }

// word is the length of the record at a place.
func (r *Ring) word(pos uint64) *uint32 {
	return (*uint32)(unsafe.Pointer(&r.ring[pos&(uint64(r.cfg.RingBytes)-1)]))
}

// reserve takes room for a record with n bytes of payload, in the order of the
// calls; r.mu is held. false: there is none. The record's time is read before it has
// its place: what lies behind a record with a time after T was submitted after T.
func (r *Ring) reserve(n int) (at place, ok bool) {
	size := uint64(recordHead + n)
	pos, now := r.head.Producer, r.now()
	if pos+next(size)-atomic.LoadUint64(&r.head.Consumer) > uint64(r.cfg.RingBytes) {
		return place{}, false
	}
	atomic.StoreUint32(r.word(pos), uint32(size)|busyBit)
	atomic.StoreUint64(&r.head.Producer, pos+next(size)) // now it is part of the ring, whatever becomes of this process
	return place{pos, now}, true
}

// place is a record's in the ring, and in time.
type place struct {
	pos uint64
	now int64 // CLOCK_MONOTONIC, nanoseconds
}

// fill writes a record at its reserved place, for readers to take.
func (r *Ring) fill(to place, kind source.Kind, disk int, op block.Op, on block.Range, drops uint64, token uint64, consistency stream.Consistency, payload []byte) {
	at := to.pos & (uint64(r.cfg.RingBytes) - 1)
	b, le := r.ring[at+8:at+8+recordHead+uint64(len(payload))], binary.LittleEndian
	le.PutUint32(b, uint32(kind))
	le.PutUint16(b[4:], uint16(disk))
	b[6], b[7] = byte(op), byte(consistency)
	le.PutUint64(b[8:], uint64(on.Off))
	le.PutUint64(b[16:], uint64(on.Len))
	le.PutUint64(b[24:], uint64(to.now))
	le.PutUint64(b[32:], drops)
	le.PutUint64(b[40:], token)
	le.PutUint32(b[48:], uint32(len(payload)))
	copy(b[recordHead:], payload)
	atomic.StoreUint32(r.word(to.pos), uint32(recordHead+len(payload)))
}

// Producer is the place behind the newest record.
func (r *Ring) Producer() source.Place {
	return source.Place(atomic.LoadUint64(&r.head.Producer))
}

// Consumer is the place of the oldest record that is not committed.
func (r *Ring) Consumer() source.Place {
	return source.Place(atomic.LoadUint64(&r.head.Consumer))
}

// Commit lets everything before p go.
func (r *Ring) Commit(p source.Place) {
	if p <= r.Consumer() {
		return
	}
	atomic.StoreUint64(&r.head.Consumer, uint64(p))
	r.mu.Lock()
	defer r.mu.Unlock()
	r.tired = false
	r.room.Broadcast()
}

// Read gives the records from a place on; see source.Source.
func (r *Ring) Read(from source.Place, fn func(*source.Record) error) (source.Place, error) {
	pos, end := uint64(from), uint64(r.Producer())
	for pos < end {
		h := atomic.LoadUint32(r.word(pos))
		if h&busyBit != 0 {
			break
		}
		n := uint64(h &^ skipBit)
		if n < recordHead || pos+next(n) > end {
			return source.Place(pos), fmt.Errorf("ring record of %d bytes at %d", n, pos)
		}
		if h&skipBit == 0 {
			if err := r.decode(pos, n); err != nil {
				return source.Place(pos), err
			}
			if err := fn(&r.record); err != nil {
				return source.Place(pos), err
			}
		}
		pos += next(n)
	}
	return source.Place(pos), nil
}

func (r *Ring) decode(pos, n uint64) error {
	at := pos & (uint64(r.cfg.RingBytes) - 1)
	b, le := r.ring[at+8:at+8+n], binary.LittleEndian
	out := &r.record
	*out = source.Record{
		Place: source.Place(pos), End: source.Place(pos + next(n)), Kind: source.Kind(le.Uint32(b)), Disk: int(le.Uint16(b[4:])), Op: block.Op(b[6]),
		Consistency: stream.Consistency(b[7]), Range: block.Range{Off: int64(le.Uint64(b[8:])), Len: int64(le.Uint64(b[16:]))},
		MonoTime: int64(le.Uint64(b[24:])), Drops: le.Uint64(b[32:]), Token: le.Uint64(b[40:]),
	}
	size := uint64(le.Uint32(b[48:]))
	if size > n-recordHead {
		return fmt.Errorf("ring record at %d: payload of %d bytes in %d", pos, size, n)
	}
	payload := b[recordHead : recordHead+size]
	switch out.Kind {
	case source.Bookmark:
		out.Name = string(payload)
		return nil
	case source.Write:
		if out.Op == block.OpWrite && size != uint64(out.Range.Len) {
			return fmt.Errorf("ring record at %d: payload of %d bytes for %s", pos, size, out.Range)
		}
		out.Payload = payload
	default:
		return fmt.Errorf("ring record at %d: kind %d", pos, out.Kind)
	}
	if out.Disk >= len(r.cfg.Disks) {
		return fmt.Errorf("ring record at %d: disk %d of %d", pos, out.Disk, len(r.cfg.Disks))
	}
	return block.CheckBounds(out.Range, r.cfg.Disks[out.Disk].Size)
}

// Bookmark puts a mark behind every write that was passed on before the call. It
// waits for room as a write does.
func (r *Ring) Bookmark(m source.Mark) (source.Place, error) {
	if len(m.Name) > stream.NameMax {
		return 0, fmt.Errorf("bookmark name has %d bytes: at most %d", len(m.Name), stream.NameMax)
	}
	r.inside.Add(1)
	defer r.inside.Add(-1)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return 0, fmt.Errorf("bookmark %q: %w", m.Name, ErrClosed)
	}
	to, ok := r.reserveFor(nil, len(m.Name))
	if !ok {
		return 0, fmt.Errorf("bookmark %q: %w", m.Name, source.ErrFull)
	}
	r.fill(to, source.Bookmark, 0, 0, block.Range{}, r.Drops(), m.Token, m.Consistency, []byte(m.Name))
	return source.Place(to.pos + next(uint64(recordHead+len(m.Name)))), nil
}
