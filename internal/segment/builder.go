package segment

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/s2"

	"tidemark/internal/block"
	"tidemark/internal/stream"
)

// RecordMax bounds the payload of one record, in bytes.
const RecordMax = 64 << 20

// Builder collects records until they are sealed.
type Builder struct {
	raw     []byte // payload of the frame under construction
	frames  []byte // finished frames
	refs    []byte // the index's table of frames
	entries []byte
	extra   []byte // names and ranges
	payload uint64 // bytes appended
	count   int
	first   stream.Position
	sealed  Sealed
	head    []byte
	index   []byte
	footer  []byte
}

// Sealed is a finished segment. It is valid until the builder's Reset.
type Sealed struct {
	Summary Summary
	parts   [4][]byte
}

// WriteTo writes the segment's bytes.
func (s *Sealed) WriteTo(w io.Writer) (int64, error) {
	var n int64
	for _, p := range s.parts {
		k, err := w.Write(p)
		n += int64(k)
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// NewBuilder gives a builder with room for about size bytes of payload.
func NewBuilder(size int) *Builder {
	return &Builder{
		raw: make([]byte, 0, FrameSize), frames: make([]byte, 0, size+size/16),
		entries: make([]byte, 0, size/4096*entrySize), footer: make([]byte, footerSize),
	}
}

// Records is how many records were appended since the last Reset.
func (b *Builder) Records() int { return b.count }

// Size is about how many bytes the segment has by now.
func (b *Builder) Size() int { return len(b.frames) + len(b.raw) + len(b.entries) + len(b.extra) }

// Reset forgets everything appended.
func (b *Builder) Reset() {
	b.raw, b.frames, b.refs, b.entries, b.extra = b.raw[:0], b.frames[:0], b.refs[:0], b.entries[:0], b.extra[:0]
	b.payload, b.count, b.first = 0, 0, 0
}

// Append copies a record. An error leaves the builder as it was.
func (b *Builder) Append(r *stream.Record) error {
	if err := check(r); err != nil {
		return err
	}
	if b.first == 0 && r.Kind.TakesPosition() {
		b.first = r.Position
	}
	extraAt := len(b.extra)
	switch r.Kind {
	case stream.KindBookmark:
		b.extra = append(b.extra, r.Name...)
	case stream.KindGap:
		for _, g := range r.Ranges {
			b.extra = le.AppendUint64(b.extra, uint64(g.Disk))
			b.extra = le.AppendUint64(b.extra, uint64(g.Off))
			b.extra = le.AppendUint64(b.extra, uint64(g.Len))
		}
	}
	e := append(b.entries, byte(r.Kind), byte(r.Op), byte(r.Fill), byte(r.Cause), byte(r.Consistency), 0)
	e = le.AppendUint16(e, uint16(r.Disk))
	e = le.AppendUint64(e, uint64(r.Position))
	e = le.AppendUint64(e, uint64(r.ValidFrom))
	e = le.AppendUint64(e, uint64(r.Base))
	e = le.AppendUint64(e, uint64(r.Time))
	e = le.AppendUint64(e, uint64(r.Range.Off))
	e = le.AppendUint64(e, uint64(r.Range.Len))
	e = le.AppendUint64(e, b.payload)
	e = le.AppendUint32(e, uint32(extraAt))
	b.entries = le.AppendUint32(e, uint32(len(b.extra)-extraAt))
	b.count++
	b.put(r.Payload)
	return nil
}

func check(r *stream.Record) error {
	data := r.Kind == stream.KindWrite && r.Op == block.OpWrite || r.Kind == stream.KindFill && r.Fill == stream.FillData
	switch {
	case data && int64(len(r.Payload)) != r.Range.Len:
		return fmt.Errorf("%s of %s with a payload of %d bytes", r.Kind, r.Range, len(r.Payload))
	case !data && len(r.Payload) > 0:
		return fmt.Errorf("%s with a payload of %d bytes", r.Kind, len(r.Payload))
	case len(r.Payload) > RecordMax:
		return fmt.Errorf("payload of %d bytes: at most %d", len(r.Payload), RecordMax)
	case r.Disk < 0 || r.Disk > 1<<16-1 || len(r.Name) > stream.NameMax:
		return errors.New("record out of bounds")
	}
	return nil
}

func (b *Builder) put(p []byte) {
	b.payload += uint64(len(p))
	for len(p) > 0 {
		n := min(len(p), FrameSize-len(b.raw))
		if n == FrameSize { // a whole frame: no copy
			b.frame(p[:n])
		} else if b.raw = append(b.raw, p[:n]...); len(b.raw) == FrameSize {
			b.frame(b.raw)
			b.raw = b.raw[:0]
		}
		p = p[n:]
	}
}

// frame compresses one frame, unless that saves less than a sixteenth.
func (b *Builder) frame(raw []byte) {
	at := len(b.frames)
	most := frameHead + max(s2.MaxEncodedLen(len(raw)), len(raw)) + 4
	b.frames = grow(b.frames, most)
	out := b.frames[at : at+most]
	codec := byte(codecS2)
	stored := len(s2.Encode(out[frameHead:], raw))
	if stored > len(raw)-len(raw)/16 {
		codec, stored = codecRaw, copy(out[frameHead:], raw)
	}
	copy(out, magicFrame[:])
	out[4], out[5], out[6], out[7] = codec, 0, 0, 0
	le.PutUint32(out[8:], uint32(len(raw)))
	le.PutUint32(out[12:], uint32(stored))
	le.PutUint32(out[frameHead+stored:], crc(out[:frameHead+stored]))
	b.frames = b.frames[:at+frameHead+stored+4]
	b.refs = le.AppendUint64(b.refs, uint64(at))
	b.refs = le.AppendUint32(b.refs, uint32(len(raw)))
	b.refs = le.AppendUint32(b.refs, uint32(stored))
}

// grow gives b room for n more bytes, with them in its length.
func grow(b []byte, n int) []byte {
	if cap(b)-len(b) < n {
		bigger := make([]byte, len(b), 2*cap(b)+n)
		copy(bigger, b)
		b = bigger
	}
	return b[:len(b)+n]
}

// Seal finishes the segment. The result is valid until Reset; sealing again
// gives the same bytes for the same arguments.
func (b *Builder) Seal(h Header, s State) (*Sealed, error) {
	if len(b.raw) > 0 {
		// Appending goes on after a seal that the spool refused: the frame in
		// progress must not be taken twice.
		frames, refs := len(b.frames), len(b.refs)
		b.frame(b.raw)
		defer func() { b.frames, b.refs = b.frames[:frames], b.refs[:refs] }()
	}
	text, err := json.Marshal(h)
	if err != nil {
		return nil, err
	}
	if len(text) > headerMax {
		return nil, fmt.Errorf("header of %d bytes: at most %d", len(text), headerMax)
	}
	b.head = append(b.head[:0], magicHeader[:]...)
	b.head = le.AppendUint32(b.head, version)
	b.head = le.AppendUint32(b.head, uint32(len(text)))
	b.head = append(b.head, text...)
	b.head = le.AppendUint32(b.head, crc(b.head))

	ix := append(b.index[:0], magicIndex[:]...)
	ix = le.AppendUint32(ix, uint32(len(b.refs)/frameRef))
	ix = le.AppendUint32(ix, uint32(b.count))
	ix = le.AppendUint32(ix, uint32(len(b.extra)))
	ix = le.AppendUint32(ix, 0)
	ix = le.AppendUint64(ix, b.payload)
	ix = append(append(append(ix, b.refs...), b.entries...), b.extra...)
	b.index = le.AppendUint32(ix, crc(ix))

	first := b.first
	if first == 0 {
		first = s.Last + 1
	}
	sum := Summary{State: s, Sequence: h.Sequence, First: first, Records: b.count}
	sum.Size = int64(len(b.head) + len(b.frames) + len(b.index) + footerSize)
	b.putFooter(&sum)
	b.sealed = Sealed{Summary: sum, parts: [4][]byte{b.head, b.frames, b.index, b.footer}}
	return &b.sealed, nil
}

func (b *Builder) putFooter(s *Summary) {
	f := b.footer
	clear(f)
	copy(f, magicFooter[:])
	le.PutUint32(f[8:], version)
	le.PutUint32(f[16:], uint32(len(b.head)))
	le.PutUint32(f[20:], crc(b.head))
	le.PutUint64(f[24:], uint64(len(b.head)+len(b.frames)))
	le.PutUint64(f[32:], uint64(len(b.index)))
	le.PutUint32(f[40:], crc(b.index))
	le.PutUint64(f[48:], s.Sequence)
	le.PutUint64(f[56:], uint64(s.First))
	le.PutUint64(f[64:], uint64(s.Last))
	le.PutUint64(f[72:], uint64(s.Settled))
	le.PutUint64(f[80:], uint64(s.GapSince))
	le.PutUint64(f[88:], uint64(s.Time))
	copy(f[96:], s.Source.Ring[:])
	le.PutUint64(f[112:], s.Source.Place)
	le.PutUint64(f[120:], s.Source.Drops)
	le.PutUint64(f[128:], uint64(s.Records))
	le.PutUint64(f[136:], uint64(s.Size))
	le.PutUint32(f[footerSize-4:], crc(f[:footerSize-4]))
	s.Digest = digestOf(f)
}
