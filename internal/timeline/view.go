package timeline

import (
	"context"
	"fmt"
	"io"
	"math"

	"tidemark/internal/block"
	"tidemark/internal/segment"
	"tidemark/internal/stream"
)

// View is a disk as it was at a point: a read-only block.Device that knows its
// extents. It may be used concurrently. Close it after its last use.
type View struct {
	h       *History
	disk    int
	at      stream.Position
	size    int64
	extents []extent
	store   *store
}

// View opens a disk at a position inside a stretch. Its memory is in proportion
// to the writes and fills up to there while it opens, then to what of them is
// still to be seen.
func (h *History) View(ctx context.Context, disk int, p stream.Position) (*View, error) {
	if h.stretchOf(p) == 0 && p != 0 && p <= h.newest {
		return nil, h.insideGap(p, stream.Spec{Position: p})
	}
	return h.ViewFuzzy(ctx, disk, p)
}

// ViewFuzzy is View also for positions inside a gap; Fuzzy says what may be
// something else than the disk held then.
func (h *History) ViewFuzzy(ctx context.Context, disk int, p stream.Position) (*View, error) {
	if disk < 0 || disk >= len(h.header.Disks) {
		return nil, ErrNoDisk
	}
	if _, err := h.at(ctx, p, stream.Spec{Position: p}); err != nil {
		return nil, err
	}
	all, tables, err := h.collect(ctx, disk, p)
	if err != nil {
		return nil, err
	}
	extents := compact(all.extents(p, []block.Range{{Len: math.MaxInt64}}))
	open := func(i int32) (io.ReaderAt, io.Closer, error) {
		return h.vault.Payloads(context.Background(), h.group, h.refs[i])
	}
	return &View{h: h, disk: disk, at: p, size: h.header.Disks[disk].Size, extents: extents, store: newStore(open, needed(tables, extents))}, nil
}

// needed leaves out the tables of segments that nothing is to be seen of any more.
func needed(tables []*segment.Frames, extents []extent) []*segment.Frames {
	out := make([]*segment.Frames, len(tables))
	for i := range extents {
		if e := &extents[i]; e.kind() == isData {
			out[e.segment] = tables[e.segment]
		}
	}
	return out
}

// Position is the point that the view shows, Size the disk's size in bytes.
func (v *View) Position() stream.Position { return v.at }
func (v *View) Size() int64               { return v.size }

// WriteAt refuses: a point does not change.
func (v *View) WriteAt([]byte, int64) (int, error) { return 0, block.ErrReadOnly }

// Flush has nothing to do.
func (v *View) Flush() error { return nil }

// ReadAt reads the disk as it was. Where stored data is damaged, the error names
// group, disk, range and object and, as a *DamagedError, the newest point
// that does not need it; damaged data is never returned.
func (v *View) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off > v.size {
		return 0, fmt.Errorf("read at %d of %d bytes: %w", off, v.size, block.ErrBounds)
	}
	var short error
	if int64(len(p)) > v.size-off {
		p, short = p[:v.size-off], io.EOF
	}
	end, at := off+int64(len(p)), off // everything before at is there
	for i := search(v.extents, off); i < len(v.extents) && v.extents[i].off < end; i++ {
		e := cut(v.extents[i], off, end)
		if e.kind() != isData {
			continue
		}
		clear(p[at-off : e.off-off])
		at = e.end()
		if err := v.store.read(e, p[e.off-off:][:e.len]); err != nil {
			clear(p[e.off-off:])
			return int(e.off - off), v.damaged(e, err)
		}
	}
	clear(p[at-off:])
	return len(p), short
}

// damaged says what cannot be read and, if it is damage, which points need it.
func (v *View) damaged(e extent, err error) error {
	r := block.Range{Off: e.off, Len: e.len}
	err = fmt.Errorf("group %s, disk %s, bytes %s, object %s: %w", v.h.group, v.h.header.Disks[v.disk].Name, r, v.h.refs[e.segment].Name, err)
	from := v.at
	if p, lookup := v.h.spoiltFrom(context.Background(), int(e.segment)); lookup != nil {
		from = min(from, v.h.refs[e.segment].First)
	} else if p != 0 {
		from = min(from, p)
	}
	return v.h.damagedAt(from, err)
}

// extentsMax bounds one answer of Extents.
const extentsMax = 4096

var states = [...]block.State{isData: block.Data, isZero: block.Zero, isUndefined: block.Undefined, isSame: block.Undefined}

// Extents tells data, zeroes and the undefined apart.
func (v *View) Extents(r block.Range) ([]block.Extent, error) {
	if err := block.CheckBounds(r, v.size); err != nil {
		return nil, err
	}
	var out []block.Extent
	put := func(off, end int64, s block.State) {
		if n := len(out); n > 0 && out[n-1].State == s {
			out[n-1].Len += end - off
		} else if end > off {
			out = append(out, block.Extent{Range: block.Range{Off: off, Len: end - off}, State: s})
		}
	}
	at := r.Off
	for i := search(v.extents, r.Off); i < len(v.extents) && v.extents[i].off < r.End() && len(out) < extentsMax; i++ {
		e := cut(v.extents[i], r.Off, r.End())
		put(at, e.off, block.Undefined) // never known: only under a discard's rules
		put(e.off, e.end(), states[e.kind()])
		at = e.end()
	}
	if len(out) < extentsMax {
		put(at, r.End(), block.Undefined)
	}
	return out, nil
}

// Close lets go of the objects that the view has open.
func (v *View) Close() error { return v.store.close() }
