package segment

import (
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/klauspost/compress/s2"

	"tidemark/internal/block"
	"tidemark/internal/stream"
)

// RecordMax bounds the payload of one record, in bytes.
const RecordMax = 64 << 20

// sizeMax bounds index and frames, so that their lengths and places fit their fields.
const sizeMax = 2 << 30

// ErrFull: the segment has no room for the record. Seal it first.
var ErrFull = errors.New("the segment has reached the most that its format holds")

// Builder collects records until they are sealed. It is used by one goroutine.
type Builder struct {
	raw     []byte // payload of the frame under construction
	frames  []byte // finished frames
	refs    []byte // the index's table of frames
	entries []byte
	marks   []byte
	deltas  deltas
	count   int
	flags   int // of the index
	first   stream.Position
	sealed  Sealed
	head    []byte
	index   []byte
	footer  []byte
}

// Sealed is a finished segment. It is valid until the builder's next Append, Seal or Reset.
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

// NewBuilder gives a builder with room for about size bytes of payload; it
// grows where that was too little, and keeps what it has grown to.
func NewBuilder(size int) *Builder {
	return &Builder{
		raw: make([]byte, 0, FrameSize), frames: make([]byte, 0, size+size/16),
		entries: make([]byte, 0, size/4096*20+1024), footer: make([]byte, footerSize),
	}
}

// Records is how many records were appended since the last Reset.
func (b *Builder) Records() int { return b.count }

// Size is about how many bytes the segment has by now.
func (b *Builder) Size() int {
	return len(b.frames) + len(b.raw) + len(b.entries) + len(b.refs) + len(b.marks)
}

// Reset forgets everything appended.
func (b *Builder) Reset() {
	b.raw, b.frames, b.refs, b.entries, b.marks = b.raw[:0], b.frames[:0], b.refs[:0], b.entries[:0], b.marks[:0]
	b.deltas, b.count, b.flags, b.first = deltas{}, 0, 0, 0
}

// Append copies a record. An error leaves the builder as it was.
func (b *Builder) Append(r *stream.Record) error {
	if err := check(r); err != nil {
		return err
	}
	if b.Size()+len(r.Payload)+len(r.Name)+24*len(r.Ranges) > sizeMax-(1<<20) {
		return ErrFull
	}
	if b.first == 0 && r.Kind.TakesPosition() {
		b.first = r.Position
	}
	if b.count%restartEvery == 0 {
		b.deltas = deltas{}
	}
	if twoPhase(r.Kind) {
		b.flags |= flagTwoPhase
	}
	b.makeRoom(len(r.Payload))
	at := uint64(len(b.refs)/frameRef*FrameSize + len(b.raw))
	b.entries = b.deltas.encode(b.entries, r, at)
	b.count++
	b.put(r.Payload)
	return nil
}

// Mark notes the state of the stream after the records so far: the segment
// could end here. A torn file is cut back to its last mark that is whole, so
// whoever wants that calls it between records now and then; it costs 72 bytes.
func (b *Builder) Mark(s State) {
	if n := len(b.marks); n > 0 && int(le.Uint32(b.marks[n-markSize:])) == b.count {
		b.marks = b.marks[:n-markSize]
	}
	b.marks = le.AppendUint32(b.marks, uint32(b.count))
	b.marks = le.AppendUint32(b.marks, 0)
	b.marks = appendState(b.marks, &s)
}

func check(r *stream.Record) error {
	data := hasPayload(r)
	switch {
	case r.Kind < stream.KindWrite || r.Kind > stream.KindVerdict || sub(r) > 15:
		return fmt.Errorf("a record of %s with %d: this build knows no such", r.Kind, sub(r))
	case data && int64(len(r.Payload)) != r.Range.Len:
		return fmt.Errorf("%s of %s with a payload of %d bytes", r.Kind, r.Range, len(r.Payload))
	case !data && len(r.Payload) > 0:
		return fmt.Errorf("%s with a payload of %d bytes", r.Kind, len(r.Payload))
	case len(r.Payload) > RecordMax:
		return fmt.Errorf("payload of %d bytes: at most %d", len(r.Payload), RecordMax)
	case len(r.Name) > stream.NameMax:
		return fmt.Errorf("bookmark name has %d bytes: at most %d", len(r.Name), stream.NameMax)
	case !sane(r.Disk, r.Range):
		return fmt.Errorf("%s of disk %d, range %s: out of bounds", r.Kind, r.Disk, r.Range)
	}
	for _, g := range r.Ranges {
		if !sane(g.Disk, g.Range) {
			return fmt.Errorf("gap of disk %d, range %s: out of bounds", g.Disk, g.Range)
		}
	}
	return nil
}

