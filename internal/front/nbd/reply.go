package nbd

import (
	"errors"
	"syscall"

	"tidemark/internal/abi/nbd"
	"tidemark/internal/block"
)

// errno is the one place where errors become the protocol's.
func errno(err error) uint32 {
	switch {
	case errors.Is(err, block.ErrReadOnly):
		return nbd.EPERM
	case errors.Is(err, block.ErrBounds):
		return nbd.EINVAL
	case errors.Is(err, syscall.ENOSPC):
		return nbd.ENOSPC
	case errors.Is(err, syscall.ENOMEM):
		return nbd.ENOMEM
	}
	return nbd.EIO
}

// outgoing is a reply on its way to the client: a head, then the data of a read,
// then what replies of several parts have besides.
type outgoing struct {
	head [chunkSize + 8]byte
	n    int // of head
	data []byte
	more [][]byte
	held held // given back when it was sent, or never will be
}

// Bytes of what replies begin with.
const (
	simpleSize = 16
	chunkSize  = 20
)

// answer queues what a request is answered with: flush sends it.
func (c *connection) answer(r *request, a outgoing) {
	a.held = r.held
	c.out.Lock()
	defer c.out.Unlock()
	c.answers = append(c.answers, a)
}

// flush sends what is queued. Where somebody else is at it already, they send
// that too. It fails when the client cannot be answered any more.
func (c *connection) flush() error {
	c.out.Lock()
	defer c.out.Unlock()
	for !c.sending && len(c.answers) > 0 {
		batch := c.answers
		c.answers, c.sending = c.spare[:0], true
		err := c.mute
		c.out.Unlock()
		if err == nil {
			err = c.link.send(batch)
		}
		for i := range batch {
			c.release(batch[i].held)
			batch[i] = outgoing{}
		}
		c.out.Lock()
		c.spare, c.sending, c.mute = batch, false, err
	}
	return c.mute
}

// simple adds a simple reply to b.
func simple(b []byte, cookie uint64, code uint32) []byte {
	return be.AppendUint64(be.AppendUint32(be.AppendUint32(b, nbd.SimpleMagic), code), cookie)
}

// chunk adds the head of a part of a structured reply to b; n bytes follow it.
func chunk(b []byte, cookie uint64, last bool, kind uint16, n int) []byte {
	flags := uint16(0)
	if last {
		flags = nbd.ReplyFlagDone
	}
	b = be.AppendUint16(be.AppendUint16(be.AppendUint32(b, nbd.StructuredMagic), flags), kind)
	return be.AppendUint32(be.AppendUint64(b, cookie), uint32(n))
}

func (c *connection) done(r *request) {
	var a outgoing
	if c.structured {
		a.n = len(chunk(a.head[:0], r.cookie, true, nbd.ReplyNone, 0))
	} else {
		a.n = len(simple(a.head[:0], r.cookie, 0))
	}
	c.answer(r, a)
}

// messageMax bounds the text of an error, in bytes; the protocol allows 4096.
const messageMax = 1024

func (c *connection) fail(r *request, code uint32, why string) {
	var a outgoing
	if !c.structured {
		a.n = len(simple(a.head[:0], r.cookie, code))
	} else {
		why = why[:min(len(why), messageMax)]
		a.n = len(chunk(a.head[:0], r.cookie, true, nbd.ReplyError, 6+len(why)))
		a.data = append(be.AppendUint16(be.AppendUint32(nil, code), uint16(len(why))), why...)
	}
	c.answer(r, a)
}

func (c *connection) read(r *request) {
	if !c.structured || r.flags&nbd.CmdFlagDF != 0 || r.n < 2*holeMin {
		c.readWhole(r)
		return
	}
	pieces := c.pieces(r.at())
	for _, p := range pieces {
		if p.State != block.Data {
			continue
		}
		if err := readFull(c.export.Device, r.buf[p.Off-int64(r.off):][:p.Len], p.Off); err != nil {
			c.fail(r, errno(err), err.Error())
			return
		}
	}
	parts := make([][]byte, 0, 2*len(pieces))
	for i, p := range pieces {
		last := i == len(pieces)-1
		if p.State == block.Data {
			h := be.AppendUint64(chunk(nil, r.cookie, last, nbd.ReplyOffsetData, 8+int(p.Len)), uint64(p.Off))
			parts = append(parts, h, r.buf[p.Off-int64(r.off):][:p.Len])
		} else {
			h := be.AppendUint64(chunk(nil, r.cookie, last, nbd.ReplyOffsetHole, 12), uint64(p.Off))
			parts = append(parts, be.AppendUint32(h, uint32(p.Len)))
		}
	}
	c.answer(r, outgoing{more: parts})
}

// readWhole answers a read in one piece.
func (c *connection) readWhole(r *request) {
	if err := readFull(c.export.Device, r.buf, int64(r.off)); err != nil {
		c.fail(r, errno(err), err.Error())
		return
	}
	a := outgoing{data: r.buf}
	if c.structured {
		a.n = len(be.AppendUint64(chunk(a.head[:0], r.cookie, true, nbd.ReplyOffsetData, 8+len(r.buf)), r.off))
	} else {
		a.n = len(simple(a.head[:0], r.cookie, 0))
	}
	c.answer(r, a)
}

// Zeroes travel as holes where they are long enough to be worth a chunk of their own.
const (
	holeMin   = 32 << 10 // bytes
	piecesMax = 64       // of one reply
)

// pieces cuts a range into data and holes, in order and gapless.
func (c *connection) pieces(r block.Range) []block.Extent {
	extents, err := c.export.extents(r)
	if err != nil {
		extents = nil // reading will tell
	}
	var out []block.Extent
	for i := 0; i < len(extents) && len(out) < piecesMax-1; {
		zero := c.export.zero(extents[i].State)
		run := block.Extent{Range: block.Range{Off: r.Off}}
		for ; i < len(extents) && c.export.zero(extents[i].State) == zero; i++ {
			run.Len += extents[i].Len
		}
		if zero && run.Len >= holeMin {
			run.State = block.Zero
		}
		out = extend(out, run)
		r.Off, r.Len = run.End(), r.Len-run.Len
	}
	if r.Len > 0 { // what nobody knows of, or too much for one reply
		out = extend(out, block.Extent{Range: r, State: block.Data})
	}
	return out
}

// extend adds an extent, to the last one where that is in the same state.
func extend(out []block.Extent, e block.Extent) []block.Extent {
	if last := len(out) - 1; last >= 0 && out[last].State == e.State {
		out[last].Len += e.Len
		return out
	}
	return append(out, e)
}

// status answers with what each context that was agreed on says.
func (c *connection) status(r *request) {
	most := statusMax
	if r.flags&nbd.CmdFlagReqOne != 0 {
		most = 1
	}
	var reply []byte
	for i, m := range c.contexts {
		found, err := m.describe(r.at(), most)
		if err == nil && len(found) == 0 {
			err = errRun
		}
		if err != nil {
			c.fail(r, errno(err), m.name+": "+err.Error())
			return
		}
		reply = chunk(reply, r.cookie, i == len(c.contexts)-1, nbd.ReplyBlockStatus, 4+8*len(found))
		reply = be.AppendUint32(reply, m.id)
		for _, d := range found {
			reply = be.AppendUint32(be.AppendUint32(reply, d.length), d.state)
		}
	}
	c.answer(r, outgoing{data: reply})
}
