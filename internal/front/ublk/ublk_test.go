package ublk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/testkit"
)

func memory(t *testing.T, n int) []byte {
	t.Helper()
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(b) })
	return b
}

// TestRequests: every kind of request reaches the device as that kind, on
// 512-byte and 4096-byte blocks, and as kernels before 6.3 do it.
func TestRequests(t *testing.T) {
	for _, c := range []struct {
		name    string
		logical int64
		plain   bool
		copies  bool
	}{{"512", 512, false, false}, {"4096", 4096, false, false}, {"copied", 512, false, true}, {"plain", 512, true, true}} {
		if c.name == "copied" && !canZeroCopy() {
			continue // as the first
		}
		t.Run(c.name, func(t *testing.T) {
			s := add(t, 16<<20, func(o *order) { o.Logical, o.Plain, o.Config.Copy = c.logical, c.plain, c.copies })
			t.Log(s.about)
			if want := fmt.Sprint(!c.plain, " ", !c.plain, " ", !c.copies && canZeroCopy()); !strings.HasSuffix(s.about, want) {
				t.Errorf("served the other way: want %s", want)
			}
			requests(t, s)
			limits(t, s)
			s.checkCarried()
		})
	}
}

func requests(t *testing.T, s *served) {
	if os.Getenv("TIDEMARK_NEWEST") != "" && !canZeroCopy() {
		t.Error("the newest kernel cannot do without copies")
	}
	f := s.open()
	p := memory(t, 1<<20)
	testkit.Fill(p, 1, 0, 1)
	if _, err := f.WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
	got := memory(t, 1<<20)
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, p) {
		t.Fatalf("read back: %v", err)
	}
	if content, err := os.ReadFile(s.order.File); err != nil || !bytes.Equal(content[:len(p)], p) {
		t.Fatalf("the device has something else: %v", err)
	}
	counted := func(what int, do func() error) {
		t.Helper()
		before := s.count[what].Load()
		if err := do(); err != nil {
			t.Error(err)
		}
		if s.count[what].Load() == before {
			t.Errorf("no request of kind %d was seen", what)
		}
	}
	fd := int(f.Fd())
	counted(flushes, f.Sync)
	counted(fuas, func() error { _, err := unix.Pwritev2(fd, [][]byte{p[:4096]}, 0, unix.RWF_DSYNC); return err })
	counted(discards, func() error {
		return exec.Command("blkdiscard", "-o", "65536", "-l", "65536", s.path).Run()
	})
	counted(zeroes, func() error {
		return exec.Command("blkdiscard", "-z", "-o", "131072", "-l", "65536", s.path).Run()
	})
	if _, err := f.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	clear(p[65536:196608]) // our device's discards give zeroes
	if !bytes.Equal(got, p) {
		t.Error("after discard and zeroes: not what it should be")
	}
}

// limits: what the kernel says of the disk is what the device said.
func limits(t *testing.T, s *served) {
	for name, want := range map[string]int64{
		"logical_block_size": s.order.Logical, "physical_block_size": 4096, "discard_granularity": 8192,
		"discard_max_bytes": 1 << 20, "write_zeroes_max_bytes": 2 << 20, "max_hw_sectors_kb": 256, "fua": 1,
	} {
		b, err := os.ReadFile(fmt.Sprintf("/sys/block/%s/queue/%s", filepath.Base(s.path), name))
		if err != nil || strings.TrimSpace(string(b)) != fmt.Sprint(want) {
			t.Errorf("%s is %q, want %d: %v", name, b, want, err)
		}
	}
}

