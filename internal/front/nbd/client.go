package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"
	"sync"
	"time"

	abi "tidemark/internal/abi/nbd"
)

// ErrAnswer: the server answered a request with an error.
var ErrAnswer = errors.New("the NBD server answered with an error")

// Client is a plain client for what needs no more than that: one request at a
// time, without TLS. Its methods may be called concurrently. After an error
// that is not ErrAnswer it is of no use any more.
type Client struct {
	mu   sync.Mutex
	conn net.Conn
	size int64
	wait time.Duration
}

// requestMax is what servers take in one request for sure, in bytes.
const requestMax = 32 << 20

// Dial connects to an export by its URI, nbd://HOST:PORT/NAME or
// nbd+unix:///NAME?socket=PATH. wait bounds that, and each request.
func Dial(uri string, wait time.Duration) (*Client, error) {
	u, err := url.Parse(uri)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrURI, err)
	}
	network, address := "tcp", u.Host
	switch u.Scheme {
	case "nbd":
	case "nbd+unix":
		network, address = "unix", u.Query().Get("socket")
	default:
		return nil, fmt.Errorf("%q: %w: want nbd or nbd+unix", uri, ErrURI)
	}
	conn, err := net.DialTimeout(network, address, wait)
	if err != nil {
		return nil, err
	}
	c := &Client{conn: conn, wait: wait}
	if err := c.shake(strings.TrimPrefix(u.Path, "/")); err != nil {
		conn.Close()
		return nil, fmt.Errorf("%s: %w", uri, err)
	}
	return c, nil
}

func (c *Client) shake(export string) error {
	if err := c.conn.SetDeadline(time.Now().Add(c.wait)); err != nil {
		return err
	}
	var hello [18]byte
	if _, err := io.ReadFull(c.conn, hello[:]); err != nil {
		return err
	}
	be := binary.BigEndian
	if be.Uint64(hello[:]) != abi.Magic || be.Uint64(hello[8:]) != abi.OptionMagic {
		return fmt.Errorf("%w: it is no NBD server", ErrAnswer)
	}
	flags := uint32(abi.FlagFixed | abi.FlagNoZeroes)
	b := be.AppendUint32(nil, flags&uint32(be.Uint16(hello[16:])))
	b = be.AppendUint64(b, abi.OptionMagic)
	b = be.AppendUint32(b, abi.OptExportName)
	b = be.AppendUint32(b, uint32(len(export)))
	if _, err := c.conn.Write(append(b, export...)); err != nil {
		return err
	}
	answer := make([]byte, 10)
	if be.Uint16(hello[16:])&abi.FlagNoZeroes == 0 {
		answer = make([]byte, 10+124)
	}
	if _, err := io.ReadFull(c.conn, answer); err != nil {
		return fmt.Errorf("export %q: %w", export, err)
	}
	c.size = int64(be.Uint64(answer))
	return nil
}

// Size is the export's when it was dialed, in bytes.
func (c *Client) Size() int64 { return c.size }

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// ReadAt fills p.
func (c *Client) ReadAt(p []byte, off int64) (int, error) {
	return c.inParts(p, off, func(part []byte, at int64) error { return c.do(abi.CmdRead, at, len(part), nil, part) })
}

// WriteAt writes all of p.
func (c *Client) WriteAt(p []byte, off int64) (int, error) {
	return c.inParts(p, off, func(part []byte, at int64) error { return c.do(abi.CmdWrite, at, len(part), part, nil) })
}

// Flush makes what was written before stable.
func (c *Client) Flush() error { return c.do(abi.CmdFlush, 0, 0, nil, nil) }

// Zero makes n bytes read as zeroes.
func (c *Client) Zero(off int64, n int) error { return c.do(abi.CmdWriteZeroes, off, n, nil, nil) }

func (c *Client) inParts(p []byte, off int64, do func(part []byte, at int64) error) (int, error) {
	done := 0
	for done < len(p) {
		part := p[done:min(len(p), done+requestMax)]
		if err := do(part, off+int64(done)); err != nil {
			return done, err
		}
		done += len(part)
	}
	return done, nil
}

func (c *Client) do(kind uint16, off int64, n int, out, in []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.conn.SetDeadline(time.Now().Add(c.wait)); err != nil {
		return err
	}
	be := binary.BigEndian
	b := be.AppendUint32(nil, abi.RequestMagic)
	b = be.AppendUint16(b, 0)
	b = be.AppendUint16(b, kind)
	b = be.AppendUint64(b, 1)
	b = be.AppendUint64(b, uint64(off))
	b = be.AppendUint32(b, uint32(n))
	if _, err := c.conn.Write(append(b, out...)); err != nil {
		return err
	}
	var reply [16]byte
	if _, err := io.ReadFull(c.conn, reply[:]); err != nil {
		return err
	}
	if be.Uint32(reply[:]) != abi.SimpleMagic {
		return fmt.Errorf("reply %x: no simple reply", reply)
	}
	if code := be.Uint32(reply[4:]); code != 0 {
		return fmt.Errorf("%w: %d", ErrAnswer, code)
	}
	_, err := io.ReadFull(c.conn, in)
	return err
}
