package segment

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/s2"

	"tidemark/internal/block"
	"tidemark/internal/stream"
)

// Segment is an opened segment: its header, summary and index are in memory and
// were checked; payloads are read, and checked, when they are asked for.
type Segment struct {
	r       io.ReaderAt
	header  Header
	summary Summary
	base    int64 // of the frames
	refs    []byte
	entries []byte
	extra   []byte
	payload uint64
}

// Entry is a record without its payload, and where that lies.
type Entry struct {
	stream.Record
	At uint64 // of the payload among all payloads of the segment
}

func damaged(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrDamaged, fmt.Sprintf(format, args...))
}

// ReadSummary reads and checks only the footer.
func ReadSummary(r io.ReaderAt, size int64) (Summary, error) {
	s, _, err := readFooter(r, size)
	return s, err
}

type where struct {
	headLen, headCRC, indexCRC uint32
	indexAt, indexLen          int64
}

func readFooter(r io.ReaderAt, size int64) (s Summary, w where, err error) {
	if size < footerSize+headerHead+indexHead {
		return s, w, damaged("%d bytes are too few for a segment", size)
	}
	f := make([]byte, footerSize)
	if err := readFull(r, f, size-footerSize); err != nil {
		return s, w, err
	}
	if !bytes.Equal(f[:8], magicFooter[:]) || crc(f[:footerSize-4]) != le.Uint32(f[footerSize-4:]) {
		return s, w, damaged("the footer's checksum does not fit")
	}
	if v := le.Uint32(f[8:]); v != version {
		return s, w, fmt.Errorf("%w: %d, this build reads %d", ErrVersion, v, version)
	}
	w = where{headLen: le.Uint32(f[16:]), headCRC: le.Uint32(f[20:]), indexAt: int64(le.Uint64(f[24:])), indexLen: int64(le.Uint64(f[32:])), indexCRC: le.Uint32(f[40:])}
	s.Sequence, s.First, s.Last = le.Uint64(f[48:]), stream.Position(le.Uint64(f[56:])), stream.Position(le.Uint64(f[64:]))
	s.Settled, s.GapSince, s.Time = stream.Position(le.Uint64(f[72:])), stream.Position(le.Uint64(f[80:])), int64(le.Uint64(f[88:]))
	copy(s.Source.Ring[:], f[96:])
	s.Source.Place, s.Source.Drops = le.Uint64(f[112:]), le.Uint64(f[120:])
	s.Records, s.Size = int(le.Uint64(f[128:])), int64(le.Uint64(f[136:]))
	s.Digest = digestOf(f)
	end := size - footerSize
	if s.Size != size || w.headLen < headerHead+4 || w.headLen > headerMax+headerHead+4 || int64(w.headLen) > w.indexAt ||
		w.indexLen < indexHead+4 || w.indexAt > end || w.indexLen != end-w.indexAt {
		return s, w, damaged("the footer tells of a file of %d bytes with other parts", s.Size)
	}
	return s, w, nil
}

func readFull(r io.ReaderAt, b []byte, off int64) error {
	n, err := r.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if errors.Is(err, io.EOF) {
		return damaged("the file ends at byte %d", off+int64(n))
	}
	return err
}

// Open reads and checks everything but the payloads. Errors wrap ErrDamaged or
// ErrVersion, or are the reader's own.
func Open(r io.ReaderAt, size int64) (*Segment, error) {
	sum, w, err := readFooter(r, size)
	if err != nil {
		return nil, err
	}
	s := &Segment{r: r, summary: sum, base: int64(w.headLen)}
	head := make([]byte, w.headLen)
	if err := readFull(r, head, 0); err != nil {
		return nil, err
	}
	if err := s.parseHeader(head, w.headCRC); err != nil {
		return nil, err
	}
	ix := make([]byte, w.indexLen)
	if err := readFull(r, ix, w.indexAt); err != nil {
		return nil, err
	}
	if crc(ix) != w.indexCRC {
		return nil, damaged("the index's checksum does not fit")
	}
	return s, s.parseIndex(ix, w.indexAt)
}

func (s *Segment) parseHeader(b []byte, want uint32) error {
	body, sum := b[:len(b)-4], le.Uint32(b[len(b)-4:])
	if crc(b) != want || crc(body) != sum || !bytes.Equal(b[:8], magicHeader[:]) || int(le.Uint32(b[12:])) != len(body)-headerHead {
		return damaged("the header's checksum does not fit")
	}
	if v := le.Uint32(b[8:]); v != version {
		return fmt.Errorf("%w: %d, this build reads %d", ErrVersion, v, version)
	}
	if err := json.Unmarshal(body[headerHead:], &s.header); err != nil {
		return damaged("the header: %v", err)
	}
	if s.header.Sequence != s.summary.Sequence {
		return damaged("the header says sequence %d, the footer %d", s.header.Sequence, s.summary.Sequence)
	}
	return nil
}

