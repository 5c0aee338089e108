// Package capture is the filter that records every write to the served devices
// of a group, in the order in which they were submitted, for the same stream
// that a tap feeds.
//
// A group has one ring (Ring), over which each of its devices has one filter. A
// write takes its place in the ring, its payload is copied there, and only then
// is it passed on: what completes after another was submitted lies behind it,
// whichever devices they went to. Writes without room are gaps, or wait for room
// where back-pressure was chosen.
//
// Ring, gap bits and the writes in flight live in a file on a memory file
// system, which outlives a daemon that is killed: the next one goes on where it
// ended. What was in flight then becomes a gap, as nobody knows whether it
// reached the disk. A reboot takes the file away, and with it continuity: the
// whole of every device is compared, as after any crash a disk may be older than
// what was recorded of it.
package capture

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
	"tidemark/internal/source"
	"tidemark/internal/vfs"
)

// Errors that callers branch on.
var (
	// ErrConfig: the ring cannot be made as asked.
	ErrConfig = errors.New("not a valid capture")
	// ErrOther: the file is of other devices, of another version, or not whole.
	ErrOther = errors.New("not the ring of these devices")
	// ErrNotServed: the filter is not in the device's stack.
	ErrNotServed = errors.New("the device is not served")
	// ErrClosed: the ring was closed.
	ErrClosed = errors.New("the capture has ended")
)

// Disk is one served device of the group.
type Disk struct {
	Name      string
	Size      int64 // bytes
	BlockSize int64 // of the gap bits: a power of two from 512
}

// Config of a ring.
type Config struct {
	// Path is the ring's file, best on a memory file system. It is made where it is absent.
	Path string
	// RingBytes is a power of two from 64 KiB.
	RingBytes int64
	Disks     []Disk
	// Patience is how long a write may wait for room before it becomes a gap; 0: not at all.
	Patience time.Duration
}

// Bounds.
const (
	disksMax   = 64
	slotsMax   = 1024     // writes in flight; more wait
	payloadMax = 32 << 20 // bytes of one write; more is a gap
)

const (
	magic    = 0x6b72616d65646974 // "tidemark"
	version  = 1
	pageSize = 4096
	noteMax  = 2048
)

// header is the first page of the file.
type header struct {
	Magic    uint64
	Version  uint32
	Disks    uint32
	Ident    [16]byte
	Shape    uint32 // checksum of the configuration
	_        uint32
	Ring     uint64
	Producer uint64
	Consumer uint64
	Drops    uint64
	NoteLen  uint32
	_        uint32
	Note     [noteMax]byte
}

// slot is a write on its way. It is in use while Length is not 0.
type slot struct {
	Place   uint64
	Offset  int64
	Length  int64
	Disk    uint32
	Dropped uint32
}

// Ring is a source.Source of served devices. Filters write to it concurrently.
type Ring struct {
	cfg    Config
	memory []byte
	head   *header
	slots  []slot
	gaps   []uint64
	base   []int // a disk's first word in gaps
	ring   []byte
	ident  [16]byte
	clock  int64 // CLOCK_MONOTONIC at began
	began  time.Time
	record source.Record
	counts [disksMax]counts
	ends   atomic.Bool
	over   [disksMax]atomic.Pointer[filter] // the newest of each disk

	inside  atomic.Int64 // requests that may touch the memory
	shut    atomic.Bool  // no more of them
	resting atomic.Bool  // the devices end in order

	mu     sync.Mutex // the order of writes
	free   []int      // slots
	room   *sync.Cond // a slot or bytes have become free
	closed bool
	tired  bool  // a write has waited in vain
	lost   error // why writes are no longer seen
}

type counts struct{ submitted, ended, writes, bytes, lost, failed atomic.Uint64 }

var _ source.Source = (*Ring)(nil)

// Open makes a ring, or takes over the one of a process that ended; fresh says
// which. What that process had on its way is in the gap bits afterwards. A file
// that is not the ring of these devices is replaced.
func Open(cfg Config) (r *Ring, fresh bool, err error) {
	if err := cfg.check(); err != nil {
		return nil, false, err
	}
	r = &Ring{cfg: cfg}
	r.room = sync.NewCond(&r.mu)
	if err := r.readClock(); err != nil {
		return nil, false, err
	}
	err = r.mapFile(false)
	if errors.Is(err, ErrOther) || errors.Is(err, os.ErrNotExist) {
		fresh = true
		err = r.mapFile(true)
	}
	if err != nil {
		return nil, false, fmt.Errorf("capture ring %s: %w", cfg.Path, err)
	}
	if err := r.recover(); err != nil {
		return nil, false, errors.Join(fmt.Errorf("capture ring %s: %w", cfg.Path, err), r.Close())
	}
	return r, fresh, nil
}

