package nbd

import (
	"bytes"
	"context"
	"io"
	"testing"
	"time"

	"tidemark/internal/abi/nbd"
	"tidemark/internal/testkit"
)

// together is a client that agreed on nothing, as the kernel, over a pair of
// sockets, with the server's side of its connection.
func together(t testing.TB, e Export) (*client, *connection) {
	t.Helper()
	testkit.NoLeaks(t)
	s := server(t, e)
	ours, theirs := pair(t)
	c := s.connection(context.Background(), ours, false)
	ended := make(chan struct{})
	go func() { defer close(ended); _ = c.serve(func() error { return c.use(e) }) }()
	t.Cleanup(func() { theirs.Close(); <-ended })
	if err := theirs.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	return &client{t, theirs}, c
}

// TestQuickRequestsAllocateNothing: small reads and writes of a device that
// answers at once, one at a time and several in one piece.
func TestQuickRequestsAllocateNothing(t *testing.T) {
	if raceEnabled {
		return // the detector's pools forget on purpose
	}
	const size, trips = 4096, 200
	c, ours := together(t, Export{Name: "x", Device: newMemory(1 << 20)})
	for name, load := range map[string]struct {
		request []byte
		reply   int
	}{
		"write": {append(header(nbd.CmdWrite, size), make([]byte, size)...), 16},
		"read":  {header(nbd.CmdRead, size), 16 + size},
	} {
		for _, depth := range []int{1, 8} {
			out, in := bytes.Repeat(load.request, depth), make([]byte, depth*load.reply)
			trip := func() {
				ours.turns.slow.Store(0) // whatever the machine is busy with
				if _, err := c.conn.Write(out); err != nil {
					t.Fatal(err)
				}
				if _, err := io.ReadFull(c.conn, in); err != nil {
					t.Fatal(err)
				}
			}
			best := 1e9
			for range 10 { // the bell and the collector allocate now and then
				best = min(best, testing.AllocsPerRun(trips, trip))
			}
			if best >= 1 { // it is rounded down
				t.Errorf("%s, %d at a time: %v allocations", name, depth, best)
			}
		}
	}
}