// TestFileSystem: a file system on the disk, fio on that, and a check of both.
func TestFileSystem(t *testing.T) {
	testkit.Need(t, "fio")
	s := add(t, 96<<20, func(o *order) { o.Config.Queues = 2 })
	testkit.Mkfs(t, s.path, "ext4")
	dir := testkit.Mount(t, s.path, "discard")
	fio(t, "--directory="+dir, "--size=4m", "--rw=randrw", "--numjobs=2", "--fsync=50")
	testkit.Run(t, "sync", "-f", dir)
	if err := os.RemoveAll(filepath.Join(dir, "t.0.0")); err != nil {
		t.Error(err)
	}
	testkit.Unmount(t, dir)
	testkit.Run(t, "e2fsck", "-fn", s.path)
	s.must("delete")
	testkit.Run(t, "e2fsck", "-fn", s.order.File)
	if s.count[flushes].Load() == 0 || s.count[discards].Load() == 0 {
		t.Errorf("%d flushes, %d discards", s.count[flushes].Load(), s.count[discards].Load())
	}
	s.checkCarried()
}

// checkCarried: some requests were done without a copy where that is possible,
// none elsewhere, and what failed are those that had to.
func (s *served) checkCarried() {
	s.t.Helper()
	n, vain := s.count[carries].Load(), s.count[uncarried].Load()
	can := strings.HasSuffix(s.about, " true")
	if can != (n > 0) || can && vain > 0 {
		s.t.Errorf("%d requests were done without a copy, %d otherwise than they must; served as %q", n, vain, s.about)
	}
	s.t.Logf("%d of %d requests were done without a copy, and %d not, as they must", n, s.count[reads].Load()+s.count[writes].Load(), s.count[refused].Load())
}

func fioCommand(args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	cmd := exec.CommandContext(ctx, "fio", append([]string{"--name=t", "--ioengine=libaio", "--direct=1", "--bs=4k", "--iodepth=16",
		"--verify=crc32c", "--verify_fatal=1", "--minimal", "--invalidate=0"}, args...)...)
	cmd.Cancel = func() error { cancel(); return cmd.Process.Kill() }
	return cmd
}

func fio(t *testing.T, args ...string) {
	t.Helper()
	if out, err := fioCommand(args...).CombinedOutput(); err != nil {
		t.Fatalf("fio: %v\n%s", err, out)
	}
}

// TestQueues: requests in several queues at a time, each answered by itself.
func TestQueues(t *testing.T) {
	s := add(t, 32<<20, func(o *order) { o.Config.Queues, o.Config.Depth, o.Config.MaxIO = 2, 8, 64<<10 })
	dirs, err := filepath.Glob("/sys/block/" + filepath.Base(s.path) + "/mq/*")
	if err != nil || len(dirs) != 2 || !strings.Contains(s.about, " 2 ") {
		t.Errorf("queues %v, %v, %s", dirs, err, s.about)
	}
	f := s.open()
	var wg sync.WaitGroup
	const writers, each = 24, 1 << 20
	for w := range writers {
		p := memory(t, 128<<10)
		wg.Go(func() {
			for off := int64(w) * each; off < int64(w+1)*each; off += int64(len(p)) {
				testkit.Fill(p, 0, off, uint64(w+1))
				if _, err := f.WriteAt(p, off); err != nil {
					t.Error(err)
				}
				clear(p)
				if _, err := f.ReadAt(p, off); err != nil {
					t.Error(err)
				}
				if seqs, err := testkit.Check(p, 0, off); err != nil || seqs[0] != uint64(w+1) {
					t.Errorf("at %d: %v", off, err)
				}
			}
		})
	}
	wg.Wait()
	if n := s.count[busiest].Load(); n < 2 || n > 16 {
		t.Errorf("%d requests at a time", n)
	}
}