func (s *Segment) parseIndex(b []byte, framesEnd int64) error {
	body, sum := b[:len(b)-4], le.Uint32(b[len(b)-4:])
	if crc(body) != sum || !bytes.Equal(b[:8], magicIndex[:]) {
		return damaged("the index's checksum does not fit")
	}
	frames, entries, extra := uint64(le.Uint32(b[8:])), uint64(le.Uint32(b[12:])), uint64(le.Uint32(b[16:]))
	s.payload = le.Uint64(b[24:])
	rest := body[indexHead:]
	if frames*frameRef+entries*entrySize+extra != uint64(len(rest)) || entries != uint64(s.summary.Records) ||
		frames != (s.payload+FrameSize-1)/FrameSize {
		return damaged("the index's sizes do not fit")
	}
	s.refs, rest = rest[:frames*frameRef], rest[frames*frameRef:]
	s.entries, s.extra = rest[:entries*entrySize], rest[entries*entrySize:]
	var at uint64
	for i := uint64(0); i < frames; i++ {
		ref := s.refs[i*frameRef:]
		want := uint64(FrameSize)
		if i == frames-1 {
			want = s.payload - i*FrameSize
		}
		if le.Uint64(ref) != at || uint64(le.Uint32(ref[8:])) != want {
			return damaged("frame %d is not where it should be", i)
		}
		at += frameHead + uint64(le.Uint32(ref[12:])) + 4
	}
	if s.base+int64(at) != framesEnd {
		return damaged("the frames do not end where the index begins")
	}
	for i := range s.Len() {
		if _, err := s.entry(i); err != nil {
			return err
		}
	}
	return nil
}

// Header, Summary and Len say whose and how many records these are.
func (s *Segment) Header() Header   { return s.header }
func (s *Segment) Summary() Summary { return s.summary }
func (s *Segment) Len() int         { return len(s.entries) / entrySize }

// Entry is the i-th record in stream order. Its Ranges are decoded anew at each call.
func (s *Segment) Entry(i int) Entry {
	e, err := s.entry(i)
	if err != nil {
		panic(err) // Open has decoded every entry
	}
	return e
}

func (s *Segment) entry(i int) (Entry, error) {
	b := s.entries[i*entrySize:][:entrySize]
	e := Entry{At: le.Uint64(b[56:]), Record: stream.Record{
		Kind: stream.Kind(b[0]), Op: block.Op(b[1]), Fill: stream.FillOp(b[2]), Cause: stream.Cause(b[3]), Consistency: stream.Consistency(b[4]),
		Disk: int(le.Uint16(b[6:])), Position: stream.Position(le.Uint64(b[8:])), ValidFrom: stream.Position(le.Uint64(b[16:])),
		Base: stream.Position(le.Uint64(b[24:])), Time: int64(le.Uint64(b[32:])),
		Range: block.Range{Off: int64(le.Uint64(b[40:])), Len: int64(le.Uint64(b[48:]))},
	}}
	from, n := uint64(le.Uint32(b[64:])), uint64(le.Uint32(b[68:]))
	if from+n > uint64(len(s.extra)) {
		return e, damaged("entry %d points past the index", i)
	}
	extra := s.extra[from : from+n]
	switch e.Kind {
	case stream.KindBookmark:
		e.Name = string(extra)
	case stream.KindGap:
		for ; len(extra) >= 24; extra = extra[24:] {
			g := block.DiskRange{Disk: int(le.Uint64(extra)), Range: block.Range{Off: int64(le.Uint64(extra[8:])), Len: int64(le.Uint64(extra[16:]))}}
			if err := s.inDisk(g.Disk, g.Range); err != nil {
				return e, err
			}
			e.Ranges = append(e.Ranges, g)
		}
	case stream.KindWrite, stream.KindFill:
		if err := s.inDisk(e.Disk, e.Range); err != nil {
			return e, err
		}
		if e.HasPayload() && (e.At > s.payload || uint64(e.Range.Len) > s.payload-e.At) {
			return e, damaged("entry %d points past the payloads", i)
		}
	case stream.KindSettled:
	default:
		return e, damaged("entry %d is of kind %d", i, e.Kind)
	}
	return e, nil
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

// HasPayload says whether the record's content is stored with it.
func (e *Entry) HasPayload() bool {
	return e.Kind == stream.KindWrite && e.Op == block.OpWrite || e.Kind == stream.KindFill && e.Fill == stream.FillData
}

// Frame decodes frame i into dst, which must have room for FrameSize bytes, and
// gives what it holds. An error names the range of payloads that is damaged.
func (s *Segment) Frame(i int, dst []byte) ([]byte, error) {
	ref := s.refs[i*frameRef:]
	at, raw, stored := int64(le.Uint64(ref)), int(le.Uint32(ref[8:])), int(le.Uint32(ref[12:]))
	if stored > s2.MaxEncodedLen(FrameSize) {
		return nil, damaged("frame %d tells of %d bytes", i, stored)
	}
	b := make([]byte, frameHead+stored+4)
	if err := readFull(s.r, b, s.base+at); err != nil {
		return nil, err
	}
	body := b[:frameHead+stored]
	if crc(body) != le.Uint32(b[frameHead+stored:]) || !bytes.Equal(b[:4], magicFrame[:]) || int(le.Uint32(b[8:])) != raw || int(le.Uint32(b[12:])) != stored {
		return nil, damaged("the checksum of frame %d does not fit", i)
	}
	switch b[4] {
	case codecRaw:
		if stored != raw {
			return nil, damaged("frame %d has %d bytes of %d", i, stored, raw)
		}
		return append(dst[:0], body[frameHead:]...), nil
	case codecS2:
		out, err := s2.Decode(dst[:raw], body[frameHead:])
		if err != nil || len(out) != raw {
			return nil, damaged("frame %d does not decompress", i)
		}
		return out, nil
	}
	return nil, damaged("frame %d has codec %d", i, b[4])
}

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
		n := copy(dst, frame[at%FrameSize:])
		dst, at = dst[n:], at+uint64(n)
	}
	return nil
}

// Check reads and checks every payload. It calls bad for each damaged frame
// with the payload bytes that it holds.
func (s *Segment) Check(bad func(from, to uint64, err error)) {
	buf := make([]byte, FrameSize)
	for i := range len(s.refs) / frameRef {
		if _, err := s.Frame(i, buf); err != nil {
			bad(uint64(i)*FrameSize, min(uint64(i+1)*FrameSize, s.payload), err)
		}
	}
}
