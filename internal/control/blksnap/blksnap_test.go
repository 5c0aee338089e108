package blksnap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/abi/blksnap"
	"tidemark/internal/block"
	"tidemark/internal/testkit"
)

// The real thing is driven in a virtual machine (test/vm/guest); here is what
// can be asked without a kernel: that no bytes of a caller crash, hang or change
// anything where the answer is an error.

// space is a caller's memory: size bytes at base.
type space struct {
	base     uint64
	b        []byte
	readOnly int // so many bytes from base on can only be read
}

func (s *space) at(addr uint64, n int) ([]byte, error) {
	if addr < s.base || addr > s.base+uint64(len(s.b)) || uint64(n) > s.base+uint64(len(s.b))-addr {
		return nil, syscall.EFAULT
	}
	return s.b[addr-s.base:][:n], nil
}

func (s *space) Read(addr uint64, b []byte) error {
	from, err := s.at(addr, len(b))
	copy(b, from)
	return err
}

func (s *space) Write(addr uint64, b []byte) error {
	to, err := s.at(addr, len(b))
	if err == nil && addr < s.base+uint64(s.readOnly) {
		return syscall.EFAULT
	}
	copy(to, b)
	return err
}

// disks is a System of two tracked devices, 8:0 and 8:16, of 1 MiB.
type disks struct {
	mu      sync.Mutex
	changed int // how often anything did
	held    map[blksnap.ID]bool
	next    byte
	table   [256]byte
	events  []Event // of each snapshot
	asks    bool    // new snapshots ask for storage
}

func (d *disks) known(dev blksnap.Dev) error {
	if dev.Major != 8 || dev.Minor != 0 && dev.Minor != 16 {
		return fmt.Errorf("%v: %w", dev, ErrNoDevice)
	}
	return nil
}

func (d *disks) Tracked() ([]Tracking, error) {
	var out []Tracking
	for _, minor := range []uint32{0, 16} {
		out = append(out, Tracking{Dev: blksnap.Dev{Major: 8, Minor: minor}, BlockSize: 4096, Capacity: 1 << 20, Blocks: 256, Number: 1, Held: minor == 16})
	}
	return out, nil
}

func (d *disks) Table(dev blksnap.Dev) (Table, error) {
	if err := d.known(dev); err != nil {
		return nil, err
	}
	return table{bytes.NewReader(d.table[:])}, nil
}

// table makes a reader of bytes one of a change map.
type table struct{ *bytes.Reader }

func (t table) Read(p []byte, i int64) (int, error) { return t.ReadAt(p, i) }

func (d *disks) OnImages(func()) {}

func (d *disks) change() { d.mu.Lock(); d.changed++; d.mu.Unlock() }

func (d *disks) Untrack(dev blksnap.Dev) error { d.change(); return d.known(dev) }

func (d *disks) MarkDirty(dev blksnap.Dev, ranges []block.Range) error {
	if err := d.known(dev); err != nil {
		return err
	}
	for _, r := range ranges {
		if r.Off < 0 || r.Len < 0 || r.End() > 1<<20 {
			return ErrRange
		}
	}
	d.change()
	return nil
}

func (d *disks) Create(devs []blksnap.Dev) (blksnap.ID, error) {
	for _, dev := range devs {
		if err := d.known(dev); err != nil {
			return blksnap.ID{}, err
		}
	}
	d.change()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.next++
	if d.asks {
		d.events = append(d.events, Event{Code: blksnap.EventLowFreeSpace, Sequence: uint64(len(d.events) + 1), Time: time.Now(), Bytes: 7})
	}
	id := blksnap.ID{d.next}
	d.held[id] = false
	return id, nil
}

func (d *disks) Append(id blksnap.ID, dev blksnap.Dev, ranges []block.Range) error {
	if err := d.known(dev); err != nil {
		return err
	}
	return d.with(id, func() error { d.changed++; return nil })
}

func (d *disks) Take(ctx context.Context, id blksnap.ID) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return d.with(id, func() error { d.changed++; d.held[id] = true; return nil })
}

