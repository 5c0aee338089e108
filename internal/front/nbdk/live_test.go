package nbdk

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
	"tidemark/internal/front/nbd"
	"tidemark/internal/testkit"
)

// image is a device over a file.
type image struct {
	*os.File
	size int64
}

func (i *image) Size() int64  { return i.size }
func (i *image) Flush() error { return i.Sync() }
func (i *image) Discard(r block.Range) error {
	return unix.Fallocate(int(i.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, r.Off, r.Len)
}

// TestMain is also the server process: TIDEMARK_NBDK is the image it serves.
func TestMain(m *testing.M) {
	path := os.Getenv("TIDEMARK_NBDK")
	if path == "" {
		os.Exit(m.Run())
	}
	if err := serveImage(path); err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
}

// serveImage attaches or reattaches, says "ready NODE", and does what it is told, a line each.
func serveImage(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	dev := &image{f, st.Size()}
	s := &nbd.Server{}
	if err := s.Add(nbd.Export{Name: "disk", Device: dev, ReadOnly: os.Getenv("TIDEMARK_NBDK_READONLY") != ""}); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var d *Device
	if os.Getenv("TIDEMARK_NBDK_AGAIN") != "" {
		d, err = Reattach(ctx, s, "disk", path)
	} else {
		n, _ := strconv.Atoi(os.Getenv("TIDEMARK_NBDK_CONNECTIONS"))
		wait, _ := time.ParseDuration(os.Getenv("TIDEMARK_NBDK_WAIT"))
		d, err = Attach(ctx, s, "disk", Options{Identity: path, Wait: wait, Connections: n})
	}
	if err != nil {
		return err
	}
	fmt.Println("ready", d.Path)
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		switch word, arg, _ := strings.Cut(lines.Text(), " "); word {
		case "resize":
			size, _ := strconv.ParseInt(arg, 10, 64)
			dev.size, err = size, errors.Join(f.Truncate(size), d.Resize(ctx, size))
		case "detach":
			err = d.Detach(ctx)
		case "release":
			d.Release()
		case "done":
			<-d.Done()
		}
		cancel()
		if err != nil {
			fmt.Println("error", err)
		} else {
			fmt.Println("ok")
		}
	}
	return nil
}

// server is a process that serves an image.
type server struct {
	t     *testing.T
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines chan string
	node  string
}

// newImage gives a file of some size on tmpfs; the device with it goes with the test.
func newImage(t *testing.T, size int64) string {
	t.Helper()
	testkit.Need(t, "root", "nbd")
	dir, err := os.MkdirTemp("/dev/shm", "tidemark-test-"+strconv.Itoa(os.Getpid())+"-")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "image")
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := Forget(context.Background(), path); err != nil && !errors.Is(err, ErrNotFound) {
			t.Error(err)
		}
	})
	return path
}

// start starts a server of an image and waits until the device is served.
func start(t *testing.T, image string, env ...string) *server {
	t.Helper()
	s := launch(t, image, env...)
	line := s.line()
	node, ok := strings.CutPrefix(line, "ready ")
	if !ok {
		t.Fatalf("the server says %q", line)
	}
	s.node = node
	return s
}

func launch(t *testing.T, image string, env ...string) *server {
	t.Helper()
	s := &server{t: t, cmd: exec.Command(os.Args[0]), lines: make(chan string, 10)}
	s.cmd.Env = append(append(os.Environ(), "TIDEMARK_NBDK="+image, "TIDEMARK_NBDK_WAIT=1m"), env...)
	s.cmd.Stderr = os.Stderr
	in, err := s.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s.in = in
	go func() {
		for lines := bufio.NewScanner(out); lines.Scan(); {
			s.lines <- lines.Text()
		}
		close(s.lines)
	}()
	t.Cleanup(s.kill)
	return s
}

// kill is kill -9.
func (s *server) kill() {
	_ = s.cmd.Process.Kill()
	for range s.lines { // until it is gone
	}
	_ = s.cmd.Wait() // a second time it is no use, and no harm
}

