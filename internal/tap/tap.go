// Package tap sees every write to live disks through eBPF programs on the block
// layer's tracepoints and gives them out in order.
//
// One tap serves one group. Its programs, links and maps are pinned below
// /sys/fs/bpf/tidemark/INSTANCE/GROUP, so capture goes on while no process is
// alive; Adopt takes over where the last one stopped. Records leave the kernel's
// ring only by Commit.
//
// A Tap is used by one goroutine, except for Producer, Bookmark, Counters, Drops and Ends.
package tap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"tidemark/internal/block"
	"tidemark/internal/source"
	"tidemark/internal/stream"
)

// Errors that callers branch on.
var (
	ErrExists   = errors.New("a tap of this group is pinned already")
	ErrNoPins   = errors.New("no tap of this group is pinned")
	ErrLayout   = errors.New("the pinned tap was made by another version of Tidemark")
	ErrRingFull = source.ErrFull
	ErrConfig   = errors.New("not a valid tap")
	// ErrMetadataOnly is WhyNoPayload's where nobody tried.
	ErrMetadataOnly = errors.New("only ranges were asked for")
)

// What a tap gives is what any way in gives.
type (
	Place    = source.Place
	Kind     = source.Kind
	Record   = source.Record
	Mark     = source.Mark
	Peek     = source.Peek
	Scan     = source.Scan
	Counters = source.Counters
)

// Kinds of records.
const (
	Write    = source.Write
	Lost     = source.Lost
	Bookmark = source.Bookmark
)

var _ source.Source = (*Tap)(nil)

// DisksMax is how many disks one tap takes.
const DisksMax = disksMax

// Bounds that the programs share (bpf/layout.h).
const (
	layout       = 4
	layoutOldest = 3 // that Adopt takes over
	targetsMax   = 16
	disksMax     = 64
	headSize     = 64
	pageSize     = 4096
	payloadMax   = 32 << 20
)

// Target is one protected range of one disk: a whole disk or a partition.
type Target struct {
	Name      string
	Whole     uint32 // device number of the whole disk, major<<20|minor
	Start     int64  // bytes from the start of the whole disk
	Len       int64  // bytes
	DiskSeq   uint64 // the kernel's number of this disk, or loop's backing, in this boot
	BlockSize int64  // of change map and gap bits: a power of two from 512
	BioBased  bool   // device-mapper, md: bios end without becoming requests
	Pass      Passthrough
}

// Passthrough says how commands that are not bios are told apart (bpf/layout.h).
type Passthrough struct {
	Kind   uint32
	Offset uint32
}

// Kinds of Passthrough.
const (
	PassUnknown = 0
	PassSCSI    = 1
	PassNVMe    = 2
	PassNone    = 3
)

// Tap is a running capture.
type Tap struct {
	pins    pins
	targets []Target
	ident   [16]byte
	options Options
	meta    meta // as it is pinned

	maps      map[string]*ebpf.Map
	mark      *ebpf.Program
	stubs     map[string]*ebpf.Program // attached ones, by hook
	state     *state
	counts    []counters
	change    []byte
	gaps      []uint64
	noPayload error
	base      []offsets
	mappings  [][]byte
	rest      rest
	aging     aging

	ring     []byte // data, mapped twice in a row
	ringSize uint64
	consumer *uint64
	producer *uint64
	record   Record
}

// offsets says where a target's part of the group's maps begins.
type offsets struct {
	change uint64 // byte
	gap    uint64 // word
	blocks uint64
}

// Identity names this ring; it changes when capture was interrupted.
func (t *Tap) Identity() [16]byte { return t.ident }

// Targets are what the tap was started with.
func (t *Tap) Targets() []Target { return t.targets }

// PayloadCaptured is false in metadata mode.
func (t *Tap) PayloadCaptured() bool { return atomic.LoadUint32(&t.state.Payload) == payloadYes }

// WhyNoPayload is why payloads are not captured: ErrMetadataOnly, what stood in
// the calibration's way, or what Distrust was called with. nil: they are.
func (t *Tap) WhyNoPayload() error { return t.noPayload }

