package timeline

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"tidemark/internal/block"
	"tidemark/internal/segment"
	"tidemark/internal/stream"
	"tidemark/internal/vault"
)

const bs = 4096

// sizes of the disks; the second one's last block is short.
var sizes = [2]int64{64 << 10, 44<<10 + 3*512}

// seeds gives n, or what TIDEMARK_SEEDS says.
func seeds(n uint64) uint64 {
	if s, err := strconv.ParseUint(os.Getenv("TIDEMARK_SEEDS"), 10, 64); err == nil {
		return s
	}
	return n
}

// written is a vault with a random history, and the history itself.
type written struct {
	v       *vault.Vault
	records []stream.Record
	stretch []Stretch
}

// history makes a stream that keeps the rules of internal/stream, cuts it into
// segments at random and puts them into a vault.
func history(t testing.TB, seed uint64, n int) *written {
	t.Helper()
	return keep(t, tell(seed, n), seed, 15)
}

// keep puts a story into a vault, in segments of about every records each.
func keep(t testing.TB, s *story, seed uint64, every int) *written {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 11))
	w := &written{records: s.out, stretch: s.stretches}
	dir := memoryDir(t)
	v, err := vault.Create(t.Context(), filepath.Join(dir, "vault"))
	if err != nil {
		t.Fatal(err)
	}
	w.v = v
	lock, err := v.Lock(t.Context(), "g", vault.Holder{PID: os.Getpid(), Host: "h"})
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Unlock()
	b := segment.NewBuilder(1 << 16)
	var prev segment.Summary
	var last stream.Position
	put := func() {
		h := segment.Header{Group: "g", GroupID: [16]byte{1}, Sequence: prev.Sequence + 1, Previous: prev.Digest,
			Disks: []segment.Disk{{Name: "a", Size: sizes[0], SectorSize: 512, BlockSize: bs}, {Name: "b", Size: sizes[1], SectorSize: 512, BlockSize: bs}}}
		// A ring is new after each reboot: that must mean nothing here.
		s, err := b.Seal(h, segment.State{Last: last, Source: segment.Source{Ring: [16]byte{byte(r.IntN(3))}, Place: r.Uint64()}})
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, fmt.Sprint(h.Sequence))
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.WriteTo(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
		for range 2 { // the same segment again is nothing
			if err := v.Put(t.Context(), lock, path, s.Summary); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		prev = s.Summary
		b.Reset()
	}
	for i := range w.records {
		if err := b.Append(&w.records[i]); err != nil {
			t.Fatal(err)
		}
		if w.records[i].Kind.TakesPosition() {
			last = w.records[i].Position
		}
		if r.IntN(every) == 0 {
			put()
		}
	}
	put()
	return w
}

// story makes records. It knows for each block whether it is unknown, and since when.
type story struct {
	r         *rand.Rand
	out       []stream.Record
	pos       stream.Position
	clock     int64
	unknown   [2]map[int64]stream.Position // block to the position of its newest gap
	valid     stream.Position
	settled   stream.Position // 0 while a gap is open
	stretches []Stretch
	sectorMax int64
}

// tell makes about n writes with everything that the format allows between them.
func tell(seed uint64, n int) *story {
	s := &story{r: rand.New(rand.NewPCG(seed, 7)), clock: 1_000_000, unknown: [2]map[int64]stream.Position{{}, {}}, sectorMax: 20}
	s.gap(stream.CauseInitial, true)
	s.fill()
	s.run(n)
	return s
}

func (s *story) run(n int) {
	for range n {
		s.clock += s.r.Int64N(3) * 1000 // some at the same time
		switch k := s.r.IntN(60); {
		case k == 0: // ring overflow, or a failed write
			s.gap(stream.Cause(2+s.r.IntN(2)), false)
			s.fill()
		case k == 1: // reboot, unknown territory: whole disks, compared with a point of the past
			s.gap(stream.Cause(4+s.r.IntN(2)), true)
			s.fill()
		case k < 5:
			s.bookmark()
		default:
			s.write()
		}
	}
	if s.settled != 0 {
		s.end(s.pos)
	}
}

