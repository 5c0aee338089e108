package ublk

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
	"tidemark/internal/testkit"
)

// order is what a server process is told to do.
type order struct {
	File    string // its content
	Counts  string // where it counts
	Number  int    // recover this one; -1: add
	Config  Config
	Plain   bool
	Logical int64
	Die     bool   // between the beginning and the end of a recovery
	Bad     int64  // reads and writes of this place fail; -1: none
	Hold    string // while there is such a file, reads wait
}

const timeout = 90 * time.Second // emulation is slow

// canZeroCopy says whether this kernel can do without copies.
func canZeroCopy() bool {
	c, err := openControl(false)
	if err != nil {
		return false
	}
	defer c.Close()
	return c.canZeroCopy()
}

func TestMain(m *testing.M) {
	if text := os.Getenv("TIDEMARK_UBLK"); text != "" {
		if err := serverMain(text); err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// serverMain is the process that serves; it takes words from standard input and
// answers each with a line.
func serverMain(text string) error {
	var o order
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		return err
	}
	dev, err := newFileDevice(&o)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	var s *Server
	switch {
	case o.Die:
		ctl, err := openControl(false)
		if err != nil {
			return err
		}
		dying := newServer(dev, ctl)
		dying.id = uint32(o.Number)
		if _, err := dying.takeOver(ctx); err != nil {
			return err
		}
		return unix.Kill(os.Getpid(), unix.SIGKILL)
	case o.Number < 0:
		o.Config.plain = o.Plain
		s, err = Add(ctx, dev, o.Config)
	default:
		s, err = Recover(ctx, o.Number, dev)
	}
	if err != nil {
		return err
	}
	fmt.Println("ok", s.Number(), len(s.queues), s.userCopy, s.encoded, s.zeroCopy)
	return obey(ctx, s, dev)
}

func obey(ctx context.Context, s *Server, dev *fileDevice) error {
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		var err error
		word := lines.Text()
		switch {
		case word == "leave":
			err = s.Leave(ctx)
		case word == "leave soon":
			soon, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
			err = s.Leave(soon)
			cancel()
		case word == "delete":
			err = s.Delete(ctx)
		case strings.HasPrefix(word, "resize "):
			var n int64
			fmt.Sscan(word[7:], &n)
			if err = os.Truncate(dev.f.Name(), n); err == nil {
				dev.size.Store(n)
				err = s.Resize(ctx)
			}
		}
		if err != nil {
			fmt.Println("error", err)
			continue
		}
		fmt.Println("ok")
		if word == "leave" || word == "delete" {
			if err := s.Err(); word == "leave" && !errors.Is(err, ErrLeft) || word == "delete" && err != nil {
				return err
			}
			return nil
		}
	}
	select {} // until killed
}

// The counters of a device, in memory that the test sees too.
const (
	reads = iota
	writes
	flushes
	fuas
	discards
	zeroes
	busiest // the most requests at a time
	now
	carries   // reads and writes that were done without a copy
	uncarried // those for which that went otherwise than it must
	refused   // those for which it was tried so that it must fail
	counters
)

// fileDevice is a file as a device, counting.
type fileDevice struct {
	f     *os.File
	size  atomic.Int64
	o     *order
	count []atomic.Uint64
}

func mapCounts(path string) ([]atomic.Uint64, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := f.Truncate(4096); err != nil {
		return nil, err
	}
	b, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	return unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(&b[0])), counters), nil
}

