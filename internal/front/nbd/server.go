// Package nbd serves block devices to NBD clients over unix sockets or
// loopback TCP: our own server, as the ones in Go lack flush, structured
// replies and block status. It follows the public protocol specification; the
// newstyle handshake with fixed options only.
package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"tidemark/internal/block"
)

// Export is a device under a name.
type Export struct {
	Name        string
	Description string
	Device      block.Device
	ReadOnly    bool
	BlockSize   int64 // smallest request, a power of two; 0: 1 byte
}

// Bounds of what a client can make the server hold.
const (
	payloadMax    = 32 << 20 // of one request
	optionMax     = 64 << 10
	optionsMax    = 256
	workers       = 16 // requests of one connection at one time
	connectionMax = 64
	handshakeTime = 10 * time.Second
	drainTime     = 5 * time.Second
)

// Server serves exports. Set Exports before Serve.
type Server struct {
	Exports []Export

	mu    sync.Mutex
	conns map[net.Conn]bool
}

// Serve answers clients until ctx ends or the listener fails. It closes the
// listener, gives requests under way a few seconds, and returns when every
// goroutine of it has ended. The end of ctx is no error.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	s.conns = map[net.Conn]bool{}
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	slots := make(chan struct{}, connectionMax)
	var all sync.WaitGroup
	var failed error
	for {
		slots <- struct{}{}
		c, err := l.Accept()
		if err != nil {
			if ctx.Err() == nil {
				failed = err
			}
			break
		}
		s.add(c)
		all.Go(func() {
			defer func() { s.drop(c); <-slots }()
			(&connection{server: s, conn: c}).serve()
		})
	}
	l.Close()
	s.hangUp(time.Now().Add(drainTime))
	all.Wait()
	return failed
}

func (s *Server) add(c net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns[c] = true
}

func (s *Server) drop(c net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
	c.Close()
}

// hangUp ends reading at once, so that no new request comes, and writing at a time.
func (s *Server) hangUp(at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		_ = errors.Join(c.SetReadDeadline(time.Now()), c.SetWriteDeadline(at)) // a closed one has ended already
	}
}

func (s *Server) find(name string) (Export, error) {
	for _, e := range s.Exports {
		if e.Name == name || name == "" && len(s.Exports) == 1 {
			return e, nil
		}
	}
	return Export{}, fmt.Errorf("no export %q", name)
}
