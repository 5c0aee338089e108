package serve

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tidemark/internal/freeze"
	"tidemark/internal/snapshot"
	"tidemark/internal/testkit"
)

func TestMain(m *testing.M) {
	if freeze.IsWatchdog() {
		os.Exit(freeze.WatchdogMain())
	}
	if os.Getenv("TIDEMARK_HELPER") != "" {
		if err := HelperMain(os.Args[1:]); err != nil {
			println(err.Error())
			os.Exit(1)
		}
		return
	}
	if dir := os.Getenv(childFolder); dir != "" {
		println(childMain(dir).Error())
		os.Exit(1)
	}
	os.Exit(m.Run())
}

const mib = 1 << 20

func newEnv(t *testing.T) *Env {
	return envIn(t.TempDir())
}

func envIn(dir string) *Env {
	return &Env{StateDir: filepath.Join(dir, "state"), Nodes: filepath.Join(dir, "nodes"), Log: slog.New(slog.NewTextHandler(os.Stderr, nil)),
		Helper: []string{"env", "TIDEMARK_HELPER=1", os.Args[0]}}
}

func open(t *testing.T, env *Env) *Server {
	t.Helper()
	s, err := Open(t.Context(), env)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if s.watch0.Err() != nil {
			return // stopped by the test
		}
		for _, d := range s.list() {
			if err := s.Remove(context.Background(), d.spec.Name); err != nil && !errors.Is(err, ErrNotFound) {
				t.Error(err)
			}
		}
	})
	return s
}

