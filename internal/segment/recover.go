package segment

import (
	"io"

	"tidemark/internal/stream"
)

// Recovery says what Recover found in a torn file.
type Recovery struct {
	Sequence uint64
	Records  int // in the file, before it was torn
	Kept     int // in what Recover gives
}

// Recover makes a segment of the good part of a torn file: the records up to
// the last mark whose payloads, and all before them, are whole. What a mark says
// is as sound an end as the seal would have been, so the result simply ends
// earlier. Where header or index is not whole, or no mark is reached, nothing
// can be kept and the error wraps ErrDamaged; Recovery says what is known.
func Recover(r io.ReaderAt, size int64) (*Sealed, Recovery, error) {
	s, err := openFront(r, size)
	if err != nil {
		return nil, Recovery{}, err
	}
	out := Recovery{Sequence: s.header.Sequence, Records: s.count}
	good := s.goodRecords()
	mark := -1
	for i := range len(s.marks) / markSize {
		if int(le.Uint32(s.marks[i*markSize:])) <= good {
			mark = i
		}
	}
	if mark < 0 {
		return nil, out, damaged("%d of %d records are whole, and no mark is among them", good, s.count)
	}
	out.Kept = int(le.Uint32(s.marks[mark*markSize:]))
	b := NewBuilder(FrameSize)
	next := 0
	copyMarks := func(done int) {
		for ; next <= mark && int(le.Uint32(s.marks[next*markSize:])) <= done; next++ {
			b.Mark(readState(s.marks[next*markSize+8:]))
		}
	}
	copyMarks(0)
	err = s.Records(func(r *stream.Record) error {
		if b.Records() == out.Kept {
			return io.EOF
		}
		err := b.Append(r)
		copyMarks(b.Records())
		return err
	})
	if err != nil && err != io.EOF {
		return nil, out, err
	}
	sealed, err := b.Seal(s.header, readState(s.marks[mark*markSize+8:]))
	return sealed, out, err
}

// openFront opens a file by its header and index alone.
func openFront(r io.ReaderAt, size int64) (*Segment, error) {
	front := make([]byte, headerHead)
	if size < headerHead+indexHead {
		return nil, damaged("%d bytes are too few for a segment", size)
	}
	if err := readFull(r, front, 0); err != nil {
		return nil, err
	}
	headLen, err := headerLen(front)
	if err != nil {
		return nil, err
	}
	if headLen+indexHead > size {
		return nil, damaged("the file ends inside the header or the index")
	}
	b := make([]byte, headLen+indexHead)
	if err := readFull(r, b, 0); err != nil {
		return nil, err
	}
	s := &Segment{r: r}
	if s.header, err = parseHeader(b[:headLen]); err != nil {
		return nil, err
	}
	n := indexLen(b[headLen:])
	if n > size-headLen {
		return nil, damaged("the file ends inside the index")
	}
	ix := make([]byte, n)
	if err := readFull(r, ix, headLen); err != nil {
		return nil, err
	}
	return s, s.parseIndex(ix, headLen+n)
}

// goodRecords counts the records before the first whose payload is damaged.
func (s *Segment) goodRecords() int {
	buf, checked := make([]byte, FrameSize), uint64(0)
	for i := range s.count {
		e := s.Entry(i)
		if !e.HasPayload() || e.Range.Len == 0 {
			continue
		}
		for end := e.At + uint64(e.Range.Len); checked*FrameSize < end; checked++ {
			if _, err := s.Frame(int(checked), buf); err != nil {
				return i
			}
		}
	}
	return s.count
}
