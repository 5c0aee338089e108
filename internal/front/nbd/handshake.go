package nbd

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"tidemark/internal/abi/nbd"
)

var errEnd = errors.New("the client is done")

// handshake agrees with the client on an export.
func (c *connection) handshake() error {
	if err := c.say(uint64(nbd.Magic), uint64(nbd.OptionMagic), uint16(nbd.FlagFixed|nbd.FlagNoZeroes)); err != nil {
		return err
	}
	var flags [4]byte
	if _, err := io.ReadFull(c.in, flags[:]); err != nil {
		return err
	}
	f := be.Uint32(flags[:])
	if f&nbd.FlagFixed == 0 || f&^(nbd.FlagFixed|nbd.FlagNoZeroes) != 0 {
		return refused("its flags %#x are not those of the fixed newstyle handshake", f)
	}
	c.noZeroes = f&nbd.FlagNoZeroes != 0
	for range optionsMax {
		done, err := c.option()
		if done || err != nil {
			return err
		}
	}
	return refused("it sent more than %d options", optionsMax)
}

// option answers one option; done says that an export is agreed on.
func (c *connection) option() (done bool, err error) {
	var head [16]byte
	if _, err := io.ReadFull(c.in, head[:]); err != nil {
		return false, err
	}
	opt, n := be.Uint32(head[8:]), be.Uint32(head[12:])
	if be.Uint64(head[:]) != nbd.OptionMagic {
		return false, refused("it sent something else than an option")
	}
	if n > optionMax {
		if n > payloadMax {
			return false, refused("it sent an option of %d bytes", n)
		}
		if _, err := io.CopyN(io.Discard, c.in, int64(n)); err != nil {
			return false, err
		}
		return false, c.reply(opt, nbd.RepErrTooBig, "the option is too long")
	}
	data := make([]byte, n)
	if _, err := io.ReadFull(c.in, data); err != nil {
		return false, err
	}
	if opt != nbd.OptAbort && (c.denied != nil || c.tls != nil && !c.secure && opt != nbd.OptStartTLS) {
		return false, c.turnAway(opt)
	}
	switch opt {
	case nbd.OptExportName:
		return true, c.exportName(string(data))
	case nbd.OptAbort:
		return false, errors.Join(c.reply(opt, nbd.RepAck), errEnd)
	case nbd.OptList:
		return false, c.list(data)
	case nbd.OptStartTLS:
		return false, c.startTLS(data)
	case nbd.OptInfo, nbd.OptGo:
		return c.info(opt, data)
	case nbd.OptStructured:
		if len(data) != 0 {
			return false, c.reply(opt, nbd.RepErrInvalid, "this option has no data")
		}
		c.structured = true
		return false, c.reply(opt, nbd.RepAck)
	case nbd.OptListMeta, nbd.OptSetMeta:
		return false, c.meta(opt, data)
	}
	return false, c.reply(opt, nbd.RepErrUnsup, "unknown option")
}

// say sends numbers, bytes and strings; the handshake's own time limit holds.
func (c *connection) say(parts ...any) error {
	var b []byte
	for _, p := range parts {
		switch v := p.(type) {
		case string:
			b = append(b, v...)
		default:
			var err error
			if b, err = binary.Append(b, be, v); err != nil {
				return err
			}
		}
	}
	_, err := c.link.rw.Write(b)
	return err
}

func (c *connection) reply(opt uint32, kind uint32, data ...any) error {
	n := 0
	for _, d := range data {
		switch v := d.(type) {
		case string:
			n += len(v)
		default:
			n += binary.Size(v)
		}
	}
	return c.say(append([]any{uint64(nbd.OptReplyMagic), opt, kind, uint32(n)}, data...)...)
}

// turnAway answers a client that is not to be served, whatever it asks for.
func (c *connection) turnAway(opt uint32) error {
	switch {
	case opt == nbd.OptExportName: // knows no error
		return refused("it asks for an export, and may not")
	case c.denied != nil:
		return c.reply(opt, nbd.RepErrPolicy, c.denied.Error())
	case !c.told:
		c.told = true
		c.server.complain("an NBD client has to speak TLS first", "client", c.link.raw.RemoteAddr())
	}
	return c.reply(opt, nbd.RepErrTLSReqd, "this server speaks TLS only: give the client its certificates, and an nbds:// or nbds+unix:// URI")
}