func imageFile(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(path)
	if err == nil {
		err = errors.Join(f.Truncate(size), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func create(t *testing.T, s *Server, spec Spec) Info {
	t.Helper()
	i, err := s.Create(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// outside runs a program with a bound: this process must not touch what it serves.
func outside(t *testing.T, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v: %s", name, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

func qemuIO(t *testing.T, uri string, commands ...string) {
	t.Helper()
	testkit.Need(t, "nbdclients")
	args := []string{"-f", "raw", uri}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	if out := outside(t, "qemu-io", args...); strings.Contains(strings.ToLower(out), "fail") || strings.Contains(out, "error") {
		t.Fatalf("qemu-io %q: %s", commands, out)
	}
}

// TestServerRestart: what was written over NBD is in the file, and the device
// comes back under its name and address after a clean end and after a kill.
func TestServerRestart(t *testing.T) {
	env, path := newEnv(t), imageFile(t, 8*mib)
	s := open(t, env)
	i := create(t, s, Spec{Name: "data", Backing: path, Front: FrontNBDServer})
	if i.Kernel != "" || !strings.HasPrefix(i.Node, "nbd+unix:///data?socket=") || i.Size != 8*mib {
		t.Fatalf("created %+v, want an NBD URI and 8 MiB", i)
	}
	qemuIO(t, i.Node, "write -P 0x5a 4096 4096", "flush")
	text, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(text[4096:8192], bytes.Repeat([]byte{0x5a}, 4096)) {
		t.Fatalf("the file does not hold what was written (%v)", err)
	}
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	s = open(t, env)
	if got := s.List(); len(got) != 1 || got[0].Node != i.Node {
		t.Fatalf("after a restart %+v, want %s", got, i.Node)
	}
	qemuIO(t, i.Node, "read -P 0x5a 4096 4096")
	// A killed daemon leaves its socket, and nothing that listens.
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(i.Node)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(u.Query().Get("socket"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s = open(t, env)
	if got := s.List(); len(got) != 1 || got[0].Node != "" || len(got[0].Conditions) != 1 {
		t.Errorf("with a file where the socket was: %+v, want a device that is offline and says why", got)
	}
}

// TestLoop: the device is there as a block device, can be written and resized,
// is not removed while it is open, and its backing keeps what was written.
func TestLoop(t *testing.T) {
	testkit.Need(t, "root", "loop", "fuse")
	env, path := newEnv(t), imageFile(t, 8*mib)
	s := open(t, env)
	i := create(t, s, Spec{Name: "data", Backing: path, Front: FrontLoop})
	if i.Node != filepath.Join(env.Nodes, "data") {
		t.Errorf("node %s, want it in %s", i.Node, env.Nodes)
	}
	outside(t, "sh", "-c", "head -c 4096 /dev/zero | tr '\\0' 'x' | dd of="+i.Node+" bs=4096 seek=7 oflag=direct conv=notrunc,fsync")
	if text, err := os.ReadFile(path); err != nil || !bytes.Equal(text[7*4096:8*4096], bytes.Repeat([]byte("x"), 4096)) {
		t.Errorf("the file does not hold what was written (%v)", err)
	}
	if _, err := s.Resize(t.Context(), "data", 16*mib); err != nil {
		t.Fatal(err)
	}
	if got := outside(t, "blockdev", "--getsize64", i.Node); got != "16777216" {
		t.Errorf("size after growing %s, want 16777216", got)
	}
	if _, err := s.Resize(t.Context(), "data", 4*mib); !errors.Is(err, ErrSize) {
		t.Errorf("shrinking: %v, want %v", err, ErrSize)
	}
	user := exec.Command("sh", "-c", "exec 3<"+i.Node+"; echo open; exec sleep 60")
	out, err := user.StdoutPipe()
	if err == nil {
		err = user.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = user.Process.Kill(); _ = user.Wait() }()
	if _, err := out.Read(make([]byte, 8)); err != nil {
		t.Fatal(err)
	}
	if got := s.InUse(); len(got) != 1 {
		t.Errorf("in use: %q, want data", got)
	}
	if err := s.Remove(t.Context(), "data"); !errors.Is(err, ErrInUse) {
		t.Errorf("removing it while it is open: %v, want %v", err, ErrInUse)
	}
	if err := user.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = user.Wait()
	if err := s.Remove(t.Context(), "data"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(i.Node); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the name is still there: %v", err)
	}
}

// TestRefusals: what is refused leaves nothing behind.
func TestRefusals(t *testing.T) {
	env, path := newEnv(t), imageFile(t, mib)
	s := open(t, env)
	create(t, s, Spec{Name: "first", Backing: path, Front: FrontNBDServer})
	other := imageFile(t, mib)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	env.Taken = func(path string) string {
		if path == "/dev/null" {
			return "a group protects it"
		}
		return ""
	}
	for name, c := range map[string]struct {
		spec Spec
		want error
	}{
		"name":            {Spec{Name: "a@b", Backing: other}, ErrName},
		"path as name":    {Spec{Name: "../x", Backing: other}, ErrName},
		"name taken":      {Spec{Name: "first", Backing: other}, ErrExists},
		"backing taken":   {Spec{Name: "second", Backing: path}, ErrInUse},
		"by another name": {Spec{Name: "second", Backing: link}, ErrInUse},
		"taken elsewhere": {Spec{Name: "second", Backing: "/dev/null"}, ErrInUse},
		"no backing":      {Spec{Name: "second", Backing: other + "x"}, fs.ErrNotExist},
		"no such front":   {Spec{Name: "second", Backing: other, Front: "iscsi"}, ErrNoFront},
		"loop listens":    {Spec{Name: "second", Backing: other, Front: FrontLoop, Listen: "nbd://127.0.0.1/x"}, ErrNoFront},
	} {
		if _, err := s.Create(t.Context(), c.spec); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	if _, err := s.Create(t.Context(), Spec{Name: "second", Backing: other, Front: FrontNBDServer, Listen: "nbd://192.0.2.1/x"}); err == nil {
		t.Error("it listens where anybody can connect")
	}
	left, err := os.ReadDir(filepath.Join(env.StateDir, "devices"))
	for _, e := range left {
		if !strings.HasPrefix(e.Name(), "first.") {
			t.Errorf("%s is left behind", e.Name())
		}
	}
	if got := s.List(); len(got) != 1 || err != nil {
		t.Errorf("devices %+v, want only first (%v)", got, err)
	}
	if err := s.Remove(t.Context(), "second"); !errors.Is(err, ErrNotFound) {
		t.Errorf("removing what is not there: %v, want %v", err, ErrNotFound)
	}
}

// TestNotOverItself: what this process serves, and what lies on that, backs no
// other device of it.
func TestNotOverItself(t *testing.T) {
	testkit.Need(t, "root", "loop", "fuse", "ext4")
	s := open(t, newEnv(t))
	i := create(t, s, Spec{Name: "below", Backing: imageFile(t, 16*mib), Front: FrontLoop})
	outside(t, "mkfs.ext4", "-q", i.Node)
	dir := t.TempDir()
	outside(t, "mount", i.Node, dir)
	t.Cleanup(func() {
		if out, err := exec.Command("timeout", "60", "umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	outside(t, "truncate", "-s", "1M", filepath.Join(dir, "image"))
	for _, path := range []string{i.Node, i.Kernel, filepath.Join(dir, "image")} {
		if _, err := s.Create(t.Context(), Spec{Name: "above", Backing: path, Front: FrontNBDServer}); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), "below") {
			t.Errorf("over %s: %v, want %v", path, err, ErrInUse)
		}
	}
}

// TestRemembered: a record of a create that was killed goes, a damaged one is
// told of and stays until the device is removed.
func TestRemembered(t *testing.T) {
	env, path := newEnv(t), imageFile(t, mib)
	s := open(t, env)
	create(t, s, Spec{Name: "whole", Backing: path, Front: FrontNBDServer})
	if err := s.save(record{Spec: Spec{Name: "half", Backing: path, Front: FrontLoop}}); err != nil {
		t.Fatal(err)
	}
	if err := s.save(record{Spec: Spec{Name: "gone", Backing: path + "x", Front: FrontNBDServer}, Made: true}); err != nil {
		t.Fatal(err)
	}
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(s.path("whole"))
	if err != nil {
		t.Fatal(err)
	}
	for at := range text {
		damaged := bytes.Clone(text)
		damaged[at] ^= 0x40
		if r, err := decodeRecord(damaged); err == nil {
			t.Fatalf("byte %d changed, and it is read as %+v", at, r)
		}
	}
	text[len(text)/2] ^= 1
	if err := os.WriteFile(s.path("whole"), text, 0o600); err != nil {
		t.Fatal(err)
	}
	s = open(t, env)
	got := s.List()
	if len(got) != 2 || got[0].Name != "gone" || got[1].Name != "whole" {
		t.Fatalf("devices %+v, want gone and whole", got)
	}
	for _, i := range got {
		if i.Node != "" || len(i.Conditions) != 1 || i.Conditions[0].Code != "device-offline" {
			t.Errorf("%+v, want it offline with its condition", i)
		}
	}
	for _, i := range got {
		if err := s.Remove(t.Context(), i.Name); err != nil {
			t.Error(err)
		}
	}
	if left, err := os.ReadDir(s.folder); err != nil || len(left) != 0 {
		t.Errorf("%v is left (%v)", left, err)
	}
}

func FuzzRecord(f *testing.F) {
	b, err := encodeRecord(record{Spec: Spec{Name: "a", Backing: "/b", Front: FrontLoop}, Made: true})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"format":1,"record":{},"crc32c":0}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := decodeRecord(b)
		if err != nil {
			return
		}
		again, err := encodeRecord(r)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decodeRecord(again); err != nil {
			t.Fatal(err)
		}
	})
}

// TestLookedAt: devices can be looked at while they come and go.
func TestLookedAt(t *testing.T) {
	s := open(t, newEnv(t))
	path := imageFile(t, mib)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 30 {
			if _, err := s.Create(t.Context(), Spec{Name: "data", Backing: path, Front: FrontNBDServer}); err != nil {
				t.Error(err)
			}
			if err := s.Remove(t.Context(), "data"); err != nil {
				t.Error(err)
			}
		}
	}()
	for {
		select {
		case <-done:
			return
		default:
			s.List()
			s.InUse()
			_, _ = s.Changes("data") // which may be gone
		}
	}
}

// TestBackingComesLate: a device whose backing is not there yet comes back when it
// is, unless a snapshot is of it, which waits for the next start.
func TestBackingComesLate(t *testing.T) {
	for _, held := range []bool{false, true} {
		env := newEnv(t)
		s := open(t, env)
		image := imageFile(t, mib)
		create(t, s, Spec{Name: "late", Backing: image, Front: FrontNBDServer})
		var id snapshot.ID
		if held {
			_, id = snapshotOf(t, s, snapshot.Request{Devices: []string{"late"}, Storage: []snapshot.Storage{{Path: filepath.Join(t.TempDir(), "diff"), Limit: 4 * mib}}})
			if err := s.TakeSnapshot(t.Context(), id); err != nil {
				t.Fatal(err)
			}
		}
		away := image + ".away"
		if err := errors.Join(s.Stop(t.Context()), os.Rename(image, away)); err != nil {
			t.Fatal(err)
		}
		s = open(t, env)
		if i := s.List()[0]; i.Node != "" || len(i.Conditions) == 0 {
			t.Fatalf("without its backing: %+v", i)
		}
		if err := os.Rename(away, image); err != nil {
			t.Fatal(err)
		}
		if held {
			s.changes.Lock()
			s.late(t.Context())
			s.changes.Unlock()
			if i := s.List()[0]; i.Node != "" {
				t.Errorf("it came back past its snapshot: %+v", i)
			}
			if err := s.Stop(t.Context()); err != nil {
				t.Fatal(err)
			}
			s = open(t, env)
			if images, err := s.set.Images(id); err != nil || len(images) != 1 {
				t.Errorf("the snapshot did not go on: %v", err)
			}
			if err := s.DestroySnapshot(t.Context(), id); err != nil {
				t.Error(err)
			}
			continue
		}
		deadline := time.Now().Add(time.Minute)
		for s.List()[0].Node == "" && time.Now().Before(deadline) {
			time.Sleep(10 * time.Millisecond)
		}
		if i := s.List()[0]; i.Node == "" || len(i.Conditions) > 0 {
			t.Errorf("it did not come back: %+v", i)
		}
	}
}
