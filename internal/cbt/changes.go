package cbt

import (
	"fmt"
	"io"
	"iter"

	"tidemark/internal/block"
)

// Changes is what changed up to one snapshot: its table, or what in it is newer
// than an earlier snapshot. Its numbers do not change any more, except that
// MarkDirty shows in those of the newest one.
type Changes struct {
	side  *side
	above uint8 // blocks with a higher number count as changed
}

// Info describes the snapshot.
func (c *Changes) Info() Info { return c.side.info() }

// Size is the device's at the snapshot, in bytes.
func (c *Changes) Size() int64 { return c.side.size }

// Since narrows to what changed after an earlier snapshot of the same generation.
// Anything else is ErrFullCopy.
func (c *Changes) Since(g Generation, number uint8) (*Changes, error) {
	switch have := c.side; {
	case g != have.generation:
		return nil, fmt.Errorf("changes since %s:%d, of a generation that has ended (now %s): %w", g, number, have.generation, ErrFullCopy)
	case number == 0:
		return nil, fmt.Errorf("changes since %s:0, before the first snapshot: %w", g, ErrFullCopy)
	case uint32(number) > have.number:
		return nil, fmt.Errorf("changes since %s:%d, of which the newest snapshot is %d: %w", g, number, have.number, ErrFullCopy)
	}
	return &Changes{c.side, number}, nil
}

// Read copies the table's bytes, one a block, from block i on, and returns how
// many; none and io.EOF at the end.
func (c *Changes) Read(p []byte, i int64) (int, error) {
	if i < 0 || i > c.side.blocks.blocks() {
		return 0, fmt.Errorf("block %d of a change map of %d: %w", i, c.side.blocks.blocks(), block.ErrBounds)
	}
	n := c.side.blocks.bytes(p, i)
	if n == 0 && len(p) > 0 {
		return 0, io.EOF
	}
	return n, nil
}

// Extents yields the lengths of the runs that a range consists of, each with
// whether it changed, in order, without gaps, cut to the range; neighbours differ.
func (c *Changes) Extents(off, length int64) iter.Seq2[int64, bool] {
	return func(yield func(int64, bool) bool) {
		t := c.side.blocks
		end := min(off+length, c.side.size)
		for at := max(off, 0); at < end; {
			to, dirty := t.next(at>>t.shift, (end-1)>>t.shift+1, c.above)
			stop := min(to<<t.shift, end)
			if !yield(stop-at, dirty) {
				return
			}
			at = stop
		}
	}
}

// Ranges yields what changed, whole blocks cut to the device.
func (c *Changes) Ranges() iter.Seq[block.Range] {
	return func(yield func(block.Range) bool) {
		at := int64(0)
		for n, dirty := range c.Extents(0, c.side.size) {
			if dirty && !yield(block.Range{Off: at, Len: n}) {
				return
			}
			at += n
		}
	}
}