// TestKilled: the server is killed and started again, over and over, while fio
// writes and verifies, and fio sees nothing of it.
func TestKilled(t *testing.T) {
	testkit.Need(t, "fio")
	modes := []string{"best", "plain"}
	if canZeroCopy() {
		modes = append(modes, "copied")
	}
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			s := add(t, 16<<20, func(o *order) { o.Config.Queues, o.Plain, o.Config.Copy = 2, mode == "plain", mode == "copied" })
			cmd := fioCommand("--filename="+s.path, "--rw=randwrite", "--size=4m")
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			done := make(chan error, 1)
			go func() { done <- cmd.Wait() }()
			for kills := 0; ; kills++ {
				before := s.count[writes].Load() + s.count[reads].Load()
				for ended := false; s.count[writes].Load()+s.count[reads].Load() < before+300; {
					select {
					case err := <-done:
						if err != nil {
							t.Fatalf("after %d kills: %v\n%s", kills, err, out.String())
						}
						if ended = true; kills < 3 {
							t.Errorf("fio ended after %d kills", kills)
						}
					case <-time.After(time.Millisecond):
					}
					if ended {
						t.Logf("%d kills", kills)
						s.checkCarried()
						return
					}
				}
				s.kill()
				s.start()
			}
		})
	}
}

// TestLeave: a server that leaves ends what it has begun, and another goes on.
func TestLeave(t *testing.T) {
	s := add(t, 8<<20, nil)
	f := s.open()
	p := memory(t, 64<<10)
	for i := range 3 {
		testkit.Fill(p, 0, 0, uint64(i+1))
		s.must("leave")
		written := make(chan error, 1)
		go func() { _, err := f.WriteAt(p, 0); written <- err }()
		if i, err := Stat(t.Context(), s.number); err != nil || !i.Waiting {
			t.Errorf("%+v, %v", i, err)
		}
		s.kill()
		if i == 1 {
			s.order.Die = true
			if answer := s.try(); answer != "" {
				t.Error(answer)
			}
			s.kill()
			s.order.Die = false
		}
		s.start()
		if err := <-written; err != nil {
			t.Fatal(err)
		}
		content, err := os.ReadFile(s.order.File)
		if err != nil || !bytes.Equal(content[:len(p)], p) {
			t.Fatalf("round %d: the write did not arrive: %v", i, err)
		}
	}
	s.checkCarried()
}

