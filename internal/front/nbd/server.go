// Package nbd serves block devices to NBD clients over unix sockets, loopback
// TCP or TLS: our own server, as the ones in Go lack flush, structured
// replies, block status and TLS. It follows the public protocol specification;
// the newstyle handshake with fixed options only.
//
// A client is a stranger: any program of the machine can connect to loopback. What one
// can make the server hold is bounded, every wait for its hand too (docs/nbd.md
// lists the bounds), and what it sends wrong ends its own connection at most.
//
// One connection is one goroutine that reads requests, on a thread that waits in the kernel for them, and one for each request
// under way that takes long; they end before Serve, ServeConn and Remove return.
package nbd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"

	"tidemark/internal/block"
)

// Export is a device under a name.
type Export struct {
	Name        string // at most 4096 bytes; a client that names none gets the only export
	Description string // at most 4096 bytes
	Device      block.Device
	ReadOnly    bool
	BlockSize   int64 // smallest request, a power of two up to 64 KiB; 0: 1 byte

	// UndefinedReadsZero says that the device gives zeroes for extents that are
	// block.Undefined, so that clients need not read them.
	UndefinedReadsZero bool

	// Bitmaps gives the change maps that there are; it is asked whenever a client
	// asks for them, and may be nil. Clients know each as qemu:dirty-bitmap:NAME.
	Bitmaps func() []Bitmap
}

// Bitmap is a change map under a name.
type Bitmap struct {
	Name string
	Map  ChangeMap
}

// ChangeMap says what of a device has changed.
type ChangeMap interface {
	// Run says whether the byte at r.Off has changed, and how many bytes from there
	// on, at least 1 and at most r.Len, are as it is. It is called concurrently.
	Run(r block.Range) (length int64, changed bool, err error)
}

// Bounds of what clients can make the server hold, and of what it waits for.
const (
	nameMax       = 4096
	payloadMax    = 32 << 20  // bytes of one request
	clientMemory  = 64 << 20  // bytes of the requests of one connection
	serverMemory  = 256 << 20 // bytes of the requests of all connections
	optionMax     = 64 << 10  // bytes of one option
	optionsMax    = 256       // of one handshake
	workers       = 16        // requests of one connection at one time
	connectionMax = 64
	handshakeTime = 10 * time.Second
	stallTime     = time.Minute     // to send or take the next stallBytes of a payload
	stallBytes    = 1 << 20         // or what is left of it
	poolSmallest  = 64 << 10        // bytes of a request's buffer
	drainTime     = 5 * time.Second // to take the last replies when the server ends
)

// Errors of a Server's exports and clients.
var (
	ErrNoExport = errors.New("no such export")
	ErrExport   = errors.New("an export that cannot be served")
	ErrHungUp   = errors.New("the client hung up")
)

// Server serves exports. Its zero value has none. All methods may be called concurrently.
type Server struct {
	// Log hears of clients that were refused or cut off, a few a second at most; nil: nobody does.
	Log *slog.Logger

	mu          sync.Mutex
	exports     []Export
	connections map[*connection]bool

	once   sync.Once
	memory *semaphore.Weighted
	quiet  rate.Sometimes
	pools  [10]sync.Pool // buffers, by power of two from poolSmallest
}

func (s *Server) init() {
	s.once.Do(func() {
		s.connections = map[*connection]bool{}
		s.memory = semaphore.NewWeighted(serverMemory)
		s.quiet = rate.Sometimes{First: 20, Interval: time.Second}
	})
}

// Add serves one more export; new connections see it. ErrExport says why not.
func (s *Server) Add(e Export) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case len(e.Name) > nameMax || len(e.Description) > nameMax:
		return fmt.Errorf("%w: its name or description has more than %d bytes", ErrExport, nameMax)
	case e.BlockSize < 0 || e.BlockSize > 64<<10 || e.BlockSize&(e.BlockSize-1) != 0:
		return fmt.Errorf("%w: blocks of %d bytes; want a power of two up to 64 KiB", ErrExport, e.BlockSize)
	case slices.ContainsFunc(s.exports, func(o Export) bool { return o.Name == e.Name }):
		return fmt.Errorf("%w: the name %q is taken", ErrExport, e.Name)
	}
	s.exports = append(s.exports, e)
	return nil
}