func (d *disks) Destroy(ctx context.Context, id blksnap.ID) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return d.with(id, func() error { d.changed++; delete(d.held, id); return nil })
}

func (d *disks) with(id blksnap.ID, do func() error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, ok := d.held[id]; !ok {
		return ErrNoSnapshot
	}
	return do()
}

func (d *disks) Snapshots() []blksnap.ID {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []blksnap.ID
	for id := range d.held {
		out = append(out, id)
	}
	return out
}

func (d *disks) Images(id blksnap.ID) (out []Image, err error) {
	err = d.with(id, func() error {
		if !d.held[id] {
			return ErrNotTaken
		}
		out = []Image{{Original: blksnap.Dev{Major: 8}}}
		return nil
	})
	return out, err
}

func (d *disks) Event(ctx context.Context, id blksnap.ID, after uint64) (Event, error) {
	var next []Event
	err := d.with(id, func() error { next = d.events[min(int(after), len(d.events)):]; return nil })
	if err != nil {
		return Event{}, err
	}
	if len(next) > 0 {
		return next[0], nil
	}
	<-ctx.Done()
	return Event{}, context.Cause(ctx)
}

func FuzzCommand(f *testing.F) {
	const base = 4096
	arg := func(v ...any) (b []byte) {
		for _, v := range v {
			b = append(b, blksnap.Bytes(v)...)
		}
		return b
	}
	dev := blksnap.Dev{Major: 8, Minor: 16}
	f.Add(uint32(blksnap.Version), arg(blksnap.VersionInfo{}), uint64(0), uint16(0))
	f.Add(uint32(blksnap.TrackerRemove), arg(blksnap.Dev{Major: 8}), uint64(0), uint16(0))
	f.Add(uint32(blksnap.TrackerCollect), arg(blksnap.Collect{Count: 2, Array: base + 16}, [2]blksnap.TrackerInfo{}), uint64(0), uint16(0))
	f.Add(uint32(blksnap.ReadMap), arg(blksnap.ReadMapArg{Dev: dev, Length: 256, Buffer: base}, make([]byte, 256)), uint64(0), uint16(0))
	f.Add(uint32(blksnap.MarkDirty), arg(blksnap.MarkDirtyArg{Dev: dev, Count: 1, Array: base + 24}, blksnap.Range{Offset: 8, Count: 8}), uint64(0), uint16(0))
	f.Add(uint32(blksnap.SnapshotCreate), arg(blksnap.Create{Count: 1, Array: base + 32}, dev), uint64(0), uint16(0))
	f.Add(uint32(blksnap.SnapshotDestroy), arg(blksnap.ID{1}), uint64(0), uint16(0))
	f.Add(uint32(blksnap.AppendStorage), arg(blksnap.Append{ID: blksnap.ID{1}, Dev: dev, Count: 1, Array: base + 40}, blksnap.Range{Count: 8}), uint64(0), uint16(0))
	f.Add(uint32(blksnap.SnapshotTake), arg(blksnap.ID{1}), uint64(0), uint16(0))
	f.Add(uint32(blksnap.SnapshotCollect), arg(blksnap.Collect{Count: 4, Array: base + 16}, [4]blksnap.ID{}), uint64(0), uint16(0))
	f.Add(uint32(blksnap.CollectImages), arg(blksnap.Images{ID: blksnap.ID{1}, Count: 1, Array: base + 32}, blksnap.ImageInfo{}), uint64(0), uint16(0))
	f.Add(uint32(blksnap.SnapshotWaitEvent), arg(blksnap.Event{ID: blksnap.ID{1}, TimeoutMs: 1}), uint64(0), uint16(0))
	f.Add(uint32(0x5699), []byte{}, uint64(1), uint16(0))
	f.Add(uint32(blksnap.SnapshotCreate), arg(blksnap.Create{Count: 1, Array: base + 32}, dev), uint64(0), uint16(32))
	f.Add(uint32(blksnap.SnapshotWaitEvent), arg(blksnap.Event{ID: blksnap.ID{1}, TimeoutMs: 1}), uint64(0), uint16(1))
	f.Fuzz(func(t *testing.T, cmd uint32, memory []byte, off uint64, readOnly uint16) {
		d := &disks{held: map[blksnap.ID]bool{{1}: true}, next: 1}
		s := New(d, t.TempDir(), nil)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond) // a caller's signal
		defer cancel()
		m := &space{base: base, b: memory, readOnly: int(readOnly)}
		before := slices.Clone(memory)
		n, err := s.command(ctx, cmd, base+off, m)
		var errno syscall.Errno
		if err != nil && (!errors.As(err, &errno) || errno == 0) {
			t.Errorf("%#x: %v has no errno", cmd, err)
		}
		if err != nil && d.changed != 0 {
			t.Errorf("%#x: %v, and %d changes", cmd, err, d.changed)
		}
		if err != nil && len(d.Snapshots()) != 1 {
			t.Errorf("%#x: %v, and %d snapshots", cmd, err, len(d.Snapshots()))
		}
		counts := cmd == blksnap.TrackerCollect || cmd == blksnap.SnapshotCollect || cmd == blksnap.CollectImages || cmd == blksnap.ReadMap
		if err != nil && !counts && !slices.Equal(before, memory) {
			t.Errorf("%#x: %v, and the caller's memory is another", cmd, err)
		}
		if n < 0 || n != 0 && cmd != blksnap.ReadMap {
			t.Errorf("%#x returns %d", cmd, n)
		}
	})
}

