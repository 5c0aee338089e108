package nbd

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"tidemark/internal/abi/nbd"
)

var be = binary.BigEndian

var errEnd = errors.New("the client is done")

// connection is one client.
type connection struct {
	server     *Server
	conn       net.Conn
	in         *bufio.Reader
	export     Export
	structured bool
	allocation bool // base:allocation was agreed on
	metaFor    string
	noZeroes   bool

	out  sync.Mutex // one reply at a time
	busy sync.WaitGroup
}

func (c *connection) serve() {
	c.in = bufio.NewReaderSize(c.conn, 64<<10)
	if err := c.conn.SetDeadline(time.Now().Add(handshakeTime)); err != nil {
		return
	}
	if err := c.handshake(); err != nil {
		return // the client went away, or was told in the reply to its option
	}
	if err := c.conn.SetDeadline(time.Time{}); err != nil {
		return
	}
	c.transmission()
}

func (c *connection) send(parts ...any) error {
	var b []byte
	for _, p := range parts {
		switch v := p.(type) {
		case []byte:
			b = append(b, v...)
		case string:
			b = append(b, v...)
		default:
			var err error
			if b, err = binary.Append(b, be, v); err != nil {
				return err
			}
		}
	}
	_, err := c.conn.Write(b)
	return err
}

func (c *connection) handshake() error {
	if err := c.send(uint64(nbd.Magic), uint64(nbd.OptionMagic), uint16(nbd.FlagFixed|nbd.FlagNoZeroes)); err != nil {
		return err
	}
	var flags [4]byte
	if _, err := io.ReadFull(c.in, flags[:]); err != nil {
		return err
	}
	f := be.Uint32(flags[:])
	if f&nbd.FlagFixed == 0 || f&^(nbd.FlagFixed|nbd.FlagNoZeroes) != 0 {
		return fmt.Errorf("client flags %#x", f)
	}
	c.noZeroes = f&nbd.FlagNoZeroes != 0
	for range optionsMax {
		done, err := c.option()
		if done || err != nil {
			return err
		}
	}
	return errors.New("too many options")
}

func (c *connection) option() (done bool, err error) {
	var head [16]byte
	if _, err := io.ReadFull(c.in, head[:]); err != nil {
		return false, err
	}
	opt, n := be.Uint32(head[8:]), be.Uint32(head[12:])
	if be.Uint64(head[:]) != nbd.OptionMagic {
		return false, errors.New("not an option")
	}
	if n > optionMax {
		if n > payloadMax {
			return false, errors.New("an option beyond all bounds")
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
	switch opt {
	case nbd.OptExportName:
		return true, c.exportName(string(data))
	case nbd.OptAbort:
		return false, errors.Join(c.reply(opt, nbd.RepAck), errEnd)
	case nbd.OptList:
		return false, c.list(data)
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
	return c.send(append([]any{uint64(nbd.OptReplyMagic), opt, kind, uint32(n)}, data...)...)
}

func (c *connection) exportName(name string) error {
	e, err := c.server.find(name)
	if err != nil {
		return err // this option knows no error: the connection ends
	}
	c.use(e)
	pad := make([]byte, 124)
	if c.noZeroes {
		pad = nil
	}
	return c.send(uint64(e.Device.Size()), c.flags(e), pad)
}

// use settles on an export; what was agreed on for another one is void.
func (c *connection) use(e Export) {
	c.export = e
	c.allocation = c.allocation && c.structured && c.metaFor == e.Name
}

func (c *connection) flags(e Export) uint16 {
	f := nbd.HasFlags | nbd.SendFlush | nbd.SendFUA | nbd.CanMultiConn | nbd.SendCache
	if c.structured {
		f |= nbd.SendDF
	}
	if e.ReadOnly {
		return uint16(f | nbd.ReadOnly)
	}
	return uint16(f | nbd.SendTrim | nbd.SendWriteZeroes)
}

func (c *connection) list(data []byte) error {
	if len(data) != 0 {
		return c.reply(nbd.OptList, nbd.RepErrInvalid, "this option has no data")
	}
	for _, e := range c.server.Exports {
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

func (c *connection) info(opt uint32, data []byte) (bool, error) {
	name, rest, ok := str(data)
	if !ok || len(rest) < 2 || len(rest) != 2+2*int(be.Uint16(rest)) {
		return false, c.reply(opt, nbd.RepErrInvalid, "the option's lengths do not fit")
	}
	e, err := c.server.find(name)
	if err != nil {
		return false, c.reply(opt, nbd.RepErrUnknown, err.Error())
	}
	smallest := uint32(max(e.BlockSize, 1))
	err = errors.Join(
		c.reply(opt, nbd.RepInfo, uint16(nbd.InfoExport), uint64(e.Device.Size()), c.flags(e)),
		c.reply(opt, nbd.RepInfo, uint16(nbd.InfoName), e.Name),
		c.reply(opt, nbd.RepInfo, uint16(nbd.InfoDesc), e.Description),
		c.reply(opt, nbd.RepInfo, uint16(nbd.InfoBlockSize), smallest, max(smallest, 4096), uint32(payloadMax)),
		c.reply(opt, nbd.RepAck))
	if opt == nbd.OptGo {
		c.use(e)
	}
	return opt == nbd.OptGo, err
}

// metaID is the only context that there is.
const metaID = 1

func (c *connection) meta(opt uint32, data []byte) error {
	if !c.structured {
		return c.reply(opt, nbd.RepErrInvalid, "ask for structured replies first")
	}
	name, rest, ok := str(data)
	if !ok || len(rest) < 4 {
		return c.reply(opt, nbd.RepErrInvalid, "the option's lengths do not fit")
	}
	queries := be.Uint32(rest)
	rest = rest[4:]
	wanted := opt == nbd.OptListMeta && queries == 0
	for range queries {
		var q string
		if q, rest, ok = str(rest); !ok {
			return c.reply(opt, nbd.RepErrInvalid, "the option's lengths do not fit")
		}
		wanted = wanted || q == nbd.BaseAllocation || opt == nbd.OptListMeta && strings.HasPrefix(nbd.BaseAllocation, q) && strings.HasSuffix(q, ":")
	}
	if len(rest) != 0 {
		return c.reply(opt, nbd.RepErrInvalid, "the option's lengths do not fit")
	}
	e, err := c.server.find(name)
	if err != nil {
		return c.reply(opt, nbd.RepErrUnknown, err.Error())
	}
	id := uint32(0)
	if opt == nbd.OptSetMeta {
		c.allocation, c.metaFor, id = wanted, e.Name, metaID
	}
	if wanted {
		if err := c.reply(opt, nbd.RepMetaContext, id, nbd.BaseAllocation); err != nil {
			return err
		}
	}
	return c.reply(opt, nbd.RepAck)
}
