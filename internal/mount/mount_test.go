package mount

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
	"tidemark/internal/loop"
	"tidemark/internal/testkit"
)

// image is a file as a read-only view.
type image struct {
	*os.File
	size int64
}

func (i image) WriteAt([]byte, int64) (int, error) { return 0, block.ErrReadOnly }
func (i image) Flush() error                       { return nil }
func (i image) Size() int64                        { return i.size }

func openImage(path string) (image, error) {
	f, err := os.Open(path)
	if err != nil {
		return image{}, err
	}
	size, err := f.Seek(0, io.SeekEnd)
	return image{f, size}, err
}

// cover is an overlay of whole blocks in memory, with a scratch file to see that it goes.
type cover struct {
	block.Device
	mu      sync.Mutex
	blocks  map[int64][]byte
	scratch string
}

const grain = 4096

func (c *cover) ReadAt(p []byte, off int64) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n, err := c.Device.ReadAt(p, off); n < len(p) {
		return n, err
	}
	for b := off / grain; b*grain < off+int64(len(p)); b++ {
		if data, ok := c.blocks[b]; ok {
			part := block.Range{Off: b * grain, Len: grain}.Intersect(block.Range{Off: off, Len: int64(len(p))})
			copy(p[part.Off-off:part.End()-off], data[part.Off-b*grain:])
		}
	}
	return len(p), nil
}

func (c *cover) WriteAt(p []byte, off int64) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for b := off / grain; b*grain < off+int64(len(p)); b++ {
		if c.blocks[b] == nil {
			c.blocks[b] = make([]byte, grain)
			if _, err := c.Device.ReadAt(c.blocks[b], b*grain); err != nil && err != io.EOF {
				return 0, err
			}
		}
		part := block.Range{Off: b * grain, Len: grain}.Intersect(block.Range{Off: off, Len: int64(len(p))})
		copy(c.blocks[b][part.Off-b*grain:], p[part.Off-off:part.End()-off])
	}
	return len(p), nil
}

func (c *cover) Close() error { return os.Remove(c.scratch) }

func TestMain(m *testing.M) {
	if len(os.Args) == 6 && os.Args[1] == "mounter" {
		if err := mounter(os.Args[2], os.Args[3], os.Args[4], os.Args[5]); err != nil {
			os.Exit(1)
		}
		return
	}
	if len(os.Args) < 2 || !strings.HasPrefix(os.Args[1], "mount-serve") {
		os.Exit(m.Run())
	}
	err := ServeMain(func(_ context.Context, spec json.RawMessage) (block.Device, error) {
		var path string
		if err := json.Unmarshal(spec, &path); err != nil {
			return nil, err
		}
		if path == "hang" {
			time.Sleep(time.Minute)
		}
		return openImage(path)
	}, func(view block.Device, dir string) (block.Device, error) {
		name := filepath.Join(dir, "scratch-"+strconv.Itoa(os.Getpid()))
		return &cover{Device: view, blocks: map[int64][]byte{}, scratch: name}, os.WriteFile(name, nil, 0o600)
	})
	if err != nil {
		os.Exit(1)
	}
}

// options gives a serving process that the test can find again, and its scratch folder.
func options(t *testing.T, path string) Options {
	t.Helper()
	testkit.Need(t, "root", "loop", "fuse")
	spec, err := json.Marshal(path)
	if err != nil {
		t.Fatal(err)
	}
	return Options{Spec: spec, Server: []string{os.Args[0], "mount-serve-" + t.Name() + strconv.Itoa(os.Getpid())}, Scratch: t.TempDir()}
}

// serverOf is the process that serves, or 0.
func serverOf(o Options) int {
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range all {
		if b, err := os.ReadFile(p); err == nil && bytes.Contains(b, []byte("\x00"+o.Server[1]+"\x00")) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(p)))
			return pid
		}
	}
	return 0
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Errorf("after a minute: not %s", what)
			return
		}
	}
}