// TestHeld: a request that does not end keeps the server from leaving, for as
// long as it is told to wait, and keeps no other request.
func TestHeld(t *testing.T) {
	s := add(t, 8<<20, func(o *order) { o.Hold = filepath.Join(t.TempDir(), "hold") })
	f := s.open()
	if err := os.WriteFile(s.order.Hold, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	p := memory(t, 4096)
	done := make(chan error, 1)
	before := s.count[now].Load()
	go func() { _, err := f.ReadAt(p, 0); done <- err }()
	for s.count[now].Load() == before {
		time.Sleep(time.Millisecond)
	}
	if _, err := f.WriteAt(memory(t, 4096), 4096); err != nil {
		t.Error(err)
	}
	if answer := s.say("leave soon"); !strings.Contains(answer, "has not ended") {
		t.Error(answer)
	}
	select {
	case err := <-done:
		t.Errorf("the read that was held ended: %v", err)
	default:
	}
	if err := os.Remove(s.order.Hold); err != nil {
		t.Fatal(err)
	}
	s.must("leave")
	s.kill()
	s.start()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestRefusals: a device is recovered by one that has what it shows, and only
// once its server is gone.
func TestRefusals(t *testing.T) {
	s := add(t, 8<<20, func(o *order) { o.Config.Token = 0xabcdef0123456789 })
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	dev, err := newFileDevice(&s.order)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Recover(ctx, s.number, dev); !errors.Is(err, ErrServed) {
		t.Errorf("a device that is served: %v", err)
	}
	if err := Forget(t.Context(), s.number); !errors.Is(err, ErrServed) {
		t.Errorf("a device that is served: %v", err)
	}
	if _, err := Recover(t.Context(), s.number+17, dev); !errors.Is(err, ErrNoDevice) {
		t.Errorf("no device: %v", err)
	}
	if i := listed(t, s.number); i == nil || i.Token != s.order.Config.Token || i.Size != 8<<20 || !i.Started || i.Waiting || i.PID != s.cmd.Process.Pid {
		t.Errorf("%+v", i)
	}
	s.kill()
	dev.size.Store(4 << 20)
	if _, err := Recover(t.Context(), s.number, dev); err == nil || !strings.Contains(err.Error(), "8388608 bytes") {
		t.Errorf("by a smaller one: %v", err)
	}
	s.start()
}

// listed is what List says of a device, or nil.
func listed(t *testing.T, number int) *Info {
	t.Helper()
	all, err := List(t.Context())
	if err != nil {
		t.Error(err)
	}
	for i := range all {
		if all[i].Number == number {
			return &all[i]
		}
	}
	return nil
}

// TestErrors: an error of the device is its request's alone.
func TestErrors(t *testing.T) {
	s := add(t, 8<<20, func(o *order) { o.Bad = 1 << 20 })
	f := s.open()
	p := memory(t, 4096)
	if _, err := f.ReadAt(p, 1<<20); !errors.Is(err, unix.EIO) {
		t.Errorf("reading the bad place: %v", err)
	}
	if _, err := f.WriteAt(p, 1<<20); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("writing the bad place: %v", err)
	}
	if _, err := f.WriteAt(p, 2<<20); err != nil {
		t.Error(err)
	}
}

// TestDeleteWhileOpen: deletion does not wait for who has the disk open or
// mounted; they get errors, and the disk is gone.
func TestDeleteWhileOpen(t *testing.T) {
	s := add(t, 32<<20, nil)
	testkit.Mkfs(t, s.path, "ext4")
	testkit.Mount(t, s.path)
	f, err := os.OpenFile(s.path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s.must("delete")
	if _, err := f.ReadAt(memory(t, 4096), 0); err == nil {
		t.Error("the disk can still be read")
	}
	if i := listed(t, s.number); i != nil {
		t.Errorf("%+v", i)
	}
	if _, err := os.Stat(s.path); err == nil {
		t.Error("its node is still there")
	}
}

// TestForget: who waits for a server that never comes gets an error.
func TestForget(t *testing.T) {
	s := add(t, 8<<20, nil)
	f := s.open()
	s.kill()
	p := memory(t, 4096)
	got := make(chan error, 1)
	go func() { _, err := f.ReadAt(p, 0); got <- err }()
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	for { // until the kernel has noticed
		err := Forget(ctx, s.number)
		if err == nil {
			break
		}
		if !errors.Is(err, ErrServed) {
			t.Fatal(err)
		}
	}
	s.gone = true
	select {
	case err := <-got:
		if err == nil {
			t.Error("a read of nothing")
		}
	case <-ctx.Done():
		t.Fatal("the reader still waits")
	}
	if _, err := Stat(t.Context(), s.number); !errors.Is(err, ErrNoDevice) {
		t.Error(err)
	}
}

// TestResize: the disk grows while it is open, or it is said why not.
func TestResize(t *testing.T) {
	s := add(t, 8<<20, nil)
	f := s.open()
	answer := s.say(fmt.Sprint("resize ", 16<<20))
	if !CanResize() {
		if os.Getenv("TIDEMARK_NEWEST") != "" {
			t.Error("the newest kernel cannot resize")
		}
		if !strings.Contains(answer, ErrResize.Error()) {
			t.Error(answer)
		}
		return
	}
	if size, err := f.Seek(0, 2); answer != "ok" || err != nil || size != 16<<20 {
		t.Fatalf("%d bytes, %v, %s", size, err, answer)
	}
	if _, err := f.WriteAt(memory(t, 4096), 16<<20-4096); err != nil {
		t.Error(err)
	}
	s.kill() // and what grew while nobody served is seen at recovery
	if err := os.Truncate(s.order.File, 24<<20); err != nil {
		t.Fatal(err)
	}
	s.start()
	if size, err := f.Seek(0, 2); err != nil || size != 24<<20 {
		t.Errorf("%d bytes, %v", size, err)
	}
}
