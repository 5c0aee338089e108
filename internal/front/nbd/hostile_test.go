package nbd

import (
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"tidemark/internal/abi/nbd"
)

// listening is a server on a unix socket with one writable and one read-only export.
func listening(t *testing.T) net.Addr {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	disk := newMemory(1 << 20)
	serveAt(t, "nbd+unix:///x?socket="+path, server(t,
		Export{Name: "x", Device: disk, Bitmaps: func() []Bitmap { return []Bitmap{{"b", stripes(4096)}} }},
		Export{Name: "ro", Device: disk, ReadOnly: true, BlockSize: 512}))
	return &net.UnixAddr{Name: path, Net: "unix"}
}

// TestHandshakeBreach: what breaks the protocol ends the connection, and only that one.
func TestHandshakeBreach(t *testing.T) {
	at := listening(t)
	honest := greet(t, at)
	honest.enter("x")
	for name, say := range map[string][]any{
		"no fixed newstyle":      {uint32(0)},
		"unknown flags":          {uint32(0xffffffff)},
		"another protocol":       {"GET / HTTP/1.1\r\n\r\n"},
		"bad option magic":       {uint32(3), "IHAVENOT", uint32(nbd.OptGo), uint32(0)},
		"an option of 4 GiB":     {uint32(3), "IHAVEOPT", uint32(nbd.OptGo), uint32(math.MaxUint32)},
		"no such export":         {uint32(3), "IHAVEOPT", uint32(nbd.OptExportName), uint32(2), "no"},
		"an export of 64 KiB":    {uint32(3), "IHAVEOPT", uint32(nbd.OptExportName), uint32(65536), strings.Repeat("x", 65536)},
		"abort":                  {uint32(3), "IHAVEOPT", uint32(nbd.OptAbort), uint32(0)},
		"257 options":            {uint32(3), strings.Repeat("IHAVEOPT\x00\x00\x00\x63\x00\x00\x00\x00", optionsMax+1)},
		"requests before export": {uint32(3), uint32(nbd.RequestMagic), make([]byte, 24)},
	} {
		t.Run(name, func(t *testing.T) {
			c := connect(t, at)
			c.recv(18)
			if err := c.trySend(say...); err == nil { // it may hang up before all is said
				c.closed()
			}
		})
	}
	honest.works()
}

// TestHandshakeNonsense: an option that makes no sense gets an error, and the client may go on.
func TestHandshakeNonsense(t *testing.T) {
	c := greet(t, listening(t))
	u32 := func(n uint32) string { return string(be.AppendUint32(nil, n)) }
	for _, o := range []struct {
		what string
		opt  uint32
		data string
		want uint32
	}{
		{"unknown option", 4711, "abc", nbd.RepErrUnsup},
		{"a long one", 4711, strings.Repeat("y", optionMax+1), nbd.RepErrTooBig},
		{"a list with data", nbd.OptList, "x", nbd.RepErrInvalid},
		{"structured replies with data", nbd.OptStructured, "x", nbd.RepErrInvalid},
		{"contexts without structured replies", nbd.OptSetMeta, text("x") + u32(0), nbd.RepErrInvalid},
		{"TLS where there is none", nbd.OptStartTLS, "", nbd.RepErrPolicy},
		{"no data", nbd.OptGo, "", nbd.RepErrInvalid},
		{"a name beyond its option", nbd.OptGo, u32(math.MaxUint32) + "x\x00\x00", nbd.RepErrInvalid},
		{"more items than there are", nbd.OptInfo, text("x") + "\xff\xff\x00\x00", nbd.RepErrInvalid},
		{"half an item", nbd.OptInfo, text("x") + "\x00\x01\x00", nbd.RepErrInvalid},
		{"no such export", nbd.OptGo, text(strings.Repeat("\x00", 60000)) + "\x00\x00", nbd.RepErrUnknown},
		{"no name, and two exports", nbd.OptGo, text("") + "\x00\x00", nbd.RepErrUnknown},
		{"structured replies", nbd.OptStructured, "", nbd.RepAck},
		{"no queries at all", nbd.OptSetMeta, text("x"), nbd.RepErrInvalid},
		{"4 billion queries", nbd.OptSetMeta, text("x") + u32(math.MaxUint32), nbd.RepErrInvalid},
		{"a query beyond its option", nbd.OptListMeta, text("x") + u32(1) + u32(9) + "base:", nbd.RepErrInvalid},
		{"too much", nbd.OptListMeta, text("x") + u32(0) + "x", nbd.RepErrInvalid},
		{"contexts of no export", nbd.OptSetMeta, text("y") + u32(0), nbd.RepErrUnknown},
		{"16000 queries", nbd.OptListMeta, text("x") + u32(16000) + strings.Repeat(u32(0), 16000), nbd.RepAck},
	} {
		all := c.option(o.opt, o.data)
		if last(all) != o.want {
			t.Errorf("%s: %#x, not %#x", o.what, last(all), o.want)
		}
		for _, r := range all {
			if len(r.data) > nameMax {
				t.Errorf("%s: a reply of %d bytes", o.what, len(r.data))
			}
		}
	}
	c.enter("x", nbd.BaseAllocation)
	c.works()
}

