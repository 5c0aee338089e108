package nbd

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"testing"
	"testing/iotest"
	"time"

	"tidemark/internal/testkit"
)

// sockets are one of ours and its other end.
func sockets(t testing.TB) (*socket, *net.UnixConn) {
	t.Helper()
	testkit.NoLeaks(t)
	a, b := pair(t)
	s, ok := newSocket(a).(*socket)
	if !ok {
		t.Fatal("it was not taken over")
	}
	t.Cleanup(func() { s.Close(); b.Close() })
	return s, b
}

// TestSocketCarries: what goes through is what was sent, whatever the pieces, where the
// other side takes it slowly.
func TestSocketCarries(t *testing.T) {
	s, other := sockets(t)
	rng := rand.New(rand.NewPCG(1, 2))
	var pieces [][]byte
	var all []byte
	for range 3000 { // more than the kernel takes at one time
		p := make([]byte, rng.IntN(3000))
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		pieces, all = append(pieces, p), append(all, p...)
	}
	sent := make(chan error, 1)
	go func() {
		n, err := s.writeAll(pieces)
		if err == nil && n != int64(len(all)) {
			err = io.ErrShortWrite
		}
		sent <- err
	}()
	got := make([]byte, len(all))
	if _, err := io.ReadFull(iotest.HalfReader(other), got); err != nil {
		t.Fatal(err)
	}
	if err := <-sent; err != nil || !bytes.Equal(got, all) {
		t.Fatalf("sent: %v, same: %v", err, bytes.Equal(got, all))
	}
	go func() {
		rng := rand.New(rand.NewPCG(3, 4))
		for p := all; len(p) > 0; {
			n := min(len(p), 1+rng.IntN(40000))
			if _, err := other.Write(p[:n]); err != nil {
				break
			}
			p = p[n:]
		}
		other.CloseWrite()
	}()
	in := newInbox(s)
	var back []byte
	for {
		in.more(time.Duration(rng.IntN(2)) * moment)
		n := 1 + rng.IntN(inboxBytes)
		if have := in.peek(n); have != nil && !bytes.Equal(have, all[len(back):][:n]) {
			t.Fatal("what is looked at is not what was sent")
		}
		if rng.IntN(2) == 0 {
			p := make([]byte, n)
			k, err := in.Read(p)
			if back = append(back, p[:k]...); err == io.EOF {
				break
			}
			continue
		}
		p, err := in.take(min(n, 1+len(all)-len(back)))
		if back = append(back, p...); err == io.EOF {
			rest, err := io.ReadAll(in)
			if err != nil {
				t.Fatal(err)
			}
			back = append(back, rest...)
			break
		}
	}
	if !bytes.Equal(back, all) {
		t.Errorf("%d bytes came back, not the %d that were sent", len(back), len(all))
	}
}

// TestSocketEnds: whoever waits in a socket is let go by its deadline, by hangUp
// and by Close, and gets the error that tells which.
func TestSocketEnds(t *testing.T) {
	read := func(s *socket) error { _, err := s.Read(make([]byte, 1)); return err }
	write := func(s *socket) error { _, err := s.Write(make([]byte, 16<<20)); return err }
	soon := func() time.Time { return time.Now().Add(20 * time.Millisecond) }
	for name, c := range map[string]struct {
		before, after func(*socket) error
		wait          func(*socket) error
		want          error
	}{
		"read, deadline":  {func(s *socket) error { return s.SetReadDeadline(soon()) }, nil, read, os.ErrDeadlineExceeded},
		"write, deadline": {func(s *socket) error { return s.SetWriteDeadline(soon()) }, nil, write, os.ErrDeadlineExceeded},
		"read, over":      {func(s *socket) error { return s.SetDeadline(time.Now()) }, nil, read, os.ErrDeadlineExceeded},
		"read, hung up":   {nil, func(s *socket) error { defer s.hangUp(); return s.SetReadDeadline(time.Now()) }, read, os.ErrDeadlineExceeded},
		"write, hung up":  {nil, func(s *socket) error { return s.SetWriteDeadline(time.Now()) }, write, os.ErrDeadlineExceeded},
		"read, closed":    {nil, (*socket).Close, read, net.ErrClosed},
		"write, closed":   {nil, (*socket).Close, write, nil},
	} {
		t.Run(name, func(t *testing.T) {
			s, _ := sockets(t)
			if c.before != nil {
				if err := c.before(s); err != nil {
					t.Fatal(err)
				}
			}
			ended := make(chan error, 1)
			go func() { ended <- c.wait(s) }()
			if c.after != nil {
				time.Sleep(time.Millisecond) // either way it must end
				if err := c.after(s); err != nil {
					t.Error(err)
				}
			}
			select {
			case err := <-ended:
				if err == nil || c.want != nil && !errors.Is(err, c.want) {
					t.Errorf("it ended with %v, not %v", err, c.want)
				}
			case <-time.After(20 * time.Second):
				t.Error("it waits for ever")
			}
		})
	}
}