func newFileDevice(o *order) (*fileDevice, error) {
	f, err := os.OpenFile(o.File, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	d := &fileDevice{f: f, o: o}
	if d.count, err = mapCounts(o.Counts); err != nil {
		return nil, err
	}
	d.count[now].Store(0)
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	d.size.Store(st.Size())
	return d, nil
}

func (d *fileDevice) enter(what int) func() {
	d.count[what].Add(1)
	for n := d.count[now].Add(1); ; {
		most := d.count[busiest].Load()
		if n <= most || d.count[busiest].CompareAndSwap(most, n) {
			break
		}
	}
	return func() { d.count[now].Add(^uint64(0)) }
}

func (d *fileDevice) bad(p []byte, off int64) error {
	if d.o.Bad >= 0 && off <= d.o.Bad && d.o.Bad < off+int64(len(p)) {
		return errors.New("a bad place")
	}
	return nil
}

func (d *fileDevice) ReadAt(p []byte, off int64) (int, error) {
	defer d.enter(reads)()
	for d.o.Hold != "" {
		if _, err := os.Stat(d.o.Hold); err != nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if err := d.bad(p, off); err != nil {
		return 0, err
	}
	return d.f.ReadAt(p, off)
}

func (d *fileDevice) WriteAt(p []byte, off int64) (int, error) {
	defer d.enter(writes)()
	if err := d.bad(p, off); err != nil {
		return 0, unix.ENOSPC
	}
	return d.f.WriteAt(p, off)
}

func (d *fileDevice) WriteFUA(p []byte, off int64) (int, error) {
	d.count[fuas].Add(1)
	return d.WriteAt(p, off)
}

// Move lets every request be carried but those of some places in eight: of one it sees
// the data at once, of the others when it could not be carried, or not all of it.
func (d *fileDevice) Move(op block.Op, r block.Range, fua bool, l block.Load) error {
	switch place := r.Off >> 12 % 8; {
	case place == 3 || d.o.Hold != "" || d.o.Bad >= 0:
	case place == 5:
		d.refuse(l.Carry(-1, r.Off), unix.EBADF)
	case place == 6 && op == block.OpRead:
		d.refuse(l.Carry(int(d.f.Fd()), d.Size()-1), io.ErrUnexpectedEOF)
	case d.carry(op, r, l) == nil:
		if d.count[carries].Add(1); fua {
			d.count[fuas].Add(1)
		}
		return nil
	default:
		d.count[uncarried].Add(1)
	}
	p, err := l.Data()
	switch {
	case err != nil:
	case op == block.OpRead:
		_, err = d.ReadAt(p, r.Off)
	case fua:
		_, err = d.WriteFUA(p, r.Off)
	default:
		_, err = d.WriteAt(p, r.Off)
	}
	return err
}

func (d *fileDevice) refuse(err, want error) {
	if d.count[refused].Add(1); !errors.Is(err, want) {
		d.count[uncarried].Add(1)
	}
}

func (d *fileDevice) carry(op block.Op, r block.Range, l block.Load) error {
	what := reads
	if op != block.OpRead {
		what = writes
	}
	defer d.enter(what)()
	return l.Carry(int(d.f.Fd()), r.Off)
}

func (d *fileDevice) WriteZeroes(r block.Range) error {
	defer d.enter(zeroes)()
	return unix.Fallocate(int(d.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, r.Off, r.Len)
}

func (d *fileDevice) Discard(r block.Range) error {
	defer d.enter(discards)()
	return unix.Fallocate(int(d.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, r.Off, r.Len)
}

func (d *fileDevice) Flush() error { d.count[flushes].Add(1); return nil }
func (d *fileDevice) Size() int64  { return d.size.Load() }

func (d *fileDevice) Limits() block.Limits {
	return block.Limits{LogicalBlock: d.o.Logical, PhysicalBlock: 4096, Discard: 8192, MaxDiscard: 1 << 20, MaxZeroes: 2 << 20}
}

// served is a device and the process that serves it, as the test sees them.
type served struct {
	t      *testing.T
	order  order
	number int
	path   string
	about  string // what the server said of itself
	count  []atomic.Uint64
	cmd    *exec.Cmd
	in     *os.File
	out    *bufio.Scanner
	gone   bool
}

// add has a process serve a new device of a size in bytes until the test ends.
func add(t *testing.T, size int64, change func(*order)) *served {
	t.Helper()
	testkit.Need(t, "root", "ublk", "uring")
	dir := t.TempDir()
	s := &served{t: t, order: order{File: filepath.Join(dir, "disk"), Counts: filepath.Join(dir, "counts"), Number: -1, Logical: 512, Bad: -1}}
	if change != nil {
		change(&s.order)
	}
	if err := errors.Join(os.WriteFile(s.order.File, nil, 0o600), os.Truncate(s.order.File, size)); err != nil {
		t.Fatal(err)
	}
	var err error
	if s.count, err = mapCounts(s.order.Counts); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.end)
	s.start()
	s.order.Number, s.order.Plain = s.number, false
	return s
}

// end removes whatever is left.
func (s *served) end() {
	s.kill()
	if s.gone || s.path == "" {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	for { // the kernel may not know yet that the server is gone
		err := Forget(ctx, s.number)
		if err == nil || errors.Is(err, ErrNoDevice) {
			return
		}
		if !errors.Is(err, ErrServed) || ctx.Err() != nil {
			s.t.Error(err)
			return
		}
	}
}

// try starts the process, and gives what it says first.
func (s *served) try() string {
	s.t.Helper()
	text, err := json.Marshal(s.order)
	if err != nil {
		s.t.Fatal(err)
	}
	s.cmd = exec.Command(os.Args[0])
	s.cmd.Env = append(os.Environ(), "TIDEMARK_UBLK="+string(text))
	s.cmd.Stderr = os.Stderr
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	r, in, err := os.Pipe()
	if err != nil {
		s.t.Fatal(err)
	}
	s.in, s.cmd.Stdin = in, r
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	r.Close()
	s.out = bufio.NewScanner(out)
	return s.line()
}

func (s *served) start() {
	s.t.Helper()
	answer := s.try()
	if _, err := fmt.Sscanf(answer, "ok %d", &s.number); err != nil {
		s.t.Fatal(answer)
	}
	s.about = answer
	s.path = blockPath(uint32(s.number))
}

func (s *served) line() string {
	if !s.out.Scan() {
		return ""
	}
	return s.out.Text()
}

// say tells the server a word and gives its answer.
func (s *served) say(word string) string {
	s.t.Helper()
	if _, err := fmt.Fprintln(s.in, word); err != nil {
		s.t.Fatal(err)
	}
	answer := s.line()
	if answer == "ok" && word == "delete" {
		s.gone = true
	}
	return answer
}

func (s *served) must(word string) {
	s.t.Helper()
	if answer := s.say(word); answer != "ok" {
		s.t.Fatalf("%s: %q", word, answer)
	}
}

// kill ends the server as kill -9 does.
func (s *served) kill() {
	if s.cmd == nil || s.cmd.Process == nil {
		return
	}
	_ = s.cmd.Process.Kill() // it may have ended
	_ = s.cmd.Wait()
	s.in.Close()
	s.cmd = nil
}

// open opens the disk for direct I/O.
func (s *served) open() *os.File {
	s.t.Helper()
	f, err := os.OpenFile(s.path, os.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { f.Close() })
	return f
}
