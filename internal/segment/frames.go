package segment

import (
	"bytes"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/s2"
)

// Frames is a segment's table of frames by itself. With it payloads can be read
// from any place that has the same bytes; whatever else is there fails the
// checksums. Its methods may be called concurrently.
type Frames struct {
	refs []byte
	at   []int64 // where each frame lies in the file, and the end of the last
}

// Frames gives the segment's table, which needs 24 bytes a frame and nothing of
// the segment.
func (s *Segment) Frames() *Frames {
	return &Frames{refs: bytes.Clone(s.frames.refs), at: s.frames.at}
}

// parse reads the table of frames that begin at a place in the file, and gives
// the place of payloads behind the last.
func (f *Frames) parse(refs []byte, at int64) (payload uint64, err error) {
	n := len(refs) / frameRef
	f.refs, f.at = refs, make([]int64, n+1)
	for i := range n {
		stored, raw, codec := f.ref(i)
		if raw == 0 || raw > FrameSize || stored == 0 || stored > raw || codec == codecRaw && stored != raw {
			return 0, damaged("frame %d has %d bytes for %d", i, stored, raw)
		}
		f.at[i] = at
		at += int64(stored)
	}
	f.at[n] = at
	if n > 0 {
		_, raw, _ := f.ref(n - 1)
		payload = uint64(n-1)*FrameSize + uint64(raw)
	}
	return payload, nil
}

func (f *Frames) len() int   { return len(f.refs) / frameRef }
func (f *Frames) end() int64 { return f.at[len(f.at)-1] }

func (f *Frames) ref(i int) (stored, raw uint32, codec byte) {
	b := f.refs[i*frameRef:]
	return le.Uint32(b), le.Uint32(b[4:]), b[12]
}

var storedFrames = sync.Pool{New: func() any { return new([FrameSize]byte) }}

// Read decodes frame i, which it reads from r, into dst, which must have room
// for FrameSize bytes, and gives what it holds. An error wraps ErrDamaged and
// names the places that are, wraps ErrVersion, or is r's own.
func (f *Frames) Read(r io.ReaderAt, i int, dst []byte) ([]byte, error) {
	if i < 0 || i >= f.len() {
		return nil, damaged("frame %d of %d", i, f.len())
	}
	stored, raw, codec := f.ref(i)
	b := dst[:raw]
	if codec != codecRaw {
		scratch := storedFrames.Get().(*[FrameSize]byte)
		defer storedFrames.Put(scratch)
		b = scratch[:stored]
	}
	if err := readFull(r, b, f.at[i]); err != nil {
		return nil, err
	}
	if crc(b) != le.Uint32(f.refs[i*frameRef+8:]) {
		return nil, damaged("the checksum of frame %d, places %d to %d, does not fit", i, i*FrameSize, i*FrameSize+int(raw))
	}
	switch codec {
	case codecRaw:
		return b, nil
	case codecS2:
		if n, err := s2.DecodedLen(b); err != nil || n != int(raw) {
			return nil, damaged("frame %d would have %d bytes instead of %d", i, n, raw)
		}
		out, err := s2.Decode(dst[:raw], b)
		if err != nil {
			return nil, damaged("frame %d does not decompress", i)
		}
		return out, nil
	}
	return nil, fmt.Errorf("%w: frame %d has codec %d", ErrVersion, i, codec)
}
