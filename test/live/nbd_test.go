package live

import (
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"tidemark/internal/front/nbd"
	"tidemark/internal/testkit/program"
)

// export is a served device as an NBD client has it, which connects again when
// the daemon was restarted, and sends again what had no answer. One request at a time.
type export struct {
	name string // of the device
	uri  string
	mu   sync.Mutex
	conn *nbd.Client
	stop chan struct{}
}

// serve makes a device over a new image file, for NBD clients.
func serve(t testing.TB, d *program.Daemon, name, backing string) *export {
	t.Helper()
	node := d.Run("device", "create", "--backing", backing, "--front", "nbd-server", "--name", name)
	return connect(t, name, node)
}

func connect(t testing.TB, name, node string) *export {
	t.Helper()
	e := &export{name: name, uri: strings.TrimSpace(node), stop: make(chan struct{})}
	t.Cleanup(e.Close)
	return e
}

// Name is what the device is protected by.
func (e *export) Name() string { return e.name }

// Close ends the connection; requests that wait for a server fail.
func (e *export) Close() {
	select {
	case <-e.stop:
	default:
		close(e.stop)
	}
	e.drop()
}

func (e *export) drop() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.conn != nil {
		e.conn.Close()
		e.conn = nil
	}
}

// request sends until it is answered.
func (e *export) request(send func(c *nbd.Client) error) error {
	for {
		err := e.try(send)
		if err == nil || errors.Is(err, nbd.ErrAnswer) {
			return err
		}
		e.drop()
		select {
		case <-e.stop:
			return err
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (e *export) try(send func(c *nbd.Client) error) (err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.conn == nil {
		if e.conn, err = nbd.Dial(e.uri, 2*patience); err != nil {
			return err
		}
	}
	return send(e.conn)
}

// WriteAt writes all of p.
func (e *export) WriteAt(p []byte, off int64) (int, error) {
	return len(p), e.request(func(c *nbd.Client) error { _, err := c.WriteAt(p, off); return err })
}

// Sync flushes.
func (e *export) Sync() error { return e.request((*nbd.Client).Flush) }

func (e *export) zero(off int64, n int) error {
	return e.request(func(c *nbd.Client) error { return c.Zero(off, n) })
}
