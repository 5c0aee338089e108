package timeline

import (
	"cmp"
	"container/heap"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sort"
	"sync"

	"tidemark/internal/block"
	"tidemark/internal/segment"
	"tidemark/internal/stream"
	"tidemark/internal/vault"
)

// extent is a run of a view with one source.
type extent struct {
	off, len int64
	at       uint64
	segment  int32
	kind     itemKind
	base     stream.Position
}

// View is a disk as it was at a point: a read-only block.Device that knows its
// extents. It may be used concurrently. Close it.
type View struct {
	h       *History
	disk    int
	at      stream.Position
	size    int64
	extents []extent
	store   *store
}

// View opens a disk at a position inside a stretch.
func (h *History) View(_ context.Context, disk int, p stream.Position) (*View, error) {
	if disk < 0 || disk >= len(h.disks) {
		return nil, ErrNoDisk
	}
	if _, err := h.at(p, stream.Spec{Position: p}); err != nil {
		return nil, err
	}
	return &View{h: h, disk: disk, at: p, size: h.header.Disks[disk].Size, extents: h.extents(disk, p), store: newStore(h)}, nil
}

// extents finds, for each byte of a disk, the newest item at or below p.
func (h *History) extents(disk int, p stream.Position) []extent {
	items := make([]int32, 0, len(h.disks[disk]))
	all := h.disks[disk]
	for i := range all {
		if all[i].pos <= p {
			items = append(items, int32(i))
		}
	}
	slices.SortFunc(items, func(a, b int32) int { return cmp.Compare(all[a].off, all[b].off) })
	out := sweep(all, items)
	if !slices.ContainsFunc(out, func(e extent) bool { return e.kind == isSame }) {
		return out
	}
	return h.throughBases(disk, out)
}

// newer orders items as internal/stream says: by position, a fill above the
// write of its rank, and what was appended later above what came before.
func newer(all []item, a, b int32) bool {
	x, y := &all[a], &all[b]
	if x.pos != y.pos {
		return x.pos > y.pos
	}
	if x.fill != y.fill {
		return x.fill
	}
	return a > b
}

// active is a heap of items with the newest on top.
type active struct {
	all   []item
	items []int32
}

func (h *active) Len() int           { return len(h.items) }
func (h *active) Less(i, j int) bool { return newer(h.all, h.items[i], h.items[j]) }
func (h *active) Swap(i, j int)      { h.items[i], h.items[j] = h.items[j], h.items[i] }
func (h *active) Push(x any)         { h.items = append(h.items, x.(int32)) }
func (h *active) Pop() any {
	x := h.items[len(h.items)-1]
	h.items = h.items[:len(h.items)-1]
	return x
}

// sweep walks items, sorted by offset, from left to right with those that cover
// the place in a heap.
func sweep(all []item, items []int32) []extent {
	var out []extent
	h := &active{all: all}
	var at int64
	for i := 0; i < len(items) || len(h.items) > 0; {
		for len(h.items) > 0 && all[h.items[0]].off+all[h.items[0]].len <= at {
			heap.Pop(h)
		}
		if len(h.items) == 0 {
			if i == len(items) {
				break
			}
			at = max(at, all[items[i]].off)
		}
		for i < len(items) && all[items[i]].off <= at {
			heap.Push(h, items[i])
			i++
		}
		for len(h.items) > 0 && all[h.items[0]].off+all[h.items[0]].len <= at {
			heap.Pop(h)
		}
		if len(h.items) == 0 {
			continue
		}
		top := &all[h.items[0]]
		end := top.off + top.len
		if i < len(items) {
			end = min(end, all[items[i]].off)
		}
		out = join(out, extent{off: at, len: end - at, at: top.at + uint64(at-top.off), segment: top.segment, kind: top.kind, base: top.base})
		at = end
	}
	return out
}

// join appends e, as part of the last extent where it goes on from it.
func join(out []extent, e extent) []extent {
	if n := len(out); n > 0 {
		l := &out[n-1]
		if l.off+l.len == e.off && l.kind == e.kind && (e.kind == isZero || e.kind == isUndefined ||
			e.kind == isSame && l.base == e.base || e.kind == isData && l.segment == e.segment && l.at+uint64(l.len) == e.at) {
			l.len += e.len
			return out
		}
	}
	return append(out, e)
}

// throughBases puts what their bases hold in place of the extents that say "as at base".
func (h *History) throughBases(disk int, in []extent) []extent {
	bases := map[stream.Position][]extent{}
	var out []extent
	for _, e := range in {
		if e.kind != isSame {
			out = join(out, e)
			continue
		}
		base, ok := bases[e.base]
		if !ok {
			base = h.extents(disk, e.base)
			bases[e.base] = base
		}
		for i := search(base, e.off); i < len(base) && base[i].off < e.off+e.len; i++ {
			out = join(out, cut(base[i], e.off, e.off+e.len))
		}
	}
	return out
}

