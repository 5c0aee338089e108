package nbd

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
)

var be = binary.BigEndian

// errRefused is what the log hears of; other ends of a connection are everyday.
var errRefused = errors.New("refused")

func refused(format string, args ...any) error {
	return fmt.Errorf("%w: %w", errRefused, fmt.Errorf(format, args...))
}

// connection is one client. Its reader goroutine owns all fields but those
// below out and what server.mu guards.
type connection struct {
	server *Server
	ctx    context.Context // ends with the connection
	cancel func()
	ended  chan struct{}
	link   *link
	in     *inbox

	tls        *TLS // to be agreed on before all else; nil: the client may not
	secure     bool
	denied     error // why the client must not be served
	told       bool  // the log knows that it speaks no TLS
	noZeroes   bool
	structured bool
	contexts   []metaContext // agreed on, for export metaFor
	metaFor    string

	export Export
	user   bool // of export; guarded by server.mu, as writes of export are

	stranger bool // came through Serve; never changes

	memory *semaphore.Weighted
	slots  chan struct{} // one for each request under way
	busy   sync.WaitGroup
	turns  turns

	out     sync.Mutex // of what follows
	answers []outgoing // to be sent
	spare   []outgoing // what answers is when that is sent
	sending bool       // somebody is at it
	mute    error      // the client takes no answer any more
}

func newConnection(ctx context.Context, s *Server, conn net.Conn) *connection {
	ctx, cancel := context.WithCancel(ctx)
	conn = newSocket(conn)
	l := &link{raw: conn, rw: conn}
	c := &connection{
		server: s, ctx: ctx, cancel: cancel, ended: make(chan struct{}), link: l,
		memory: semaphore.NewWeighted(clientMemory), slots: make(chan struct{}, workers),
	}
	c.turns.slow.Store(slowFirst)
	c.in = newInbox(conn)
	return c
}

// serve greets the client, answers it until it is gone, and forgets it. A
// client that took its leave is no error.
func (c *connection) serve(greet func() error) error {
	defer func() {
		c.link.rw.Close()
		c.cancel()
		c.server.mu.Lock()
		delete(c.server.connections, c)
		c.server.mu.Unlock()
		close(c.ended)
	}()
	stop := context.AfterFunc(c.ctx, c.link.hangUp)
	defer stop()
	c.link.both(handshakeTime)
	err := greet()
	if err == nil {
		c.link.both(0)
		err = c.transmission()
	}
	if errors.Is(err, errRefused) {
		c.server.complain("an NBD client was cut off", "client", c.link.raw.RemoteAddr(), "why", err)
	}
	return err
}

// removed says that the server ended the connection: Remove, or the end of ctx.
func (c *connection) removed() bool {
	_, err := c.server.find(c.export.Name)
	return err != nil
}

// use settles on an export; what was agreed on for another one is void.
func (c *connection) use(e Export) error {
	if !c.structured || c.metaFor != e.Name {
		c.contexts = nil
	}
	c.server.mu.Lock()
	defer c.server.mu.Unlock()
	if _, err := c.server.findLocked(e.Name); err != nil {
		return err // removed in the meantime
	}
	c.export, c.user = e, true
	return nil
}

// link is the client's connection, with a bound on each wait for the client.
type link struct {
	raw net.Conn           // bears the deadlines
	rw  io.ReadWriteCloser // raw, or TLS over it

	bound  time.Time // when the bound of writes was set; of who sends
	pieces [][]byte  // of what is sent; of who sends

	mu    sync.Mutex
	ended bool // deadlines are set for the last time
}

// set sets a deadline from now on, 0 for none, unless the link is to end.
func (l *link) set(deadline func(time.Time) error, d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended {
		return
	}
	at := time.Time{}
	if d > 0 {
		at = time.Now().Add(d)
	}
	_ = deadline(at) // fails where it is closed, as what follows will
}

func (l *link) both(d time.Duration) {
	l.set(l.raw.SetDeadline, d)
	l.bound = time.Time{}
}
func (l *link) reading(d time.Duration) { l.set(l.raw.SetReadDeadline, d) }

// writing bounds a write that begins now. A bound that was set in the last
// second is as good: setting one costs as much as a small write.
func (l *link) writing() {
	if now := time.Now(); now.Sub(l.bound) > time.Second {
		l.bound = now
		l.set(l.raw.SetWriteDeadline, stallTime+time.Second)
	}
}