// startTLS goes on in TLS, with a client that has a certificate of ours.
func (c *connection) startTLS(data []byte) error {
	switch {
	case len(data) != 0:
		return c.reply(nbd.OptStartTLS, nbd.RepErrInvalid, "this option has no data")
	case c.secure:
		return c.reply(nbd.OptStartTLS, nbd.RepErrInvalid, "TLS is spoken already")
	case c.tls == nil:
		return c.reply(nbd.OptStartTLS, nbd.RepErrPolicy, "this server speaks no TLS here: use an nbd:// or nbd+unix:// URI")
	case c.in.buffered() > 0: // what anybody could have put in must not count as said in TLS
		return refused("it went on in the clear after it asked for TLS")
	}
	if err := c.reply(nbd.OptStartTLS, nbd.RepAck); err != nil {
		return err
	}
	id, err := c.tls.read()
	if err != nil {
		return refused("%w", err)
	}
	conn := tls.Server(c.link.raw, id.config())
	if err := conn.HandshakeContext(c.ctx); err != nil {
		return refused("TLS: %w (if it does not trust this server: is the server's certificate signed by the CA that the client has?)", err)
	}
	if c.denied = id.admit(conn.ConnectionState().PeerCertificates); c.denied != nil {
		c.server.complain("an NBD client was refused", "client", c.link.raw.RemoteAddr(), "why", c.denied)
	}
	c.link.rw, c.secure = conn, true
	c.in.reset(conn)
	return nil
}

func (c *connection) exportName(name string) error {
	e, err := c.server.find(name)
	if err != nil {
		return refused("%w", err) // this option knows no error: the connection ends
	}
	if err := c.use(e); err != nil {
		return err
	}
	var pad [124]byte
	if c.noZeroes {
		return c.say(uint64(e.Device.Size()), e.flags(c.structured))
	}
	return c.say(uint64(e.Device.Size()), e.flags(c.structured), pad)
}

func (e Export) flags(structured bool) uint16 {
	f := nbd.HasFlags | nbd.SendFlush | nbd.SendFUA | nbd.CanMultiConn | nbd.SendCache
	if structured {
		f |= nbd.SendDF
	}
	if e.ReadOnly {
		return uint16(f | nbd.ReadOnly)
	}
	return uint16(f | nbd.SendTrim | nbd.SendWriteZeroes | nbd.SendFastZero)
}

func (c *connection) list(data []byte) error {
	if len(data) != 0 {
		return c.reply(nbd.OptList, nbd.RepErrInvalid, "this option has no data")
	}
	for _, e := range c.server.list() {
		if err := c.reply(nbd.OptList, nbd.RepServer, uint32(len(e.Name)), e.Name, e.Description); err != nil {
			return err
		}
	}
	return c.reply(nbd.OptList, nbd.RepAck)
}

// str takes a string with its length before it off data.
func str(data []byte) (s string, rest []byte, ok bool) {
	if len(data) < 4 {
		return "", nil, false
	}
	n := be.Uint32(data)
	if uint64(n) > uint64(len(data)-4) {
		return "", nil, false
	}
	return string(data[4 : 4+n]), data[4+n:], true
}

// info answers NBD_OPT_INFO and NBD_OPT_GO, with everything that there is to know.
func (c *connection) info(opt uint32, data []byte) (bool, error) {
	name, rest, ok := str(data)
	if !ok || len(rest) < 2 || len(rest) != 2+2*int(be.Uint16(rest)) {
		return false, c.reply(opt, nbd.RepErrInvalid, "the option's lengths do not fit")
	}
	e, err := c.server.find(name)
	if err == nil && opt == nbd.OptGo {
		err = c.use(e)
	}
	if err != nil {
		return false, c.reply(opt, nbd.RepErrUnknown, err.Error())
	}
	smallest := uint32(max(e.BlockSize, 1))
	err = errors.Join(
		c.reply(opt, nbd.RepInfo, uint16(nbd.InfoExport), uint64(e.Device.Size()), e.flags(c.structured)),
		c.reply(opt, nbd.RepInfo, uint16(nbd.InfoName), e.Name),
		c.reply(opt, nbd.RepInfo, uint16(nbd.InfoDesc), e.Description),
		c.reply(opt, nbd.RepInfo, uint16(nbd.InfoBlockSize), smallest, max(smallest, 4096), uint32(payloadMax)),
		c.reply(opt, nbd.RepAck))
	if err != nil {
		return false, fmt.Errorf("answering option %d: %w", opt, err)
	}
	return opt == nbd.OptGo, nil
}
