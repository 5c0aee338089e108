package involflt

import (
	"tidemark/internal/abi/involflt"
)

// part is what one block hands over: a batch has one or more of them. What the
// parts of a batch are depends on the batch alone, so that a drainer that comes
// again gets the same ones.
type part struct {
	kind        Kind
	order       uint32
	flags       uint32 // of a change that takes several blocks
	split       uint32 // its number, from 1 on; 0: it is whole
	first, last involflt.Stamp
	changes     []involflt.Change
	bytes       int64
	tags        [][]byte

	id uint64 // transaction; 0: none yet
}

const (
	streamMax = 4 << 20  // bytes of a block's stream
	pieceMax  = 4 << 20  // bytes of a change in a block of its own
	rangeMax  = 64 << 20 // bytes of a range to be read
)

// cut makes a batch's parts.
func cut(b *Batch) []*part {
	c := cutter{kind: b.Kind}
	switch b.Kind {
	case Tags:
		return []*part{{kind: Tags, order: involflt.OrderData, first: b.At, last: b.At, tags: b.Tags}}
	case Writes:
		c.order = involflt.OrderData
	case Copies:
		c.order = involflt.OrderBitmap
	case Ranges:
		c.order = involflt.OrderMetadata
	}
	for _, change := range b.Changes {
		if b.Kind == Ranges {
			c.ranges(change)
		} else {
			c.add(change)
		}
	}
	return c.parts
}

type cutter struct {
	kind  Kind
	order uint32
	parts []*part
	open  *part // may take more
	size  int64 // of its stream
}

// begin opens a part.
func (c *cutter) begin(at involflt.Stamp) *part {
	p := &part{kind: c.kind, order: c.order, first: at}
	c.parts = append(c.parts, p)
	c.open, c.size = p, involflt.StreamOverhead
	return p
}

func (p *part) take(offset, length int64, at involflt.Stamp, data []byte) {
	p.changes = append(p.changes, involflt.Change{Offset: uint64(offset), Length: uint32(length), At: at, Data: data})
	p.bytes += length
	p.last = at
}

// ended is how many changes are complete with the part.
func (p *part) ended() int64 {
	if p.split > 0 && p.flags&involflt.FlagSplitEnd == 0 {
		return 0
	}
	return int64(len(p.changes))
}

func (c *cutter) add(ch Change) {
	size := int64(involflt.ChangeOverhead) + ch.Length
	if involflt.StreamOverhead+size > streamMax {
		c.split(ch)
		return
	}
	if c.open == nil || c.size+size > streamMax || !involflt.Fits(c.open.first, ch.At) {
		c.begin(ch.At)
	}
	c.open.take(ch.Offset, ch.Length, ch.At, ch.Data)
	c.size += size
}

// split gives a large change blocks of its own, all with its one stamp.
func (c *cutter) split(ch Change) {
	for at, n := int64(0), uint32(1); at < ch.Length; n++ {
		length := min(pieceMax, ch.Length-at)
		var data []byte
		if ch.Data != nil {
			data = ch.Data[at : at+length]
		}
		p := c.begin(ch.At)
		p.take(ch.Offset+at, length, ch.At, data)
		p.flags, p.split = involflt.FlagSplitPart, n
		at += length
		switch {
		case n == 1:
			p.flags = involflt.FlagSplitStart
		case at == ch.Length:
			p.flags = involflt.FlagSplitEnd
		}
	}
	c.open = nil
}

// ranges has no content, and no order either: there is nothing to be split.
func (c *cutter) ranges(ch Change) {
	for at := int64(0); at < ch.Length; at += rangeMax {
		if c.open == nil || len(c.open.changes) == involflt.NotifyChanges || !involflt.Fits(c.open.first, ch.At) {
			c.begin(ch.At)
		}
		c.open.take(ch.Offset+at, min(rangeMax, ch.Length-at), ch.At, nil)
	}
}

// block is the part as a client sees it. path is of its data file.
func (p *part) block(path string) (b involflt.DirtyBlock, err error) {
	b = involflt.DirtyBlock{Transaction: p.id, ChangeBytes: uint64(p.bytes), Changes: uint32(len(p.changes)), Flags: p.flags, Split: p.split, WriteOrder: p.order}
	switch p.kind {
	case Writes, Copies:
		b.Flags |= involflt.FlagDataFile
		b.StreamBytes = uint32(involflt.StreamSize(p.changes))
		b.Tags, err = involflt.FileName(path)
	case Tags:
		b.Tags, err = involflt.TagList(p.first, p.last, involflt.SourceMetadata, p.tags)
	case Ranges:
		for i, c := range p.changes {
			b.Offsets[i], b.Lengths[i] = c.Offset, c.Length
			b.TimeDeltas[i], b.SequenceDeltas[i] = uint32(c.At.Time-p.first.Time), uint32(c.At.Sequence-p.first.Sequence)
		}
		b.Tags, err = involflt.TagList(p.first, p.last, involflt.SourceMetadata, nil)
	}
	return b, err
}
