package diff

import (
	"cmp"
	"fmt"
	"slices"
	"sort"

	"tidemark/internal/block"
)

// Linear makes one space of ranges of a device, in their order.
type Linear struct {
	dev    block.Device
	fua    block.FUAWriter
	ranges []block.Range
	starts []int64 // of each range in the space
	size   int64
}

// NewLinear refuses ranges that are not of whole, aligned pages, that overlap, or
// that are not inside the device.
func NewLinear(dev block.Device, ranges []block.Range) (*Linear, error) {
	l := &Linear{dev: dev, ranges: ranges}
	l.fua, _ = dev.(block.FUAWriter)
	for _, r := range ranges {
		if r.Off%Align != 0 || r.Len%Align != 0 || r.Empty() {
			return nil, fmt.Errorf("range %s is not aligned to %d bytes: %w", r, Align, ErrRefused)
		}
		if err := block.CheckBounds(r, dev.Size()); err != nil {
			return nil, fmt.Errorf("%w: %w", err, ErrRefused)
		}
		l.starts = append(l.starts, l.size)
		l.size += r.Len
	}
	sorted := slices.SortedFunc(slices.Values(ranges), func(a, b block.Range) int { return cmp.Compare(a.Off, b.Off) })
	for i := 1; i < len(sorted); i++ {
		if sorted[i-1].Overlaps(sorted[i]) {
			return nil, fmt.Errorf("range %s overlaps another one: %w", sorted[i], ErrRefused)
		}
	}
	return l, nil
}

// Ranges are those of the device.
func (l *Linear) Ranges() []block.Range { return l.ranges }

// Size is in bytes.
func (l *Linear) Size() int64 { return l.size }

// each calls do with the parts of a range of the space on the device.
func (l *Linear) each(p []byte, off int64, do func(p []byte, off int64) (int, error)) (int, error) {
	if err := block.CheckBounds(block.Range{Off: off, Len: int64(len(p))}, l.size); err != nil {
		return 0, err
	}
	done := 0
	for i := sort.Search(len(l.starts), func(i int) bool { return l.starts[i] > off }) - 1; done < len(p); i++ {
		in := off + int64(done) - l.starts[i]
		n := int(min(l.ranges[i].Len-in, int64(len(p)-done)))
		k, err := do(p[done:done+n], l.ranges[i].Off+in)
		done += k
		if k < n {
			return done, fmt.Errorf("%s: %w", block.Range{Off: l.ranges[i].Off + in, Len: int64(n)}, err)
		}
	}
	return done, nil
}

// ReadAt reads whole or fails.
func (l *Linear) ReadAt(p []byte, off int64) (int, error) { return l.each(p, off, l.dev.ReadAt) }

// WriteAt writes whole or fails.
func (l *Linear) WriteAt(p []byte, off int64) (int, error) { return l.each(p, off, l.dev.WriteAt) }

// WriteFUA writes and makes it stable.
func (l *Linear) WriteFUA(p []byte, off int64) (int, error) {
	if l.fua != nil {
		return l.each(p, off, l.fua.WriteFUA)
	}
	n, err := l.WriteAt(p, off)
	if err == nil {
		err = l.dev.Flush()
	}
	return n, err
}

// Flush makes stable what was written.
func (l *Linear) Flush() error { return l.dev.Flush() }
