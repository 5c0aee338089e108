package sim

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"

	"tidemark/internal/block"
)

// ErrInjected is what a Disk's failing requests return where the test names no other error.
var ErrInjected = errors.New("injected I/O error")

// Disk is a block.Device in memory, with a write cache that Crash loses parts
// of: each write since the last Flush may be there or not, cut at sectors. All
// methods may be called concurrently; a request is whole to every other.
type Disk struct {
	mu      sync.RWMutex
	rng     *rand.Rand
	now     []byte
	stable  []byte // nil: the test will not crash it
	pending []write
	crashed bool
	// Fault is asked before each request, also concurrently, and gives the error
	// that it ends with. Set it before the first request.
	Fault func(op block.Op, r block.Range) error
	// Off, if set, cuts the power of all disks that share it, at one instant: when it
	// is true they answer ErrCrashed and do nothing.
	Off *atomic.Bool
}

func (d *Disk) dead() bool { return d.crashed || d.Off != nil && d.Off.Load() }

var (
	_ block.Device    = (*Disk)(nil)
	_ block.Zeroer    = (*Disk)(nil)
	_ block.Discarder = (*Disk)(nil)
	_ block.FUAWriter = (*Disk)(nil)
)

// NewDisk gives a disk of zeroes that cannot crash.
func NewDisk(size int64) *Disk { return &Disk{now: make([]byte, size)} }

// NewCrashDisk gives a disk of zeroes whose crash follows the seed.
func NewCrashDisk(seed uint64, size int64) *Disk {
	return &Disk{now: make([]byte, size), stable: make([]byte, size), rng: rand.New(rand.NewPCG(seed, 11))}
}

// Size is in bytes.
func (d *Disk) Size() int64 {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return int64(len(d.now))
}

// Resize makes the disk larger or smaller; what is new is zero.
func (d *Disk) Resize(size int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.now = append(slices.Clone(d.now), make([]byte, max(0, size-int64(len(d.now))))...)[:size]
}

func (d *Disk) fault(op block.Op, r block.Range) error {
	if d.Fault != nil {
		if err := d.Fault(op, r); err != nil {
			return fmt.Errorf("%s %s: %w", op, r, err)
		}
	}
	return nil
}

// ReadAt reads what was written last.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	if err := d.fault(block.OpRead, block.Range{Off: off, Len: int64(len(p))}); err != nil {
		return 0, err
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.dead() {
		return 0, ErrCrashed
	}
	if off > int64(len(d.now)) {
		return 0, io.EOF
	}
	n := copy(p, d.now[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt writes to the cache. One that fails has written any front part.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) { return d.put(block.OpWrite, p, off, false) }

// WriteFUA is WriteAt that is stable when it returns.
func (d *Disk) WriteFUA(p []byte, off int64) (int, error) { return d.put(block.OpWrite, p, off, true) }

// WriteZeroes zeroes a range in the cache.
func (d *Disk) WriteZeroes(r block.Range) error {
	_, err := d.put(block.OpZeroes, make([]byte, r.Len), r.Off, false)
	return err
}

// Discard fills a range with something else.
func (d *Disk) Discard(r block.Range) error {
	junk := make([]byte, r.Len)
	for i := range junk {
		junk[i] = 0xdb
	}
	_, err := d.put(block.OpDiscard, junk, r.Off, false)
	return err
}

func (d *Disk) put(op block.Op, p []byte, off int64, fua bool) (int, error) {
	err := d.fault(op, block.Range{Off: off, Len: int64(len(p))})
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.dead() {
		return 0, ErrCrashed
	}
	if bad := block.CheckBounds(block.Range{Off: off, Len: int64(len(p))}, int64(len(d.now))); bad != nil {
		return 0, bad
	}
	if err != nil {
		p = p[:len(p)/2&^(sector-1)]
	}
	copy(d.now[off:], p)
	switch {
	case d.stable == nil:
	case fua && err == nil:
		// What the cache holds of the range is older: it must not come over it.
		d.pending = append(d.pending, write{off, slices.Clone(p)})
		copy(d.stable[off:], p)
		d.settle(off, p)
	default:
		d.pending = append(d.pending, write{off, slices.Clone(p)})
	}
	return len(p), err
}

// settle has what is pending of a range agree with what became stable.
func (d *Disk) settle(off int64, p []byte) {
	for _, w := range d.pending {
		from, to := max(off, w.off), min(off+int64(len(p)), w.off+int64(len(w.data)))
		if from < to {
			copy(w.data[from-w.off:to-w.off], p[from-off:])
		}
	}
}

// Flush makes everything written stable. One that fails made a part of it so.
func (d *Disk) Flush() error {
	err := d.fault(block.OpFlush, block.Range{})
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.dead() {
		return ErrCrashed
	}
	if err == nil && d.stable != nil {
		for _, w := range d.pending {
			copy(d.stable[w.off:], w.data)
		}
		d.pending = nil
	}
	return err
}

// Crash cuts the power: this disk answers nothing any more, and the one that it
// gives has what was stable and any part of the rest.
func (d *Disk) Crash() *Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.crashed = true
	after := slices.Clone(d.stable)
	for _, w := range d.pending {
		for at := 0; at < len(w.data); at += sector {
			if d.rng.IntN(2) == 0 {
				copy(after[w.off+int64(at):], w.data[at:min(at+sector, len(w.data))])
			}
		}
	}
	return &Disk{now: after, stable: slices.Clone(after), rng: d.rng}
}

// Bytes is a copy of the content.
func (d *Disk) Bytes() []byte {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return slices.Clone(d.now)
}