func (c *Config) check() error {
	switch {
	case c.RingBytes < 64<<10 || c.RingBytes > 1<<40 || c.RingBytes&(c.RingBytes-1) != 0:
		return fmt.Errorf("ring of %d bytes: want a power of two from 64 KiB: %w", c.RingBytes, ErrConfig)
	case len(c.Disks) == 0 || len(c.Disks) > disksMax:
		return fmt.Errorf("%d disks: want 1 to %d: %w", len(c.Disks), disksMax, ErrConfig)
	}
	for _, d := range c.Disks {
		if d.Size <= 0 || d.BlockSize < block.SectorSize || d.BlockSize&(d.BlockSize-1) != 0 {
			return fmt.Errorf("disk %s of %d bytes with blocks of %d: %w", d.Name, d.Size, d.BlockSize, ErrConfig)
		}
	}
	return nil
}

// shape is what must be equal for a ring to be of these devices, and of this boot.
func (c *Config) shape() uint32 {
	boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id") // there on every Linux
	text := fmt.Sprintf("%s|%d", boot, c.RingBytes)
	for _, d := range c.Disks {
		text += fmt.Sprintf("|%q %d %d", d.Name, d.Size, d.BlockSize)
	}
	return crc32.Checksum([]byte(text), crc32.MakeTable(crc32.Castagnoli))
}

// words is how many words the gap bits of a disk take.
func (d *Disk) words() int { return int((d.blocks() + 63) / 64) }

func (d *Disk) blocks() int64 { return (d.Size + d.BlockSize - 1) / d.BlockSize }

func roundUp(n int) int { return (n + pageSize - 1) &^ (pageSize - 1) }

// mapFile maps the file: a page of header, slots, gap bits, and the ring, twice
// in a row so that no record is cut in two.
func (r *Ring) mapFile(make bool) error {
	words := 0
	r.base = r.base[:0]
	for i := range r.cfg.Disks {
		r.base = append(r.base, words)
		words += r.cfg.Disks[i].words()
	}
	slotsAt := pageSize
	gapsAt := slotsAt + roundUp(slotsMax*int(unsafe.Sizeof(slot{})))
	ringAt := gapsAt + roundUp(words*8)
	size := ringAt + int(r.cfg.RingBytes)
	f, err := r.file(make, int64(size))
	if err != nil {
		return err
	}
	defer f.Close()
	if r.memory, err = mapTwice(f, ringAt, int(r.cfg.RingBytes)); err != nil {
		return err
	}
	r.head = (*header)(unsafe.Pointer(&r.memory[0]))
	r.slots = unsafe.Slice((*slot)(unsafe.Pointer(&r.memory[slotsAt])), slotsMax)
	r.gaps = unsafe.Slice((*uint64)(unsafe.Pointer(&r.memory[gapsAt])), max(words, 1))
	r.ring = r.memory[ringAt:]
	if make {
		if _, err := rand.Read(r.head.Ident[:]); err != nil {
			return errors.Join(err, r.unmap())
		}
		r.head.Version, r.head.Disks, r.head.Shape, r.head.Ring = version, uint32(len(r.cfg.Disks)), r.cfg.shape(), uint64(r.cfg.RingBytes)
		atomic.StoreUint64(&r.head.Magic, magic) // last: without it the file is nothing
	}
	r.ident = r.head.Ident
	h := r.head
	if h.Magic != magic || h.Version != version || h.Shape != r.cfg.shape() || h.Ring != uint64(r.cfg.RingBytes) ||
		h.Consumer%8 != 0 || h.Producer%8 != 0 || h.Consumer > h.Producer || h.Producer-h.Consumer > h.Ring || h.NoteLen > noteMax {
		return errors.Join(ErrOther, r.unmap())
	}
	return nil
}

