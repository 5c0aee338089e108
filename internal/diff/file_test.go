package diff

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
	"tidemark/internal/testkit"
)

// node is a block device by its path.
type node struct {
	*os.File
	size int64
}

func (n node) Flush() error { return n.Sync() }
func (n node) Size() int64  { return n.size }

func openNode(t *testing.T, d *testkit.Disk) node {
	t.Helper()
	f, err := os.OpenFile(d.Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return node{f, d.Size}
}

func command(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

// TestFileByExtent: a file on the very device that it is written to, below its
// file system; whatever is stored, the file system and its other files stay whole.
func TestFileByExtent(t *testing.T) {
	for _, c := range []struct {
		kind, mkfs, fsck string
		options          []string
	}{{"ext4", "mkfs.ext4", "e2fsck", []string{"-b", "4096"}}, {"xfs", "mkfs.xfs", "xfs_repair", nil}} {
		t.Run(c.kind, func(t *testing.T) {
			testkit.Need(t, "root", "loop", c.kind)
			d := testkit.NewDisk(t, 320<<20)
			command(t, c.mkfs, append(c.options, "-q", d.Path)...)
			dir := t.TempDir()
			if err := unix.Mount(d.Path, dir, c.kind, 0, ""); err != nil {
				t.Fatal(err)
			}
			mounted := true
			t.Cleanup(func() {
				if mounted {
					_ = unix.Unmount(dir, unix.MNT_DETACH)
				}
			})
			sums := fillWithFiles(t, dir)
			dev := openNode(t, d)
			path := filepath.Join(dir, "diff")
			f, err := OpenFile(path, 12<<20, Where{Device: dev})
			if err != nil {
				t.Fatal(err)
			}
			cfg := Config{ID: ID{5}, Chunk: 16384, Low: 1 << 20, Notify: func(e Event) {
				if e.Kind == LowSpace && e.Err != nil {
					t.Error(e.Err)
				}
			}}
			s := storage(t, cfg)
			s.AddSource(f)
			idle(s)
			rng := rand.New(rand.NewPCG(1, 1))
			stored := map[Key][]byte{}
			for i := int64(0); ; i++ {
				slot, err := s.Reserve()
				if errors.Is(err, ErrFull) {
					break
				}
				key, p := Key{0, i}, content(rng, 16384)
				if err := s.Store(slot, key, s.Version(), p); err != nil {
					t.Fatal(err)
				}
				stored[key] = p
				idle(s)
			}
			if got := f.Size(); got != 12<<20 || len(stored) < 700 {
				t.Errorf("grown to %d, %d chunks", got, len(stored))
			}
			if err := os.Truncate(path, 0); !errors.Is(err, unix.EPERM) {
				t.Errorf("somebody else could free its blocks: %v", err)
			}
			if err := f.Check(); err != nil {
				t.Error(err)
			}
			// The process is killed, and another takes the file over.
			kept := f.Kept()
			g, err := ReopenFile(kept, Where{Device: dev})
			if err := errors.Join(err, g.Check()); err != nil {
				t.Fatal(err)
			}
			var spaces []Space
			at := int64(0)
			for _, a := range s.areas {
				space, err := g.Space(at, a.space.Size())
				if err != nil {
					t.Fatal(err)
				}
				spaces, at = append(spaces, space), at+a.space.Size()
			}
			r, found, err := Recover(cfg, spaces)
			if err != nil || len(found) != len(stored) {
				t.Fatalf("%d of %d found, %v", len(found), len(stored), err)
			}
			for key, want := range stored {
				p := make([]byte, 16384)
				if err := r.Load(found[key].Slot, key, p); err != nil || !bytes.Equal(p, want) {
					t.Fatalf("%v: %v", key, err)
				}
			}
			checkTasks(t, kept)
			checkFiles(t, sums)
			if err := g.Remove(); err != nil {
				t.Error(err)
			}
			if _, err := os.Stat(path); !os.IsNotExist(err) {
				t.Errorf("the file is still there: %v", err)
			}
			if err := unix.Unmount(dir, 0); err != nil {
				t.Fatal(err)
			}
			mounted = false
			command(t, c.fsck, "-n", d.Path)
			if err := unix.Mount(d.Path, dir, c.kind, 0, ""); err != nil {
				t.Fatal(err)
			}
			checkFiles(t, sums)
			if err := unix.Unmount(dir, 0); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// checkTasks: a file that is not the one that is meant is neither grown nor
// removed; one whose growth was cut off is immutable again when it was looked at.
func checkTasks(t *testing.T, k Kept) {
	t.Helper()
	elsewhere := slices.Concat(k.Extents[1:], k.Extents[:1])
	if len(k.Extents) == 1 {
		elsewhere = []block.Range{{Off: k.Extents[0].Off + Align, Len: k.Extents[0].Len}}
	}
	for what, bad := range map[string]Task{"another file": {Inode: k.Inode + 1, Extents: k.Extents}, "moved": {Inode: k.Inode, Extents: elsewhere}} {
		bad.Path, bad.Size, bad.Made = k.Path, k.Size+1<<20, true
		for _, bad.Do = range []Action{CheckFile, GrowFile} {
			if _, err := Do(bad); !errors.Is(err, ErrCorrupt) {
				t.Errorf("%s: %s: %v", what, bad.Do, err)
			}
		}
		bad.Do = RemoveFile
		if _, err := Do(bad); err != nil {
			t.Errorf("%s: remove: %v", what, err)
		}
	}
	st, err := os.Stat(k.Path)
	if err != nil || st.Size() != k.Size {
		t.Fatalf("the file is touched: %v, %v", st, err)
	}
	f, err := os.Open(k.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := immutable(f, false); err != nil { // as a growth that was killed
		t.Fatal(err)
	}
	if _, err := Do(Task{Do: CheckFile, Path: k.Path, Inode: k.Inode, Extents: k.Extents}); err != nil {
		t.Error(err)
	}
	if err := os.Truncate(k.Path, 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("its blocks could be freed: %v", err)
	}
	if _, err := Do(Task{Do: CheckFile, Path: k.Path + "-absent", Inode: k.Inode}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
}

// fillWithFiles makes files and removes every second one, so that room is in pieces.
func fillWithFiles(t *testing.T, dir string) map[string][32]byte {
	t.Helper()
	sums := map[string][32]byte{}
	rng := rand.New(rand.NewPCG(2, 2))
	for i := range 60 {
		name := filepath.Join(dir, fmt.Sprint(i))
		p := content(rng, 200<<10)
		if err := os.WriteFile(name, p, 0o600); err != nil {
			t.Fatal(err)
		}
		sums[name] = sha256.Sum256(p)
	}
	unix.Sync()
	for i := 0; i < 60; i += 2 {
		name := filepath.Join(dir, fmt.Sprint(i))
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
		delete(sums, name)
	}
	return sums
}

func checkFiles(t *testing.T, sums map[string][32]byte) {
	t.Helper()
	for name, want := range sums {
		if p, err := os.ReadFile(name); err != nil || sha256.Sum256(p) != want {
			t.Errorf("%s is not what it was: %v", name, err)
		}
	}
}

// TestFileThroughItsFileSystem needs no privileges.
func TestFileThroughItsFileSystem(t *testing.T) {
	path := filepath.Join(t.TempDir(), "diff")
	f, err := OpenFile(path, 1<<20, Where{})
	if err != nil {
		t.Fatal(err)
	}
	s := storage(t, Config{Chunk: 4096, Low: 64 << 10, Durable: true})
	s.AddSource(f)
	idle(s)
	for i := range int64(200) {
		slot, err := s.Reserve()
		if err != nil {
			t.Fatal(err)
		}
		want := bytes.Repeat([]byte{byte(i)}, 4096)
		got := make([]byte, 4096)
		if err := errors.Join(s.Store(slot, Key{0, i}, s.Version(), want), s.Load(slot, Key{0, i}, got)); err != nil || !bytes.Equal(got, want) {
			t.Fatal(err)
		}
		idle(s)
	}
	if st, err := os.Stat(path); err != nil || st.Size() != f.Size() || f.Size() > 1<<20 {
		t.Errorf("%d bytes, %v", f.Size(), err)
	}
	if err := f.Remove(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("the file is still there: %v", err)
	}
}

// TestFileRefusals: what would be lost, and what does not stay where it is.
func TestFileRefusals(t *testing.T) {
	dir := t.TempDir()
	full := filepath.Join(dir, "full")
	if err := os.WriteFile(full, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenFile(full, 1<<20, Where{}); !errors.Is(err, ErrRefused) {
		t.Errorf("a file with content: %v", err)
	}
	if b, err := os.ReadFile(full); err != nil || string(b) != "precious" {
		t.Errorf("it now holds %q, %v", b, err)
	}
	if _, err := OpenFile(filepath.Join(dir, "small"), 100, Where{}); !errors.Is(err, ErrRefused) {
		t.Errorf("too small a limit: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "small")); !os.IsNotExist(err) {
		t.Errorf("a refused file stays: %v", err)
	}
	if err := os.Mkdir(filepath.Join(dir, "folder"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenFile(filepath.Join(dir, "folder"), 1<<20, Where{}); err == nil {
		t.Error("a folder was taken")
	}
	if _, err := os.Stat("/dev/shm"); err == nil {
		memory, err := os.MkdirTemp("/dev/shm", "tidemark-test-")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(memory)
		if _, err := OpenFile(filepath.Join(memory, "f"), 1<<20, Where{Device: sized{size: 1 << 30}}); !errors.Is(err, ErrRefused) {
			t.Errorf("by extent on a tmpfs: %v", err)
		}
	}
}

// TestExtentRefusals: every kind of extent whose bytes are not where they seem.
func TestExtentRefusals(t *testing.T) {
	for _, bad := range extentFlags {
		if _, err := extent(0, 4096, 8192, bad.bit, 0, 8192); !errors.Is(err, ErrRefused) {
			t.Errorf("%s: %v", bad.name, err)
		}
	}
	for what, c := range map[string][5]int64{"not aligned": {0, 4608, 8192, 0, 8192}, "a hole": {8192, 4096, 8192, 0, 16384}} {
		if _, err := extent(c[0], c[1], c[2], 0, c[3], c[4]); !errors.Is(err, ErrRefused) {
			t.Errorf("%s: %v", what, err)
		}
	}
	const unwritten, last, merged = 0x800, 0x1, 0x1000
	r, err := extent(4096, 1<<20, 16384, unwritten|last|merged, 8192, 16384)
	if err != nil || r != (block.Range{Off: 1<<20 + 4096, Len: 8192}) {
		t.Errorf("an ordinary one: %v, %v", r, err)
	}
}

// TestRoomWaitsForNobody: whoever reserves a slot asks for the room of a file that
// may be growing just then, in a file system that waits for that very writer.
func TestRoomWaitsForNobody(t *testing.T) {
	f, err := OpenFile(filepath.Join(t.TempDir(), "f"), 1<<20, Where{})
	if err != nil {
		t.Fatal(err)
	}
	f.growing.Lock()
	asked := make(chan int64)
	go func() { asked <- f.Room() + int64(len(f.Kept().Extents)) }()
	select {
	case <-asked:
	case <-time.After(time.Minute):
		t.Error("the room of a file that grows is waited for")
	}
	f.growing.Unlock()
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}