func sane(disk int, r block.Range) bool {
	return disk >= 0 && disk <= math.MaxUint16 && r.Off >= 0 && r.Len >= 0 && r.Off <= math.MaxInt64-r.Len
}

// makeRoom ends the frame under construction where a payload of n bytes would
// not lie in it as a whole.
func (b *Builder) makeRoom(n int) {
	if len(b.raw) > 0 && len(b.raw)+n > FrameSize {
		b.frame(b.raw)
		b.raw = b.raw[:0]
	}
}

func (b *Builder) put(p []byte) {
	for len(p) >= FrameSize { // a whole frame: no copy
		b.frame(p[:FrameSize])
		p = p[FrameSize:]
	}
	if b.raw = append(b.raw, p...); len(b.raw) == FrameSize {
		b.frame(b.raw)
		b.raw = b.raw[:0]
	}
}

// frame compresses one frame, unless that saves less than a twentieth.
func (b *Builder) frame(raw []byte) {
	at := len(b.frames)
	most := max(s2.MaxEncodedLen(len(raw)), len(raw))
	b.frames = grow(b.frames, most)
	out := b.frames[at : at+most]
	codec := byte(codecS2)
	stored := len(s2.Encode(out, raw))
	if stored > len(raw)-len(raw)/20-1 {
		codec, stored = codecRaw, copy(out, raw)
	}
	b.frames = b.frames[:at+stored]
	b.refs = le.AppendUint32(b.refs, uint32(stored))
	b.refs = le.AppendUint32(b.refs, uint32(len(raw)))
	b.refs = le.AppendUint32(b.refs, crc(out[:stored]))
	b.refs = append(b.refs, codec, 0, 0, 0)
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

// Seal finishes the segment. Sealing again gives the same bytes for the same
// arguments, and Append may go on after it.
func (b *Builder) Seal(h Header, s State) (*Sealed, error) {
	if len(b.raw) > 0 {
		// Appending goes on after a seal that the spool refused: the frame in
		// progress must not be taken twice.
		frames, refs := len(b.frames), len(b.refs)
		b.frame(b.raw)
		defer func() { b.frames, b.refs = b.frames[:frames], b.refs[:refs] }()
	}
	var err error
	if b.head, err = appendHeader(b.head[:0], &h); err != nil {
		return nil, err
	}
	ix := append(b.index[:0], magicIndex[:]...)
	for _, n := range [...]int{b.flags, len(b.refs) / frameRef, b.count, len(b.marks) / markSize, len(b.entries), 0, 0, 0, 0, 0} {
		ix = le.AppendUint32(ix, uint32(n))
	}
	ix = append(append(append(ix, b.refs...), b.marks...), b.entries...)
	b.index = le.AppendUint32(ix, crc(ix))

	first := b.first
	if first == 0 {
		first = s.Last + 1
	}
	sum := Summary{State: s, Sequence: h.Sequence, First: first, Records: b.count}
	sum.Size = int64(len(b.head) + len(b.frames) + len(b.index) + footerSize)
	b.putFooter(&sum)
	b.sealed = Sealed{Summary: sum, parts: [4][]byte{b.head, b.index, b.frames, b.footer}}
	return &b.sealed, nil
}

// putFooter takes the checksums of header and index as they stand at their ends:
// a CRC of something with its own CRC behind it would be the same for everything.
func (b *Builder) putFooter(s *Summary) {
	f := b.footer
	clear(f)
	copy(f, magicFooter[:])
	le.PutUint32(f[8:], version)
	le.PutUint32(f[16:], uint32(len(b.head)))
	copy(f[20:24], b.head[len(b.head)-sumSize:])
	le.PutUint32(f[24:], uint32(len(b.index)))
	copy(f[28:32], b.index[len(b.index)-sumSize:])
	le.PutUint64(f[32:], uint64(len(b.frames)))
	le.PutUint64(f[40:], uint64(s.Size))
	le.PutUint64(f[48:], s.Sequence)
	le.PutUint64(f[56:], uint64(s.First))
	le.PutUint64(f[64:], uint64(s.Records))
	appendState(f[72:72], &s.State)
	le.PutUint32(f[footerSize-sumSize:], crc(f[:footerSize-sumSize]))
	s.Digest = digestOf(f)
}