// Remove ends an export: its clients are hung up on. When it returns, none of
// their requests is under way any more, so that the device can be closed.
func (s *Server) Remove(name string) error {
	s.init()
	s.mu.Lock()
	i := slices.IndexFunc(s.exports, func(e Export) bool { return e.Name == name })
	if i < 0 {
		s.mu.Unlock()
		return fmt.Errorf("%q: %w", name, ErrNoExport)
	}
	s.exports = slices.Delete(s.exports, i, i+1)
	var users []*connection
	for c := range s.connections {
		if c.user && c.export.Name == name {
			users = append(users, c)
		}
	}
	s.mu.Unlock()
	for _, c := range users {
		c.cancel()
		c.link.raw.Close()
	}
	for _, c := range users {
		<-c.ended
	}
	return nil
}

// Serve answers clients until ctx ends or the listener fails. It closes the
// listener, gives replies under way a few seconds, and returns when every
// goroutine of it has ended. The end of ctx is no error. A server may serve at several places.
func (s *Server) Serve(ctx context.Context, l *Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer l.Close()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	var all sync.WaitGroup
	defer all.Wait() // after cancel, which ends them
	defer cancel()
	for {
		conn, err := l.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				conn.Close()
			}
			return nil
		case err != nil && transient(err):
			s.complain("accepting NBD clients", "why", err)
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
			continue
		case err != nil:
			return err
		}
		c := s.connection(ctx, conn, true)
		if c == nil {
			s.complain("an NBD client was refused", "client", conn.RemoteAddr(), "why", fmt.Sprintf("there are %d connections", connectionMax))
			conn.Close()
			continue
		}
		c.tls = l.TLS
		all.Go(func() { _ = c.serve(c.handshake) }) // who should hear of it has heard
	}
}

// ServeConn answers one client that has agreed on an export already by other
// means, the kernel for example: requests and simple replies, no handshake. It
// owns conn, which does not count among those of strangers, and returns when the client took its leave, ctx ended or the export was
// removed, which is no error, or with ErrHungUp when the connection ended otherwise. No request of
// the client is under way any more then.
func (s *Server) ServeConn(ctx context.Context, conn net.Conn, name string) error {
	e, err := s.find(name)
	if err != nil {
		conn.Close()
		return err
	}
	c := s.connection(ctx, conn, false)
	err = c.serve(func() error { return c.use(e) })
	if err == nil || c.removed() || ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("%w: %w", ErrHungUp, err)
}

// Offer is what a client that does no handshake must be told of an export.
type Offer struct {
	Size      int64  // bytes
	BlockSize int64  // smallest request, bytes; 1 where any will do
	Flags     uint16 // transmission flags, where replies are simple
}

// Offer looks an export up.
func (s *Server) Offer(name string) (Offer, error) {
	e, err := s.find(name)
	if err != nil {
		return Offer{}, err
	}
	return Offer{Size: e.Device.Size(), BlockSize: max(e.BlockSize, 1), Flags: e.flags(false)}, nil
}

// transient are errors of Accept that pass: the client is gone already, or this
// process has too much open.
func transient(err error) bool {
	for _, e := range []error{syscall.ECONNABORTED, syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// Clients is how many connections there are, but for those of ServeConn.
func (s *Server) Clients() int {
	s.init()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.strangers()
}

// strangers is Clients with the lock held.
func (s *Server) strangers() (n int) {
	for c := range s.connections {
		if c.stranger {
			n++
		}
	}
	return n
}

// connection makes one more, to be served; nil where there are too many of strangers.
func (s *Server) connection(ctx context.Context, conn net.Conn, stranger bool) *connection {
	s.init()
	s.mu.Lock()
	defer s.mu.Unlock()
	if stranger && s.strangers() >= connectionMax {
		return nil
	}
	c := newConnection(ctx, s, conn)
	c.stranger = stranger
	s.connections[c] = true
	return c
}

func (s *Server) find(name string) (Export, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.findLocked(name)
}

func (s *Server) findLocked(name string) (Export, error) {
	for _, e := range s.exports {
		if e.Name == name || name == "" && len(s.exports) == 1 {
			return e, nil
		}
	}
	return Export{}, fmt.Errorf("%.100q: %w", name, ErrNoExport)
}

func (s *Server) list() []Export {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.exports)
}

// complain tells the log, but not as often as a hostile client likes.
func (s *Server) complain(what string, args ...any) {
	s.init()
	if s.Log != nil {
		s.quiet.Do(func() { s.Log.Warn(what, args...) })
	}
}
