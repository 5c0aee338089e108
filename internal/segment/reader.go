package segment

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"tidemark/internal/block"
	"tidemark/internal/stream"
)

// Segment is an opened segment: its header, summary and index are in memory and
// were checked; payloads are read, and checked, when they are asked for.
//
// Frame and ReadPayload may be called concurrently, Entry and Records not.
type Segment struct {
	r        io.ReaderAt
	header   Header
	summary  Summary
	frames   Frames
	marks    []byte
	entries  []byte
	restarts []uint32 // where every restartEvery-th entry begins
	count    int
	payload  uint64 // place behind the last payload
	cursor   cursor
}

// cursor stands before entry i.
type cursor struct {
	i int
	r reader
	d deltas
}

func damaged(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrDamaged, fmt.Sprintf(format, args...))
}

// ReadSummary reads and checks only the footer.
func ReadSummary(r io.ReaderAt, size int64) (Summary, error) {
	s, _, err := readFooter(r, size)
	return s, err
}

type where struct{ headLen, headCRC, indexLen, indexCRC uint32 }

func readFooter(r io.ReaderAt, size int64) (s Summary, w where, err error) {
	if size < footerSize+headerHead+indexHead {
		return s, w, damaged("%d bytes are too few for a segment", size)
	}
	f := make([]byte, footerSize)
	if err := readFull(r, f, size-footerSize); err != nil {
		return s, w, err
	}
	if !bytes.Equal(f[:8], magicFooter[:]) || crc(f[:footerSize-sumSize]) != le.Uint32(f[footerSize-sumSize:]) {
		return s, w, damaged("the footer's checksum does not fit")
	}
	if v, flags := le.Uint32(f[8:]), le.Uint32(f[12:]); v != version || flags != 0 {
		return s, w, fmt.Errorf("%w: %d with flags %#x, this build reads %d", ErrVersion, v, flags, version)
	}
	w = where{headLen: le.Uint32(f[16:]), headCRC: le.Uint32(f[20:]), indexLen: le.Uint32(f[24:]), indexCRC: le.Uint32(f[28:])}
	frames := le.Uint64(f[32:])
	s = Summary{State: readState(f[72:]), Sequence: le.Uint64(f[48:]), First: stream.Position(le.Uint64(f[56:])),
		Records: int(le.Uint64(f[64:])), Size: int64(le.Uint64(f[40:])), Digest: digestOf(f)}
	if s.Size != size || w.headLen < headerHead+sumSize || w.headLen > headerMax || w.indexLen < indexHead+sumSize ||
		frames > uint64(size) || int64(w.headLen)+int64(w.indexLen)+int64(frames)+footerSize != size {
		return s, w, damaged("the footer tells of a file of %d bytes with other parts", s.Size)
	}
	return s, w, nil
}

func readFull(r io.ReaderAt, b []byte, off int64) error {
	n, err := r.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return damaged("the file ends at byte %d", off+int64(n))
	}
	return err
}

// Open reads and checks everything but the payloads. Errors wrap ErrDamaged or
// ErrVersion, or are the reader's own. What it allocates is bounded by a small
// multiple of the file's size.
func Open(r io.ReaderAt, size int64) (*Segment, error) {
	sum, w, err := readFooter(r, size)
	if err != nil {
		return nil, err
	}
	b := make([]byte, int64(w.headLen)+int64(w.indexLen))
	if err := readFull(r, b, 0); err != nil {
		return nil, err
	}
	head, ix := b[:w.headLen], b[w.headLen:]
	if le.Uint32(head[len(head)-sumSize:]) != w.headCRC || le.Uint32(ix[len(ix)-sumSize:]) != w.indexCRC {
		return nil, damaged("the footer belongs to another header or index")
	}
	s := &Segment{r: r, summary: sum}
	if s.header, err = parseHeader(head); err != nil {
		return nil, err
	}
	if s.header.Sequence != sum.Sequence {
		return nil, damaged("the header says sequence %d, the footer %d", s.header.Sequence, sum.Sequence)
	}
	if err := s.parseIndex(ix, int64(len(b))); err != nil {
		return nil, err
	}
	if s.count != sum.Records || s.frames.end() != size-footerSize {
		return nil, damaged("the index tells of %d records and the footer of %d, or of other frames", s.count, sum.Records)
	}
	return s, nil
}