func (s *server) line() string {
	s.t.Helper()
	select {
	case line := <-s.lines:
		return line
	case <-time.After(2 * time.Minute):
		s.t.Fatal("the server says nothing")
		return ""
	}
}

// tell has the server do something, and gives the error that it says.
func (s *server) tell(what string) error {
	s.t.Helper()
	if _, err := fmt.Fprintln(s.in, what); err != nil {
		s.t.Fatal(err)
	}
	if line := s.line(); line != "ok" {
		return errors.New(line)
	}
	return nil
}

func (s *server) must(what string) {
	s.t.Helper()
	if err := s.tell(what); err != nil {
		s.t.Errorf("%s: %v", what, err)
	}
}

func sizeOf(t *testing.T, node string) int64 {
	t.Helper()
	f, err := os.Open(node)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestDevice: what is written to the device is in the image, discards and
// flushes arrive, it grows, and it is not taken from somebody who uses it.
func TestDevice(t *testing.T) {
	image := newImage(t, 64<<20)
	s := start(t, image)
	if n := sizeOf(t, s.node); n != 64<<20 {
		t.Errorf("%d bytes", n)
	}
	want := make([]byte, 4<<20)
	testkit.Fill(want, 1, 8192, 3)
	f, err := os.OpenFile(s.node, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(want, 8192); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	testkit.Run(t, "blkdiscard", "-o", "16384", "-l", "8192", s.node)
	clear(want[8192:16384])
	all, err := os.ReadFile(image)
	if err != nil || !bytes.Equal(all[8192:][:len(want)], want) {
		t.Errorf("the image holds something else (%v)", err)
	}
	if err := s.tell("detach"); err == nil || !strings.Contains(err.Error(), ErrBusy.Error()) || !strings.Contains(err.Error(), strconv.Itoa(os.Getpid())) {
		t.Errorf("detached while it is open: %v", err)
	}
	f.Close()
	again := launch(t, image)
	if line := again.line(); !strings.Contains(line, ErrServed.Error()) {
		t.Errorf("a second device of that identity: %s", line)
	}
	s.must(fmt.Sprintf("resize %d", 96<<20))
	if n := sizeOf(t, s.node); n != 96<<20 {
		t.Errorf("%d bytes after it grew", n)
	}
	s.must("detach")
	s.must("done")
	if _, err := Find(image); !errors.Is(err, ErrNotFound) {
		t.Errorf("detached, and still %v", err)
	}
}

// TestReadOnly: the kernel itself refuses writes.
func TestReadOnly(t *testing.T) {
	image := newImage(t, 16<<20)
	s := start(t, image, "TIDEMARK_NBDK_READONLY=1")
	if f, err := os.OpenFile(s.node, os.O_WRONLY, 0); err == nil {
		_, err = f.Write(make([]byte, 4096))
		if err = errors.Join(err, f.Sync()); err == nil {
			t.Error("a write was taken")
		}
		f.Close()
	}
	if out := testkit.Run(t, "blockdev", "--getro", s.node); strings.TrimSpace(out) != "1" {
		t.Errorf("blockdev --getro: %s", out)
	}
	s.must("detach")
}

// TestReconnectUnderLoad: the server is killed and started again, several times, under a
// mounted file system with a load that checks what it wrote. Nobody sees an error.
func TestReconnectUnderLoad(t *testing.T) {
	testkit.Need(t, "ext4", "fio")
	for _, connections := range []string{"1", "3"} {
		t.Run(connections, func(t *testing.T) {
			image := newImage(t, 96<<20)
			s := start(t, image, "TIDEMARK_NBDK_CONNECTIONS="+connections)
			if connections != "1" { // the minute is not to be waited for in a test
				found, err := Find(image)
				if err = errors.Join(err, genl{}.setLook(found.Index, 3*time.Second)); err != nil {
					t.Fatal(err)
				}
			}
			testkit.Mkfs(t, s.node, "ext4")
			dir := testkit.Mount(t, s.node)
			fio := exec.Command("fio", "--name=load", "--directory="+dir, "--size=16M", "--rw=randwrite", "--bsrange=4k-64k", "--ioengine=libaio",
				"--iodepth=8", "--direct=1", "--verify=crc32c", "--verify_fatal=1", "--fsync=64", "--time_based", "--runtime=8", "--loops=100", "--output-format=terse")
			var out bytes.Buffer
			fio.Stdout, fio.Stderr = &out, &out
			if err := fio.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- fio.Wait() }()
			t.Cleanup(func() { _ = fio.Process.Kill() })
			for range 3 {
				time.Sleep(1500 * time.Millisecond) // load in between; nothing depends on how much
				s.kill()
				time.Sleep(200 * time.Millisecond) // and requests that wait
				s = start(t, image, "TIDEMARK_NBDK_AGAIN=1")
			}
			select {
			case err := <-ended:
				if err != nil || strings.Contains(out.String(), "error") {
					t.Errorf("the load: %v\n%s", err, out.String())
				}
			case <-time.After(3 * time.Minute):
				t.Fatalf("the load does not end: %s", out.String())
			}
			testkit.Unmount(t, dir)
			testkit.Run(t, "e2fsck", "-fn", s.node)
			s.must("detach")
			if log := testkit.Run(t, "dmesg"); strings.Contains(log, "I/O error, dev "+filepath.Base(s.node)) {
				t.Errorf("the kernel saw I/O errors:\n%s", log)
			}
		})
	}
}

// TestRelease: a device that was let go of waits for the next server, with the size that the image has by then.
func TestRelease(t *testing.T) {
	image := newImage(t, 16<<20)
	s := start(t, image)
	s.must("release")
	s.kill()
	read := make(chan error, 1)
	go func() {
		f, err := os.Open(s.node)
		if err == nil {
			_, err = f.ReadAt(make([]byte, 4096), 0)
			f.Close()
		}
		read <- err
	}()
	select {
	case err := <-read:
		t.Errorf("a read without a server: %v", err)
	case <-time.After(500 * time.Millisecond):
	}
	if err := os.Truncate(image, 32<<20); err != nil {
		t.Fatal(err)
	}
	s = start(t, image, "TIDEMARK_NBDK_AGAIN=1")
	if err := <-read; err != nil {
		t.Errorf("a read that waited: %v", err)
	}
	if n := sizeOf(t, s.node); n != 32<<20 {
		t.Errorf("%d bytes", n)
	}
	other := launch(t, image, "TIDEMARK_NBDK_AGAIN=1")
	select {
	case line := <-other.lines:
		t.Errorf("two servers: %s", line)
	case <-time.After(500 * time.Millisecond): // it waits for the first to end
	}
	s.kill()
	if line := other.line(); line != "ready "+s.node {
		t.Errorf("the next server says %q", line)
	}
	other.must("detach")
}

// TestNoServerInTime: when nobody serves the device for too long, requests
// fail, and the device can be taken away.
func TestNoServerInTime(t *testing.T) {
	image := newImage(t, 16<<20)
	s := start(t, image, "TIDEMARK_NBDK_WAIT=2s")
	f, err := os.Open(s.node)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.ReadAt(make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	s.kill()
	failed := make(chan error, 1)
	go func() { _, err := f.ReadAt(make([]byte, 4096), 8<<20); failed <- err }()
	select {
	case err := <-failed:
		if !errors.Is(err, unix.EIO) {
			t.Errorf("a read that nobody answers: %v", err)
		}
	case <-time.After(time.Minute):
		t.Fatal("a read waits for ever")
	}
	if err := Forget(t.Context(), image); !errors.Is(err, ErrBusy) {
		t.Errorf("forgotten while it is open: %v", err)
	}
	f.Close()
	if err := Forget(t.Context(), image); err != nil {
		t.Error(err)
	}
}
