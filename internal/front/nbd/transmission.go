package nbd

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"

	"tidemark/internal/abi/nbd"
	"tidemark/internal/block"
)

// request is what a client asks for.
type request struct {
	flags, cmd uint16
	cookie     uint64
	off        uint64
	n          uint32
	data       []byte
}

// buffers are shared by all connections, by power of two from 64 KiB.
var buffers [10]sync.Pool

func buffer(n uint32) (b []byte, free func()) {
	i := 0
	for 64<<10<<i < int64(n) {
		i++
	}
	p, ok := buffers[i].Get().(*[]byte)
	if !ok {
		fresh := make([]byte, 64<<10<<i)
		p = &fresh
	}
	return (*p)[:n], func() { buffers[i].Put(p) }
}

// transmission reads requests and has them done side by side, a bounded number
// at a time. It returns when the client is gone and its requests are done.
func (c *connection) transmission() {
	slots := make(chan struct{}, workers)
	defer c.busy.Wait()
	for {
		r, free, err := c.next()
		if err != nil || r.cmd == nbd.CmdDisc {
			return
		}
		slots <- struct{}{}
		c.busy.Go(func() {
			defer func() { free(); <-slots }()
			if c.do(r) != nil {
				c.conn.Close() // it cannot be answered: the reader ends too
			}
		})
	}
}

func (c *connection) next() (r request, free func(), err error) {
	free = func() {}
	var h [nbd.RequestSize]byte
	if _, err := io.ReadFull(c.in, h[:]); err != nil {
		return r, free, err
	}
	if be.Uint32(h[:]) != nbd.RequestMagic {
		return r, free, errors.New("not a request")
	}
	r = request{flags: be.Uint16(h[4:]), cmd: be.Uint16(h[6:]), cookie: be.Uint64(h[8:]), off: be.Uint64(h[16:]), n: be.Uint32(h[24:])}
	if r.cmd != nbd.CmdWrite {
		return r, free, nil
	}
	if r.n > payloadMax { // answered with an error, and skipped
		_, err := io.CopyN(io.Discard, c.in, int64(r.n))
		return r, free, err
	}
	r.data, free = buffer(r.n)
	_, err = io.ReadFull(c.in, r.data)
	return r, free, err
}

// allowed are the flags that each command knows.
var allowed = map[uint16]uint16{
	nbd.CmdRead: nbd.CmdFlagFUA | nbd.CmdFlagDF, nbd.CmdWrite: nbd.CmdFlagFUA, nbd.CmdFlush: nbd.CmdFlagFUA, nbd.CmdTrim: nbd.CmdFlagFUA,
	nbd.CmdCache: nbd.CmdFlagFUA, nbd.CmdWriteZeroes: nbd.CmdFlagFUA | nbd.CmdFlagNoHole, nbd.CmdBlockStatus: nbd.CmdFlagFUA | nbd.CmdFlagReqOne,
}

// check gives the error for a request that must not be done; 0 for none.
func (c *connection) check(r request) uint32 {
	flags, known := allowed[r.cmd]
	size := uint64(c.export.Device.Size())
	beyond := r.off > size || uint64(r.n) > size-r.off
	writes := r.cmd == nbd.CmdWrite || r.cmd == nbd.CmdWriteZeroes || r.cmd == nbd.CmdTrim
	smallest := uint64(max(c.export.BlockSize, 1))
	switch {
	case !known || r.flags&^flags != 0:
		return nbd.EINVAL
	case r.cmd == nbd.CmdFlush:
		return 0
	case writes && c.export.ReadOnly:
		return nbd.EPERM
	case (r.cmd == nbd.CmdRead || r.cmd == nbd.CmdWrite) && r.n > payloadMax:
		return nbd.EOVERFLOW
	case beyond && (r.cmd == nbd.CmdWrite || r.cmd == nbd.CmdWriteZeroes):
		return nbd.ENOSPC
	case beyond, r.n == 0, (r.off|uint64(r.n))&(smallest-1) != 0:
		return nbd.EINVAL
	case r.cmd == nbd.CmdBlockStatus && !c.allocation:
		return nbd.EINVAL
	}
	return 0
}

func (c *connection) do(r request) error {
	if code := c.check(r); code != 0 {
		return c.fail(r, code)
	}
	at := block.Range{Off: int64(r.off), Len: int64(r.n)}
	dev := c.export.Device
	var err error
	switch r.cmd {
	case nbd.CmdRead:
		return c.read(r, at)
	case nbd.CmdBlockStatus:
		return c.status(r, at)
	case nbd.CmdWrite:
		_, err = dev.WriteAt(r.data, at.Off)
	case nbd.CmdTrim:
		if d, ok := dev.(block.Discarder); ok {
			err = d.Discard(at)
		}
	case nbd.CmdWriteZeroes:
		err = zero(dev, at)
	case nbd.CmdFlush:
		err = dev.Flush()
	}
	if err == nil && r.flags&nbd.CmdFlagFUA != 0 && r.cmd != nbd.CmdCache {
		err = dev.Flush()
	}
	if err != nil {
		return c.fail(r, errno(err))
	}
	return c.done(r)
}