// indexLen says how long the index that begins with b is.
func indexLen(b []byte) int64 {
	n := func(at int) int64 { return int64(le.Uint32(b[at:])) }
	return indexHead + n(12)*frameRef + n(20)*markSize + n(24) + sumSize
}

func (s *Segment) parseIndex(b []byte, base int64) error {
	body := b[:len(b)-sumSize]
	if !bytes.Equal(b[:8], magicIndex[:]) || crc(body) != le.Uint32(b[len(body):]) || indexLen(b) != int64(len(b)) {
		return damaged("the index's checksum does not fit")
	}
	flags := le.Uint32(b[8:])
	if flags&^flagTwoPhase != 0 {
		return fmt.Errorf("%w: its index has flags %#x, this build reads %#x", ErrVersion, flags, flagTwoPhase)
	}
	frames, marks := int(le.Uint32(b[12:])), int(le.Uint32(b[20:]))
	s.count = int(le.Uint32(b[16:]))
	rest := body[indexHead:]
	refs, rest := rest[:frames*frameRef], rest[frames*frameRef:]
	s.marks, s.entries = rest[:marks*markSize], rest[marks*markSize:]
	if s.count > len(s.entries) {
		return damaged("the index tells of %d records", s.count)
	}
	var err error
	if s.payload, err = s.frames.parse(refs, base); err != nil {
		return err
	}
	return s.parseEntries(flags&flagTwoPhase != 0)
}

// parseEntries decodes every entry once, so that later decoding cannot fail.
func (s *Segment) parseEntries(twoPhases bool) error {
	s.restarts = make([]uint32, 0, (s.count+restartEvery-1)/restartEvery)
	c := cursor{r: reader{b: s.entries}}
	var e Entry
	var end uint64
	for i := range s.count {
		if i%restartEvery == 0 {
			s.restarts = append(s.restarts, uint32(len(s.entries)-len(c.r.b)))
		}
		c.next(&e)
		if c.r.bad {
			return damaged("entry %d cannot be decoded", i)
		}
		if twoPhase(e.Kind) && !twoPhases {
			return damaged("entry %d is a %s, and the index says that there is none", i, e.Kind)
		}
		if err := s.checkEntry(&e, &end); err != nil {
			return fmt.Errorf("entry %d: %w", i, err)
		}
	}
	if len(c.r.b) != 0 {
		return damaged("%d bytes follow the last entry", len(c.r.b))
	}
	return nil
}

func (c *cursor) next(e *Entry) {
	if c.i%restartEvery == 0 {
		c.d = deltas{}
	}
	c.d.decode(&c.r, e)
	c.i++
}

// checkEntry checks what a record says against disks and frames.
func (s *Segment) checkEntry(e *Entry, end *uint64) error {
	switch e.Kind {
	case stream.KindGap:
		for _, g := range e.Ranges {
			if err := s.inDisk(g.Disk, g.Range); err != nil {
				return err
			}
		}
		return nil
	case stream.KindWrite, stream.KindFill:
	default:
		return nil
	}
	if err := s.inDisk(e.Disk, e.Range); err != nil {
		return err
	}
	if !e.HasPayload() || e.Range.Len == 0 {
		return nil
	}
	n := uint64(e.Range.Len)
	if e.At < *end || e.At > s.payload || n > s.payload-e.At || n > RecordMax {
		return damaged("a payload of %d bytes at %d of %d", n, e.At, s.payload)
	}
	*end = e.At + n
	first, last := e.At/FrameSize, (*end-1)/FrameSize
	if first != last && e.At%FrameSize != 0 {
		return damaged("a payload of %d bytes at %d begins inside a frame that it leaves", n, e.At)
	}
	for i := first; i <= last; i++ {
		if _, raw, _ := s.frames.ref(int(i)); uint64(raw) < min(FrameSize, *end-i*FrameSize) {
			return damaged("a payload of %d bytes at %d is longer than frame %d", n, e.At, i)
		}
	}
	return nil
}

