package cuse

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"tidemark/internal/abi/fuse"
	"tidemark/internal/testkit"
)

// Commands of the device under test; client.c has the same. Their numbers tell wrong sizes and directions on purpose.
const (
	cmdSum   = 0x40085600 // {u32 n; u64 *numbers; u64 sum}: nested pointer, answer in the middle
	cmdFill  = 0x80015601 // {u64 to; u64 n; u8 with}
	cmdErrno = 0x5602     // fails with the errno that is the argument
	cmdWait  = 0x5603     // until a signal
	cmdPanic = 0x5604
	cmdValue = 0x5605 // returns its argument
	cmdKill  = 0x5606 // waits for a signal, and then still takes its time
)

type echo struct {
	open, closed atomic.Int32
	waiting      atomic.Int32
	late         atomic.Pointer[Call]
}

func (e *echo) Open(Caller) (File, error) { e.open.Add(1); return e, nil }
func (e *echo) Close()                    { e.closed.Add(1) }

func (e *echo) Ioctl(ctx context.Context, c *Call) (int32, error) {
	word := binary.NativeEndian.Uint64
	switch c.Cmd {
	case cmdSum:
		var in [24]byte
		if err := c.Read(c.Arg, in[:]); err != nil {
			return 0, err
		}
		n := binary.NativeEndian.Uint32(in[:])
		if n > 1<<24 {
			return 0, syscall.E2BIG
		}
		numbers, sum := make([]byte, 8*n), uint64(0)
		if err := c.Read(word(in[8:]), numbers); err != nil {
			return 0, syscall.ENODATA
		}
		for i := range n {
			sum += word(numbers[8*i:])
		}
		return 1, c.Write(c.Arg+16, binary.NativeEndian.AppendUint64(nil, sum))
	case cmdFill:
		var in [24]byte
		if err := c.Read(c.Arg, in[:]); err != nil {
			return 0, err
		}
		return 0, c.Write(word(in[:]), bytes.Repeat(in[16:17], int(word(in[8:]))))
	case cmdErrno:
		return 0, syscall.Errno(c.Arg)
	case cmdWait:
		e.waiting.Add(1)
		defer e.waiting.Add(-1)
		<-ctx.Done()
		return 0, syscall.EINTR
	case cmdKill:
		e.waiting.Add(1)
		defer e.waiting.Add(-1)
		<-ctx.Done()
		e.late.Store(c)
		time.Sleep(100 * time.Millisecond)
		return 0, c.Write(c.Arg, []byte{1}) // it is still there: it waits
	case cmdPanic:
		panic("on purpose")
	case cmdValue:
		return int32(c.Arg), nil
	}
	return 0, syscall.ENOTTY
}

func start(t *testing.T, name string) (*Server, *echo) {
	t.Helper()
	testkit.NoLeaks(t)
	testkit.Need(t, "root", "cuse", "gcc")
	e := &echo{}
	s, err := Start(t.Context(), Device{Name: name, Open: e.Open})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := s.Close(ctx); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat("/dev/" + name); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the node is still there: %v", err)
		}
		if open, closed := e.open.Load(), e.closed.Load(); open != closed {
			t.Errorf("%d opened, %d closed", open, closed)
		}
	})
	return s, e
}

// client runs a part of the C program.
func client(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	path := filepath.Join(t.TempDir(), "client")
	if out, err := exec.Command("gcc", "-O1", "-Wall", "-Werror", "-pthread", "-o", path, "testdata/client.c").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	return exec.CommandContext(ctx, path, args...)
}

// TestClient: a C program walks through what ioctls can do, and what they cannot.
func TestClient(t *testing.T) {
	_, e := start(t, "tidemark-test")
	if out, err := client(t, "walk", "/dev/tidemark-test").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if e.waiting.Load() != 0 {
		t.Error("somebody still waits")
	}
	if st, err := os.Stat("/dev/tidemark-test"); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the node: %v, %v", st, err)
	}
	if _, err := Start(t.Context(), Device{Name: "tidemark-test", Open: e.Open}); !errors.Is(err, ErrExists) {
		t.Errorf("a second one: %v", err)
	}
}

