package segment

import (
	"bytes"
	"fmt"
	"math"
)

// appendHeader encodes a header with its checksum.
func appendHeader(b []byte, h *Header) ([]byte, error) {
	if len(h.Group) > math.MaxUint16 || len(h.Disks) > math.MaxUint16 {
		return b, fmt.Errorf("a group with a name of %d bytes and %d disks: at most %d of each", len(h.Group), len(h.Disks), math.MaxUint16)
	}
	b = append(b, magicHeader[:]...)
	b = le.AppendUint32(b, version)
	b = le.AppendUint32(b, 0) // flags
	b = le.AppendUint32(b, 0) // length, below
	b = append(b, make([]byte, 12)...)
	b = append(b, h.GroupID[:]...)
	b = le.AppendUint64(b, h.Sequence)
	b = append(b, h.Previous[:]...)
	b = le.AppendUint32(b, uint32(len(h.Disks)))
	b = appendText(b, h.Group)
	for _, d := range h.Disks {
		b = le.AppendUint64(b, uint64(d.Size))
		b = le.AppendUint64(b, uint64(d.SectorSize))
		b = le.AppendUint64(b, uint64(d.BlockSize))
		b = appendText(appendText(b, d.Name), d.Identity)
	}
	if len(b)+sumSize > headerMax {
		return b, fmt.Errorf("header of %d bytes: at most %d", len(b)+sumSize, headerMax)
	}
	le.PutUint32(b[16:], uint32(len(b)+sumSize))
	return le.AppendUint32(b, crc(b)), nil
}

func appendText(b []byte, s string) []byte {
	return append(le.AppendUint32(b, uint32(len(s))), s...)
}

// headerLen says how long the header that begins with b is.
func headerLen(b []byte) (int64, error) {
	n := int64(le.Uint32(b[16:]))
	if !bytes.Equal(b[:8], magicHeader[:]) || n < headerHead+4+sumSize || n > headerMax {
		return 0, damaged("it does not begin as a segment does")
	}
	return n, nil
}

// parseHeader decodes a whole header, checksum and all.
func parseHeader(b []byte) (h Header, err error) {
	body := b[:len(b)-sumSize]
	if n, err := headerLen(b); err != nil || n != int64(len(b)) || crc(body) != le.Uint32(b[len(body):]) {
		return h, damaged("the header's checksum does not fit")
	}
	if v, flags := le.Uint32(b[8:]), le.Uint32(b[12:]); v != version || flags != 0 {
		return h, fmt.Errorf("%w: %d with flags %#x, this build reads %d", ErrVersion, v, flags, version)
	}
	copy(h.GroupID[:], b[32:])
	h.Sequence = le.Uint64(b[48:])
	copy(h.Previous[:], b[56:])
	disks := uint64(le.Uint32(b[72:]))
	r := &reader{b: body[headerHead:]}
	h.Group = readText(r)
	if disks > uint64(len(r.b))/32 {
		return h, damaged("the header tells of %d disks", disks)
	}
	if disks > 0 {
		h.Disks = make([]Disk, disks)
	}
	for i := range h.Disks {
		d := &h.Disks[i]
		if f := r.bytes(24); f != nil {
			d.Size, d.SectorSize, d.BlockSize = int64(le.Uint64(f)), int64(le.Uint64(f[8:])), int64(le.Uint64(f[16:]))
		}
		d.Name, d.Identity = readText(r), readText(r)
	}
	if r.bad || len(r.b) != 0 {
		return h, damaged("the header's parts do not fit")
	}
	return h, nil
}

func readText(r *reader) string {
	if n := r.bytes(4); n != nil {
		return string(r.bytes(uint64(le.Uint32(n))))
	}
	return ""
}
