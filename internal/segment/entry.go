package segment

import (
	"encoding/binary"

	"tidemark/internal/block"
	"tidemark/internal/stream"
)

// Entry is a record without its payload, and where that lies.
type Entry struct {
	stream.Record
	At uint64 // place of the payload: frame number * FrameSize + offset in the frame
}

// HasPayload says whether the record's content is stored with it.
func (e *Entry) HasPayload() bool { return hasPayload(&e.Record) }

func hasPayload(r *stream.Record) bool {
	return r.Kind == stream.KindWrite && r.Op == block.OpWrite || r.Kind == stream.KindFill && r.Fill == stream.FillData
}

// inSectors is the bit of an entry's first byte that says that its range counts
// in sectors.
const inSectors = 0x80

// deltas is what entries are coded against. It begins anew every restartEvery
// entries.
type deltas struct {
	position, rank uint64
	time, end      int64
	at             uint64 // end of the last payload
}

// Sorts of a verdict.
const (
	verdictCommit = 1
	verdictRevoke = 2
)

// twoPhase says whether a segment with records of this kind needs flagTwoPhase.
func twoPhase(k stream.Kind) bool { return k == stream.KindPrepared || k == stream.KindVerdict }

// sub is the one number that tells records of a kind apart.
func sub(r *stream.Record) uint8 {
	switch r.Kind {
	case stream.KindWrite:
		return uint8(r.Op)
	case stream.KindBookmark, stream.KindPrepared:
		return uint8(r.Consistency)
	case stream.KindVerdict:
		if r.Commit {
			return verdictCommit
		}
		return verdictRevoke
	case stream.KindGap:
		return uint8(r.Cause)
	case stream.KindFill:
		return uint8(r.Fill)
	}
	return 0
}

// encode appends an entry: the fields that count for its kind, each as a
// difference to what was last seen of it.
func (d *deltas) encode(b []byte, r *stream.Record, at uint64) []byte {
	head := uint8(r.Kind) | sub(r)<<3
	shift := 0
	if (r.Range.Off|r.Range.Len)&(block.SectorSize-1) == 0 {
		head, shift = head|inSectors, 9
	}
	b = append(b, head)
	if r.Kind.TakesPosition() {
		b = binary.AppendVarint(b, int64(uint64(r.Position)-d.position))
		d.position = uint64(r.Position)
	} else {
		b = binary.AppendVarint(b, int64(uint64(r.Position)-d.rank))
		d.rank = uint64(r.Position)
	}
	b = binary.AppendVarint(b, r.Time-d.time)
	d.time = r.Time
	switch r.Kind {
	case stream.KindBookmark, stream.KindPrepared:
		b = binary.AppendUvarint(b, uint64(len(r.Name)))
		return append(b, r.Name...)
	case stream.KindGap:
		return appendRanges(b, r.Ranges)
	case stream.KindSettled, stream.KindVerdict:
		return b
	case stream.KindFill:
		b = binary.AppendVarint(b, int64(uint64(r.ValidFrom)-d.position))
		if r.Fill == stream.FillSame {
			b = binary.AppendUvarint(b, uint64(r.Base))
		}
	}
	b = binary.AppendUvarint(b, uint64(r.Disk))
	b = binary.AppendVarint(b, r.Range.Off>>shift-d.end>>shift)
	b = binary.AppendUvarint(b, uint64(r.Range.Len)>>shift)
	d.end = r.Range.End()
	if hasPayload(r) && r.Range.Len > 0 {
		b = binary.AppendUvarint(b, at-d.at)
		d.at = at + uint64(r.Range.Len)
	}
	return b
}

func appendRanges(b []byte, ranges []block.DiskRange) []byte {
	b = binary.AppendUvarint(b, uint64(len(ranges)))
	var end int64
	for _, g := range ranges {
		b = binary.AppendUvarint(b, uint64(g.Disk))
		b = binary.AppendVarint(b, g.Off-end)
		b = binary.AppendUvarint(b, uint64(g.Len))
		end = g.End()
	}
	return b
}

// reader takes numbers off the front; the first that is not there sets bad.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) uint() uint64 {
	v, n := binary.Uvarint(r.b)
	if n <= 0 {
		r.bad, r.b = true, nil
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *reader) int() int64 {
	v := r.uint()
	return int64(v>>1) ^ -int64(v&1)
}

func (r *reader) byte() byte {
	if len(r.b) == 0 {
		r.bad = true
		return 0
	}
	v := r.b[0]
	r.b = r.b[1:]
	return v
}

func (r *reader) bytes(n uint64) []byte {
	if n > uint64(len(r.b)) {
		r.bad, r.b = true, nil
		return nil
	}
	v := r.b[:n]
	r.b = r.b[n:]
	return v
}

// decode is the reverse of encode. It checks the form, not the meaning.
func (d *deltas) decode(r *reader, e *Entry) {
	head := r.byte()
	*e = Entry{}
	e.Kind = stream.Kind(head & 7)
	s, shift := head>>3&15, 0
	if head&inSectors != 0 {
		shift = 9
	}
	if e.Kind.TakesPosition() {
		d.position += uint64(r.int())
		e.Position = stream.Position(d.position)
	} else {
		d.rank += uint64(r.int())
		e.Position = stream.Position(d.rank)
	}
	d.time += r.int()
	e.Time = d.time
	switch e.Kind {
	case stream.KindWrite:
		e.Op = block.Op(s)
	case stream.KindBookmark, stream.KindPrepared:
		e.Consistency = stream.Consistency(s)
		e.Name = string(r.bytes(r.uint()))
		return
	case stream.KindGap:
		e.Cause = stream.Cause(s)
		e.Ranges = readRanges(r)
		return
	case stream.KindFill:
		e.Fill = stream.FillOp(s)
		e.ValidFrom = stream.Position(d.position + uint64(r.int()))
		if e.Fill == stream.FillSame {
			e.Base = stream.Position(r.uint())
		}
	case stream.KindSettled:
		return
	case stream.KindVerdict:
		e.Commit = s == verdictCommit
		r.bad = r.bad || s != verdictCommit && s != verdictRevoke
		return
	default:
		r.bad = true
		return
	}
	disk := r.uint()
	e.Disk = int(min(disk, 1<<31))
	e.Range.Off = (d.end>>shift + r.int()) << shift
	e.Range.Len = int64(r.uint() << shift)
	d.end = e.Range.End()
	if e.HasPayload() && e.Range.Len > 0 {
		d.at += r.uint()
		e.At = d.at
		d.at += uint64(e.Range.Len)
	}
}

// readRanges bounds what it allocates by the bytes that are there: a range has
// at least three.
func readRanges(r *reader) []block.DiskRange {
	n := r.uint()
	if n > uint64(len(r.b))/3 {
		r.bad = true
		return nil
	}
	if n == 0 {
		return nil
	}
	out := make([]block.DiskRange, n)
	var end int64
	for i := range out {
		out[i].Disk = int(min(r.uint(), 1<<31))
		out[i].Off = end + r.int()
		out[i].Len = int64(r.uint())
		end = out[i].End()
	}
	return out
}