// Distrust ends the capture of payloads: what was captured was found to be
// something else than what is on the disk. Writes from now on are gaps.
func (t *Tap) Distrust(why error) {
	t.noPayload = why
	atomic.CompareAndSwapUint32(&t.state.Payload, payloadYes, payloadNo)
}

// RingSize is the ring's size in bytes.
func (t *Tap) RingSize() int64 { return int64(t.ringSize) }

// Producer is where the next record will be put.
func (t *Tap) Producer() Place { return Place(atomic.LoadUint64(t.producer)) }

// Consumer is up to where records have been let go.
func (t *Tap) Consumer() Place { return Place(atomic.LoadUint64(t.consumer)) }

// Commit lets everything before p go. Call it when what was there is on stable storage.
func (t *Tap) Commit(p Place) {
	if c := t.Consumer(); p > c {
		atomic.StoreUint64(t.consumer, uint64(p))
	}
}

// Drops counts the writes that are gaps.
func (t *Tap) Drops() uint64 { return atomic.LoadUint64(&t.state.Drops) }

const (
	busyBit    = 1 << 31
	discardBit = 1 << 30
)

// Read calls fn for every record from a place (the consumer's or what an earlier
// Read returned) up to the producer or a record that is still being written. It
// returns the place after the last record that fn took; where fn fails, its
// error and that record's place.
func (t *Tap) Read(from Place, fn func(*Record) error) (Place, error) {
	pos, end := uint64(from), atomic.LoadUint64(t.producer)
	mask := t.ringSize - 1
	for pos < end {
		at := pos & mask
		header := atomic.LoadUint32((*uint32)(unsafe.Pointer(&t.ring[at])))
		if header&busyBit != 0 {
			break
		}
		n := uint64(header &^ (busyBit | discardBit))
		next := pos + (n+8+7)&^7
		if header&discardBit == 0 {
			if err := t.decode(t.ring[at+8:at+8+n], pos, next); err != nil {
				return Place(pos), err
			}
			if err := fn(&t.record); err != nil {
				return Place(pos), err
			}
		}
		pos = next
	}
	return Place(pos), nil
}

func (t *Tap) decode(b []byte, pos, next uint64) error {
	le := binary.LittleEndian
	if len(b) < headSize {
		return fmt.Errorf("ring record at %d has %d bytes", pos, len(b))
	}
	r := &t.record
	*r = Record{
		Place: Place(pos), End: Place(next), Kind: Kind(le.Uint32(b)), Disk: int(le.Uint16(b[4:])), Op: block.Op(b[6]),
		Consistency: stream.Consistency(b[7]),
		Range:       block.Range{Off: int64(le.Uint64(b[8:])) * block.SectorSize, Len: int64(le.Uint64(b[16:]))},
		MonoTime:    int64(le.Uint64(b[24:])), Drops: le.Uint64(b[32:]), Token: le.Uint64(b[40:]),
	}
	n := uint64(le.Uint32(b[48:]))
	if n > uint64(len(b)-headSize) {
		return fmt.Errorf("ring record at %d: payload of %d bytes in %d", pos, n, len(b))
	}
	payload := b[headSize : headSize+n]
	switch r.Kind {
	case Bookmark:
		r.Name = string(payload)
		return nil
	case Write:
		if r.Op == block.OpWrite && n != uint64(r.Range.Len) {
			return fmt.Errorf("ring record at %d: payload of %d bytes for %s", pos, n, r.Range)
		}
		r.Payload = payload
	case Lost:
	default:
		return fmt.Errorf("ring record at %d: kind %d", pos, r.Kind)
	}
	if r.Disk >= len(t.targets) {
		return fmt.Errorf("ring record at %d: disk %d of %d", pos, r.Disk, len(t.targets))
	}
	return block.CheckBounds(r.Range, t.targets[r.Disk].Len)
}

type markArg struct {
	Token, Place        uint64
	Consistency, Length uint32
	Name                [stream.NameMax]byte
}

