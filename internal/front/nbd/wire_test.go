package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"tidemark/internal/abi/nbd"
	"tidemark/internal/block"
)

// memory is a device in memory that knows its zeroes.
type memory struct {
	mu sync.RWMutex
	b  []byte
}

func newMemory(size int) *memory { return &memory{b: make([]byte, size)} }

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	n := copy(p, m.b[min(off, int64(len(m.b))):])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return copy(m.b[off:], p), nil
}

func (m *memory) Flush() error { return nil }

func (m *memory) Size() int64 {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return int64(len(m.b))
}

func (m *memory) resize(size int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b := make([]byte, size)
	copy(b, m.b)
	m.b = b
}

func (m *memory) Extents(r block.Range) ([]block.Extent, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if err := block.CheckBounds(r, int64(len(m.b))); err != nil {
		return nil, err
	}
	var out []block.Extent
	for off := r.Off; off < r.End(); {
		end := min(off&^511+512, r.End())
		state := block.Data
		if bytes.Equal(m.b[off:end], zeroes[:end-off]) {
			state = block.Zero
		}
		out = append(out, block.Extent{Range: block.Range{Off: off, Len: end - off}, State: state})
		off = end
	}
	return out, nil
}

// stripes is a change map: every other step bytes have changed.
type stripes int64

func (s stripes) Run(r block.Range) (int64, bool, error) {
	return min(r.Len, int64(s)-r.Off%int64(s)), r.Off/int64(s)%2 == 1, nil
}

// client speaks the protocol word by word, right or wrong.
type client struct {
	t    testing.TB
	conn net.Conn
}

// optionReply is one reply to an option.
type optionReply struct {
	kind uint32
	data []byte
}

func (c *client) send(parts ...any) {
	c.t.Helper()
	if err := c.trySend(parts...); err != nil {
		c.t.Fatalf("sending: %v", err)
	}
}

func (c *client) trySend(parts ...any) error {
	var b []byte
	for _, p := range parts {
		if s, ok := p.(string); ok {
			p = []byte(s)
		}
		var err error
		if b, err = binary.Append(b, be, p); err != nil {
			return err
		}
	}
	_, err := c.conn.Write(b)
	return err
}

func (c *client) recv(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(c.conn, b); err != nil {
		c.t.Fatalf("receiving %d bytes: %v", n, err)
	}
	return b
}

// closed checks that the server hung up, whatever else it still sends.
func (c *client) closed() {
	c.t.Helper()
	_, err := io.Copy(io.Discard, c.conn)
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		c.t.Fatal("the server keeps the connection")
	}
}

