package restore

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
	"tidemark/internal/loop"
	"tidemark/internal/testkit"
)

// picture is a view in memory: data, zero and undefined extents by turns.
type picture struct {
	data    []byte
	extents []block.Extent
	fail    func(off int64) error
}

func paint(size int64, seed uint64) *picture {
	rng := rand.New(rand.NewPCG(seed, 7))
	p := &picture{data: make([]byte, size)}
	for off := int64(0); off < size; {
		n := min(size-off, (1+rng.Int64N(700))*4096)
		e := block.Extent{Range: block.Range{Off: off, Len: n}, State: block.State(rng.IntN(3))}
		if e.State == block.Data && rng.IntN(4) > 0 { // some data is all zeroes
			testkit.Fill(p.data[off:off+n], 1, off, seed)
		}
		if e.State == block.Undefined { // what was there before must not matter, nor appear
			for i := range p.data[off : off+n] {
				p.data[off+int64(i)] = 0xee
			}
		}
		p.extents = append(p.extents, e)
		off += n
	}
	return p
}

func (p *picture) ReadAt(b []byte, off int64) (int, error) {
	if p.fail != nil {
		if err := p.fail(off); err != nil {
			return 0, err
		}
	}
	return copy(b, p.data[off:]), nil
}
func (p *picture) WriteAt([]byte, int64) (int, error) { return 0, block.ErrReadOnly }
func (p *picture) Flush() error                       { return nil }
func (p *picture) Size() int64                        { return int64(len(p.data)) }
func (p *picture) Extents(r block.Range) ([]block.Extent, error) {
	var out []block.Extent
	for _, e := range p.extents {
		if x := e.Intersect(r); !x.Empty() && len(out) < 3 { // a short answer is allowed
			out = append(out, block.Extent{Range: x, State: e.State})
		}
	}
	return out, nil
}

// want is what a restored disk must hold: undefined parts are zeroes.
func (p *picture) want() []byte {
	out := bytes.Clone(p.data)
	for _, e := range p.extents {
		if e.State != block.Data {
			clear(out[e.Off:e.End()])
		}
	}
	return out
}

func same(t *testing.T, path string, want []byte) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(f, got); err != nil {
		t.Fatal(err)
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("%s differs from byte %d on: %x, not %x", path, i, got[i], want[i])
		}
	}
}

func onlyFile(t *testing.T, dir string, names ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if !slices.Equal(got, names) {
		t.Errorf("in the folder: %v; want %v", got, names)
	}
}

func TestNewFile(t *testing.T) {
	testkit.NoLeaks(t)
	for _, size := range []int64{4096, 9<<20 + 512, 40 << 20} {
		view := paint(size, uint64(size))
		dir := t.TempDir()
		path := filepath.Join(dir, "image")
		var last Progress
		rep, err := Write(t.Context(), view, path, Options{Identity: "x", Progress: func(p Progress) { last = p }})
		if err != nil {
			t.Fatal(err)
		}
		same(t, path, view.want())
		onlyFile(t, dir, "image")
		if rep.Data+rep.Zero+rep.Undefined != size || last.Written != size || last.Verified != size {
			t.Errorf("%d bytes: %+v, %+v", size, rep, last)
		}
		st, _ := os.Stat(path)
		if used := st.Sys().(*syscall.Stat_t).Blocks * 512; st.Size() != size || used > rep.Data+1<<20 {
			t.Errorf("the file has %d bytes and takes %d; %d are data", st.Size(), used, rep.Data)
		}
	}
}