func search(extents []extent, off int64) int {
	return sort.Search(len(extents), func(i int) bool { return extents[i].off+extents[i].len > off })
}

func cut(e extent, from, to int64) extent {
	off, end := max(e.off, from), min(e.off+e.len, to)
	e.at += uint64(off - e.off)
	e.off, e.len = off, end-off
	return e
}

// Position is the point that the view shows, Size the disk's size in bytes.
func (v *View) Position() stream.Position { return v.at }
func (v *View) Size() int64               { return v.size }

// WriteAt refuses: a point does not change.
func (v *View) WriteAt([]byte, int64) (int, error) { return 0, block.ErrReadOnly }

// Flush has nothing to do.
func (v *View) Flush() error { return nil }

// ReadAt reads the disk as it was. An error names group, disk, range and object
// where stored data is damaged; damaged data is never returned.
func (v *View) ReadAt(p []byte, off int64) (int, error) {
	want := int64(len(p))
	if off < 0 || off > v.size {
		return 0, fmt.Errorf("read at %d of %d bytes: %w", off, v.size, block.ErrBounds)
	}
	short := want > v.size-off
	if short {
		p = p[:v.size-off]
	}
	end := off + int64(len(p))
	clear(p)
	for i := search(v.extents, off); i < len(v.extents) && v.extents[i].off < end; i++ {
		e := cut(v.extents[i], off, end)
		if e.kind != isData {
			continue
		}
		if err := v.store.read(e, p[e.off-off:][:e.len]); err != nil {
			return int(e.off - off), fmt.Errorf("group %s, disk %s, bytes %d+%d, object %s: %w", v.h.group, v.h.header.Disks[v.disk].Name,
				e.off, e.len, v.h.refs[e.segment].Name, err)
		}
	}
	if short {
		return len(p), io.EOF
	}
	return len(p), nil
}

// extentsMax bounds one answer of Extents.
const extentsMax = 4096

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
		put(e.off, e.off+e.len, [...]block.State{isData: block.Data, isZero: block.Zero, isUndefined: block.Undefined, isSame: block.Data}[e.kind])
		at = e.off + e.len
	}
	if len(out) < extentsMax {
		put(at, r.End(), block.Undefined)
	}
	return out, nil
}

// Close lets go of the objects that the view has open.
func (v *View) Close() error { return v.store.close() }

const (
	objectsMax = 64
	framesMax  = 256
)

// store reads payloads through a few open objects and decoded frames.
type store struct {
	h       *History
	mu      sync.Mutex
	objects map[int32]*vault.Object
	order   []int32
	frames  map[frameKey][]byte
	recent  []frameKey
}

type frameKey struct {
	segment int32
	frame   int
}

func newStore(h *History) *store {
	return &store{h: h, objects: map[int32]*vault.Object{}, frames: map[frameKey][]byte{}}
}

func (s *store) read(e extent, dst []byte) error {
	for at := e.at; len(dst) > 0; {
		frame, err := s.frame(frameKey{e.segment, int(at / segment.FrameSize)})
		if err != nil {
			return err
		}
		n := copy(dst, frame[at%segment.FrameSize:])
		if n == 0 {
			return fmt.Errorf("%w: a payload ends early", segment.ErrDamaged)
		}
		dst, at = dst[n:], at+uint64(n)
	}
	return nil
}

// frame gives a decoded frame; it is not changed by anybody.
func (s *store) frame(k frameKey) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f, ok := s.frames[k]; ok {
		return f, nil
	}
	o, err := s.object(k.segment)
	if err != nil {
		return nil, err
	}
	f, err := o.Frame(k.frame, make([]byte, segment.FrameSize))
	if err != nil {
		return nil, err
	}
	if len(s.recent) == framesMax {
		delete(s.frames, s.recent[0])
		s.recent = s.recent[1:]
	}
	s.frames[k] = f
	s.recent = append(s.recent, k)
	return f, nil
}

func (s *store) object(i int32) (*vault.Object, error) {
	if o, ok := s.objects[i]; ok {
		return o, nil
	}
	o, err := s.h.vault.OpenSegment(context.Background(), s.h.group, s.h.refs[i])
	if err != nil {
		return nil, err
	}
	if len(s.order) == objectsMax {
		s.objects[s.order[0]].Close()
		delete(s.objects, s.order[0])
		s.order = s.order[1:]
	}
	s.objects[i] = o
	s.order = append(s.order, i)
	return o, nil
}

func (s *store) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, o := range s.objects {
		errs = append(errs, o.Close())
	}
	s.objects, s.order = map[int32]*vault.Object{}, nil
	return errors.Join(errs...)
}