// Bookmark puts a mark behind every write that was queued before the call, over
// all disks of the group at once, and returns the producer's place after it.
// ErrRingFull: there is no room, and so no order to have.
func (t *Tap) Bookmark(m Mark) (Place, error) {
	arg := markArg{Token: m.Token, Consistency: uint32(m.Consistency), Length: uint32(len(m.Name))}
	if copy(arg.Name[:], m.Name) != len(m.Name) {
		return 0, fmt.Errorf("bookmark name has %d bytes: at most %d", len(m.Name), stream.NameMax)
	}
	ret, err := t.mark.Run(&ebpf.RunOptions{Context: &arg, ContextOut: &arg})
	if err != nil {
		return 0, fmt.Errorf("running the bookmark program: %w", err)
	}
	if ret != 0 {
		return 0, fmt.Errorf("bookmark %q: %w", m.Name, ErrRingFull)
	}
	return Place(arg.Place), nil
}

// PeekGaps copies the gap bits as ranges of whole blocks, cut at the disk's end.
func (t *Tap) PeekGaps() (Peek, error) {
	p := Peek{Drops: t.Drops()}
	for disk := range t.targets {
		p.Ranges = t.peekDisk(p.Ranges, disk)
	}
	return p, nil
}

func (t *Tap) peekDisk(out []block.DiskRange, disk int) []block.DiskRange {
	o, size, bs := t.base[disk], t.targets[disk].Len, t.targets[disk].BlockSize
	open := int64(-1)
	for w := uint64(0); w*64 < o.blocks; w++ {
		word := atomic.LoadUint64(&t.gaps[o.gap+w])
		if word == 0 && open < 0 || word == ^uint64(0) && open >= 0 {
			continue
		}
		for b := int64(w) * 64; b < int64(w+1)*64; b++ {
			set := word>>(b&63)&1 != 0
			if set && open < 0 {
				open = b
			}
			if !set && open >= 0 {
				out = append(out, blockRange(disk, open, b, bs, size))
				open = -1
			}
		}
	}
	if open >= 0 {
		out = append(out, blockRange(disk, open, int64(o.blocks), bs, size))
	}
	return out
}

func blockRange(disk int, from, to, bs, size int64) block.DiskRange {
	off := from * bs
	return block.DiskRange{Disk: disk, Range: block.Range{Off: off, Len: min(to*bs, size) - off}}
}

// ClearGaps clears the bits of ranges, and no others, and returns the
// producer's place after that: every write whose bit was cleared was queued
// before it.
func (t *Tap) ClearGaps(ranges []block.DiskRange) (Place, error) {
	for _, r := range ranges {
		bs, o := t.targets[r.Disk].BlockSize, t.base[r.Disk]
		for b, end := r.Off/bs, (r.End()+bs-1)/bs; b < end; {
			n := min(end-b, 64-b&63)
			mask := (^uint64(0) >> (64 - n)) << (b & 63)
			atomic.AndUint64(&t.gaps[o.gap+uint64(b)/64], ^mask)
			b += n
		}
	}
	return t.Producer(), nil
}

// ChangeMap is one disk's live change map, a byte for each block.
func (t *Tap) ChangeMap(disk int) (numbers []byte, blockSize int64) {
	o := t.base[disk]
	return t.change[o.change : o.change+o.blocks], t.targets[disk].BlockSize
}

// Close lets go of the tap; it stays pinned and goes on capturing.
func (t *Tap) Close() error {
	var errs []error
	for _, m := range t.mappings {
		errs = append(errs, unix.Munmap(m))
	}
	t.mappings = nil
	for _, m := range t.maps {
		errs = append(errs, m.Close())
	}
	for _, p := range t.stubs {
		errs = append(errs, p.Close())
	}
	if t.mark != nil {
		errs = append(errs, t.mark.Close())
	}
	return errors.Join(errs...)
}

// Remove ends the capture and takes every trace of it away.
func (t *Tap) Remove() error {
	return errors.Join(t.Close(), t.pins.remove())
}

func blocksOf(t Target) uint64 {
	return uint64((t.Len + t.BlockSize - 1) / t.BlockSize)
}

func shiftOf(size int64) uint32 { return uint32(bits.TrailingZeros64(uint64(size))) }
