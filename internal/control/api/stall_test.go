package api

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// batches is a service whose batches are large.
type batches struct {
	Service
	closed chan struct{}
}

const largeBatch = 5<<20 + 7

func (b batches) DrainNext(context.Context, string, string, DrainRequest) (io.ReadCloser, error) {
	return struct {
		io.Reader
		io.Closer
	}{bytes.NewReader(make([]byte, largeBatch)), closer(func() { close(b.closed) })}, nil
}

type closer func()

func (c closer) Close() error { c(); return nil }

// pipes is a listener whose connections are pipes, in the time of a test's bubble.
type pipes struct {
	conns chan net.Conn
	end   sync.Once
	over  chan struct{}
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.over:
		return nil, net.ErrClosed
	}
}
func (p *pipes) Close() error   { p.end.Do(func() { close(p.over) }); return nil }
func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "unix"} }

// asked asks for a batch over a pipe, and gives the pipe and what tells that the batch was let go.
func asked(t *testing.T) (net.Conn, chan struct{}) {
	b := batches{closed: make(chan struct{})}
	l := &pipes{conns: make(chan net.Conn), over: make(chan struct{})}
	srv := &http.Server{Handler: Handler(b)}
	go srv.Serve(l)
	theirs, ours := net.Pipe()
	l.conns <- theirs
	t.Cleanup(func() { srv.Close(); ours.Close() })
	const body = `{"after":0}`
	if _, err := io.WriteString(ours, "POST /v1/groups/g/consumers/c/next HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\n\r\n"+body); err != nil {
		t.Fatal(err)
	}
	return ours, b.closed
}

// TestStalledClient: who stands still in the middle of a batch is cut off, and the
// batch is let go; who is slow is not.
func TestStalledClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn, closed := asked(t)
		if _, err := io.ReadFull(conn, make([]byte, 1<<20)); err != nil {
			t.Fatal(err)
		}
		select {
		case <-closed: // after so long that somebody who is slow would have gone on
		case <-time.After(time.Hour):
			t.Fatal("a client that stands still holds its batch")
		}
		if _, err := io.Copy(io.Discard, conn); err != nil {
			t.Error(err)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		conn, closed := asked(t)
		resp, err := http.ReadResponse(bufio.NewReaderSize(slow{conn}, 64<<10), &http.Request{Method: "POST"})
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(io.Discard, resp.Body)
		if err != nil || n != largeBatch {
			t.Errorf("a slow client got %d of %d bytes: %v", n, largeBatch, err)
		}
		<-closed
		_ = conn.Close()
	})
}

// slow waits before it reads.
type slow struct{ io.Reader }

func (s slow) Read(b []byte) (int, error) {
	time.Sleep(time.Second / 2)
	return s.Reader.Read(b)
}