// TestOldContentGoes: a forced restore leaves nothing of what was there, on a file and on a device.
func TestOldContentGoes(t *testing.T) {
	d := testkit.NewDisk(t, 24<<20)
	file := filepath.Join(t.TempDir(), "image")
	view := paint(20<<20+4096, 3)
	for _, path := range []string{d.Path, file} {
		if err := os.WriteFile(path, bytes.Repeat([]byte{0xaa}, 24<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Write(t.Context(), view, path, Options{StateDir: t.TempDir()}); !errors.Is(err, ErrNotEmpty) {
			t.Fatalf("without force: %v", err)
		}
		rep, err := Write(t.Context(), view, path, Options{Force: true, Identity: "x", StateDir: t.TempDir()})
		if err != nil {
			t.Fatal(err)
		}
		same(t, path, view.want())
		if path == d.Path && rep.Verified != view.Size() {
			t.Errorf("verified %d of %d bytes", rep.Verified, view.Size())
		}
	}
	tail := make([]byte, 4096)
	f, _ := os.Open(d.Path)
	defer f.Close()
	if _, err := f.ReadAt(tail, view.Size()); err != nil || tail[0] != 0xaa {
		t.Errorf("what lies beyond the view was changed: %x, %v", tail[0], err)
	}
	if st, _ := os.Stat(file); st.Size() != view.Size() {
		t.Errorf("the file has %d bytes", st.Size())
	}
}

func TestRefusals(t *testing.T) {
	testkit.Need(t, "root", "loop", "ext4")
	view := paint(8<<20, 1)
	mounted, small, full, tail, empty := testkit.NewDisk(t, 16<<20), testkit.NewDisk(t, 4<<20), testkit.NewDisk(t, 8<<20), testkit.NewDisk(t, 8<<20), testkit.NewDisk(t, 8<<20)
	testkit.Mkfs(t, mounted.Path, "ext4")
	testkit.Mount(t, mounted.Path)
	testkit.Mkfs(t, full.Path, "ext4")
	f, err := os.OpenFile(tail.Path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{1}, 8<<20-1); err != nil {
		t.Fatal(err)
	}
	f.Close()
	held := testkit.NewDisk(t, 8<<20)
	h, err := os.OpenFile(held.Path, os.O_RDONLY|unix.O_EXCL, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	vault, dir := t.TempDir(), t.TempDir()
	link, written := filepath.Join(dir, "link"), filepath.Join(dir, "written")
	object, toObject, toNowhere := filepath.Join(vault, "object"), filepath.Join(dir, "to-object"), filepath.Join(dir, "to-nowhere")
	if err := errors.Join(os.Symlink(vault, link), os.WriteFile(written, []byte("precious"), 0o600), os.WriteFile(object, []byte("precious"), 0o600),
		os.Symlink(object, toObject), os.Symlink(dir+"/none", toNowhere)); err != nil {
		t.Fatal(err)
	}
	group := func(string) (string, bool) { return "g", true }
	for _, c := range []struct {
		name, path string
		o          Options
		want       error
		forced     bool // refused also with force
	}{
		{"mounted", mounted.Path, Options{}, ErrInUse, true},
		{"held exclusively", held.Path, Options{}, ErrInUse, true},
		{"backing file of a loop device", empty.File, Options{}, ErrInUse, true},
		{"protected", empty.Path, Options{Protected: group}, ErrProtected, true},
		{"too small", small.Path, Options{}, ErrTooSmall, true},
		{"file system on it", full.Path, Options{}, ErrNotEmpty, false},
		{"last byte set", tail.Path, Options{}, ErrNotEmpty, false},
		{"directory", dir, Options{}, ErrDirectory, true},
		{"character device", "/dev/null", Options{}, ErrKind, true},
		{"in the vault", filepath.Join(vault, "image"), Options{Vault: vault}, ErrVault, true},
		{"in the vault by a link", filepath.Join(link, "image"), Options{Vault: vault}, ErrVault, true},
		{"in the vault that is a link", filepath.Join(vault, "image"), Options{Vault: link}, ErrVault, true},
		{"a link to an object of the vault", toObject, Options{Vault: vault}, ErrVault, true},
		{"a link that leads nowhere", toNowhere, Options{}, ErrKind, true},
		{"file with content", written, Options{}, ErrNotEmpty, false},
		{"no such folder", filepath.Join(dir, "no/such"), Options{}, os.ErrNotExist, true},
	} {
		c.o.StateDir, c.o.Identity = filepath.Join(dir, "state"), "x"
		for _, force := range []bool{false, true} {
			if force && !c.forced {
				continue
			}
			c.o.Force = force
			if _, err := Write(t.Context(), view, c.path, c.o); !errors.Is(err, c.want) {
				t.Errorf("%s, force %v: %v; want %v", c.name, force, err, c.want)
			} else if !strings.Contains(err.Error(), c.path) {
				t.Errorf("%s: the error does not name the target: %v", c.name, err)
			}
		}
	}
	onlyFile(t, dir, "link", "to-nowhere", "to-object", "written") // nothing was left behind
	onlyFile(t, vault, "object")
	for _, path := range []string{written, object} {
		if b, _ := os.ReadFile(path); string(b) != "precious" {
			t.Errorf("a refused restore changed %s", path)
		}
	}
	same(t, tail.Path, append(make([]byte, 8<<20-1), 1))
}

// TestPartitionMounted: a disk is in use when one of its partitions is.
func TestPartitionMounted(t *testing.T) {
	testkit.Need(t, "ext4")
	d := testkit.NewDisk(t, 32<<20)
	testkit.OnePartition(t, d)
	testkit.Mkfs(t, d.Path+"p1", "ext4")
	testkit.Mount(t, d.Path+"p1")
	_, err := Write(t.Context(), paint(8<<20, 1), d.Path, Options{Force: true})
	if !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), "mounted at") {
		t.Errorf("%v", err)
	}
}

// TestFailureLeavesNothing: a view that cannot be read, and a file system that lies.
func TestFailureLeavesNothing(t *testing.T) {
	testkit.NoLeaks(t)
	view := paint(24<<20, 5)
	damaged := errors.New("damaged object")
	view.fail = func(off int64) error {
		if off > 12<<20 {
			return damaged
		}
		return nil
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "image")
	if _, err := Write(t.Context(), view, path, Options{Identity: "x"}); !errors.Is(err, damaged) {
		t.Errorf("%v", err)
	}
	onlyFile(t, dir)
	view.fail = nil
	var once atomic.Bool
	lie := func(p Progress) {
		if p.Written == p.Total && once.CompareAndSwap(false, true) {
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err != nil {
				t.Error(err)
				return
			}
			defer f.Close()
			e := view.extents[slices.IndexFunc(view.extents, func(e block.Extent) bool {
				return e.State == block.Data && view.data[e.Off] != 0
			})]
			if _, err := f.WriteAt([]byte("something else"), e.Off+100); err != nil {
				t.Error(err)
			}
		}
	}
	if _, err := Write(t.Context(), view, path, Options{Identity: "x", Progress: lie}); !errors.Is(err, ErrVerify) {
		t.Errorf("%v", err)
	}
	onlyFile(t, dir)
	if err := os.WriteFile(path, nil, 0o600); err != nil { // an empty file of the user's stays
		t.Fatal(err)
	}
	view.fail = func(int64) error { return damaged }
	if _, err := Write(t.Context(), view, path, Options{Identity: "x"}); !errors.Is(err, damaged) {
		t.Errorf("%v", err)
	}
	onlyFile(t, dir, "image")
	if st, err := os.Stat(path); err != nil || st.Size() != 0 {
		t.Errorf("half a restore was left: %v %v", st.Size(), err)
	}
}

const killSize = 3 * batchUnits * unitBytes / 2 // one batch and a half

// killView repeats a small picture, so that no test needs hundreds of megabytes of memory.
type killView struct{ *picture }

func newKillView() killView { return killView{paint(8<<20, 11)} }

func (v killView) Size() int64 { return killSize }
func (v killView) ReadAt(b []byte, off int64) (int, error) {
	for n := 0; n < len(b); {
		at := (off + int64(n)) % int64(len(v.data))
		n += copy(b[n:], v.data[at:])
	}
	return len(b), nil
}
func (v killView) Extents(r block.Range) ([]block.Extent, error) {
	base := r.Off - r.Off%int64(len(v.data))
	in := block.Range{Off: r.Off - base, Len: r.Len}.Intersect(block.Range{Len: int64(len(v.data))})
	out, err := v.picture.Extents(in)
	for i := range out {
		out[i].Off += base
	}
	return out, err
}

// TestRestoreChild is the process that TestKilled kills: it stops in its second batch.
func TestRestoreChild(t *testing.T) {
	target, dir, ok := strings.Cut(os.Getenv("TIDEMARK_RESTORE_CHILD"), ",")
	if !ok {
		return
	}
	stop := func(p Progress) {
		if p.Written > batchUnits*unitBytes+5*unitBytes {
			fmt.Println("ready")
			time.Sleep(time.Minute)
		}
	}
	_, err := Write(context.Background(), newKillView(), target, Options{Identity: "point 1", StateDir: dir, Progress: stop})
	t.Fatalf("was not stopped: %v", err)
}

func runAndKill(t *testing.T, target, stateDir string) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestRestoreChild$")
	cmd.Env = append(os.Environ(), "TIDEMARK_RESTORE_CHILD="+target+","+stateDir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if line != "ready\n" {
		t.Errorf("the child says %q, %v", line, err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
}

func TestKilled(t *testing.T) {
	d := testkit.NewDisk(t, killSize)
	dir := t.TempDir()
	for _, target := range []string{d.Path, filepath.Join(dir, "image")} {
		stateDir := t.TempDir()
		runAndKill(t, target, stateDir)
		view := newKillView()
		o := Options{Identity: "point 2", StateDir: stateDir}
		if _, err := Write(t.Context(), view, target, o); !errors.Is(err, ErrNotEmpty) {
			t.Fatalf("%s: another point over an unfinished one: %v", target, err)
		}
		f, err := os.OpenFile(target, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		first := view.extents[slices.IndexFunc(view.extents, func(e block.Extent) bool { return e.State == block.Data && view.data[e.Off] != 0 })]
		if _, err := f.WriteAt(make([]byte, 4096), first.Off); err != nil { // done, and spoiled since
			t.Fatal(err)
		}
		f.Close()
		o.Identity = "point 1"
		if _, err := Write(t.Context(), view, target, o); !errors.Is(err, ErrNotEmpty) || !strings.Contains(err.Error(), "changed") {
			t.Fatalf("%s: somebody wrote to it meanwhile: %v", target, err)
		}
		o.Force = true
		rep, err := Write(t.Context(), view, target, o)
		if err != nil {
			t.Fatal(err)
		}
		if want := int64(batchUnits-1) * unitBytes; rep.Resumed != want {
			t.Errorf("%s: resumed %d bytes; want %d", target, rep.Resumed, want)
		}
		checkKillView(t, view, target)
		onlyFile(t, stateDir)
	}
	onlyFile(t, dir, "image")
}

func checkKillView(t *testing.T, view killView, path string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	want, got := view.want(), make([]byte, len(view.data))
	for off := int64(0); off < killSize; off += int64(len(want)) {
		if _, err := f.ReadAt(got, off); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%s differs within %d bytes from %d (%v)", path, len(want), off, err)
		}
	}
}

// TestCancelled: an end by context leaves a state too, and a run with nothing to identify it leaves nothing.
func TestCancelled(t *testing.T) {
	testkit.NoLeaks(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "image")
	for _, id := range []string{"", "point 1"} {
		ctx, cancel := context.WithCancel(t.Context())
		stop := func(p Progress) {
			if p.Written > batchUnits*unitBytes {
				cancel()
			}
		}
		_, err := Write(ctx, newKillView(), path, Options{Identity: id, Progress: stop})
		if !errors.Is(err, ErrInterrupted) || !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		if id == "" {
			onlyFile(t, dir)
		}
	}
	onlyFile(t, dir, "image", "image.tidemark-restore")
	rep, err := Write(t.Context(), newKillView(), path, Options{Identity: "point 1"})
	if err != nil || rep.Resumed == 0 {
		t.Fatalf("%+v, %v", rep, err)
	}
	checkKillView(t, newKillView(), path)
	onlyFile(t, dir, "image")
}

func TestCompare(t *testing.T) {
	a := paint(30<<20, 9)
	b := &picture{data: bytes.Clone(a.data), extents: []block.Extent{{Range: block.Range{Len: 30 << 20}}}}
	var want []block.Range
	for i, off := range []int64{0, 4 << 20, 8<<20 - 1, 8 << 20, 29<<20 + 17} {
		b.data[off] ^= 1
		defined := slices.ContainsFunc(a.extents, func(e block.Extent) bool {
			return e.State != block.Undefined && e.Contains(block.Range{Off: off, Len: 1})
		})
		r := block.Range{Off: off, Len: 1}.Outward(4096)
		if defined && (i == 0 || !slices.Contains(want, r)) {
			want = merge(want, []block.Range{r})
		}
	}
	if len(want) < 2 {
		t.Fatal("the picture has too little that is defined: choose another seed")
	}
	got, err := Compare(t.Context(), a, b, CompareOptions{})
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v; want %v", got, err, want)
	}
	skip := func(r block.Range) bool { return r.Overlaps(want[0]) }
	got, err = Compare(t.Context(), a, b, CompareOptions{Skip: skip, Max: 1})
	if err != nil || !slices.Equal(got, want[1:2]) {
		t.Errorf("got %v, %v; want %v", got, err, want[1:2])
	}
	if _, err := Compare(t.Context(), a, paint(1<<20, 1), CompareOptions{}); err == nil {
		t.Error("devices of different sizes were compared")
	}
}

// BenchmarkWrite measures a restore to memory behind a loop device, and to a file.
func BenchmarkWrite(b *testing.B) {
	view := killView{paint(8<<20, 11)}
	view.extents = []block.Extent{{Range: block.Range{Len: 8 << 20}}}
	testkit.Fill(view.data, 1, 0, 1)
	d := testkit.NewDisk(b, killSize)
	for _, target := range []string{d.Path, filepath.Join(b.TempDir(), "image")} {
		b.Run(filepath.Base(filepath.Dir(target)), func(b *testing.B) {
			b.SetBytes(killSize)
			for b.Loop() {
				if _, err := Write(b.Context(), view, target, Options{Force: true}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func FuzzState(f *testing.F) {
	head, err := encodeHeader(header{Source: "s", Target: "t", Size: 5})
	if err != nil {
		f.Fatal(err)
	}
	s := &state{}
	s.sum = uint32(head[len(head)-4]) | uint32(head[len(head)-3])<<8 | uint32(head[len(head)-2])<<16 | uint32(head[len(head)-1])<<24
	whole := s.appendEntry(s.appendEntry(head, 1, digest{1}), 2, digest{2})
	f.Add(whole)
	f.Add(whole[:len(whole)-3])
	f.Add([]byte(stateMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, done, err := decodeState(b)
		if err != nil {
			return
		}
		if bytes.Equal(b, whole) && (h.Size != 5 || len(done) != 2) || bytes.Equal(b, whole[:len(whole)-3]) && len(done) != 1 {
			t.Errorf("%+v %v", h, done)
		}
	})
}

// TestLoopOverDevice: a disk under a loop device is in use.
func TestLoopOverDevice(t *testing.T) {
	d := testkit.NewDisk(t, 8<<20)
	l, err := loop.Attach(d.Path, loop.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Detach()
	if err := Check(paint(1<<20, 1), d.Path, Options{Force: true}); !errors.Is(err, ErrInUse) {
		t.Errorf("%v", err)
	}
}
