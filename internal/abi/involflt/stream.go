package involflt

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
)

// The stream of a block's changes, packed, in the byte order that its first four
// bytes name ("DRTL", little endian; "DRTB" is not written and not read). Each
// chunk begins with a prefix of 12 bytes: a name, how many follow, flags.
//
//	"DRTL"
//	SVD1  128 bytes: checksum and identities, which the driver leaves zero
//	TFV2   20: record header (kind 3, length 20), sequence and time of the first change
//	LODC    8: bytes of all DDV2 chunks together, with their prefixes
//	DDV2   20 for each change: length (4), offset (8), and by how much its sequence (4)
//	       and its time (4) are greater than the first one's; then its data
//	TLV2   20: the last change, as TFV2
const (
	StreamOverhead = 4 + prefixBytes + headerBytes + 2*(prefixBytes+stampBytes) + prefixBytes + 8 // bytes of a stream without changes
	ChangeOverhead = prefixBytes + changeBytes                                                    // bytes of a change beside its data

	prefixBytes = 12
	headerBytes = 128
	stampBytes  = 20
	changeBytes = 20
)

const littleEndian = "DRTL"

// Change is one write. Data is of Length bytes, or nil: zeroes.
type Change struct {
	Offset uint64
	Length uint32
	At     Stamp
	Data   []byte
}

var (
	// ErrStream: bytes that are no stream.
	ErrStream = errors.New("not a stream of changes")
	// ErrDelta: changes are too far apart for one block, or not in order.
	ErrDelta = errors.New("changes do not fit into one block")
)

var zeroes [64 << 10]byte

// Fits says whether a change may stand in a block that begins at first.
func Fits(first, at Stamp) bool {
	return at.Time >= first.Time && at.Sequence >= first.Sequence && at.Time-first.Time < math.MaxUint32-1 && at.Sequence-first.Sequence < math.MaxUint32-1
}

// StreamSize is how many bytes WriteStream writes.
func StreamSize(changes []Change) int64 {
	n := int64(StreamOverhead)
	for _, c := range changes {
		n += ChangeOverhead + int64(c.Length)
	}
	return n
}

// WriteStream encodes changes, the first of which may be later than first.
func WriteStream(w io.Writer, first, last Stamp, changes []Change) error {
	le := binary.LittleEndian
	prefix := func(b []byte, name string) []byte {
		return le.AppendUint32(le.AppendUint32(append(b, name...), 1), 0)
	}
	stamp := func(b []byte, name string, s Stamp) []byte {
		b = append(prefix(b, name), recStamp, 0, 0, stampBytes)
		return le.AppendUint64(le.AppendUint64(b, s.Sequence), s.Time)
	}
	b := append(prefix([]byte(littleEndian), "SVD1"), make([]byte, headerBytes)...)
	b = prefix(stamp(b, "TFV2", first), "LODC")
	b = le.AppendUint64(b, uint64(StreamSize(changes)-StreamOverhead))
	for _, c := range changes {
		if !Fits(first, c.At) {
			return fmt.Errorf("%w: %v after %v", ErrDelta, c.At, first)
		}
		b = le.AppendUint32(prefix(b, "DDV2"), c.Length)
		b = le.AppendUint64(b, c.Offset)
		b = le.AppendUint32(b, uint32(c.At.Sequence-first.Sequence))
		b = le.AppendUint32(b, uint32(c.At.Time-first.Time))
		if _, err := w.Write(b); err != nil {
			return err
		}
		if err := writeData(w, c); err != nil {
			return err
		}
		b = b[:0]
	}
	_, err := w.Write(stamp(b, "TLV2", last))
	return err
}

func writeData(w io.Writer, c Change) error {
	if c.Data != nil {
		if uint64(len(c.Data)) != uint64(c.Length) {
			return fmt.Errorf("%w: %d bytes of data, not %d", ErrStream, len(c.Data), c.Length)
		}
		_, err := w.Write(c.Data)
		return err
	}
	for left := int64(c.Length); left > 0; left -= int64(len(zeroes)) {
		if _, err := w.Write(zeroes[:min(left, int64(len(zeroes)))]); err != nil {
			return err
		}
	}
	return nil
}

// ParseStream decodes a whole stream; the changes' data are parts of b. It is
// for clients, and for tests.
func ParseStream(b []byte) (first, last Stamp, changes []Change, err error) {
	rest, ok := bytes.CutPrefix(b, []byte(littleEndian))
	fail := func(what string) (Stamp, Stamp, []Change, error) {
		return Stamp{}, Stamp{}, nil, fmt.Errorf("%w: %s at byte %d of %d", ErrStream, what, len(b)-len(rest), len(b))
	}
	chunk := func(name string, size int) []byte {
		if len(rest) < prefixBytes+size || string(rest[:4]) != name || binary.LittleEndian.Uint32(rest[4:]) != 1 {
			return nil
		}
		body := rest[prefixBytes:][:size]
		rest = rest[prefixBytes+size:]
		return body
	}
	le := binary.LittleEndian
	stamp := func(name string) (s Stamp, ok bool) {
		body := chunk(name, stampBytes)
		if body == nil || le.Uint16(body) != recStamp || body[3] != stampBytes {
			return s, false
		}
		return Stamp{Sequence: le.Uint64(body[4:]), Time: le.Uint64(body[12:])}, true
	}
	if !ok || chunk("SVD1", headerBytes) == nil {
		return fail("no header")
	}
	if first, ok = stamp("TFV2"); !ok {
		return fail("no first stamp")
	}
	total := chunk("LODC", 8)
	if total == nil || le.Uint64(total) > uint64(len(rest)) {
		return fail("no length, or a wrong one,")
	}
	for end := uint64(len(rest)) - le.Uint64(total); uint64(len(rest)) > end; {
		body := chunk("DDV2", changeBytes)
		if body == nil || uint64(le.Uint32(body)) > uint64(len(rest)) {
			return fail("no whole change")
		}
		c := Change{Length: le.Uint32(body), Offset: le.Uint64(body[4:]),
			At: Stamp{Sequence: first.Sequence + uint64(le.Uint32(body[12:])), Time: first.Time + uint64(le.Uint32(body[16:]))}}
		c.Data, rest = rest[:c.Length], rest[c.Length:]
		if uint64(len(rest)) < end {
			return fail("the changes are longer than they should be")
		}
		changes = append(changes, c)
	}
	if last, ok = stamp("TLV2"); !ok || len(rest) != 0 {
		return fail("no last stamp, or something behind it,")
	}
	return first, last, changes, nil
}