// gone checks that nothing is left of a mount.
func gone(t *testing.T, o Options, dir string) {
	t.Helper()
	eventually(t, "without a serving process", func() bool { return serverOf(o) == 0 })
	if left, _ := filepath.Glob(o.Scratch + "/*"); len(left) > 0 {
		t.Errorf("left in the scratch folder: %v", left)
	}
	table, _ := os.ReadFile("/proc/self/mountinfo")
	if bytes.Contains(table, []byte(dir)) {
		t.Errorf("still mounted: %s", dir)
	}
}

func mountAt(t *testing.T, path string, o Options) (string, error) {
	t.Helper()
	view, err := openImage(path)
	if err != nil {
		t.Fatal(err)
	}
	defer view.Close()
	dir := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	err = Mount(ctx, view, dir, o)
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }) // mostly unmounted
	return dir, err
}

func hash(t *testing.T, path string) [32]byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(b)
}

// crashImage is a copy of the disk under a mounted and busy file system, with
// files that were synced one by one: what a power cut would leave.
func crashImage(t *testing.T, d *testkit.Disk, dir string, files int) string {
	t.Helper()
	for i := range files {
		f, err := os.Create(filepath.Join(dir, fmt.Sprintf("file%d", i)))
		if err != nil {
			t.Fatal(err)
		}
		_, err = fmt.Fprintf(f, "content %d", i)
		if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(t.TempDir(), "image")
	testkit.Run(t, "cp", "--sparse=always", d.File, path)
	return path
}

var sizes = map[string]int64{"ext4": 64 << 20, "xfs": 320 << 20, "btrfs": 128 << 20}

// TestDirtyJournal: what was synced is there after replay, the view stays as it
// is, and umount ends everything. The original stays mounted where that may be.
func TestDirtyJournal(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(kind, func(t *testing.T) {
			d := testkit.NewDisk(t, sizes[kind])
			testkit.Mkfs(t, d.Path, kind)
			src := testkit.Mount(t, d.Path)
			path := crashImage(t, d, src, 20)
			o := options(t, path)
			if kind == "btrfs" {
				path = withoutOriginal(t, d, src, path, o)
			}
			before := hash(t, path)
			for _, writable := range []bool{false, true} {
				o.Writable = writable
				checkTree(t, path, o)
			}
			if hash(t, path) != before {
				t.Error("the view was changed")
			}
		})
	}
}

// checkTree mounts, looks, writes where it may, unmounts, and sees that all is gone.
func checkTree(t *testing.T, path string, o Options) {
	t.Helper()
	dir, err := mountAt(t, path, o)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		b, err := os.ReadFile(filepath.Join(dir, fmt.Sprintf("file%d", i)))
		if want := fmt.Sprintf("content %d", i); err != nil || string(b) != want {
			t.Errorf("file%d: %q, %v", i, b, err)
		}
	}
	err = os.WriteFile(filepath.Join(dir, "new"), make([]byte, 1<<20), 0o600)
	if o.Writable && err != nil || !o.Writable && !errors.Is(err, unix.EROFS) {
		t.Errorf("writable %v: writing gave %v", o.Writable, err)
	}
	if serverOf(o) == 0 {
		t.Error("no serving process was found: the test cannot see it end")
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	gone(t, o, dir)
}