// hangUp ends reading at once, so that no new request comes, and writing soon.
func (l *link) hangUp() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = true
	_ = errors.Join(l.raw.SetReadDeadline(time.Now()), l.raw.SetWriteDeadline(time.Now().Add(drainTime)))
	if s, ok := l.raw.(*socket); ok {
		s.hangUp()
	}
}

// send writes answers. A client that does not take them in time is an error.
func (l *link) send(answers []outgoing) error {
	size := 0
	add := func(p []byte) error {
		for len(p) > 0 {
			piece := p[:min(len(p), stallBytes-size%stallBytes)]
			p = p[len(piece):]
			l.pieces, size = append(l.pieces, piece), size+len(piece)
			if size%stallBytes == 0 {
				if err := l.flush(); err != nil {
					return err
				}
			}
		}
		return nil
	}
	for i := range answers {
		a := &answers[i]
		if err := add(a.head[:a.n]); err != nil {
			return err
		}
		if err := add(a.data); err != nil {
			return err
		}
		for _, p := range a.more {
			if err := add(p); err != nil {
				return err
			}
		}
	}
	return l.flush()
}

// flush sends the pieces, and forgets them.
func (l *link) flush() error {
	if len(l.pieces) == 0 {
		return nil
	}
	l.writing()
	var err error
	if s, ok := l.rw.(*socket); ok { // one system call
		_, err = s.writeAll(l.pieces)
	} else { // TLS makes a record of each write
		w := bufio.NewWriterSize(l.rw, 16<<10)
		for _, p := range l.pieces {
			_, _ = w.Write(p) // Flush says it
		}
		err = w.Flush()
	}
	clear(l.pieces)
	l.pieces = l.pieces[:0]
	if err != nil && timedOut(err) {
		return refused("it takes no reply: %w", err)
	}
	return err
}

func timedOut(err error) bool {
	timeout, ok := errors.AsType[net.Error](err)
	return ok && timeout.Timeout()
}

// payload fills b from the client. One that stops in the middle is an error.
func (c *connection) payload(b []byte) error {
	if len(b) > c.in.buffered() {
		defer c.link.reading(0)
	}
	for len(b) > 0 {
		n := min(len(b), stallBytes)
		if n > c.in.buffered() {
			c.link.reading(stallTime)
		}
		if _, err := io.ReadFull(c.in, b[:n]); err != nil {
			return stalled(err)
		}
		b = b[n:]
	}
	return nil
}

// skip reads n bytes from the client and forgets them.
func (c *connection) skip(n int64) error {
	defer c.link.reading(0)
	for n > 0 {
		c.link.reading(stallTime)
		some, err := io.CopyN(io.Discard, c.in, min(n, stallBytes))
		if err != nil {
			return stalled(err)
		}
		n -= some
	}
	return nil
}

func stalled(err error) error {
	if timedOut(err) {
		return refused("it stopped in the middle of a request: %w", err)
	}
	return err
}

// held is what a request holds until its reply is sent.
type held struct {
	buf  *[]byte // of pool
	pool int
	slot bool
}

// hold takes a buffer of n bytes when there is room for one more among the
// connection's and the server's; release gives it back.
func (c *connection) hold(n uint32) ([]byte, held, error) {
	i, size := 0, int64(poolSmallest)
	for size < int64(n) {
		i, size = i+1, size*2
	}
	if err := c.take(c.memory, size); err != nil {
		return nil, held{}, err
	}
	if err := c.take(c.server.memory, size); err != nil {
		c.memory.Release(size)
		return nil, held{}, err
	}
	p, ok := c.server.pools[i].Get().(*[]byte)
	if !ok {
		fresh := make([]byte, size)
		p = &fresh
	}
	return (*p)[:n], held{buf: p, pool: i}, nil
}

// release gives back what a request holds.
func (c *connection) release(h held) {
	if h.buf != nil {
		size := int64(poolSmallest) << h.pool
		c.server.pools[h.pool].Put(h.buf)
		c.server.memory.Release(size)
		c.memory.Release(size)
	}
	if h.slot {
		<-c.slots
	}
}

// take waits for room; answers that hold some go first.
func (c *connection) take(room *semaphore.Weighted, size int64) error {
	if room.TryAcquire(size) {
		return nil
	}
	if err := c.flush(); err != nil {
		return err
	}
	return room.Acquire(c.ctx, size)
}
