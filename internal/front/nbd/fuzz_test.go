package nbd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/abi/nbd"
)

// fuzzed is what fuzzing talks to: exports of both kinds, with contexts.
func fuzzed(t testing.TB) *Server {
	disk := newMemory(8192)
	disk.b[700] = 1
	return server(t,
		Export{Name: "x", Device: disk, Bitmaps: bitmaps(Bitmap{"b", stripes(1024)})},
		Export{Name: "ro", Device: disk, ReadOnly: true, BlockSize: 512, UndefinedReadsZero: true})
}

// converse says all of in, and has read check everything that the server answers.
func converse(t *testing.T, in []byte, begin func(*Server, net.Conn), read func(io.Reader) error) {
	s := fuzzed(t)
	server, client := pair(t)
	served, checked := make(chan struct{}), make(chan error, 1)
	go func() { defer close(served); begin(s, server) }()
	go func() { checked <- read(client) }()
	_ = client.SetDeadline(time.Now().Add(10 * time.Second))
	_, _ = client.Write(in) // the server may hang up in the middle
	_ = client.CloseWrite()
	if err := <-checked; err != nil {
		t.Errorf("%q: %v", in, err)
	}
	client.Close()
	<-served
	if n := s.Clients(); n != 0 {
		t.Errorf("%d connections are left", n)
	}
	if s.init(); !s.memory.TryAcquire(serverMemory) {
		t.Error("memory was not given back")
	}
}

// pair is a connected pair of sockets.
func pair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		conns[i] = c.(*net.UnixConn)
	}
	return conns[0], conns[1]
}

// notCutOff makes no error of the ways in which the server may hang up. That it
// goes on for ever is one.
func notCutOff(err error) error {
	for _, e := range []error{io.EOF, io.ErrUnexpectedEOF, unix.ECONNRESET} {
		if errors.Is(err, e) {
			return nil
		}
	}
	return err
}

// FuzzHandshake sends anything after the greeting: the server never crashes,
// answers in proper form, and lets go.
func FuzzHandshake(f *testing.F) {
	option := func(opt uint32, data string) string {
		return "IHAVEOPT" + string(be.AppendUint32(be.AppendUint32(nil, opt), uint32(len(data)))) + data
	}
	const hello = "\x00\x00\x00\x03"
	base := text("x") + "\x00\x00\x00\x01" + text(nbd.BaseAllocation)
	for _, s := range []string{
		"GET / HTTP/1.1\r\n", hello, "\x00\x00\x00\x01" + option(nbd.OptExportName, "x"),
		hello + option(nbd.OptGo, text("x")+"\x00\x00"),
		hello + option(nbd.OptList, "") + option(nbd.OptInfo, text("ro")+"\x00\x01\x00\x03") + option(nbd.OptAbort, ""),
		hello + option(nbd.OptStructured, "") + option(nbd.OptListMeta, text("x")+"\x00\x00\x00\x00") + option(nbd.OptSetMeta, base) + option(nbd.OptGo, text("x")+"\x00\x00") + string(header(nbd.CmdBlockStatus, 4096)),
		hello + option(nbd.OptStartTLS, "") + option(nbd.OptSetMeta, base) + option(77, "?"),
		hello + option(nbd.OptExportName, "x") + string(header(nbd.CmdRead, 512)),
		hello + "IHAVEOPT\x00\x00\x00\x07\xff\xff\xff\xff",
		hello + option(nbd.OptListMeta, text("x")+"\xff\xff\xff\xff"+text("qemu:")),
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		converse(t, in, func(s *Server, conn net.Conn) {
			c := s.connection(context.Background(), conn, true)
			_ = c.serve(c.handshake)
		}, readOptionReplies)
	})
}

