package nbd

import (
	"errors"
	"net"
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

// outgoing is a reply on its way to the client.
type outgoing struct {
	parts net.Buffers
	sent  func() // it was, or it never will be
}

// answer queues what a request is answered with: flush sends it.
func (c *connection) answer(r request, parts ...[]byte) {
	c.out.Lock()
	defer c.out.Unlock()
	c.answers = append(c.answers, outgoing{parts, r.free})
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
		for i, a := range batch {
			a.sent()
			batch[i] = outgoing{}
		}
		c.out.Lock()
		c.spare, c.sending, c.mute = batch, false, err
	}
	return c.mute
}

func simple(cookie uint64, code uint32) []byte {
	h := be.AppendUint32(make([]byte, 0, 16), nbd.SimpleMagic)
	return be.AppendUint64(be.AppendUint32(h, code), cookie)
}

// chunk is the head of a part of a structured reply, n bytes follow.
func chunk(cookie uint64, last bool, kind uint16, n int) []byte {
	flags := uint16(0)
	if last {
		flags = nbd.ReplyFlagDone
	}
	h := be.AppendUint32(make([]byte, 0, 40), nbd.StructuredMagic)
	h = be.AppendUint64(be.AppendUint16(be.AppendUint16(h, flags), kind), cookie)
	return be.AppendUint32(h, uint32(n))
}

func (c *connection) done(r request) {
	if c.structured {
		c.answer(r, chunk(r.cookie, true, nbd.ReplyNone, 0))
	} else {
		c.answer(r, simple(r.cookie, 0))
	}
}

// messageMax bounds the text of an error, in bytes; the protocol allows 4096.
const messageMax = 1024

func (c *connection) fail(r request, code uint32, why string) {
	if !c.structured {
		c.answer(r, simple(r.cookie, code))
		return
	}
	why = why[:min(len(why), messageMax)]
	h := chunk(r.cookie, true, nbd.ReplyError, 6+len(why))
	c.answer(r, be.AppendUint16(be.AppendUint32(h, code), uint16(len(why))), []byte(why))
}

func (c *connection) read(r request) {
	pieces := []block.Extent{{Range: r.at(), State: block.Data}}
	if c.structured && r.flags&nbd.CmdFlagDF == 0 && r.n >= 2*holeMin {
		pieces = c.pieces(r.at())
	}
	for _, p := range pieces {
		if p.State != block.Data {
			continue
		}
		if err := readFull(c.export.Device, r.buf[p.Off-int64(r.off):][:p.Len], p.Off); err != nil {
			c.fail(r, errno(err), err.Error())
			return
		}
	}
	if !c.structured {
		c.answer(r, simple(r.cookie, 0), r.buf)
		return
	}
	parts := make([][]byte, 0, 2*len(pieces))
	for i, p := range pieces {
		last := i == len(pieces)-1
		if p.State == block.Data {
			h := be.AppendUint64(chunk(r.cookie, last, nbd.ReplyOffsetData, 8+int(p.Len)), uint64(p.Off))
			parts = append(parts, h, r.buf[p.Off-int64(r.off):][:p.Len])
		} else {
			h := be.AppendUint64(chunk(r.cookie, last, nbd.ReplyOffsetHole, 12), uint64(p.Off))
			parts = append(parts, be.AppendUint32(h, uint32(p.Len)))
		}
	}
	c.answer(r, parts...)
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
func (c *connection) status(r request) {
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
		h := chunk(r.cookie, i == len(c.contexts)-1, nbd.ReplyBlockStatus, 4+8*len(found))
		reply = append(reply, be.AppendUint32(h, m.id)...)
		for _, d := range found {
			reply = be.AppendUint32(be.AppendUint32(reply, d.length), d.state)
		}
	}
	c.answer(r, reply)
}