// TestKilled: a caller is killed in an ioctl; the answer comes late, and then
// its memory is not ours any more. The device goes away under another one.
func TestKilled(t *testing.T) {
	s, e := start(t, "tidemark-test")
	killed := client(t, "wait", "/dev/tidemark-test", "kill")
	left := exec.CommandContext(t.Context(), killed.Path, "wait", "/dev/tidemark-test", "wait")
	if err := errors.Join(killed.Start(), left.Start()); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(time.Minute); e.waiting.Load() < 2; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("they do not wait")
		}
	}
	if err := killed.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := killed.Wait(); err == nil {
		t.Error("it ended well")
	}
	if c := e.late.Load(); c == nil || !errors.Is(c.Write(c.Arg, []byte{1}), errAnswered) {
		t.Error("an answered caller's memory could be written")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := s.Close(ctx); err != nil {
		t.Error(err)
	}
	if err := left.Wait(); err != nil {
		t.Errorf("whoever was there when the device went away: %v", err)
	}
}

func TestNames(t *testing.T) {
	for _, name := range []string{"", "a/b", "../null", "a b", strings.Repeat("x", 32), "x\x00y"} {
		if _, err := Start(t.Context(), Device{Name: name}); !errors.Is(err, ErrName) {
			t.Errorf("%q: %v", name, err)
		}
	}
	if _, err := Start(t.Context(), Device{Name: "null"}); !errors.Is(err, ErrExists) {
		t.Errorf("/dev/null: %v", err)
	}
}

// TestNotTheCaller: a process that does not wait in the request is not touched,
// as where it got the number of a caller that is gone; nor is anybody after the answer.
func TestNotTheCaller(t *testing.T) {
	testkit.Need(t, "root")
	other := exec.CommandContext(t.Context(), "sleep", "60")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = other.Process.Kill(); _ = other.Wait() })
	pid := uint32(other.Process.Pid)
	var stack uint64 // can be read and written
	for end := time.Now().Add(time.Minute); ; {
		maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
		if err != nil || time.Now().After(end) {
			t.Fatalf("%v: %s", err, maps)
		}
		call, _ := os.ReadFile(fmt.Sprintf("/proc/%d/syscall", pid)) // of a moment
		for line := range strings.Lines(string(maps)) {
			if strings.Contains(line, "[stack]") {
				if _, err := fmt.Sscanf(line, "%x", &stack); err != nil {
					t.Fatal(err)
				}
			}
		}
		if comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); stack != 0 && string(comm) == "sleep\n" && !strings.HasPrefix(string(call), "running") {
			break
		}
	}
	b := make([]byte, 8)
	c := &Call{Caller: Caller{PID: pid}, Cmd: cmdSum, Arg: stack}
	if err := c.Read(stack, b); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("reading another process: %v", err)
	}
	if err := c.Write(stack, b); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("writing to another process: %v", err)
	}
	if err := (&Call{Cmd: cmdSum, Arg: stack}).Read(stack, b); !errors.Is(err, syscall.EPERM) {
		t.Errorf("a caller without a number: %v", err)
	}
	c.close()
	if err := c.Read(stack, b); !errors.Is(err, errAnswered) {
		t.Errorf("after the answer: %v", err)
	}
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	if err := (&Call{Caller: Caller{PID: uint32(gone.Process.Pid)}, Cmd: cmdSum}).Read(stack, b); err == nil {
		t.Error("a process that has ended was read")
	}
}

// TestCovered: what a maps file says of ranges.
func TestCovered(t *testing.T) {
	const maps = "1000-2000 rw-p 00000000 00:00 0\n2000-3000 r--p 00000000 fe:01 123   /bin/with space\n4000-5000 ---p 00000000 00:00 0\n5000-6000 rw-s 00000000 00:00 0 \n"
	for _, c := range []struct {
		from, end uint64
		how       byte
		want      bool
	}{{0x1000, 0x2000, 'w', true}, {0x1800, 0x1801, 'w', true}, {0x1fff, 0x2001, 'w', false}, {0x1fff, 0x2001, 'r', true}, {0x2fff, 0x3001, 'r', false}, {0, 1, 'r', false},
		{0x4000, 0x4001, 'r', false}, {0x5fff, 0x6000, 'w', true}, {0x5fff, 0x6001, 'w', false}, {0xfff, 0x1001, 'r', false}} {
		if got, err := covered(strings.NewReader(maps), c.from, c.end, c.how); got != c.want || err != nil {
			t.Errorf("%+v: %v, %v", c, got, err)
		}
	}
}

