package drain

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"

	"tidemark/internal/block"
	"tidemark/internal/segment"
	"tidemark/internal/stream"
)

const (
	testBlock = 4096
	undefined = 0xDD // what a discarded byte is, here and in the copies
)

var testSizes = [2]int64{64 << 10, 44<<10 + 3*512}

var testGroup = [16]byte{7}

// story makes a stream that keeps the rules of internal/stream, in segments. It
// knows what the stream means.
type story struct {
	r         *rand.Rand
	all       []stream.Record
	pos       stream.Position
	clock     int64
	unknown   [2]map[int64]stream.Position // block to the position of its newest gap
	valid     stream.Position
	state     segment.State
	stretches [][2]stream.Position
	marks     []stream.Position // bookmarks that a consumer must see: behind a settled mark, before the next gap

	prepared []stream.Position // without a verdict

	builder  *segment.Builder
	segments [][]byte
	previous segment.Summary
	images   map[stream.Position][2][]byte
}

func tell(seed uint64, n int) *story {
	s := &story{r: rand.New(rand.NewPCG(seed, 7)), clock: 1_000_000, unknown: [2]map[int64]stream.Position{{}, {}},
		builder: segment.NewBuilder(1 << 16), images: map[stream.Position][2][]byte{}}
	s.gap(true)
	s.fill()
	for range n {
		switch k := s.r.IntN(60); {
		case k == 0:
			s.gap(false)
			s.fill()
		case k == 1:
			s.gap(true)
			s.fill()
		case k < 5:
			s.bookmark()
			s.marks = append(s.marks, s.pos)
		case k == 5:
			s.pos++
			s.add(stream.Record{Kind: stream.KindPrepared, Position: s.pos, Name: fmt.Sprint("mark", s.pos)})
			s.prepared = append(s.prepared, s.pos)
		case k == 6:
			s.decide()
		default:
			s.write()
		}
	}
	for len(s.prepared) > 0 {
		s.decide()
	}
	s.seal()
	return s
}

// decide gives a prepared mark its verdict.
func (s *story) decide() {
	if len(s.prepared) == 0 {
		return
	}
	i := s.r.IntN(len(s.prepared))
	p := s.prepared[i]
	s.prepared = slices.Delete(s.prepared, i, i+1)
	commit := s.r.IntN(2) == 0
	if commit {
		at, _ := slices.BinarySearch(s.marks, p)
		s.marks = slices.Insert(s.marks, at, p)
	}
	s.add(stream.Record{Kind: stream.KindVerdict, Position: p, Commit: commit})
}

func (s *story) payload(n int64) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(s.r.Uint32())
	}
	return p
}

func (s *story) add(rec stream.Record) {
	s.clock += s.r.Int64N(3) * 1000
	rec.Time = s.clock
	s.all = append(s.all, rec)
	if err := s.builder.Append(&rec); err != nil {
		panic(err)
	}
	s.state.Last, s.state.Time = s.pos, s.clock
	if s.r.IntN(15) == 0 {
		s.seal()
	}
}

func (s *story) seal() {
	h := segment.Header{Group: "g", GroupID: testGroup, Sequence: s.previous.Sequence + 1, Previous: s.previous.Digest}
	for i, size := range testSizes {
		h.Disks = append(h.Disks, segment.Disk{Name: string(rune('a' + i)), Size: size, SectorSize: 512, BlockSize: testBlock})
	}
	sealed, err := s.builder.Seal(h, s.state)
	if err != nil {
		panic(err)
	}
	var b bytes.Buffer
	if _, err := sealed.WriteTo(&b); err != nil {
		panic(err)
	}
	s.segments = append(s.segments, b.Bytes())
	s.previous = sealed.Summary
	s.builder.Reset()
}

func (s *story) write() {
	s.pos++
	disk := s.r.IntN(2)
	size := 512 * (1 + s.r.Int64N(20))
	rec := stream.Record{Kind: stream.KindWrite, Op: block.Op(1 + s.r.IntN(3)), Disk: disk, Position: s.pos,
		Range: block.Range{Off: 512 * s.r.Int64N((testSizes[disk]-size)/512+1), Len: size}}
	if rec.Op == block.OpWrite {
		rec.Payload = s.payload(size)
	}
	s.add(rec)
}

func (s *story) bookmark() {
	s.pos++
	s.add(stream.Record{Kind: stream.KindBookmark, Position: s.pos, Name: fmt.Sprint("mark", s.pos)})
}

func (s *story) gap(whole bool) {
	if s.state.Settled != 0 {
		s.stretches = append(s.stretches, [2]stream.Position{s.state.Settled, s.pos})
	}
	var ranges []block.DiskRange
	for d := range 2 {
		blocks := (testSizes[d] + testBlock - 1) / testBlock
		a, b := s.r.Int64N(blocks), s.r.Int64N(blocks)
		a, b = min(a, b), max(a, b)+1
		if whole {
			a, b = 0, blocks
		}
		ranges = append(ranges, block.DiskRange{Disk: d, Range: block.Range{Off: a * testBlock, Len: min(b*testBlock, testSizes[d]) - a*testBlock}})
	}
	s.pos++
	if s.state.GapSince == 0 {
		s.state.GapSince = s.pos
	}
	s.state.Settled = 0
	for _, g := range ranges {
		for b := g.Off / testBlock; b*testBlock < g.End(); b++ {
			s.unknown[g.Disk][b] = s.pos
		}
	}
	s.valid = s.pos
	s.add(stream.Record{Kind: stream.KindGap, Position: s.pos, Cause: stream.CauseOverflow, Ranges: ranges})
}