// TestFlusher: no thread of the server can wait for the device that it serves.
func TestFlusher(t *testing.T) {
	testkit.Need(t, "ioflusher")
	d := testkit.NewDisk(t, sizes["ext4"])
	testkit.Mkfs(t, d.Path, "ext4")
	path := filepath.Join(t.TempDir(), "image")
	testkit.Run(t, "cp", "--sparse=always", d.File, path)
	o := options(t, path)
	dir, err := mountAt(t, path, o)
	if err != nil {
		t.Fatal(err)
	}
	const memallocNoIO = 0x80000 // PF_MEMALLOC_NOIO
	stats, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", serverOf(o)))
	if len(stats) == 0 {
		t.Error("no serving process was found")
	}
	for _, p := range stats {
		b, err := os.ReadFile(p)
		if err != nil {
			continue // a thread that ended
		}
		fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		if flags, err := strconv.ParseUint(fields[6], 10, 64); err != nil || flags&memallocNoIO == 0 {
			t.Errorf("%s: flags %x, %v", p, flags, err)
		}
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	gone(t, o, dir)
}

// TestMounterKilled: when the process that mounts dies on its way, nothing stays.
func TestMounterKilled(t *testing.T) {
	d := testkit.NewDisk(t, sizes["ext4"])
	testkit.Mkfs(t, d.Path, "ext4")
	path := filepath.Join(t.TempDir(), "image")
	testkit.Run(t, "cp", "--sparse=always", d.File, path)
	o := options(t, path)
	for _, wait := range []time.Duration{0, 5 * time.Millisecond, 20 * time.Millisecond} {
		dir := t.TempDir()
		cmd := exec.Command(os.Args[0], "mounter", path, dir, o.Server[1], o.Scratch)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "serving", func() bool { return serverOf(o) != 0 })
		time.Sleep(wait) // another place to be killed at
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if err := unix.Unmount(dir, 0); err != nil && !errors.Is(err, unix.EINVAL) { // it may have come that far
			t.Error(err)
		}
		gone(t, o, dir)
	}
}

// mounter is the process that TestMounterKilled kills.
func mounter(path, dir, verb, scratch string) error {
	view, err := openImage(path)
	if err != nil {
		return err
	}
	spec, err := json.Marshal(path)
	if err != nil {
		return err
	}
	return Mount(context.Background(), view, dir, Options{Spec: spec, Server: []string{os.Args[0], verb}, Scratch: scratch})
}

// withoutOriginal sees that a btrfs is refused while its original is mounted,
// or there at all, and takes the original away.
func withoutOriginal(t *testing.T, d *testkit.Disk, src, path string, o Options) string {
	t.Helper()
	for _, state := range []string{"mounted", "present"} {
		if dir, err := mountAt(t, path, o); !errors.Is(err, ErrSameFS) {
			t.Errorf("original %s: %v", state, err)
		} else {
			gone(t, o, dir)
		}
		testkit.Unmount(t, src)
	}
	testkit.Run(t, "losetup", "-d", d.Path)
	return path
}

// TestBtrfsOlder: an older point can be mounted after a newer one of the same file system.
func TestBtrfsOlder(t *testing.T) {
	d := testkit.NewDisk(t, sizes["btrfs"])
	testkit.Mkfs(t, d.Path, "btrfs")
	src := testkit.Mount(t, d.Path)
	older := crashImage(t, d, src, 20)
	if err := os.WriteFile(filepath.Join(src, "more"), []byte("more"), 0o600); err != nil {
		t.Fatal(err)
	}
	testkit.Run(t, "sync", "-f", src)
	newer := crashImage(t, d, src, 20)
	testkit.Unmount(t, src)
	testkit.Run(t, "losetup", "-d", d.Path)
	for _, path := range []string{newer, older, newer} {
		checkTree(t, path, options(t, path))
	}
}

// TestServerKilled: users see errors, nobody hangs, and umount works, also
// where changes had not been written.
func TestServerKilled(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs"} {
		for _, writable := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s,writable=%v", kind, writable), func(t *testing.T) { killServer(t, kind, writable) })
		}
	}
}