func (s *Segment) inDisk(disk int, r block.Range) error {
	if disk < 0 || disk >= len(s.header.Disks) {
		return damaged("a record of disk %d of %d", disk, len(s.header.Disks))
	}
	if err := block.CheckBounds(r, s.header.Disks[disk].Size); err != nil {
		return damaged("%v", err)
	}
	return nil
}

// Header, Summary and Len say whose and how many records these are.
func (s *Segment) Header() Header   { return s.header }
func (s *Segment) Summary() Summary { return s.summary }
func (s *Segment) Len() int         { return s.count }

// Entry is the i-th record in stream order. Going through them in order costs
// one decoding each, going elsewhere up to 64. Its Ranges and Name are its own.
func (s *Segment) Entry(i int) Entry {
	if i < 0 || i >= s.count {
		panic(fmt.Sprintf("entry %d of %d", i, s.count))
	}
	c := &s.cursor
	if c.i > i || c.r.b == nil || c.i < i-i%restartEvery {
		*c = cursor{i: i - i%restartEvery, r: reader{b: s.entries[s.restarts[i/restartEvery]:]}}
	}
	var e Entry
	for c.i <= i {
		c.next(&e)
	}
	return e
}

// Frame decodes frame i into dst, which must have room for FrameSize bytes, and
// gives what it holds. An error names the places that are damaged.
func (s *Segment) Frame(i int, dst []byte) ([]byte, error) { return s.frames.Read(s.r, i, dst) }

// ReadPayload fills dst with the entry's payload from byte off of it.
func (s *Segment) ReadPayload(e *Entry, off int64, dst []byte) error {
	if err := block.CheckBounds(block.Range{Off: off, Len: int64(len(dst))}, e.Range.Len); err != nil {
		return err
	}
	buf := make([]byte, FrameSize)
	for at := e.At + uint64(off); len(dst) > 0; {
		frame, err := s.Frame(int(at/FrameSize), buf)
		if err != nil {
			return err
		}
		if at%FrameSize >= uint64(len(frame)) {
			return damaged("no payload at place %d", at)
		}
		n := copy(dst, frame[at%FrameSize:])
		dst, at = dst[n:], at+uint64(n)
	}
	return nil
}

// Bytes is what the segment is read from.
func (s *Segment) Bytes() io.ReaderAt { return s.r }

// Records calls fn for every record in stream order, with its payload. The
// record and its payload are valid until fn returns; an error of fn ends it.
func (s *Segment) Records(fn func(*stream.Record) error) error { return s.RecordsFrom(0, fn) }

// RecordsFrom is Records that begins at the i-th.
func (s *Segment) RecordsFrom(i int, fn func(*stream.Record) error) error {
	buf, have := make([]byte, FrameSize), -1
	var frame, long []byte
	for ; i < s.count; i++ {
		e := s.Entry(i)
		if n := int(e.Range.Len); e.HasPayload() && n > 0 {
			at := int(e.At % FrameSize)
			if at+n <= FrameSize {
				if f := int(e.At / FrameSize); f != have {
					var err error
					if frame, err = s.Frame(f, buf); err != nil {
						return err
					}
					have = f
				}
				e.Payload = frame[at : at+n]
			} else {
				if cap(long) < n {
					long = make([]byte, n)
				}
				e.Payload = long[:n]
				if err := s.ReadPayload(&e, 0, e.Payload); err != nil {
					return err
				}
			}
		}
		if err := fn(&e.Record); err != nil {
			return err
		}
	}
	return nil
}

// Check reads and checks every payload. It calls bad for each damaged frame
// with the places of the payloads that it holds.
func (s *Segment) Check(bad func(from, to uint64, err error)) {
	buf := make([]byte, FrameSize)
	for i := range s.frames.len() {
		if _, err := s.Frame(i, buf); err != nil {
			_, raw, _ := s.frames.ref(i)
			bad(uint64(i)*FrameSize, uint64(i)*FrameSize+uint64(raw), err)
		}
	}
}