func connect(t testing.TB, l net.Addr) *client {
	t.Helper()
	conn, err := net.Dial(l.Network(), l.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	return &client{t, conn}
}

// greet goes through the greeting.
func greet(t testing.TB, l net.Addr) *client {
	t.Helper()
	c := connect(t, l)
	c.hello()
	return c
}

func (c *client) hello() {
	c.t.Helper()
	if b := c.recv(18); !bytes.Equal(b, []byte("NBDMAGICIHAVEOPT\x00\x03")) {
		c.t.Fatalf("greeting %q", b)
	}
	c.send(uint32(3))
}

func (c *client) option(opt uint32, data string) []optionReply {
	c.t.Helper()
	c.send("IHAVEOPT", opt, uint32(len(data)), data)
	return c.replies(opt)
}

// replies reads up to the reply that ends them.
func (c *client) replies(opt uint32) []optionReply {
	c.t.Helper()
	var all []optionReply
	for {
		h := c.recv(20)
		if be.Uint64(h) != nbd.OptReplyMagic || be.Uint32(h[8:]) != opt {
			c.t.Fatalf("reply head %x to option %d", h, opt)
		}
		r := optionReply{be.Uint32(h[12:]), c.recv(int(be.Uint32(h[16:])))}
		all = append(all, r)
		if r.kind == nbd.RepAck || r.kind >= 1<<31 {
			return all
		}
	}
}

func last(all []optionReply) uint32 { return all[len(all)-1].kind }

func text(s string) string { return string(be.AppendUint32(nil, uint32(len(s)))) + s }

// enter agrees on an export, with structured replies and contexts.
func (c *client) enter(name string, contexts ...string) {
	c.t.Helper()
	if k := last(c.option(nbd.OptStructured, "")); k != nbd.RepAck {
		c.t.Fatalf("structured replies: %#x", k)
	}
	if len(contexts) > 0 {
		q := text(name) + string(be.AppendUint32(nil, uint32(len(contexts))))
		for _, m := range contexts {
			q += text(m)
		}
		if k := last(c.option(nbd.OptSetMeta, q)); k != nbd.RepAck {
			c.t.Fatalf("contexts: %#x", k)
		}
	}
	if k := last(c.option(nbd.OptGo, text(name)+"\x00\x00")); k != nbd.RepAck {
		c.t.Fatalf("go: %#x", k)
	}
}

// header is a request at offset 0.
func header(cmd uint16, n uint32) []byte {
	b := be.AppendUint16(be.AppendUint32(nil, nbd.RequestMagic), 0)
	return be.AppendUint32(append(be.AppendUint16(b, cmd), make([]byte, 16)...), n)
}

func (c *client) request(flags, cmd uint16, cookie, off uint64, n uint32, payload ...any) {
	c.t.Helper()
	c.send(append([]any{uint32(nbd.RequestMagic), flags, cmd, cookie, off, n}, payload...)...)
}

// answer is a whole structured reply.
type answer struct {
	cookie uint64
	code   uint32
	why    string
	data   map[uint64][]byte
	holes  map[uint64]uint32
	status map[uint32][]descriptor // by context
}

// readAnswer reads one structured reply and checks its form.
func readAnswer(r io.Reader) (*answer, error) {
	a := &answer{data: map[uint64][]byte{}, holes: map[uint64]uint32{}, status: map[uint32][]descriptor{}}
	for first := true; ; first = false {
		var h [20]byte
		if _, err := io.ReadFull(r, h[:]); err != nil {
			return nil, err
		}
		flags, kind, cookie, n := be.Uint16(h[4:]), be.Uint16(h[6:]), be.Uint64(h[8:]), be.Uint32(h[16:])
		if be.Uint32(h[:]) != nbd.StructuredMagic || flags > 1 || n > payloadMax+8 || !first && cookie != a.cookie {
			return nil, fmt.Errorf("a chunk begins with %x", h)
		}
		a.cookie = cookie
		b := make([]byte, n)
		if _, err := io.ReadFull(r, b); err != nil {
			return nil, err
		}
		if err := a.chunk(kind, b); err != nil {
			return nil, err
		}
		if flags&nbd.ReplyFlagDone != 0 {
			return a, nil
		}
	}
}

func (a *answer) chunk(kind uint16, b []byte) error {
	switch {
	case kind == nbd.ReplyNone && len(b) == 0:
	case kind == nbd.ReplyOffsetData && len(b) > 8:
		a.data[be.Uint64(b)] = b[8:]
	case kind == nbd.ReplyOffsetHole && len(b) == 12 && be.Uint32(b[8:]) > 0:
		a.holes[be.Uint64(b)] = be.Uint32(b[8:])
	case kind == nbd.ReplyBlockStatus && len(b) >= 12 && len(b)%8 == 4:
		id := be.Uint32(b)
		for b = b[4:]; len(b) > 0; b = b[8:] {
			a.status[id] = append(a.status[id], descriptor{be.Uint32(b), be.Uint32(b[4:])})
		}
	case kind == nbd.ReplyError && len(b) >= 6 && int(be.Uint16(b[4:])) == len(b)-6 && be.Uint32(b) != 0:
		a.code, a.why = be.Uint32(b), string(b[6:])
	default:
		return fmt.Errorf("a chunk of kind %d and %d bytes", kind, len(b))
	}
	return nil
}

func (c *client) answer(cookie uint64) *answer {
	c.t.Helper()
	a, err := readAnswer(c.conn)
	if err != nil {
		c.t.Fatal(err)
	}
	if a.cookie != cookie {
		c.t.Fatalf("an answer to %d instead of %d", a.cookie, cookie)
	}
	return a
}

// works checks that the client still gets its answers.
func (c *client) works() {
	c.t.Helper()
	c.request(0, nbd.CmdRead, 77, 0, 512)
	if a := c.answer(77); a.code != 0 || len(a.data[0]) != 512 {
		c.t.Errorf("a plain read: %+v", a)
	}
}

// pipes is a listener in memory.
type pipes struct {
	conns chan net.Conn
	once  sync.Once
	end   chan struct{}
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), end: make(chan struct{})} }

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.end:
		return nil, net.ErrClosed
	}
}
func (p *pipes) Close() error   { p.once.Do(func() { close(p.end) }); return nil }
func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "unix"} }

func (p *pipes) dial(t testing.TB) *client {
	ours, theirs := net.Pipe()
	p.conns <- theirs
	return &client{t, ours}
}

// run serves at a listener until the returned function is called.
func run(s *Server, l net.Listener) (end func() error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, &Listener{Listener: l}) }()
	return func() error { cancel(); return <-done }
}