func (s *story) end(last stream.Position) {
	s.stretches = append(s.stretches, Stretch{First: s.settled, Last: last})
	s.settled = 0
}

func (s *story) payload(size int64) []byte {
	p := make([]byte, size)
	for i := range p {
		p[i] = byte(s.r.Uint32())
	}
	return p
}

func (s *story) add(rec stream.Record) {
	rec.Time = s.clock
	s.out = append(s.out, rec)
}

// write is of any kind and size, and overlaps others.
func (s *story) write() {
	s.pos++
	disk := s.r.IntN(2)
	size := 512 * (1 + s.r.Int64N(s.sectorMax))
	rec := stream.Record{Kind: stream.KindWrite, Op: block.Op(1 + s.r.IntN(3)), Disk: disk, Position: s.pos,
		Range: block.Range{Off: 512 * s.r.Int64N((sizes[disk]-size)/512+1), Len: size}}
	switch rec.Op {
	case block.OpWrite:
		rec.Payload = s.payload(size)
	case block.OpDiscard:
		if s.r.IntN(20) == 0 {
			rec.Range = block.Range{Len: sizes[disk]}
		}
	}
	s.add(rec)
}

func (s *story) bookmark() {
	s.pos++
	s.add(stream.Record{Kind: stream.KindBookmark, Position: s.pos, Name: fmt.Sprint("mark", s.pos)})
}

// gap opens one, also where one is open: in one record or several.
func (s *story) gap(c stream.Cause, whole bool) {
	if s.settled != 0 {
		s.end(s.pos)
	}
	s.valid = s.pos
	var ranges []block.DiskRange
	for d := range 2 {
		blocks := (sizes[d] + bs - 1) / bs
		for range 1 + s.r.IntN(2) {
			a, b := s.r.Int64N(blocks), s.r.Int64N(blocks)
			a, b = min(a, b), max(a, b)+1
			if whole {
				a, b = 0, blocks
			}
			ranges = append(ranges, block.DiskRange{Disk: d, Range: block.Range{Off: a * bs, Len: min(b*bs, sizes[d]) - a*bs}})
		}
	}
	at := s.r.IntN(len(ranges))
	for _, part := range [][]block.DiskRange{ranges[:at], ranges[at:]} {
		if len(part) == 0 {
			continue
		}
		s.pos++
		s.add(stream.Record{Kind: stream.KindGap, Position: s.pos, Cause: c, Ranges: part})
		for _, g := range part {
			for b := g.Off / bs; b*bs < g.End(); b++ {
				s.unknown[g.Disk][b] = s.pos
			}
		}
	}
	s.valid = s.pos
}

// fill makes everything known again while writes, marks and further gaps come,
// and settles, at once or later.
func (s *story) fill() {
	for len(s.unknown[0])+len(s.unknown[1]) > 0 {
		switch k := s.r.IntN(100); {
		case k < 40:
			s.write()
		case k < 44:
			s.bookmark()
		case k < 46:
			s.gap(stream.CauseOverflow, false)
		default:
			s.fillOne()
		}
	}
	first := s.valid
	for range s.r.IntN(6) {
		s.write()
	}
	s.add(stream.Record{Kind: stream.KindSettled, Position: first})
	s.settled = first
}

// fillOne fills a run of blocks of one disk. Its rank is not below their gaps;
// it is true from any position between that and now.
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
	r := block.Range{Off: from * bs, Len: min(to*bs, sizes[d]) - from*bs}
	rec := stream.Record{Kind: stream.KindFill, Disk: d, Position: rank, ValidFrom: valid, Range: r}
	switch k := s.r.IntN(6); {
	case k == 0:
		rec.Fill = stream.FillZero
	case k == 1:
		rec.Fill = stream.FillKnown
	case k < 4 && len(s.stretches) > 0:
		st := s.stretches[s.r.IntN(len(s.stretches))]
		rec.Fill, rec.Base = stream.FillSame, st.First+stream.Position(s.r.Int64N(int64(st.Last-st.First)+1))
	default:
		rec.Fill, rec.Payload = stream.FillData, s.payload(r.Len)
	}
	s.add(rec)
}