// TestWaiters: an event goes to one of those that wait, in the order of the
// events; the end of the time and of the snapshot are told apart.
func TestWaiters(t *testing.T) {
	testkit.NoLeaks(t)
	d := &disks{held: map[blksnap.ID]bool{}}
	s := New(d, t.TempDir(), nil)
	m := &space{base: 4096, b: make([]byte, 8192)}
	empty := blksnap.Create{}
	copy(m.b, blksnap.Bytes(empty))
	if _, err := s.command(t.Context(), blksnap.SnapshotCreate, 4096, m); err != nil {
		t.Fatal(err)
	}
	if err := blksnap.Decode(m.b[:32], &empty); err != nil || empty.ID == (blksnap.ID{}) {
		t.Fatalf("%+v, %v", empty, err)
	}
	wait := func(ms uint32) error {
		own := &space{base: 4096, b: blksnap.Bytes(blksnap.Event{ID: empty.ID, TimeoutMs: ms})}
		_, err := s.command(t.Context(), blksnap.SnapshotWaitEvent, 4096, own)
		return err
	}
	if err := wait(0); err != nil {
		t.Errorf("a new snapshot wants storage: %v", err)
	}
	if err := wait(5); err != syscall.ENOENT {
		t.Errorf("nothing happens: %v", err)
	}
	ended := make(chan error)
	go func() { ended <- wait(60_000) }()
	time.Sleep(10 * time.Millisecond)
	own := &space{base: 4096, b: blksnap.Bytes(empty.ID)}
	if _, err := s.command(t.Context(), blksnap.SnapshotDestroy, 4096, own); err != nil {
		t.Error(err)
	}
	if err := <-ended; err != syscall.ESRCH {
		t.Errorf("destroyed while somebody waits: %v", err)
	}
}