func killServer(t *testing.T, kind string, writable bool) {
	d := testkit.NewDisk(t, sizes[kind])
	testkit.Mkfs(t, d.Path, kind)
	src := testkit.Mount(t, d.Path)
	if err := os.WriteFile(filepath.Join(src, "big"), bytes.Repeat([]byte("x"), 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	testkit.Run(t, "sync", "-f", src)
	path := crashImage(t, d, src, 1)
	o := options(t, path)
	o.Writable = writable
	others := ofFUSE(t)
	dir, err := mountAt(t, path, o)
	if err != nil {
		t.Fatal(err)
	}
	if writable {
		if err := os.WriteFile(filepath.Join(dir, "dirty"), bytes.Repeat([]byte("y"), 4<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Kill(serverOf(o), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "dead", func() bool { return serverOf(o) == 0 })
	done := make(chan [2]error, 1)
	go func() {
		_, err := os.ReadFile(filepath.Join(dir, "big"))
		done <- [2]error{err, unix.Unmount(dir, 0)}
	}()
	select {
	case errs := <-done:
		if !errors.Is(errs[0], unix.EIO) || errs[1] != nil {
			t.Errorf("with no server reading gives %v, umount %v", errs[0], errs[1])
		}
	case <-time.After(time.Minute):
		t.Fatal("hangs")
	}
	testkit.Run(t, "rm", "-f", filepath.Join(o.Scratch, "scratch-*")) // the test's overlay has a name
	eventually(t, "detached", func() bool {
		return !slices.ContainsFunc(ofFUSE(t), func(path string) bool { return !slices.Contains(others, path) })
	})
}

// ofFUSE are the loop devices that lie on FUSE files, whoever's.
func ofFUSE(t *testing.T) (paths []string) {
	t.Helper()
	all, err := loop.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range all {
		if l.Backing == "/" || l.Backing == "" {
			paths = append(paths, l.Path)
		}
	}
	return paths
}

func TestPartition(t *testing.T) {
	testkit.Need(t, "ext4")
	d := testkit.NewDisk(t, 40<<20)
	testkit.OnePartition(t, d)
	testkit.Mkfs(t, d.Path+"p1", "ext4")
	src := testkit.Mount(t, d.Path+"p1")
	path := crashImage(t, d, src, 20)
	o := options(t, path)
	for _, c := range []struct {
		number int
		says   string
	}{{0, "1 (39 MiB from byte 1048576)"}, {2, "there is no 2"}} {
		o.Partition = c.number
		if _, err := mountAt(t, path, o); !errors.Is(err, ErrPartition) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("partition %d: %v", c.number, err)
		}
	}
	o.Partition = 1
	checkTree(t, path, o)
}

func TestRefusals(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	o := options(t, path)
	if dir, err := mountAt(t, path, o); !errors.Is(err, ErrNoFileSystem) {
		t.Errorf("zeroes: %v", err)
	} else {
		gone(t, o, dir)
	}
	o.Partition = 1
	if _, err := mountAt(t, path, o); !errors.Is(err, ErrPartition) {
		t.Errorf("a partition of a disk without a table: %v", err)
	}
	o.Partition, o.Type = 0, "ext4" // the kernel says no: everything is taken down again
	if dir, err := mountAt(t, path, o); !errors.Is(err, unix.EINVAL) {
		t.Errorf("no ext4: %v", err)
	} else {
		gone(t, o, dir)
	}
	o.Spec = json.RawMessage(`"/no/such/image"`)
	if dir, err := mountAt(t, path, o); err == nil || !strings.Contains(err.Error(), "/no/such/image") {
		t.Errorf("a view that does not open: %v", err)
	} else {
		gone(t, o, dir)
	}
	view, err := openImage(path)
	if err != nil {
		t.Fatal(err)
	}
	defer view.Close()
	for _, dir := range []string{path, path + "/none", path + "-none"} {
		if err := Mount(t.Context(), view, dir, o); !errors.Is(err, ErrDir) {
			t.Errorf("%s: %v", dir, err)
		}
	}
	vault := filepath.Join(t.TempDir(), "vault")
	if err := os.Mkdir(vault, 0o700); err != nil {
		t.Fatal(err)
	}
	link := vault + "-link"
	if err := os.Symlink(vault, link); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"/proc", vault, link, filepath.Dir(vault), "/"} {
		o.Visible = []string{link}
		if err := Mount(t.Context(), view, dir, o); !errors.Is(err, ErrTaken) {
			t.Errorf("%s: %v", dir, err)
		}
	}
	o.Visible = []string{vault + "-not"} // a neighbour whose name begins alike
	if err := os.Mkdir(vault+"-not", 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := mountpoint(vault, o.Visible); err != nil {
		t.Error(err)
	}
	o.Spec = json.RawMessage(`"hang"`)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := Mount(ctx, view, t.TempDir(), o); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a server that hangs: %v", err)
	}
	gone(t, o, "hang")
}