// TestRequests: each wrong request gets its own error, and the connection lives on.
func TestRequests(t *testing.T) {
	at := listening(t)
	rw, ro, plain := greet(t, at), greet(t, at), greet(t, at)
	rw.enter("x", nbd.BaseAllocation)
	ro.enter("ro")
	plain.enter("x")
	for i, r := range []struct {
		what       string
		c          *client
		flags, cmd uint16
		off        uint64
		n          uint32
		want       uint32
	}{
		{"unknown command", rw, 0, 99, 0, 512, nbd.EINVAL},
		{"unknown flag", rw, 1 << 15, nbd.CmdRead, 0, 512, nbd.EINVAL},
		{"a flag of another command", rw, nbd.CmdFlagReqOne, nbd.CmdRead, 0, 512, nbd.EINVAL},
		{"nothing", rw, 0, nbd.CmdRead, 0, 0, nbd.EINVAL},
		{"beyond the end", rw, 0, nbd.CmdRead, 1<<20 - 511, 512, nbd.EINVAL},
		{"an offset that overflows", rw, 0, nbd.CmdRead, math.MaxUint64 - 100, 512, nbd.EINVAL},
		{"a negative offset", rw, 0, nbd.CmdBlockStatus, 1 << 63, 512, nbd.EINVAL},
		{"a read of 4 GiB", rw, 0, nbd.CmdRead, 0, math.MaxUint32, nbd.EOVERFLOW},
		{"zeroes beyond the end", rw, 0, nbd.CmdWriteZeroes, 0, math.MaxUint32, nbd.ENOSPC},
		{"a trim beyond the end", rw, 0, nbd.CmdTrim, 1 << 20, 1, nbd.EINVAL},
		{"a status beyond the end", rw, 0, nbd.CmdBlockStatus, 0, 1<<20 + 1, nbd.EINVAL},
		{"a status without contexts", plain, 0, nbd.CmdBlockStatus, 0, 512, nbd.EINVAL},
		{"fast zeroes where they are slow", rw, nbd.CmdFlagFastZero, nbd.CmdWriteZeroes, 0, 512, nbd.ENOTSUP},
		{"zeroes on a read-only export", ro, 0, nbd.CmdWriteZeroes, 0, 512, nbd.EPERM},
		{"a trim of a read-only export", ro, 0, nbd.CmdTrim, 0, 512, nbd.EPERM},
		{"not whole blocks", ro, 0, nbd.CmdRead, 256, 512, nbd.EINVAL},
		{"half a block", ro, 0, nbd.CmdRead, 512, 256, nbd.EINVAL},
	} {
		r.c.request(r.flags, r.cmd, uint64(i), r.off, r.n)
		if a := r.c.answer(uint64(i)); a.code != r.want {
			t.Errorf("%s: error %d, not %d", r.what, a.code, r.want)
		}
		r.c.works()
	}
	big := make([]byte, payloadMax+512)
	for i, w := range []struct {
		what string
		c    *client
		off  uint64
		n    int
		want uint32
	}{
		{"a payload beyond the bound", rw, 0, len(big), nbd.EOVERFLOW},
		{"a write beyond the end", rw, 1 << 20, 4096, nbd.ENOSPC},
		{"a write to a read-only export", ro, 0, 4096, nbd.EPERM},
		{"an empty write", rw, 0, 0, nbd.EINVAL},
	} {
		w.c.request(0, nbd.CmdWrite, uint64(i), w.off, uint32(w.n), big[:w.n])
		if a := w.c.answer(uint64(i)); a.code != w.want {
			t.Errorf("%s: error %d, not %d", w.what, a.code, w.want)
		}
		w.c.works()
	}
	rw.send(uint32(nbd.StructuredMagic), make([]byte, 24))
	rw.closed()
	ro.works()
}