// TestEvents: each is given once; a caller that cannot be told loses none; what
// is asked for when a snapshot is made is asked for once, whenever storage comes.
func TestEvents(t *testing.T) {
	for _, early := range []bool{false, true} {
		d := &disks{held: map[blksnap.ID]bool{}, asks: true}
		s := New(d, t.TempDir(), nil)
		dev := blksnap.Dev{Major: 8}
		m := &space{base: 4096, b: append(blksnap.Bytes(blksnap.Create{Count: 1, Array: 4096 + 32}), blksnap.Bytes(dev)...)}
		if _, err := s.command(t.Context(), blksnap.SnapshotCreate, 4096, m); err != nil {
			t.Fatal(err)
		}
		id := blksnap.ID(m.b[16:32])
		appends := func() {
			m := &space{base: 4096, b: append(blksnap.Bytes(blksnap.Append{ID: id, Dev: dev, Count: 1, Array: 4096 + 40}), blksnap.Bytes(blksnap.Range{Count: 8})...)}
			if _, err := s.command(t.Context(), blksnap.AppendStorage, 4096, m); err != nil {
				t.Error(err)
			}
		}
		wait := func(bytes int) (blksnap.Event, error) {
			e := blksnap.Event{ID: id, TimeoutMs: 1}
			m := &space{base: 4096, b: blksnap.Bytes(e), readOnly: bytes}
			_, err := s.command(t.Context(), blksnap.SnapshotWaitEvent, 4096, m)
			return e, errors.Join(err, blksnap.Decode(m.b, &e))
		}
		if early {
			appends()
		}
		if _, err := wait(1); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("an answer that cannot be written: %v", err)
		}
		if e, err := wait(0); err != nil || e.Code != blksnap.EventLowFreeSpace || !bytes.Equal(e.Data[:8], blksnap.Bytes(blksnap.LowFreeSpace{Sectors: minimum / 512})) {
			t.Errorf("the first: %v, %v", e.Code, err)
		}
		if !early {
			appends()
		}
		if e, err := wait(0); !errors.Is(err, syscall.ENOENT) {
			t.Errorf("asked twice for what was wanted when it was made: %d, %v", e.Code, err)
		}
		d.events = append(d.events, Event{Code: blksnap.EventCorrupted, Sequence: 2, Time: time.Now(), Original: dev, Errno: syscall.ENOSPC})
		if _, err := wait(1); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("an answer that cannot be written: %v", err)
		}
		if e, err := wait(0); err != nil || e.Code != blksnap.EventCorrupted || !bytes.Equal(e.Data[:12], blksnap.Bytes(blksnap.Corrupted{Original: dev, Error: int32(syscall.ENOSPC)})) {
			t.Errorf("the next: %v, %v", e.Code, err)
		}
		if _, err := wait(0); !errors.Is(err, syscall.ENOENT) {
			t.Errorf("an event comes twice: %v", err)
		}
	}
}