func (r *Ring) file(make bool, size int64) (*os.File, error) {
	if !make {
		f, err := os.OpenFile(r.cfg.Path, os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		if st, err := f.Stat(); err != nil || st.Size() != size {
			return nil, errors.Join(ErrOther, err, f.Close())
		}
		return f, nil
	}
	if err := os.MkdirAll(filepath.Dir(r.cfg.Path), 0o700); err != nil {
		return nil, err
	}
	if err := os.Remove(r.cfg.Path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	f, err := os.OpenFile(r.cfg.Path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	// Allocated, not sparse: a page that cannot be had later would be a SIGBUS in the middle of a write.
	if err := vfs.Allocate(f, 0, size); err != nil {
		return nil, errors.Join(fmt.Errorf("%d bytes: %w", size, err), f.Close(), os.Remove(r.cfg.Path))
	}
	return f, nil
}

// mapTwice maps the file, and what lies from at on once more behind it.
func mapTwice(f *os.File, at, ring int) ([]byte, error) {
	whole, err := unix.MmapPtr(-1, 0, nil, uintptr(at+2*ring), unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, err
	}
	for _, part := range []struct{ to, from, size int }{{0, 0, at + ring}, {at + ring, at, ring}} {
		if _, err := unix.MmapPtr(int(f.Fd()), int64(part.from), unsafe.Add(whole, part.to), uintptr(part.size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_FIXED); err != nil {
			return nil, errors.Join(err, unix.MunmapPtr(whole, uintptr(at+2*ring)))
		}
	}
	return unsafe.Slice((*byte)(whole), at+2*ring), nil
}

// recover makes a gap of what was in flight when the last process ended, and
// skips records that it did not finish: their writes were never passed on.
func (r *Ring) recover() error {
	for i := range r.slots {
		if s := &r.slots[i]; s.Length != 0 {
			on := block.Range{Off: s.Offset, Len: s.Length}
			if s.Disk >= uint32(len(r.cfg.Disks)) || block.CheckBounds(on, r.cfg.Disks[s.Disk].Size) != nil {
				return fmt.Errorf("a write in flight of disk %d at %s: %w", s.Disk, on, ErrOther)
			}
			r.gap(int(s.Disk), on)
			s.Length = 0
		}
		r.free = append(r.free, i)
	}
	for pos := r.head.Consumer; pos < r.head.Producer; {
		h := r.word(pos)
		n := uint64(*h &^ (busyBit | skipBit))
		if n < recordHead || n > uint64(r.cfg.RingBytes) || pos+next(n) > r.head.Producer {
			return fmt.Errorf("record of %d bytes at %d: %w", n, pos, ErrOther)
		}
		if *h&busyBit != 0 {
			*h = uint32(n) | skipBit
		}
		pos += next(n)
	}
	return nil
}

// Identity names the ring.
func (r *Ring) Identity() [16]byte { return r.ident }

// PayloadCaptured is always so.
func (r *Ring) PayloadCaptured() bool { return true }

// WhyNoPayload is nil.
func (r *Ring) WhyNoPayload() error { return nil }

// RingSize is in bytes.
func (r *Ring) RingSize() int64 { return r.cfg.RingBytes }

// Note is what SetNote kept.
func (r *Ring) Note() string { return string(r.head.Note[:r.head.NoteLen]) }

// SetNote keeps a text of at most 2048 bytes for as long as the ring lives.
func (r *Ring) SetNote(note string) error {
	if len(note) > noteMax {
		sum := crc32.Checksum([]byte(note), crc32.MakeTable(crc32.Castagnoli))
		note = string(binary.LittleEndian.AppendUint32([]byte(note[:noteMax-4]), sum))
	}
	r.head.NoteLen = 0
	copy(r.head.Note[:], note)
	r.head.NoteLen = uint32(len(note))
	return nil
}

// Rest says that the devices end in order: nothing is lost when their filters are detached.
func (r *Ring) Rest() { r.resting.Store(true) }

// Resting says whether Rest was called.
func (r *Ring) Resting() bool { return r.resting.Load() }

// Disks are what the ring is for; they are not to be changed.
func (r *Ring) Disks() []Disk { return r.cfg.Disks }

// leaveMax is how long Close waits for writes that are under way.
const leaveMax = 10 * time.Second

// Close unmaps the ring, which stays in its file, when the last write that may
// touch it has ended. Where that does not happen the memory stays: a filter that
// was taken out of its stack may still hold a request.
func (r *Ring) Close() error {
	r.mu.Lock()
	again := r.closed
	r.closed = true
	r.shut.Store(true)
	r.room.Broadcast()
	r.mu.Unlock()
	if again {
		return nil
	}
	for end := time.Now().Add(leaveMax); r.inside.Load() > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			return fmt.Errorf("capture ring %s: writes do not end", r.cfg.Path)
		}
	}
	return r.unmap()
}

func (r *Ring) unmap() error {
	return unix.MunmapPtr(unsafe.Pointer(&r.memory[0]), uintptr(len(r.memory)))
}

// Remove closes the ring and removes its file.
func (r *Ring) Remove() error {
	return errors.Join(r.Close(), os.Remove(r.cfg.Path))
}

// Distrust says that writes of a disk go past its filter.
func (r *Ring) Distrust(disk int, cause error) { r.unseen(disk, cause) }

// fail notes that a device's writes are no longer seen. The first cause stays.
func (r *Ring) fail(cause error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.lost == nil {
		r.lost = cause
		r.room.Broadcast()
	}
}

// Lost says why writes of a device are no longer seen, nil where all are.
func (r *Ring) Lost() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.lost
}

// clockTries bounds how often the clock is read for a better guess.
const clockTries = 100

// readClock finds out what CLOCK_MONOTONIC, by which a tap stamps its records, was
// at began. Both run alike, so records of all groups have one clock but for the time
// between the two looks: that of the quickest of many tries, some ten nanoseconds.
func (r *Ring) readClock() error {
	best := time.Duration(-1)
	for range clockTries {
		var mono unix.Timespec
		began := time.Now()
		if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &mono); err != nil {
			return err
		}
		if took := time.Since(began); best < 0 || took < best {
			best, r.began, r.clock = took, began, mono.Nano()-int64(took/2)
		}
	}
	return nil
}

// now is CLOCK_MONOTONIC, in nanoseconds.
func (r *Ring) now() int64 { return r.clock + int64(time.Since(r.began)) }
