package drain

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"sync"

	"tidemark/internal/block"
	"tidemark/internal/segment"
	"tidemark/internal/sim/story"
	"tidemark/internal/stream"
)

const (
	testBlock = story.Block
	undefined = 0xDD // what a discarded byte is, here and in the copies
)

var testSizes = story.New(0).Sizes

var testGroup = [16]byte{7}

// tale is a story in segments. It knows what the stream means.
type tale struct {
	*story.Story
	builder  *segment.Builder
	segments [][]byte
	previous segment.Summary
	images   map[stream.Position][2][]byte
}

// untold is a story that has not begun, to be told and sealed by hand.
func untold(seed uint64) *tale {
	s := &tale{Story: story.New(seed), builder: segment.NewBuilder(1 << 16), images: map[stream.Position][2][]byte{}}
	s.Told = func(rec *stream.Record) {
		if err := s.builder.Append(rec); err != nil {
			panic(err)
		}
	}
	return s
}

// tell makes a story of about n writes in segments of any length.
func tell(seed uint64, n int) *tale {
	s := untold(seed)
	put := s.Told
	s.TwoPhase, s.Told = true, func(rec *stream.Record) {
		put(rec)
		if s.Rand.IntN(15) == 0 {
			s.seal()
		}
	}
	s.Begin()
	s.Run(n)
	s.seal()
	return s
}

func (s *tale) seal() {
	h := segment.Header{Group: "g", GroupID: testGroup, Sequence: s.previous.Sequence + 1, Previous: s.previous.Digest}
	for i, size := range s.Sizes {
		h.Disks = append(h.Disks, segment.Disk{Name: string(rune('a' + i)), Size: size, SectorSize: 512, BlockSize: testBlock})
	}
	sealed, err := s.builder.Seal(h, segment.State{Last: s.Position, Time: s.Time, Settled: s.Settled, GapSince: s.GapSince})
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

// at is what the disks hold at a position, by the words of internal/stream.
func (s *tale) at(p stream.Position) [2][]byte {
	if have, ok := s.images[p]; ok {
		return have
	}
	var order []*stream.Record
	for i := range s.Records {
		if r := &s.Records[i]; r.Position <= p && (r.Kind == stream.KindWrite || r.Kind == stream.KindFill && r.Fill != stream.FillKnown) {
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
	s       *tale
	n       int
	changed chan struct{}
	damaged uint64 // this one cannot be read; 0: none
	opened  int    // segments that are open
	opens   int    // how often one was opened
}

func reveal(s *tale, n int) *revealed {
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
