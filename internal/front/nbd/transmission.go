package nbd

import (
	"io"

	"tidemark/internal/abi/nbd"
	"tidemark/internal/block"
)

// request is what a client asks for.
type request struct {
	flags, cmd uint16
	cookie     uint64
	off        uint64
	n          uint32
	buf        []byte // of a read or write
	held       held   // given back when its reply is sent
}

// at is the request's range. It means something once check has passed.
func (r *request) at() block.Range { return block.Range{Off: int64(r.off), Len: int64(r.n)} }

// next reads one request, with its payload. No more come than there is memory for.
func (c *connection) next() (request, error) {
	h, err := c.in.take(nbd.RequestSize)
	if err != nil {
		return request{}, err
	}
	r, err := parse(h)
	if err != nil {
		return r, err
	}
	large := r.n > payloadMax // answered with an error, and a payload skipped
	switch {
	case r.cmd == nbd.CmdWrite && large:
		return r, c.skip(int64(r.n))
	case r.cmd == nbd.CmdWrite, r.cmd == nbd.CmdRead && !large:
		if r.buf, r.held, err = c.hold(r.n); err != nil {
			return r, err
		}
	}
	if r.cmd == nbd.CmdWrite {
		c.in.expect(r.n)
		if err := c.payload(r.buf); err != nil {
			c.release(r.held)
			return r, err
		}
	}
	return r, nil
}

func parse(h []byte) (request, error) {
	if be.Uint32(h) != nbd.RequestMagic {
		return request{}, refused("it sent something else than a request")
	}
	return request{flags: be.Uint16(h[4:]), cmd: be.Uint16(h[6:]), cookie: be.Uint64(h[8:]), off: be.Uint64(h[16:]), n: be.Uint32(h[24:])}, nil
}

// allowed are the flags that each command knows.
var allowed = map[uint16]uint16{
	nbd.CmdRead: nbd.CmdFlagFUA | nbd.CmdFlagDF, nbd.CmdWrite: nbd.CmdFlagFUA, nbd.CmdFlush: nbd.CmdFlagFUA, nbd.CmdTrim: nbd.CmdFlagFUA,
	nbd.CmdCache: nbd.CmdFlagFUA, nbd.CmdWriteZeroes: nbd.CmdFlagFUA | nbd.CmdFlagNoHole | nbd.CmdFlagFastZero,
	nbd.CmdBlockStatus: nbd.CmdFlagFUA | nbd.CmdFlagReqOne,
}

// check gives the error for a request that must not be done; 0 for none.
func (c *connection) check(r *request) uint32 {
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
	case r.cmd == nbd.CmdBlockStatus && len(c.contexts) == 0:
		return nbd.EINVAL
	case r.flags&nbd.CmdFlagFastZero != 0 && !quickZeroes(c.export.Device):
		return nbd.ENOTSUP
	}
	return 0
}

// do has a request done and queues the answer.
func (c *connection) do(r *request) {
	if code := c.check(r); code != 0 {
		c.fail(r, code, "")
		return
	}
	dev := c.export.Device
	var err error
	switch r.cmd {
	case nbd.CmdRead:
		c.read(r)
		return
	case nbd.CmdBlockStatus:
		c.status(r)
		return
	case nbd.CmdWrite:
		err = write(dev, r)
	case nbd.CmdTrim:
		if d, ok := dev.(block.Discarder); ok {
			err = d.Discard(r.at())
		}
	case nbd.CmdWriteZeroes:
		err = zero(dev, r.at())
	case nbd.CmdFlush:
		err = dev.Flush()
	}
	if err == nil && r.flags&nbd.CmdFlagFUA != 0 && (r.cmd == nbd.CmdWriteZeroes || r.cmd == nbd.CmdTrim) {
		err = dev.Flush()
	}
	if err != nil {
		c.fail(r, errno(err), err.Error())
		return
	}
	c.done(r)
}

// write writes, with FUA so that it is stable when it returns.
func write(dev block.Device, r *request) error {
	stable := r.flags&nbd.CmdFlagFUA != 0
	if f, ok := dev.(block.FUAWriter); ok && stable {
		_, err := f.WriteFUA(r.buf, int64(r.off))
		return err
	}
	_, err := dev.WriteAt(r.buf, int64(r.off))
	if err == nil && stable {
		err = dev.Flush()
	}
	return err
}

// cut ends the connection at once.
func (c *connection) cut(err error) {
	c.server.complain("an NBD client was cut off", "client", c.link.raw.RemoteAddr(), "why", err)
	c.cancel()
	c.link.raw.Close()
}

func quickZeroes(dev block.Device) bool {
	_, ok := dev.(block.Zeroer)
	return ok
}

// zeroes is what is written where a device cannot zero by itself. Nobody changes it.
var zeroes = make([]byte, 1<<20)

func zero(dev block.Device, r block.Range) error {
	if z, ok := dev.(block.Zeroer); ok {
		return z.WriteZeroes(r)
	}
	for r.Len > 0 {
		n, err := dev.WriteAt(zeroes[:min(r.Len, int64(len(zeroes)))], r.Off)
		if err != nil {
			return err
		}
		r.Off, r.Len = r.Off+int64(n), r.Len-int64(n)
	}
	return nil
}

func readFull(d block.Device, b []byte, off int64) error {
	n, err := d.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	return err
}
