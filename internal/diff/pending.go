package diff

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/vfs"
)

// Pending is a bounded number of chunk buffers on their way into a storage. Over
// a file on a tmpfs they outlive the process: what was sealed is found again.
//
//	a head of 64 bytes each, rounded up to pages | a chunk each
//
// head: magic u32 | slot u64 | an entry of 32 bytes | CRC-32C of id and these u32
type Pending struct {
	storage *Storage
	memory  []byte
	content int // byte where chunks begin
	free    chan *Buffer
	queue   chan job
	workers sync.WaitGroup
}

const (
	headSize     = 64
	headMagic    = 0x50444d54
	storeWorkers = 4
)

// Buffer holds one chunk.
type Buffer struct {
	p    *Pending
	i    int
	slot Slot
	e    entry
}

type job struct {
	b    *Buffer
	done func(error)
}

// NewPending gives n buffers for a storage's chunks. file is on a tmpfs, empty,
// and closed by the caller after the call; nil: the chunks do not outlive the process.
func NewPending(s *Storage, n int, file *os.File) (*Pending, error) {
	p, err := mapPending(s, n, file)
	if err != nil {
		return nil, err
	}
	for i := range n {
		p.free <- &Buffer{p: p, i: i}
	}
	p.start()
	return p, nil
}

func mapPending(s *Storage, n int, file *os.File) (*Pending, error) {
	p := &Pending{storage: s, content: (n*headSize + Align - 1) / Align * Align, free: make(chan *Buffer, n), queue: make(chan job, n)}
	size := p.content + n*int(s.cfg.Chunk)
	fd, flags := -1, unix.MAP_SHARED|unix.MAP_ANONYMOUS
	if file != nil {
		// Allocated now: a tmpfs that is full would kill the process at the first touch.
		if err := vfs.Allocate(file, 0, int64(size)); err != nil {
			return nil, fmt.Errorf("memory for chunks, %d bytes in %s: %w", size, file.Name(), err)
		}
		fd, flags = int(file.Fd()), unix.MAP_SHARED
	}
	var err error
	if p.memory, err = unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, flags); err != nil {
		return nil, fmt.Errorf("memory for chunks: %w", err)
	}
	return p, nil
}

func (p *Pending) start() {
	for range storeWorkers {
		p.workers.Go(func() {
			for j := range p.queue {
				j.done(p.storage.store(j.b.slot, j.b.e, j.b.Bytes()[:j.b.e.length]))
			}
		})
	}
}

// RecoverPending takes over the buffers of a process that was killed, and gives
// those that were sealed and whose slot the storage does not have. The others are free.
func RecoverPending(s *Storage, n int, file *os.File, have map[Key]Found) (*Pending, []*Buffer, error) {
	p, err := mapPending(s, n, file)
	if err != nil {
		return nil, nil, err
	}
	var out []*Buffer
	for i := range n {
		b := &Buffer{p: p, i: i}
		found, stored := have[b.peek().key]
		if b.e.length == 0 || stored && found.Version >= b.e.version || crc32.Checksum(b.Bytes()[:b.e.length], castagnoli) != b.e.sum || !s.Claim(b.slot) {
			b.clear()
			p.free <- b
			continue
		}
		s.version.Store(max(s.version.Load(), b.e.version))
		out = append(out, b)
	}
	p.start()
	return p, out, nil
}

func (b *Buffer) head() []byte { return b.p.memory[b.i*headSize:][:headSize] }

// Bytes is the buffer, of one chunk.
func (b *Buffer) Bytes() []byte {
	chunk := int(b.p.storage.cfg.Chunk)
	return b.p.memory[b.p.content+b.i*chunk:][:chunk:chunk]
}

// peek reads a head that another process left; nothing where it is not whole.
func (b *Buffer) peek() entry {
	le, h := binary.LittleEndian, b.head()
	id := b.p.storage.cfg.ID
	e, ok := getEntry(id, h[12:44])
	if !ok || le.Uint32(h) != headMagic || le.Uint32(h[44:]) != crc32.Update(crc32.Checksum(id[:], castagnoli), castagnoli, h[:44]) || int64(e.length) > b.p.storage.cfg.Chunk {
		b.e = entry{}
		return b.e
	}
	b.slot, b.e = Slot(le.Uint64(h[4:])), e
	return e
}

// Key, Slot, Version, Len and Changed are those of what was sealed.
func (b *Buffer) Key() Key        { return b.e.key }
func (b *Buffer) Slot() Slot      { return b.slot }
func (b *Buffer) Version() uint64 { return b.e.version }
func (b *Buffer) Len() int        { return int(b.e.length) }
func (b *Buffer) Changed() bool   { return b.e.changed }

// Seal says what the first n bytes are, and whether they are an image's own
// (changed). From now on they outlive the process.
func (b *Buffer) Seal(slot Slot, key Key, version uint64, n int, changed bool) {
	le, h := binary.LittleEndian, b.head()
	b.slot, b.e = slot, entry{key, uint32(n), version, crc32.Checksum(b.Bytes()[:n], castagnoli), changed}
	id := b.p.storage.cfg.ID
	le.PutUint32(h, headMagic)
	le.PutUint64(h[4:], uint64(slot))
	b.e.put(id, h[12:44])
	le.PutUint32(h[44:], crc32.Update(crc32.Checksum(id[:], castagnoli), castagnoli, h[:44]))
}

func (b *Buffer) clear() { clear(b.head()) }

// ErrBusy: no buffer became free in time.
var ErrBusy = errors.New("the difference storage is too slow: no buffer is free")

// Take gives a buffer, after at most so long.
func (p *Pending) Take(patience time.Duration) (*Buffer, error) {
	select {
	case b := <-p.free:
		return b, nil
	default:
	}
	t := time.NewTimer(patience)
	defer t.Stop()
	select {
	case b := <-p.free:
		return b, nil
	case <-t.C:
		return nil, ErrBusy
	}
}

// Idle says whether no buffer is in use.
func (p *Pending) Idle() bool { return len(p.free) == cap(p.free) }

// Store has a sealed buffer written to its slot. done is called from a worker;
// the buffer is the caller's until it calls Drop.
func (b *Buffer) Store(done func(error)) { b.p.queue <- job{b, done} }

// Drop gives the buffer back.
func (b *Buffer) Drop() {
	b.clear()
	b.p.free <- b
}

// Close ends the workers after what is queued, and frees the memory: no buffer
// may be in use any more.
func (p *Pending) Close() error {
	close(p.queue)
	p.workers.Wait()
	return unix.Munmap(p.memory)
}

// For names the slot that the buffer will be stored in.
func (b *Buffer) For(slot Slot) { b.slot = slot }
