package nbd

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/testkit"
)

// file is a device over a file, with a map of its blocks of zeroes.
type file struct {
	*os.File
	size int64
}

func (f *file) Flush() error { return f.Sync() }
func (f *file) Size() int64  { return f.size }
func (f *file) Extents(r block.Range) ([]block.Extent, error) {
	var out []block.Extent
	for off := r.Off; off < r.End(); {
		end := min(off&^4095+4096, r.End())
		b := make([]byte, end-off)
		if _, err := f.ReadAt(b, off); err != nil {
			return nil, err
		}
		state := block.Data
		if bytes.Equal(b, zeroes[:len(b)]) {
			state = block.Zero
		}
		if n := len(out); n > 0 && out[n-1].State == state {
			out[n-1].Len += end - off
		} else {
			out = append(out, block.Extent{Range: block.Range{Off: off, Len: end - off}, State: state})
		}
		off = end
	}
	return out, nil
}

func device(t testing.TB, size int64) *file {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "device"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		b := make([]byte, 64<<10)
		for i := range b {
			b[i] = byte(rand.Uint32())
		}
		if _, err := f.WriteAt(b, rand.Int64N(size/65536)*65536); err != nil {
			t.Fatal(err)
		}
	}
	return &file{f, size}
}

// serve gives the URI of a server that ends, with all its goroutines, with the test.
func serve(t testing.TB, exports ...Export) string {
	t.Helper()
	return serveAt(t, "nbd+unix:///"+exports[0].Name+"?socket="+filepath.Join(t.TempDir(), "s"), server(t, exports...))
}

func server(t testing.TB, exports ...Export) *Server {
	t.Helper()
	s := &Server{}
	for _, e := range exports {
		if err := s.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func serveAt(t testing.TB, uri string, s *Server) string {
	t.Helper()
	testkit.NoLeaks(t)
	l, err := Listen(uri)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(20 * time.Second):
			t.Error("the server does not end")
		}
	})
	return l.URI
}

func TestClients(t *testing.T) {
	testkit.Need(t, "nbdclients")
	d := device(t, 16<<20)
	uri := serve(t, Export{Name: "disk", Description: "a disk", Device: d})
	if out := testkit.Run(t, "nbdinfo", uri); !strings.Contains(out, "export-size: 16777216") || !strings.Contains(out, "base:allocation") || !strings.Contains(out, "can_multi_conn: true") {
		t.Errorf("nbdinfo:\n%s", out)
	}
	if out := testkit.Run(t, "nbdinfo", "--list", uri); !strings.Contains(out, `export="disk"`) {
		t.Errorf("nbdinfo --list:\n%s", out)
	}
	if out := testkit.Run(t, "nbdinfo", "--map", uri); !strings.Contains(out, "hole,zero") || !strings.Contains(out, "data") {
		t.Errorf("nbdinfo --map:\n%s", out)
	}
	copied := filepath.Join(t.TempDir(), "copy")
	testkit.Run(t, "nbdcopy", "--connections=4", "--requests=16", uri, copied)
	same(t, copied, d)
	testkit.Run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", copied, uri)
	for _, cmd := range []string{"write -P 0xab 4096 65536", "read -P 0xab 4096 65536", "write -z 8192 4096", "read -P 0 8192 4096", "discard 65536 65536", "write -f -P 1 1000 24", "read -P 1 1000 24", "flush"} {
		if out := testkit.Run(t, "qemu-io", "-f", "raw", "-c", cmd, uri); strings.Contains(out, "failed") || strings.Contains(out, "rror") {
			t.Errorf("qemu-io %s:\n%s", cmd, out)
		}
	}
	other := device(t, 16<<20)
	testkit.Run(t, "nbdcopy", "--connections=4", other.Name(), uri)
	same(t, other.Name(), d)
}

func same(t *testing.T, path string, d *file) {
	t.Helper()
	a, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(d.Name())
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a, b) {
		t.Error("the copy differs")
	}
}

func TestReadOnly(t *testing.T) {
	testkit.Need(t, "nbdclients")
	d := device(t, 1<<20)
	before, _ := os.ReadFile(d.Name())
	uri := serve(t, Export{Name: "ro", Device: d, ReadOnly: true})
	if out, err := exec.Command("qemu-io", "-f", "raw", "-c", "write 0 512", uri).CombinedOutput(); err == nil && !strings.Contains(string(out), "ead-only") && !strings.Contains(string(out), "permitted") {
		t.Errorf("a write to a read-only export: %s", out)
	}
	if after, _ := os.ReadFile(d.Name()); !bytes.Equal(before, after) {
		t.Error("it was changed")
	}
}

func TestWhereToListen(t *testing.T) {
	for _, uri := range []string{"nbd://0.0.0.0:1/x", "nbd://[::]:1/x", "nbd://192.0.2.1:1/x", "nbd://[2001:db8::1]:1/x", "nbd://example.com/x", "http://127.0.0.1/", "nbd+unix:///x", "nbds://127.0.0.1/", "::",
		"nbd://127.0.0.1/?tls-certificates=/tmp", "nbd://127.0.0.1/?socket=/tmp/s", "nbd+unix:///x?socket=s&tls-hostname=y",
		"nbd://127.0.0.1:65536/", "nbd+unix:///?socket=/tmp/" + strings.Repeat("x", 103)} {
		if l, err := Listen(uri); !errors.Is(err, ErrURI) {
			t.Errorf("%s: %v, %v", uri, l, err)
		}
	}
	path := filepath.Join(t.TempDir(), "s")
	uri := "nbd+unix:///x?socket=" + path
	l, err := Listen(uri)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	go func() {
		if c, err := l.Accept(); err == nil {
			c.Close()
		}
	}()
	if _, err := Listen(uri); !errors.Is(err, ErrSocketInUse) {
		t.Errorf("a socket in use: %v", err)
	}
}
