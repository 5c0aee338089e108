package nbdk

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	abi "tidemark/internal/abi/nbd"
	"tidemark/internal/front/nbd"
	"tidemark/internal/testkit"
)

// fake is a kernel whose NBD client does what the real one does with sockets:
// it takes new ones for dead ones only, and sends what was under way again.
type fake struct {
	mu      sync.Mutex
	devices map[int]*fakeDevice
	user    string // who has the devices open
	refuse  error  // of the next command
}

type fakeDevice struct {
	backend string
	size    int64
	flags   uint16
	socks   []net.Conn // nil where one is dead
}

func newFake() *fake { return &fake{devices: map[int]*fakeDevice{}} }

func (k *fake) send(_ context.Context, what uint8, c command) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.refuse != nil {
		return -1, k.refuse
	}
	if what == abi.GenlConnect {
		d := &fakeDevice{backend: c.backend, size: c.size, flags: c.flags, socks: make([]net.Conn, len(c.sockets))}
		k.devices[len(k.devices)] = d
		return len(k.devices) - 1, d.take(c)
	}
	d := k.devices[c.index]
	if d == nil || what == abi.GenlReconfigure && d.backend != c.backend {
		return -1, unix.EINVAL
	}
	if what == abi.GenlDisconnect {
		for _, s := range d.socks {
			if s != nil {
				_, _ = s.Write(request(abi.CmdDisc, 0, 0)) // it may be dead by now
				s.Close()
			}
		}
		delete(k.devices, c.index)
		return -1, nil
	}
	if c.size != 0 {
		d.size = c.size
	}
	return -1, d.take(c)
}

// take keeps a hold on sockets, in place of dead ones.
func (d *fakeDevice) take(c command) error {
	for _, f := range c.sockets {
		for i, s := range d.socks {
			if s == nil {
				conn, err := net.FileConn(f)
				if err != nil {
					return err
				}
				d.socks[i] = conn
				break
			}
		}
	}
	return nil
}

func (k *fake) backends() (map[int]string, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	all := map[int]string{}
	for i, d := range k.devices {
		all[i] = d.backend
	}
	return all, nil
}

func (k *fake) setLook(int, time.Duration) error { return nil }
func (k *fake) inUse(int) (string, error)        { return k.user, nil }

func request(cmd uint16, off uint64, n uint32) []byte {
	b := binary.BigEndian.AppendUint32(nil, abi.RequestMagic)
	b = binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint32(b, uint32(cmd)), 42)
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64(b, off), n)
}

// read reads over one of the connections, and again while that is dead. It is
// given up when the device is gone.
func (k *fake) read(index, over int, b []byte, off uint64) error {
	for {
		k.mu.Lock()
		d := k.devices[index]
		if d == nil {
			k.mu.Unlock()
			return unix.ENODEV
		}
		s := d.socks[over]
		k.mu.Unlock()
		if s == nil {
			time.Sleep(time.Millisecond)
			continue
		}
		reply := make([]byte, 16+len(b))
		_, err := s.Write(request(abi.CmdRead, off, uint32(len(b))))
		if err == nil {
			_, err = io.ReadFull(s, reply)
		}
		if err != nil {
			k.kill(index, over)
			continue
		}
		if code := binary.BigEndian.Uint32(reply[4:]); code != 0 {
			return unix.Errno(code)
		}
		copy(b, reply[16:])
		return nil
	}
}

// kill makes a connection a dead one.
func (k *fake) kill(index, over int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if d := k.devices[index]; d != nil && d.socks[over] != nil {
		d.socks[over].Close()
		d.socks[over] = nil
	}
}

// content is a device that can be read only; each byte is the same.
type content byte

func (c content) ReadAt(p []byte, _ int64) (int, error) {
	copy(p, bytes.Repeat([]byte{byte(c)}, len(p)))
	return len(p), nil
}
func (content) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
func (content) Flush() error                           { return nil }
func (content) Size() int64                            { return 1 << 20 }

func exporting(t *testing.T, c content) *nbd.Server {
	t.Helper()
	s := &nbd.Server{}
	if err := s.Add(nbd.Export{Name: "x", Device: c}); err != nil {
		t.Fatal(err)
	}
	return s
}