// readOptionReplies checks the form of the server's side of a handshake, up to
// the first thing that is no reply to an option: an export was agreed on.
func readOptionReplies(r io.Reader) error {
	var greeting [18]byte
	if _, err := io.ReadFull(r, greeting[:]); err != nil {
		return notCutOff(err)
	}
	for {
		var h [20]byte
		if _, err := io.ReadFull(r, h[:8]); err != nil {
			return notCutOff(err)
		}
		if be.Uint64(h[:]) != nbd.OptReplyMagic {
			_, err := io.Copy(io.Discard, r)
			return notCutOff(err)
		}
		if _, err := io.ReadFull(r, h[8:]); err != nil {
			return notCutOff(err)
		}
		if n := be.Uint32(h[16:]); n > optionMax {
			return errors.New("a reply beyond all bounds")
		}
		if _, err := io.CopyN(io.Discard, r, int64(be.Uint32(h[16:]))); err != nil {
			return notCutOff(err)
		}
	}
}

// FuzzTransmission sends anything as requests, to a connection with structured
// replies and contexts: every answer has the proper form.
func FuzzTransmission(f *testing.F) {
	request := func(flags, cmd uint16, off uint64, n uint32, payload string) []byte {
		h := be.AppendUint16(be.AppendUint16(be.AppendUint32(nil, nbd.RequestMagic), flags), cmd)
		return append(be.AppendUint32(be.AppendUint64(be.AppendUint64(h, 9), off), n), payload...)
	}
	f.Add(request(0, nbd.CmdRead, 0, 8192, ""))
	f.Add(request(nbd.CmdFlagDF, nbd.CmdRead, 512, 1024, ""))
	f.Add(request(0, nbd.CmdWrite, 4096, 3, "abc"))
	f.Add(append(request(nbd.CmdFlagFUA, nbd.CmdWrite, 8192, 3, "abc"), request(0, nbd.CmdFlush, 0, 0, "")...))
	f.Add(append(request(0, nbd.CmdBlockStatus, 0, 8192, ""), request(nbd.CmdFlagReqOne, nbd.CmdBlockStatus, 1000, 3000, "")...))
	f.Add(append(request(0, nbd.CmdTrim, 0, 4096, ""), request(nbd.CmdFlagFastZero, nbd.CmdWriteZeroes, 0, 4096, "")...))
	f.Add(append(request(0, nbd.CmdCache, 0, 8192, ""), request(0, nbd.CmdDisc, 0, 0, "")...))
	f.Add(request(0xffff, 0xffff, 1<<63, 0xffffffff, ""))
	f.Add(request(0, nbd.CmdWrite, 0, payloadMax+1, "only a little"))
	f.Fuzz(func(t *testing.T, in []byte) {
		for _, name := range []string{"x", "ro"} {
			converse(t, in, func(s *Server, conn net.Conn) {
				c := s.connection(context.Background(), conn, true)
				_ = c.serve(func() error {
					e, err := s.find(name)
					c.structured, c.contexts, c.metaFor = true, contextsOf(e), name
					for i := range c.contexts {
						c.contexts[i].id = uint32(i + 1)
					}
					return errors.Join(err, c.use(e))
				})
			}, readAnswers)
		}
	})
}

func readAnswers(r io.Reader) error {
	for {
		if _, err := readAnswer(r); err != nil {
			return notCutOff(err)
		}
	}
}

// FuzzSimple sends anything as requests where replies are simple, as the
// kernel's client has them: nothing but replies to what was asked comes back.
func FuzzSimple(f *testing.F) {
	f.Add(append(header(nbd.CmdRead, 512), header(nbd.CmdFlush, 0)...))
	f.Add(append(header(nbd.CmdBlockStatus, 512), header(nbd.CmdWriteZeroes, 512)...))
	f.Fuzz(func(t *testing.T, in []byte) {
		converse(t, in, func(s *Server, conn net.Conn) {
			if err := s.ServeConn(context.Background(), conn, "x"); err != nil && !errors.Is(err, ErrHungUp) {
				t.Error(err)
			}
		}, func(r io.Reader) error {
			b, err := io.ReadAll(r)
			if len(b) >= 4 && !bytes.HasPrefix(b, []byte{0x67, 0x44, 0x66, 0x98}) {
				return errors.New("that is no simple reply")
			}
			return notCutOff(err)
		})
	})
}
