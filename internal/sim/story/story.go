// Package story makes random streams that keep the rules of internal/stream, for
// the tests of whoever reads streams: writes of every kind that overlap, bookmarks,
// gaps and all that may happen while they are filled.
package story

import (
	"fmt"
	"math/rand/v2"
	"slices"

	"tidemark/internal/block"
	"tidemark/internal/stream"
)

// Block is what gaps are made of, in bytes.
const Block = 4096

// Stretch is a run of positions that can be recovered, both ends included.
type Stretch struct{ First, Last stream.Position }

// Story is a stream of two disks that grows. It is used by one goroutine. The
// fields of the first part may be changed before the first record.
type Story struct {
	Rand      *rand.Rand
	Sizes     [2]int64             // of the disks, in bytes, whole sectors; by default the second one's last block is short
	SectorMax int64                // how long a write may be, in sectors
	TwoPhase  bool                 // bookmarks that are prepared, and their verdicts, come too
	Told      func(*stream.Record) // is given each record when all below is true of it; nil: nobody is

	Records  []stream.Record
	Position stream.Position   // newest
	Time     int64             // of the newest record
	Settled  stream.Position   // where the stretch begins that goes on; 0 while a gap is open
	GapSince stream.Position   // of the oldest gap that is open; 0: none is
	Ended    []Stretch         // the stretches that gaps have ended
	Marks    []stream.Position // bookmarks, but for those inside gaps

	unknown  [2]map[int64]stream.Position // block to the position of its newest gap
	valid    stream.Position              // from here on all that is filled by now is true
	prepared []stream.Position            // without a verdict
}

// New is a story that Begin begins.
func New(seed uint64) *Story {
	return &Story{Rand: rand.New(rand.NewPCG(seed, 7)), Sizes: [2]int64{64 << 10, 44<<10 + 3*512}, SectorMax: 20,
		Time: 1_000_000, unknown: [2]map[int64]stream.Position{{}, {}}}
}

// Begin is the first copy.
func (s *Story) Begin() {
	s.Gap(stream.CauseInitial, true)
	s.Fill()
}

// Stretches are all of them, with the one that goes on.
func (s *Story) Stretches() []Stretch {
	if s.Settled == 0 {
		return s.Ended
	}
	return append(slices.Clone(s.Ended), Stretch{s.Settled, s.Position})
}

// Run makes about n writes with everything that may come between them.
func (s *Story) Run(n int) {
	for range n {
		switch k := s.Rand.IntN(60); {
		case k == 0: // ring overflow, or a failed write
			s.Gap(stream.Cause(2+s.Rand.IntN(2)), false)
			s.Fill()
		case k == 1: // reboot, unknown territory: whole disks, compared with a point of the past
			s.Gap(stream.Cause(4+s.Rand.IntN(2)), true)
			s.Fill()
		case k < 5:
			s.bookmark()
			s.Marks = append(s.Marks, s.Position)
		case k == 5 && s.TwoPhase:
			s.Position++
			s.Add(stream.Record{Kind: stream.KindPrepared, Position: s.Position, Name: fmt.Sprint("mark", s.Position)})
			s.prepared = append(s.prepared, s.Position)
		case k == 6 && s.TwoPhase:
			s.decide()
		default:
			s.write()
		}
	}
	for len(s.prepared) > 0 {
		s.decide()
	}
}

// decide gives a prepared mark its verdict.
func (s *Story) decide() {
	if len(s.prepared) == 0 {
		return
	}
	i := s.Rand.IntN(len(s.prepared))
	p := s.prepared[i]
	s.prepared = slices.Delete(s.prepared, i, i+1)
	commit := s.Rand.IntN(2) == 0
	if commit {
		at, _ := slices.BinarySearch(s.Marks, p)
		s.Marks = slices.Insert(s.Marks, at, p)
	}
	s.Add(stream.Record{Kind: stream.KindVerdict, Position: p, Commit: commit})
}

// Payload is n random bytes.
func (s *Story) Payload(n int64) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(s.Rand.Uint32())
	}
	return p
}

// Add gives a record its time, which it may share with the one before, and tells it.
func (s *Story) Add(rec stream.Record) {
	if s.Rand.IntN(2) == 0 {
		s.Time += s.Rand.Int64N(3) * 1000
	}
	rec.Time = s.Time
	s.Records = append(s.Records, rec)
	if s.Told != nil {
		s.Told(&rec)
	}
}

// write is of any kind and size, and overlaps others.
func (s *Story) write() {
	s.Position++
	disk := s.Rand.IntN(2)
	size := 512 * (1 + s.Rand.Int64N(s.SectorMax))
	rec := stream.Record{Kind: stream.KindWrite, Op: block.Op(1 + s.Rand.IntN(3)), Disk: disk, Position: s.Position,
		Range: block.Range{Off: 512 * s.Rand.Int64N((s.Sizes[disk]-size)/512+1), Len: size}}
	switch rec.Op {
	case block.OpWrite:
		rec.Payload = s.Payload(size)
	case block.OpDiscard:
		if s.Rand.IntN(20) == 0 {
			rec.Range = block.Range{Len: s.Sizes[disk]}
		}
	}
	s.Add(rec)
}

func (s *Story) bookmark() {
	s.Position++
	s.Add(stream.Record{Kind: stream.KindBookmark, Position: s.Position, Name: fmt.Sprint("mark", s.Position)})
}

// blocks is the range of some blocks of a disk, of which the last may be short.
func (s *Story) blocks(disk int, from, to int64) block.Range {
	return block.Range{Off: from * Block, Len: min(to*Block, s.Sizes[disk]) - from*Block}
}
