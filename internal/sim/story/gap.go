package story

import (
	"maps"
	"slices"

	"tidemark/internal/block"
	"tidemark/internal/stream"
)

// Gap opens one, also where one is open: in one record or two, of whole disks or parts.
func (s *Story) Gap(c stream.Cause, whole bool) {
	if s.Settled != 0 {
		s.Ended = append(s.Ended, Stretch{s.Settled, s.Position})
		s.Settled = 0
	}
	var ranges []block.DiskRange
	for d := range s.Sizes {
		blocks := (s.Sizes[d] + Block - 1) / Block
		for range 1 + s.Rand.IntN(2) {
			a, b := s.Rand.Int64N(blocks), s.Rand.Int64N(blocks)
			a, b = min(a, b), max(a, b)+1
			if whole {
				a, b = 0, blocks
			}
			ranges = append(ranges, block.DiskRange{Disk: d, Range: s.blocks(d, a, b)})
		}
	}
	at := s.Rand.IntN(len(ranges))
	for _, part := range [][]block.DiskRange{ranges[:at], ranges[at:]} {
		if len(part) > 0 {
			s.open(c, part)
		}
	}
}

func (s *Story) open(c stream.Cause, ranges []block.DiskRange) {
	s.Position++
	if s.GapSince == 0 {
		s.GapSince = s.Position
	}
	for _, g := range ranges {
		for b := g.Off / Block; b*Block < g.End(); b++ {
			s.unknown[g.Disk][b] = s.Position
		}
	}
	s.valid = s.Position
	s.Add(stream.Record{Kind: stream.KindGap, Position: s.Position, Cause: c, Ranges: ranges})
}

// Fill makes everything known again while writes, marks and further gaps come,
// and settles, at once or later.
func (s *Story) Fill() {
	for len(s.unknown[0])+len(s.unknown[1]) > 0 {
		switch k := s.Rand.IntN(100); {
		case k < 40:
			s.write()
		case k < 44:
			s.bookmark()
		case k < 46:
			s.Gap(stream.CauseOverflow, false)
		default:
			s.fillOne()
		}
	}
	first := s.valid
	for range s.Rand.IntN(6) {
		s.write()
	}
	s.Settled, s.GapSince = first, 0
	s.Add(stream.Record{Kind: stream.KindSettled, Position: first})
}

// fillOne fills a run of blocks of one disk. Its rank is not below their gaps;
// it is true from any position between that and now.
func (s *Story) fillOne() {
	d := s.Rand.IntN(2)
	if len(s.unknown[d]) == 0 {
		return
	}
	blocks := slices.Sorted(maps.Keys(s.unknown[d]))
	from := blocks[s.Rand.IntN(len(blocks))]
	to, low := from, stream.Position(0)
	for n := s.Rand.IntN(4); n >= 0; n-- {
		g, ok := s.unknown[d][to]
		if !ok {
			break
		}
		low = max(low, g)
		delete(s.unknown[d], to)
		to++
	}
	rank := s.between(low, s.Position)
	valid := s.between(rank, s.Position)
	s.valid = max(s.valid, valid)
	rec := stream.Record{Kind: stream.KindFill, Disk: d, Position: rank, ValidFrom: valid, Range: s.blocks(d, from, to)}
	switch k := s.Rand.IntN(6); {
	case k == 0:
		rec.Fill = stream.FillZero
	case k == 1:
		rec.Fill = stream.FillKnown
	case k < 4 && len(s.Ended) > 0:
		base := s.Ended[s.Rand.IntN(len(s.Ended))]
		rec.Fill, rec.Base = stream.FillSame, s.between(base.First, base.Last)
		if k == 2 { // as the program does it; any other is allowed too
			rec.Base = s.Ended[len(s.Ended)-1].Last
		}
	default:
		rec.Fill, rec.Payload = stream.FillData, s.Payload(rec.Range.Len)
	}
	s.Add(rec)
}

func (s *Story) between(a, b stream.Position) stream.Position {
	return a + stream.Position(s.Rand.Int64N(int64(b-a)+1))
}