func zero(dev block.Device, r block.Range) error {
	if z, ok := dev.(block.Zeroer); ok {
		return z.WriteZeroes(r)
	}
	b := make([]byte, min(r.Len, 1<<20))
	for r.Len > 0 {
		n, err := dev.WriteAt(b[:min(r.Len, int64(len(b)))], r.Off)
		if err != nil {
			return err
		}
		r.Off, r.Len = r.Off+int64(n), r.Len-int64(n)
	}
	return nil
}

// errno is the one place where errors become the protocol's.
func errno(err error) uint32 {
	switch {
	case errors.Is(err, block.ErrReadOnly):
		return nbd.EPERM
	case errors.Is(err, block.ErrBounds):
		return nbd.EINVAL
	case errors.Is(err, syscall.ENOSPC):
		return nbd.ENOSPC
	}
	return nbd.EIO
}

func (c *connection) write(parts ...[]byte) error {
	c.out.Lock()
	defer c.out.Unlock()
	b := net.Buffers(parts)
	_, err := b.WriteTo(c.conn)
	return err
}

func simple(cookie uint64, code uint32) []byte {
	h := be.AppendUint32(make([]byte, 0, 16), nbd.SimpleMagic)
	return be.AppendUint64(be.AppendUint32(h, code), cookie)
}

func chunk(cookie uint64, flags, kind uint16, n int) []byte {
	h := be.AppendUint32(make([]byte, 0, 40), nbd.StructuredMagic)
	h = be.AppendUint64(be.AppendUint16(be.AppendUint16(h, flags), kind), cookie)
	return be.AppendUint32(h, uint32(n))
}

func (c *connection) done(r request) error {
	if c.structured {
		return c.write(chunk(r.cookie, nbd.ReplyFlagDone, nbd.ReplyNone, 0))
	}
	return c.write(simple(r.cookie, 0))
}

func (c *connection) fail(r request, code uint32) error {
	if !c.structured {
		return c.write(simple(r.cookie, code))
	}
	h := chunk(r.cookie, nbd.ReplyFlagDone, nbd.ReplyError, 6)
	return c.write(be.AppendUint16(be.AppendUint32(h, code), 0))
}

// extents gives what is known of a range; all data where nothing is.
func (c *connection) extents(r block.Range) ([]block.Extent, error) {
	if m, ok := c.export.Device.(block.Mapper); ok {
		return m.Extents(r)
	}
	return []block.Extent{{Range: r, State: block.Data}}, nil
}

func (c *connection) read(r request, at block.Range) error {
	b, free := buffer(r.n)
	defer free()
	if !c.structured {
		if _, err := readFull(c.export.Device, b, at.Off); err != nil {
			return c.fail(r, errno(err))
		}
		return c.write(simple(r.cookie, 0), b)
	}
	// Zeroes travel as holes, unless the client wants one piece.
	if extents, err := c.extents(at); err == nil && len(extents) == 1 && extents[0].State == block.Zero && extents[0].Len == at.Len {
		h := chunk(r.cookie, nbd.ReplyFlagDone, nbd.ReplyOffsetHole, 12)
		return c.write(be.AppendUint32(be.AppendUint64(h, r.off), r.n))
	}
	if _, err := readFull(c.export.Device, b, at.Off); err != nil {
		return c.fail(r, errno(err))
	}
	return c.write(be.AppendUint64(chunk(r.cookie, nbd.ReplyFlagDone, nbd.ReplyOffsetData, 8+len(b)), r.off), b)
}

func readFull(d block.Device, b []byte, off int64) (int, error) {
	n, err := d.ReadAt(b, off)
	if n == len(b) {
		return n, nil
	}
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// statusMax bounds the extents of one answer.
const statusMax = 4096

func (c *connection) status(r request, at block.Range) error {
	extents, err := c.extents(at)
	if err != nil {
		return c.fail(r, errno(err))
	}
	var desc []byte
	for i, e := range extents {
		if i == statusMax || i > 0 && r.flags&nbd.CmdFlagReqOne != 0 {
			break
		}
		state := uint32(0)
		if e.State != block.Data { // what is undefined reads as zeroes from our views
			state = nbd.StateHole | nbd.StateZero
		}
		desc = binary.BigEndian.AppendUint32(desc, uint32(e.Len))
		desc = binary.BigEndian.AppendUint32(desc, state)
	}
	h := chunk(r.cookie, nbd.ReplyFlagDone, nbd.ReplyBlockStatus, 4+len(desc))
	return c.write(be.AppendUint32(h, metaID), desc)
}