// kernel plays the kernel's side: what it sends, and what it hears.
type kernel struct {
	in  *bytes.Reader
	mu  sync.Mutex
	out bytes.Buffer
}

func (k *kernel) Read(b []byte) (int, error) { return k.in.Read(b) }
func (k *kernel) Write(b []byte) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.out.Write(b)
}
func (k *kernel) Close() error { return nil }

func request(op uint32, unique uint64, uid uint32, parts ...any) []byte {
	var b bytes.Buffer
	for _, p := range append([]any{fuse.InHeader{Opcode: op, Unique: unique, UID: uid, PID: uint32(os.Getpid())}}, parts...) {
		if err := binary.Write(&b, binary.NativeEndian, p); err != nil {
			panic(err)
		}
	}
	binary.NativeEndian.PutUint32(b.Bytes(), uint32(b.Len()))
	return b.Bytes()
}

// FuzzRequest: whatever the kernel sends, nothing crashes or hangs, and who is not root gets nowhere.
func FuzzRequest(f *testing.F) {
	f.Add(request(fuse.OpOpen, 1, 0, fuse.OpenIn{}))
	f.Add(request(fuse.OpOpen, 1, 1000, fuse.OpenIn{}))
	f.Add(request(fuse.OpIoctl, 2, 0, fuse.IoctlIn{Handle: 1, Cmd: cmdValue, Arg: 5}))
	f.Add(request(fuse.OpIoctl, 3, 0, fuse.IoctlIn{Handle: 1, Cmd: cmdSum, Arg: 1 << 63}))
	f.Add(request(fuse.OpIoctl, 3, 0, fuse.IoctlIn{Handle: 9, Flags: fuse.IoctlCompat}))
	f.Add(request(fuse.OpInterrupt, 4, 0, fuse.InterruptIn{Unique: 2}))
	f.Add(request(fuse.OpRelease, 5, 0, fuse.ReleaseIn{Handle: 1}))
	f.Add(request(fuse.OpCuseInit, 5, 0, fuse.CuseInitIn{Major: 7, Minor: 40}))
	f.Add(request(fuse.OpPoll, 6, 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		e := &echo{}
		k := &kernel{in: bytes.NewReader(nil)}
		s := newServer(Device{Name: "x", Open: e.Open}, k)
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if err := s.request(ctx, request(fuse.OpOpen, 77, 0, fuse.OpenIn{})); err != nil {
			t.Fatal(err)
		}
		s.all.Wait()
		if err := s.request(ctx, b); err != nil && !errors.Is(err, errShort) {
			t.Errorf("%v", err)
		}
		s.all.Wait()
		if h, _, err := header(b); err == nil && h.UID != 0 && h.Opcode == fuse.OpOpen && e.open.Load() != 1 {
			t.Error("somebody who is not root has opened it")
		}
	})
}

// TestIntroduce: the first request of the kernel, and what is not it.
func TestIntroduce(t *testing.T) {
	for _, c := range []struct {
		name string
		in   []byte
		ok   bool
	}{
		{"as it is", request(fuse.OpCuseInit, 1, 0, fuse.CuseInitIn{Major: 7, Minor: 36, Flags: 1}), true},
		{"another protocol", request(fuse.OpCuseInit, 1, 0, fuse.CuseInitIn{Major: 8}), false},
		{"another request", request(fuse.OpOpen, 1, 0, fuse.OpenIn{}), false},
		{"torn", request(fuse.OpCuseInit, 1, 0, fuse.CuseInitIn{Major: 7})[:44], false},
		{"nothing", nil, false},
	} {
		k := &kernel{in: bytes.NewReader(c.in)}
		s := newServer(Device{Name: "blksnap"}, k)
		if err := s.introduce(); (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		}
		if said := k.out.Bytes(); c.ok != bytes.HasSuffix(said, []byte("DEVNAME=blksnap\x00")) || c.ok && len(said) != 16+72+16 {
			t.Errorf("%s: %d bytes: %q", c.name, len(said), said)
		}
	}
	if err := newServer(Device{}, &kernel{in: bytes.NewReader(nil)}).requests(t.Context()); err != nil && !errors.Is(err, io.EOF) {
		t.Error(err)
	}
}
