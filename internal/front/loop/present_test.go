package loop

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"tidemark/internal/loop"
	"tidemark/internal/testkit"
)

// grown is a device that can become larger.
type grown struct {
	*memory
	size atomic.Int64
}

func (g *grown) Size() int64 { return g.size.Load() }

func (g *grown) page(n int64) []byte {
	b := make([]byte, 4096)
	_, _ = g.ReadAt(b, n*4096) // memory does not fail
	return b
}

func helper() []string { return []string{"env", "TIDEMARK_SERVE=helper", os.Args[0]} }

func present(t *testing.T, dev *grown) *Presented {
	t.Helper()
	testkit.Need(t, "root", "loop", "fuse")
	p, err := Present(t.Context(), helper(), dev, loop.Options{DirectIO: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Detach(context.Background()); err != nil {
			t.Error(err)
		}
		select {
		case <-p.Done():
		case <-time.After(10 * time.Second):
			t.Error("the server goes on though nobody uses the device")
		}
	})
	return p
}

// outside runs a program with a bound: this process must not touch the device.
func outside(t *testing.T, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v: %s", name, args, err, out)
	}
	return string(out)
}

func newGrown(size int64) *grown {
	g := &grown{memory: &memory{b: make([]byte, diskSize)}}
	g.size.Store(size)
	return g
}

func TestPresent(t *testing.T) {
	dev := newGrown(diskSize / 2)
	p := present(t, dev)
	text := bytes.Repeat([]byte("tidemark"), 512)
	file := t.TempDir() + "/text"
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	outside(t, "dd", "if="+file, "of="+p.Path, "bs=4096", "seek=3", "oflag=direct", "conv=notrunc")
	if got := dev.page(3); !bytes.Equal(got, text) {
		t.Errorf("the device holds %.16q, want what was written", got)
	}
	if got := strings.TrimSpace(outside(t, "blockdev", "--getsize64", p.Path)); got != "8388608" {
		t.Errorf("size %s, want 8388608", got)
	}
	dev.size.Store(diskSize)
	if err := p.Resized(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := strings.TrimSpace(outside(t, "blockdev", "--getsize64", p.Path)); got != "16777216" {
		t.Errorf("size after growing %s, want 16777216", got)
	}
	outside(t, "dd", "if="+file, "of="+p.Path, "bs=4096", "seek=3000", "oflag=direct", "conv=notrunc")
	if got := dev.page(3000); !bytes.Equal(got, text) {
		t.Errorf("what was added holds %.16q, want what was written", got)
	}
}

func TestDetachWhileOpen(t *testing.T) {
	p := present(t, newGrown(diskSize))
	cmd := exec.Command("sh", "-c", "exec 3<"+p.Path+"; echo open; exec sleep 60")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	if _, err := out.Read(make([]byte, 8)); err != nil {
		t.Fatal(err)
	}
	if err := p.Detach(t.Context()); !errors.Is(err, loop.ErrBusy) {
		t.Errorf("detaching while it is open: %v, want %v", err, loop.ErrBusy)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	select {
	case <-p.Done():
	case <-time.After(10 * time.Second):
		t.Error("the last user is gone, and the server goes on")
	}
}

func TestPresentFails(t *testing.T) {
	testkit.Need(t, "root", "loop", "fuse")
	if _, err := Present(t.Context(), []string{"/nonexistent"}, newGrown(diskSize), loop.Options{}); err == nil {
		t.Error("no helper, and no error")
	}
	if _, err := Present(t.Context(), []string{"true"}, newGrown(diskSize), loop.Options{}); err == nil {
		t.Error("a helper that does nothing, and no error")
	}
	if _, err := Present(t.Context(), helper(), newGrown(diskSize), loop.Options{BlockSize: 12345}); err == nil || !strings.Contains(err.Error(), "helper") {
		t.Errorf("a block size that cannot be: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := Present(ctx, []string{"sleep", "60"}, newGrown(diskSize), loop.Options{}); err == nil {
		t.Error("a helper that hangs, and no error")
	}
}