// TestDisconnects: clients that go away at any moment leave nothing behind (serve checks for goroutines).
func TestDisconnects(t *testing.T) {
	at := listening(t)
	var all sync.WaitGroup
	for i := range 60 {
		all.Go(func() {
			conn, err := net.Dial("unix", at.String())
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			c := &client{t, conn}
			_ = conn.SetDeadline(time.Now().Add(time.Minute))
			if _, err := io.ReadFull(conn, make([]byte, 18)); err != nil {
				t.Error(err)
				return
			}
			enter := []any{uint32(3), "IHAVEOPT", uint32(nbd.OptExportName), uint32(1), "x"}
			header := []any{uint32(nbd.RequestMagic), uint16(0), uint16(nbd.CmdWrite), uint64(1), uint64(0), uint32(1 << 20)}
			switch i % 6 {
			case 0: // at once
			case 1: // in the middle of an option
				_ = c.trySend(enter[:3:3]...)
			case 2: // in the middle of a request
				_ = c.trySend(append(enter[:5:5], header[:4]...)...)
			case 3: // in the middle of a payload
				_ = c.trySend(append(append(enter[:5:5], header...), make([]byte, 5000))...)
			case 4, 5: // in the middle of replies
				_ = c.trySend(enter...)
				for k := range uint64(8) {
					_ = c.trySend(uint32(nbd.RequestMagic), uint32(nbd.CmdRead), k, uint64(0), uint32(1<<20))
				}
				_, _ = io.ReadFull(conn, make([]byte, 3<<20/2))
			}
		})
	}
	all.Wait()
	c := greet(t, at)
	c.enter("x")
	c.works()
}

// TestTooManyConnections: those beyond the bound are hung up on, and there is room again when others go.
func TestTooManyConnections(t *testing.T) {
	at := listening(t)
	var idle []*client
	for range connectionMax {
		c := greet(t, at)
		c.enter("x")
		idle = append(idle, c)
	}
	if n, err := connect(t, at).conn.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("one too many is greeted: %d, %v", n, err)
	}
	idle[0].works()
	for _, c := range idle {
		c.conn.Close()
	}
	for range 1000 {
		conn, err := net.Dial("unix", at.String())
		if err != nil {
			t.Fatal(err)
		}
		_, err = io.ReadFull(conn, make([]byte, 18))
		conn.Close()
		if err == nil {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("there is no room again")
}

// TestClientsThatWait: a client that keeps the server waiting is cut off, when
// it began something; one that is merely idle is not.
func TestClientsThatWait(t *testing.T) {
	enter := "IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x01x"
	write := func(n uint32) string { return string(header(nbd.CmdWrite, n)) }
	for name, o := range map[string]struct {
		say   string
		after time.Duration // it is cut off; 0: it is not
		idle  bool          // takes what the server sends
	}{
		"says nothing":        {"", handshakeTime, true},
		"half an option":      {"\x00\x00\x00\x03IHAVEOPT", handshakeTime, true},
		"half a long option":  {"\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x63\x00\x20\x00\x00abc", handshakeTime, true},
		"takes no reply":      {"\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x63\x00\x00\x00\x00", handshakeTime, false},
		"idle":                {"\x00\x00\x00\x03" + enter, 0, true},
		"half a header":       {"\x00\x00\x00\x03" + enter + write(1)[:20], 0, true},
		"half a payload":      {"\x00\x00\x00\x03" + enter + write(4096) + "abc", stallTime, true},
		"half a long payload": {"\x00\x00\x00\x03" + enter + write(payloadMax+1) + "abc", stallTime, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := server(t, Export{Name: "x", Device: newMemory(1 << 20)})
				l := newPipes()
				end := run(s, l)
				c := l.dial(t)
				c.recv(18)
				begun := time.Now()
				if !o.idle {
					c.send(o.say)
					time.Sleep(handshakeTime + time.Second)
					synctest.Wait()
					if n := s.Clients(); n != 0 {
						t.Errorf("%d connections", n)
					}
				} else {
					go func() { _, _ = io.WriteString(c.conn, o.say) }() // a pipe holds nothing
					gone := make(chan time.Duration, 1)
					go func() { _, _ = io.Copy(io.Discard, c.conn); gone <- time.Since(begun) }()
					time.Sleep(time.Hour)
					synctest.Wait()
					select {
					case took := <-gone:
						if o.after == 0 || took != o.after {
							t.Errorf("cut off after %v", took)
						}
					default:
						if o.after != 0 {
							t.Error("still there after an hour")
						}
					}
				}
				if err := end(); err != nil {
					t.Error(err)
				}
				c.conn.Close()
			})
		})
	}
}