// fill makes everything known again while writes, marks and further gaps come.
func (s *story) fill() {
	for len(s.unknown[0])+len(s.unknown[1]) > 0 {
		switch k := s.r.IntN(100); {
		case k < 40:
			s.write()
		case k < 44:
			s.bookmark() // swallowed
		case k < 46:
			s.gap(false)
		default:
			s.fillOne()
		}
	}
	for range s.r.IntN(6) {
		s.write()
	}
	s.state.Settled, s.state.GapSince = s.valid, 0
	s.add(stream.Record{Kind: stream.KindSettled, Position: s.valid})
}

func (s *story) fillOne() {
	d := s.r.IntN(2)
	var blocks []int64
	for b := range s.unknown[d] {
		blocks = append(blocks, b)
	}
	if len(blocks) == 0 {
		return
	}
	slices.Sort(blocks)
	from := blocks[s.r.IntN(len(blocks))]
	to, low := from, stream.Position(0)
	for n := s.r.IntN(4); ; n-- {
		g, ok := s.unknown[d][to]
		if !ok || n < 0 {
			break
		}
		low = max(low, g)
		delete(s.unknown[d], to)
		to++
	}
	rank := low + stream.Position(s.r.Int64N(int64(s.pos-low)+1))
	valid := rank + stream.Position(s.r.Int64N(int64(s.pos-rank)+1))
	s.valid = max(s.valid, valid)
	r := block.Range{Off: from * testBlock, Len: min(to*testBlock, testSizes[d]) - from*testBlock}
	rec := stream.Record{Kind: stream.KindFill, Disk: d, Position: rank, ValidFrom: valid, Range: r}
	switch k := s.r.IntN(6); {
	case k == 0:
		rec.Fill = stream.FillZero
	case k == 1:
		rec.Fill = stream.FillKnown
	case k < 4 && len(s.stretches) > 0:
		st := s.stretches[s.r.IntN(len(s.stretches))]
		if k == 2 { // as the program does it; any other is allowed too
			st = s.stretches[len(s.stretches)-1]
			st[0] = st[1]
		}
		rec.Fill, rec.Base = stream.FillSame, st[0]+stream.Position(s.r.Int64N(int64(st[1]-st[0])+1))
	default:
		rec.Fill, rec.Payload = stream.FillData, s.payload(r.Len)
	}
	s.add(rec)
}

// at is what the disks hold at a position, by the words of internal/stream.
func (s *story) at(p stream.Position) [2][]byte {
	if have, ok := s.images[p]; ok {
		return have
	}
	var order []*stream.Record
	for i := range s.all {
		if r := &s.all[i]; r.Position <= p && (r.Kind == stream.KindWrite || r.Kind == stream.KindFill && r.Fill != stream.FillKnown) {
			order = append(order, r)
		}
	}
	fill := func(r *stream.Record) int {
		if r.Kind == stream.KindFill {
			return 1
		}
		return 0
	}
	slices.SortStableFunc(order, func(a, b *stream.Record) int {
		return cmp.Or(cmp.Compare(a.Position, b.Position), cmp.Compare(fill(a), fill(b)))
	})
	out := nothing()
	for _, r := range order {
		dst := out[r.Disk][r.Range.Off:r.Range.End()]
		switch {
		case r.Kind == stream.KindWrite && r.Op == block.OpWrite, r.Kind == stream.KindFill && r.Fill == stream.FillData:
			copy(dst, r.Payload)
		case r.Kind == stream.KindFill && r.Fill == stream.FillSame:
			copy(dst, s.at(r.Base)[r.Disk][r.Range.Off:r.Range.End()])
		case r.Kind == stream.KindFill || r.Op == block.OpZeroes:
			clear(dst)
		default:
			for i := range dst {
				dst[i] = undefined
			}
		}
	}
	s.images[p] = out
	return out
}

// nothing is what disks hold of which nothing was ever known.
func nothing() (out [2][]byte) {
	for d := range out {
		out[d] = bytes.Repeat([]byte{undefined}, int(testSizes[d]))
	}
	return out
}

// revealed is a Source of as many of a story's segments as were revealed.
type revealed struct {
	mu      sync.Mutex
	s       *story
	n       int
	changed chan struct{}
	damaged uint64 // this one cannot be read; 0: none
	opened  int    // segments that are open
	opens   int    // how often one was opened
}

func reveal(s *story, n int) *revealed {
	return &revealed{s: s, n: n, changed: make(chan struct{})}
}

func (v *revealed) more(n int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.n = min(v.n+n, len(v.s.segments))
	close(v.changed)
	v.changed = make(chan struct{})
}

type counted struct{ v *revealed }

func (c counted) Close() error {
	c.v.mu.Lock()
	defer c.v.mu.Unlock()
	c.v.opened--
	return nil
}

func (v *revealed) Open(_ context.Context, n uint64) (*segment.File, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if n > uint64(v.n) {
		return nil, ErrNotSealed
	}
	v.opens++
	b := v.s.segments[n-1]
	if n == v.damaged {
		b = slices.Clone(b)
		for i := len(b) * 2 / 3; i < len(b)*2/3+40 && i < len(b)-256; i++ {
			b[i] ^= 0x55
		}
	}
	s, err := segment.Open(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		return nil, fmt.Errorf("segment %d: %w", n, err)
	}
	v.opened++
	return &segment.File{Segment: s, Closer: io.Closer(counted{v})}, nil
}

func (v *revealed) Newest() (segment.Summary, bool) {
	v.mu.Lock()
	n := v.n
	v.mu.Unlock()
	if n == 0 {
		return segment.Summary{}, false
	}
	b := v.s.segments[n-1]
	sum, err := segment.ReadSummary(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		panic(err)
	}
	return sum, true
}

func (v *revealed) Changed() <-chan struct{} {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.changed
}