func attached(t *testing.T, k *fake, connections int) *Device {
	t.Helper()
	testkit.NoLeaks(t)
	d, err := attach(t.Context(), k, exporting(t, 7), "x", Options{Identity: "id", Wait: time.Minute, Connections: connections})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func reads(t *testing.T, k *fake, connections int, want byte) {
	t.Helper()
	for over := range connections {
		b := make([]byte, 4096)
		if err := k.read(0, over, b, 8192); err != nil || b[0] != want || b[4095] != want {
			t.Errorf("over connection %d: %v, %d", over, err, b[0])
		}
	}
}

func ended(t *testing.T, d *Device) {
	t.Helper()
	select {
	case <-d.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("the device is served on")
	}
}

func TestAttachAndDetach(t *testing.T) {
	k := newFake()
	d := attached(t, k, 3)
	if f, err := find(k, "id"); err != nil || f.Index != 0 || f.Connections != 3 || d.Path != "/dev/nbd0" {
		t.Errorf("%+v, %v, %s", f, err, d.Path)
	}
	if fd := k.devices[0]; fd.size != 1<<20 || fd.flags&abi.SendFlush == 0 || fd.flags&abi.SendDF != 0 {
		t.Errorf("the kernel was told %+v", fd)
	}
	reads(t, k, 3, 7)
	if _, err := attach(t.Context(), k, exporting(t, 1), "x", Options{Identity: "id"}); !errors.Is(err, ErrServed) {
		t.Errorf("attached a second time: %v", err)
	}
	if err := d.Resize(t.Context(), 2<<20); err != nil || k.devices[0].size != 2<<20 {
		t.Errorf("resize: %v", err)
	}
	k.user = "somebody"
	if err := d.Detach(t.Context()); !errors.Is(err, ErrBusy) {
		t.Errorf("detached under somebody: %v", err)
	}
	reads(t, k, 3, 7)
	k.user = ""
	if err := d.Detach(t.Context()); err != nil {
		t.Error(err)
	}
	ended(t, d)
	if _, err := find(k, "id"); !errors.Is(err, ErrNotFound) {
		t.Errorf("still there: %v", err)
	}
}

// TestConnectionReplaced: a connection that the kernel gave up is replaced, without end.
func TestConnectionReplaced(t *testing.T) {
	k := newFake()
	d := attached(t, k, 2)
	for i := range 10 {
		k.kill(0, i%2)
		reads(t, k, 2, 7)
	}
	if err := d.Detach(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestNextServer: requests wait for the next server, and there is one at a time.
func TestNextServer(t *testing.T) {
	k := newFake()
	d := attached(t, k, 2)
	soon, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := reattach(soon, k, exporting(t, 1), "x", "id"); !errors.Is(err, ErrServed) {
		t.Errorf("a second server: %v", err)
	}
	reads(t, k, 2, 7)
	d.Release()
	ended(t, d)
	got := make(chan byte, 2)
	for over := range 2 {
		go func() {
			b := make([]byte, 1)
			if err := k.read(0, over, b, 0); err != nil {
				t.Error(err)
			}
			got <- b[0]
		}()
	}
	k.mu.Lock()
	k.devices[0].size = 4096 // the device had another size once
	k.mu.Unlock()
	next, err := reattach(t.Context(), k, exporting(t, 9), "x", "id")
	if err != nil {
		t.Fatal(err)
	}
	if a, b := <-got, <-got; a != 9 || b != 9 {
		t.Errorf("the reads that waited gave %d and %d", a, b)
	}
	if n := k.devices[0].size; n != 1<<20 {
		t.Errorf("the kernel believes in %d bytes", n)
	}
	if err := next.Detach(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestTakenAway: when somebody else detaches the device, nothing of it stays.
func TestTakenAway(t *testing.T) {
	k := newFake()
	d := attached(t, k, 2)
	if err := forget(t.Context(), k, "id"); err != nil {
		t.Fatal(err)
	}
	ended(t, d)
	d = attached(t, k, 2)
	k.kill(0, 0) // and at a moment when a connection is being replaced
	if err := forget(t.Context(), k, "id"); err != nil {
		t.Fatal(err)
	}
	ended(t, d)
}

// TestKernelRefuses: what the kernel does not take leaves nothing behind.
func TestKernelRefuses(t *testing.T) {
	testkit.NoLeaks(t)
	k := newFake()
	k.refuse = unix.EPERM
	if _, err := attach(t.Context(), k, exporting(t, 1), "x", Options{Identity: "id", Connections: 4}); !errors.Is(err, unix.EPERM) {
		t.Errorf("%v", err)
	}
}