// TestSlowReader: a reader that takes a little at a time is served to the end;
// one that stops is cut off and gives back what it held, and others are served in the meantime.
func TestSlowReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		disk := newMemory(8 << 20)
		for i := range disk.b {
			disk.b[i] = 1 // holes would be told in a few bytes
		}
		s := server(t, Export{Name: "x", Device: disk})
		l := newPipes()
		end := run(s, l)
		slow, stuck, other := l.dial(t), l.dial(t), l.dial(t)
		for _, c := range []*client{slow, stuck, other} {
			c.hello()
			c.enter("x")
			c.works()
		}
		slow.request(0, nbd.CmdRead, 1, 0, 8<<20)
		stuck.request(0, nbd.CmdRead, 1, 0, 8<<20)
		for range 8 {
			time.Sleep(stallTime - time.Second)
			slow.recv(stallBytes)
			other.works()
		}
		if n := s.Clients(); n != 2 {
			t.Errorf("%d connections; the one that stopped should be gone", n)
		}
		slow.conn.Close()
		other.conn.Close()
		stuck.conn.Close()
		synctest.Wait()
		if !s.memory.TryAcquire(serverMemory) {
			t.Error("memory was not given back")
		}
		if err := end(); err != nil {
			t.Error(err)
		}
	})
}

// lazy is a device that takes a second to read.
type lazy struct{ *memory }

func (l lazy) ReadAt(p []byte, off int64) (int, error) {
	time.Sleep(time.Second)
	return l.memory.ReadAt(p, off)
}

// TestEndWithStuckClients: the server ends soon, whatever its clients do.
func TestEndWithStuckClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := server(t, Export{Name: "x", Device: lazy{newMemory(1 << 20)}})
		l := newPipes()
		end := run(s, l)
		var clients []*client
		for i := range 9 {
			c := l.dial(t)
			clients = append(clients, c)
			if i%3 == 0 {
				continue // has not even taken the greeting
			}
			c.hello()
			c.enter("x")
			if i%3 == 1 {
				c.request(0, nbd.CmdRead, 1, 0, 4096) // and never takes the reply
			} else {
				c.request(0, nbd.CmdWrite, 1, 0, 4096, "only this")
			}
		}
		synctest.Wait()
		begun := time.Now()
		if err := end(); err != nil {
			t.Error(err)
		}
		if took := time.Since(begun); took > drainTime {
			t.Errorf("it took %v", took)
		}
		for _, c := range clients {
			c.conn.Close()
		}
	})
}

// greedy is a device whose reads wait, and which knows how much is asked of it at one time.
type greedy struct {
	*memory
	now, most atomic.Int64
	gate      chan struct{}
}

func (g *greedy) Size() int64 { return 1 << 40 }

func (g *greedy) ReadAt(p []byte, _ int64) (int, error) {
	n := g.now.Add(int64(len(p)))
	for m := g.most.Load(); n > m && !g.most.CompareAndSwap(m, n); m = g.most.Load() {
	}
	<-g.gate
	g.now.Add(-int64(len(p)))
	return 0, fmt.Errorf("no")
}

// TestMemory: however much clients ask for, what is held is bounded, for each of them and for all.
func TestMemory(t *testing.T) {
	for clients, want := range map[int]int64{1: clientMemory, 12: serverMemory} {
		synctest.Test(t, func(t *testing.T) {
			g := &greedy{memory: newMemory(0), gate: make(chan struct{})}
			s := server(t, Export{Name: "x", Device: g})
			l := newPipes()
			end := run(s, l)
			for range clients {
				c := l.dial(t)
				defer c.conn.Close()
				c.hello()
				c.send("IHAVEOPT", uint32(nbd.OptExportName), uint32(1), "x")
				c.recv(10)
				go func() {
					for i := range uint64(10) {
						if c.trySend(uint32(nbd.RequestMagic), uint32(nbd.CmdRead), i, uint64(0), uint32(payloadMax)) != nil {
							return
						}
					}
				}()
				go func() { _, _ = io.Copy(io.Discard, c.conn) }()
			}
			synctest.Wait()
			if n := g.now.Load(); n != want {
				t.Errorf("%d clients make the server hold %d MiB, not %d", clients, n>>20, want>>20)
			}
			close(g.gate)
			synctest.Wait()
			if n := g.most.Load(); n != want {
				t.Errorf("%d clients made the server hold up to %d MiB, not %d", clients, n>>20, want>>20)
			}
			if err := end(); err != nil {
				t.Error(err)
			}
			if !s.memory.TryAcquire(serverMemory) {
				t.Error("memory was not given back")
			}
		})
	}
}
