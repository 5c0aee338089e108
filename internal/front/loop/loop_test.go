package loop

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
	"tidemark/internal/loop"
	"tidemark/internal/testkit"
)

const diskSize = 16 << 20

// memory is a device; its last sector tells how often it was flushed.
type memory struct {
	mu      sync.RWMutex
	b       []byte
	flushes atomic.Uint64
	hang    bool
}

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	if m.hang {
		select {}
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	if off == 8<<20 {
		return 0, errors.New("damaged")
	}
	n := copy(p, m.b[off:])
	if end := off + int64(n); end == diskSize {
		binary.LittleEndian.PutUint64(p[n-8:], m.flushes.Load())
	}
	return n, nil
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return copy(m.b[off:], p), nil
}

func (m *memory) WriteZeroes(r block.Range) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.b[r.Off:r.End()])
	return nil
}
func (m *memory) Flush() error { m.flushes.Add(1); return nil }
func (m *memory) Size() int64  { return diskSize }

func TestMain(m *testing.M) {
	switch how := os.Getenv("TIDEMARK_SERVE"); how {
	case "":
		os.Exit(m.Run())
	case "helper":
		if err := HelperMain(os.Args[1:]); err != nil {
			println(err.Error())
			os.Exit(1)
		}
	case "deaf": // never answers
		time.Sleep(time.Minute)
	default:
		dev := &memory{b: make([]byte, diskSize), hang: how == "hang"}
		if err := Serve(os.NewFile(3, "conn"), dev); err != nil {
			println(err.Error())
			os.Exit(1)
		}
	}
}

type server struct {
	cmd  *exec.Cmd
	done chan error
}

func start(t *testing.T, how string) (*Export, *server) {
	t.Helper()
	testkit.Need(t, "root", "loop", "fuse")
	e, err := New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	s := &server{cmd: exec.Command(os.Args[0]), done: make(chan error, 1)}
	s.cmd.Env = append(os.Environ(), "TIDEMARK_SERVE="+how)
	s.cmd.ExtraFiles = []*os.File{e.Conn}
	s.cmd.Stderr = os.Stderr
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := e.Started(); err != nil {
		t.Fatal(err)
	}
	go func() { s.done <- s.cmd.Wait() }()
	t.Cleanup(s.kill)
	return e, s
}

func (s *server) kill() { _ = s.cmd.Process.Kill() }

func (s *server) ends(t *testing.T) {
	t.Helper()
	select {
	case err := <-s.done:
		if err != nil {
			t.Errorf("the server ended with %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the server still runs, and nobody uses the device")
	}
}

func attach(t *testing.T, e *Export, s *server, o loop.Options) *loop.Device {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	o.AutoClear = true
	d, err := e.Attach(ctx, o, s.kill)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	return d
}

func TestServe(t *testing.T) {
	for _, direct := range []bool{false, true} {
		t.Run("direct="+strconv.FormatBool(direct), func(t *testing.T) {
			e, s := start(t, "plain")
			d := attach(t, e, s, loop.Options{DirectIO: direct})
			defer s.ends(t)
			defer d.Close()
			f := d.File()
			if n, err := f.Seek(0, io.SeekEnd); err != nil || n != diskSize {
				t.Fatalf("size %d, %v", n, err)
			}
			want := make([]byte, 4<<20)
			testkit.Fill(want, 1, 0, 9)
			if _, err := f.WriteAt(want, 0); err != nil {
				t.Fatal(err)
			}
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
			if err := unix.IoctlSetInt(int(f.Fd()), unix.BLKFLSBUF, 0); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, 4<<20)
			if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("what was written does not come back (%v)", err)
			}
			tail := make([]byte, 8)
			if _, err := f.ReadAt(tail, diskSize-8); err != nil || binary.LittleEndian.Uint64(tail) == 0 {
				t.Errorf("no flush reached the device (%v)", err)
			}
			testkit.Run(t, "blkdiscard", "-o", "4096", "-l", "8192", d.Path)
			if _, err := f.ReadAt(got[:16384], 0); err != nil || !bytes.Equal(got[4096:12288], make([]byte, 8192)) || !bytes.Equal(got[12288:16384], want[12288:16384]) {
				t.Errorf("the discarded range is not zero, or more than it is (%v)", err)
			}
			if _, err := f.ReadAt(got[:4096], 8<<20); !errors.Is(err, unix.EIO) {
				t.Errorf("a read that fails: %v", err)
			}
		})
	}
}

// TestServerKilled: users get errors, none hangs, and everything can be taken down.
func TestServerKilled(t *testing.T) {
	e, s := start(t, "plain")
	d := attach(t, e, s, loop.Options{})
	if _, err := d.File().ReadAt(make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	s.kill()
	<-s.done
	failed := make(chan error, 1)
	go func() {
		_, err := d.File().ReadAt(make([]byte, 4096), 1<<20)
		failed <- err
	}()
	select {
	case err := <-failed:
		if err == nil {
			t.Error("a read with no server gave something")
		}
	case <-time.After(10 * time.Second):
		t.Fatal("a read hangs")
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if _, err := loop.Status(d.Path); !errors.Is(err, loop.ErrNotAttached) {
		t.Errorf("still attached: %v", err)
	}
}

// TestHang: a server that does not answer is ended, and nobody waits for it.
func TestHang(t *testing.T) {
	e, s := start(t, "deaf")
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := e.Attach(ctx, loop.Options{AutoClear: true}, s.kill); !errors.Is(err, ErrHang) {
		t.Errorf("%v", err)
	}
}

// TestUserGone: the user closes before it attached; the server ends.
func TestUserGone(t *testing.T) {
	e, s := start(t, "plain")
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-s.done: // with or without an error: it may not even have said hello
	case <-time.After(10 * time.Second):
		t.Error("the server still runs")
	}
}