// TestSignals: what a caller gets a signal in is finished: half a snapshot would be left.
func TestSignals(t *testing.T) {
	d := &disks{held: map[blksnap.ID]bool{{1}: false}}
	s := New(d, t.TempDir(), nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, cmd := range []uint32{blksnap.SnapshotTake, blksnap.SnapshotDestroy} {
		if _, err := s.command(ctx, cmd, 4096, &space{base: 4096, b: blksnap.Bytes(blksnap.ID{1})}); err != nil {
			t.Errorf("%#x: %v", cmd, err)
		}
	}
	if len(d.held) != 0 {
		t.Error("it is still there")
	}
}

// late is a System whose first list of snapshots is old when it is answered.
type late struct {
	*disks
	asked   atomic.Bool
	looking chan struct{} // closed when the old one has been made
	answer  chan struct{} // it is given when this is closed
}

func (l *late) Snapshots() []blksnap.ID {
	out := l.disks.Snapshots()
	if !l.asked.Swap(true) {
		close(l.looking)
		<-l.answer
	}
	return out
}

func (l *late) Images(blksnap.ID) ([]Image, error) {
	return []Image{{Image: blksnap.Dev{Major: 259, Minor: 5}}}, nil
}

// TestNodesOfOthers: who looked at the images earlier takes away no node of a
// snapshot that was taken since.
func TestNodesOfOthers(t *testing.T) {
	testkit.Need(t, "root")
	l := &late{disks: &disks{held: map[blksnap.ID]bool{}}, looking: make(chan struct{}), answer: make(chan struct{})}
	s := New(l, t.TempDir(), nil)
	probe := filepath.Join(s.nodes.dir, "probe")
	if err := unix.Mknod(probe, unix.S_IFBLK|0o600, int(unix.Mkdev(259, 99))); errors.Is(err, fs.ErrPermission) {
		testkit.Lack(t, "root", err)
	}
	slow, quick := make(chan struct{}), make(chan struct{})
	go func() { s.show(); close(slow) }()
	<-l.looking
	if _, err := l.Create([]blksnap.Dev{{Major: 8}}); err != nil {
		t.Fatal(err)
	}
	go func() { s.show(); close(quick) }()
	select { // it may have to wait for the slow one
	case <-quick:
	case <-time.After(50 * time.Millisecond):
	}
	close(l.answer)
	<-slow
	<-quick
	for _, name := range []string{"blksnap-image0", "blksnap-image5"} {
		if _, err := os.Lstat(filepath.Join(s.nodes.dir, name)); err != nil {
			t.Error(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if left, _ := filepath.Glob(filepath.Join(s.nodes.dir, "blksnap*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestNodes: both names of images; where one could mean two images it is the
// minor number; indexes are used again, lowest first; nothing of a killed
// process stays.
func TestNodes(t *testing.T) {
	testkit.Need(t, "root")
	n := &nodes{dir: t.TempDir(), made: map[string]blksnap.Dev{}}
	image := func(minor uint32) Image { return Image{Image: blksnap.Dev{Major: 259, Minor: minor}} }
	is := func(want map[string]uint32) {
		t.Helper()
		entries, err := os.ReadDir(n.dir)
		if err != nil || len(entries) != len(want) {
			t.Errorf("%v, %v: want %v", entries, err, want)
		}
		for name, minor := range want {
			var st unix.Stat_t
			if err := unix.Stat(filepath.Join(n.dir, name), &st); err != nil || unix.Minor(st.Rdev) != minor || unix.Major(st.Rdev) != 259 || st.Mode != unix.S_IFBLK|0o600 {
				t.Errorf("%s: %v, %d, want %d", name, err, unix.Minor(st.Rdev), minor)
			}
		}
	}
	show := func(images ...Image) {
		t.Helper()
		if err := n.show(images); err != nil {
			t.Error(err)
		}
	}
	if err := unix.Mknod(filepath.Join(n.dir, "blksnap-image7"), unix.S_IFBLK|0o600, int(unix.Mkdev(259, 99))); errors.Is(err, fs.ErrPermission) {
		testkit.Lack(t, "root", err)
	}
	adopt := func(images ...Image) { // as the next process does
		t.Helper()
		n = &nodes{dir: n.dir, made: map[string]blksnap.Dev{}}
		if err := n.adopt(); err != nil {
			t.Error(err)
		}
		show(images...)
	}
	adopt()
	is(nil)
	show(image(5), image(1), Image{})
	is(map[string]uint32{"blksnap-image5": 5, "blksnap-image1": 1, "blksnap-image0": 5})
	show(image(5), image(1), image(9))
	is(map[string]uint32{"blksnap-image5": 5, "blksnap-image1": 1, "blksnap-image0": 5, "blksnap-image9": 9, "blksnap-image2": 9})
	show(image(1), image(9))
	is(map[string]uint32{"blksnap-image1": 1, "blksnap-image9": 9, "blksnap-image2": 9})
	show(image(1), image(9), image(6))
	is(map[string]uint32{"blksnap-image1": 1, "blksnap-image9": 9, "blksnap-image2": 9, "blksnap-image6": 6, "blksnap-image0": 6})
	adopt(image(1), image(6), image(9)) // after a kill they are in another order
	is(map[string]uint32{"blksnap-image1": 1, "blksnap-image9": 9, "blksnap-image2": 9, "blksnap-image6": 6, "blksnap-image0": 6})
	adopt(image(6), image(7)) // others are gone meanwhile
	is(map[string]uint32{"blksnap-image6": 6, "blksnap-image0": 6, "blksnap-image7": 7, "blksnap-image1": 7})
	show()
	is(nil)
}
