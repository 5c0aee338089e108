package involflt

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// The tag list of a DirtyBlock: records of a kind, flags and a length that
// counts the record's own header, which has 4 bytes, or 8 where the length does
// not fit into one byte.
//
//	 0  start of the list           4 bytes
//	 4  padding                     4
//	 8  stamp of the first change  24: 4 reserved, sequence, time
//	32  stamp of the last change   24
//	56  source of the data          8
//	64  a tag's user records, padded to 4 bytes, at most TagRecordsMax together
//	 …  end of the list             4
const (
	recStart   = 1
	recEnd     = 2
	recStamp   = 3
	recSource  = 4
	recUser    = 5
	recPadding = 6

	recLong = 1 // flag: the header has 8 bytes
)

// Sources of a block's data, as its tag list names them.
const (
	SourceBitmap   = 1
	SourceMetadata = 2 // tags too
	SourceData     = 3
)

// Stamp is a place in the order of changes: 100 ns since 1970, and a number that grows.
type Stamp struct{ Time, Sequence uint64 }

// Before orders stamps.
func (s Stamp) Before(o Stamp) bool {
	return s.Time < o.Time || s.Time == o.Time && s.Sequence < o.Sequence
}

var (
	// ErrTags: a list of tags is larger than a block's room for it.
	ErrTags = errors.New("the tags do not fit into one block")
	// ErrList: bytes that are no tag list.
	ErrList = errors.New("not a list of tags")
)

// TagList encodes the list of a block. Tags are of at most TagMax bytes each.
func TagList(first, last Stamp, source uint32, tags [][]byte) (list [3584]byte, err error) {
	le := binary.NativeEndian
	b := list[:0]
	header := func(kind uint16, size uint8) { b = append(le.AppendUint16(b, kind), 0, size) }
	header(recStart, 4)
	header(recPadding, 4)
	for _, s := range []Stamp{first, last} {
		header(recStamp, 24)
		b = le.AppendUint32(b, 0)
		b = le.AppendUint64(le.AppendUint64(b, s.Sequence), s.Time)
	}
	header(recSource, 8)
	b = le.AppendUint32(b, source)
	records := UserRecords(tags)
	if len(records) > TagRecordsMax-4 {
		return list, fmt.Errorf("%w: %d bytes, at most %d", ErrTags, len(records), TagRecordsMax-4)
	}
	b = append(b, records...)
	header(recEnd, 4)
	return list, nil // b is list
}

// UserRecords encodes tags as records.
func UserRecords(tags [][]byte) (b []byte) {
	le := binary.NativeEndian
	for _, t := range tags {
		n := (4 + 2 + len(t) + 3) &^ 3
		if n > 0xff {
			n += 4
			b = append(le.AppendUint16(b, recUser), recLong, 0)
			b = le.AppendUint32(b, uint32(n))
		} else {
			b = append(le.AppendUint16(b, recUser), 0, byte(n))
		}
		b = append(le.AppendUint16(b, uint16(len(t))), t...)
		b = append(b, make([]byte, -len(b)&3)...)
	}
	return b
}

// ParseTagList decodes a block's list. It is for clients, and for tests.
func ParseTagList(list []byte) (first, last Stamp, source uint32, tags [][]byte, err error) {
	le := binary.NativeEndian
	stamps, started := []*Stamp{&first, &last}, false
	for at := 0; ; {
		kind, body, size, ok := record(list[at:])
		switch {
		case !ok:
			return first, last, 0, nil, fmt.Errorf("%w: at byte %d", ErrList, at)
		case !started && kind != recStart:
			return first, last, 0, nil, fmt.Errorf("%w: it begins with a record of kind %d", ErrList, kind)
		case kind == recStart:
			started = true
		case kind == recEnd:
			return first, last, source, tags, nil
		case kind == recStamp && len(body) == 20 && len(stamps) > 0:
			stamps[0].Sequence, stamps[0].Time = le.Uint64(body[4:]), le.Uint64(body[12:])
			stamps = stamps[1:]
		case kind == recSource && len(body) == 4:
			source = le.Uint32(body)
		case kind == recUser && len(body) >= 2 && int(le.Uint16(body)) <= len(body)-2:
			tags = append(tags, body[2:][:le.Uint16(body)])
		case kind == recPadding:
		default:
			return first, last, 0, nil, fmt.Errorf("%w: a record of kind %d with %d bytes at byte %d", ErrList, kind, size, at)
		}
		at += size
	}
}

func record(b []byte) (kind uint16, body []byte, size int, ok bool) {
	if len(b) < 4 {
		return 0, nil, 0, false
	}
	kind, size = binary.NativeEndian.Uint16(b), int(b[3])
	head := 4
	if b[2]&recLong != 0 {
		if head = 8; len(b) < head {
			return 0, nil, 0, false
		}
		size = int(binary.NativeEndian.Uint32(b[4:]))
	}
	if size < head || size > len(b) {
		return 0, nil, 0, false
	}
	return kind, b[head:size], size, true
}

// FileName encodes the name of a block's data file, which takes the place of the
// tag list: a length without the NUL, and the name with it.
func FileName(path string) (list [3584]byte, err error) {
	if len(path) > FileNameMax {
		return list, fmt.Errorf("%s: %d bytes of a file's name, at most %d", path, len(path), FileNameMax)
	}
	binary.NativeEndian.PutUint16(list[:], uint16(len(path)))
	copy(list[2:], path)
	return list, nil
}

// ParseFileName decodes it.
func ParseFileName(list []byte) (string, error) {
	if len(list) < 2 {
		return "", ErrList
	}
	n := int(binary.NativeEndian.Uint16(list))
	if n > FileNameMax || n > len(list)-3 || list[2+n] != 0 {
		return "", fmt.Errorf("%w: a file's name of %d bytes", ErrList, n)
	}
	return string(list[2:][:n]), nil
}
