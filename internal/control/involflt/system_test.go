package involflt

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"tidemark/internal/abi/involflt"
	"tidemark/internal/testkit"
)

// memSystem is a System without disks: what is pending is put into its queues by the tests.
type memSystem struct {
	mu      sync.Mutex
	changed int // how often anything did
	queues  map[string]*memQueue
	names   map[string]string
	frozen  map[string]bool
	loose   bool // freezes and barriers do not hold
	held    int
	marks   []*memMark
	failing error // Mark, Hold and Start answer
}

func newSystem(devices ...string) *memSystem {
	s := &memSystem{queues: map[string]*memQueue{}, names: map[string]string{}, frozen: map[string]bool{}}
	for _, d := range devices {
		s.queues[d], s.names[d] = newQueue(s), ""
	}
	return s
}

func (s *memSystem) Start(_ context.Context, device, name string) (Queue, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failing != nil {
		return nil, s.failing
	}
	q := s.queues[device]
	if q == nil {
		return nil, fmt.Errorf("%s: %w", device, ErrNoDevice)
	}
	s.changed++
	s.names[device] = name
	return q, nil
}

// Same takes /alias/a for /dev/a.
func (s *memSystem) Same(a, b string) bool {
	plain := func(p string) string { return strings.Replace(p, "/alias/", "/dev/", 1) }
	return plain(a) == plain(b)
}

// Stop ends the queue's waits long before it has ended itself.
func (s *memSystem) Stop(_ context.Context, device string) error {
	if q := s.queues[device]; q != nil {
		q.mu.Lock()
		close(q.end)
		q.end = make(chan struct{})
		q.mu.Unlock()
		time.Sleep(time.Millisecond)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.changed++
	s.names[device] = ""
	return nil
}

func (s *memSystem) Kept() (out []Kept) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for device, name := range s.names {
		if name != "" {
			out = append(out, Kept{Device: device, Name: name, Queue: s.queues[device]})
		}
	}
	return out
}

func (s *memSystem) Mark(_ context.Context, m Mark) (Marked, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failing != nil {
		return nil, s.failing
	}
	s.changed++
	mark := &memMark{s: s, mark: m, open: !m.Until.IsZero()}
	s.marks = append(s.marks, mark)
	at := involflt.Stamp{Time: 1 << 40, Sequence: uint64(len(s.marks)) << 32}
	for _, d := range m.Devices {
		s.queues[d].add(entry{batch: Batch{Kind: Tags, At: at, Tags: m.Tags}, mark: mark})
	}
	return mark, nil
}

func (s *memSystem) Hold(context.Context, time.Time) (func() error, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failing != nil {
		return nil, s.failing
	}
	s.held++
	return func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.held--
		if s.loose {
			return errors.New("its time was over")
		}
		return nil
	}, nil
}

func (s *memSystem) Freeze(_ context.Context, device string, _ time.Time) (func() error, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.queues[device] == nil || s.frozen[device] {
		return nil, ErrFrozen
	}
	s.changed++
	s.frozen[device] = true
	return func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.frozen, device)
		if s.loose {
			return errors.New("somebody thawed it")
		}
		return nil
	}, nil
}

type memMark struct {
	s             *memSystem
	mark          Mark
	open, revoked bool
}

func (m *memMark) Commit(context.Context) error { return m.end(false) }
func (m *memMark) Revoke(context.Context) error { return m.end(true) }

func (m *memMark) end(revoke bool) error {
	m.s.mu.Lock()
	defer m.s.mu.Unlock()
	if !m.open {
		return errors.New("the verdict has been given")
	}
	m.open, m.revoked = false, revoke
	return nil
}

type entry struct {
	batch Batch
	mark  *memMark
}

type memQueue struct {
	s *memSystem

	mu        sync.Mutex
	entries   []entry
	number    uint64
	order     uint32
	committed involflt.Stamp
	known     involflt.Stamp
	resync    Resync
	more      chan struct{} // closed when something is added
	end       chan struct{} // closed when it is stopped
	settled   int
	uncounted error // Pending's
	late      bool  // something becomes known right after Next has found nothing
}

func newQueue(s *memSystem) *memQueue {
	return &memQueue{s: s, order: involflt.OrderData, more: make(chan struct{}), end: make(chan struct{})}
}

func (q *memQueue) add(e entry) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.number++
	e.batch.Number = q.number
	q.entries = append(q.entries, e)
	close(q.more)
	q.more = make(chan struct{})
}

// write adds a batch of writes with numbers from first on, of length bytes each.
func (q *memQueue) write(first uint64, lengths ...int64) Batch {
	b := Batch{Kind: Writes}
	for i, n := range lengths {
		data := make([]byte, n)
		for j := range data {
			data[j] = byte(first) + byte(i) + byte(j>>8)
		}
		b.Changes = append(b.Changes, Change{Offset: int64(i) << 30, Length: n, Data: data, At: involflt.Stamp{Time: 1000 + first, Sequence: first + uint64(i)}})
	}
	q.add(entry{batch: b})
	return b
}

func (q *memQueue) Next(context.Context) (Batch, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.entries) > 0 {
		e := q.entries[0]
		if e.mark != nil {
			q.s.mu.Lock()
			open, revoked := e.mark.open, e.mark.revoked
			q.s.mu.Unlock()
			if open {
				return Batch{}, ErrVerdict
			}
			if revoked {
				q.entries = q.entries[1:]
				continue
			}
		}
		return e.batch, nil
	}
	if q.late {
		q.known.Time += 1000
	}
	return Batch{}, ErrEmpty
}

func (q *memQueue) Commit(_ context.Context, number, resync uint64) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.resync.Count -= resync; q.resync.Count == 0 {
		q.resync = Resync{}
	}
	if number == 0 {
		return nil
	}
	if len(q.entries) == 0 || q.entries[0].batch.Number != number {
		return fmt.Errorf("number %d is not the next", number)
	}
	if c := q.entries[0].batch.Changes; len(c) > 0 {
		q.committed = c[len(c)-1].At
	}
	q.entries = q.entries[1:]
	q.s.mu.Lock()
	q.s.changed++
	q.s.mu.Unlock()
	return nil
}

func (q *memQueue) Wait(ctx context.Context, bytes int64) error {
	for {
		q.mu.Lock()
		more, end := q.more, q.end
		q.mu.Unlock()
		if p, _ := q.Pending(ctx); p.Bytes >= bytes {
			return nil
		}
		select {
		case <-more:
		case <-end:
			return errors.New("there is no such queue any more")
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (q *memQueue) Clear(context.Context) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.entries, q.resync, q.committed = nil, Resync{}, involflt.Stamp{}
	q.s.mu.Lock()
	q.s.changed++
	q.s.mu.Unlock()
	return nil
}

func (q *memQueue) Settle(context.Context) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.settled++
	return nil
}

func (q *memQueue) State() State {
	q.mu.Lock()
	defer q.mu.Unlock()
	return State{Order: q.order, Committed: q.committed, Known: q.known, Resync: q.resync}
}

func (q *memQueue) Pending(context.Context) (p Pending, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, e := range q.entries {
		p.Any = true
		p.Changes += int64(len(e.batch.Changes))
		for _, c := range e.batch.Changes {
			p.Bytes += c.Length
			if p.Oldest == 0 {
				p.Oldest = c.At.Time
			}
		}
	}
	return p, q.uncounted
}

// space is a caller's memory: size bytes at base.
type space struct{ b []byte }

const (
	base  = 1 << 20
	array = base + 1<<14 // where the tests put volumes
	tags  = base + 1<<15 // and tags
)

func newSpace() *space { return &space{b: make([]byte, 1<<16)} }

func (s *space) at(addr uint64, n int) ([]byte, error) {
	if addr < base || addr > base+uint64(len(s.b)) || uint64(n) > base+uint64(len(s.b))-addr {
		return nil, syscall.EFAULT
	}
	return s.b[addr-base:][:n], nil
}

func (s *space) Read(addr uint64, b []byte) error {
	from, err := s.at(addr, len(b))
	copy(b, from)
	return err
}

func (s *space) Write(addr uint64, b []byte) error {
	to, err := s.at(addr, len(b))
	copy(to, b)
	return err
}

// client is a program with descriptors on the device under test.
type client struct {
	t testing.TB
	s *Server
	m *memSystem
}

func newClient(t testing.TB, m *memSystem) *client {
	t.Helper()
	if t, ok := t.(*testing.T); ok {
		testkit.NoLeaks(t)
	}
	s, err := New(m, t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	c := &client{t: t, s: s, m: m}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func (c *client) open() *file {
	return &file{s: c.s}
}

// call sends a structure that ends where the memory does, so that no byte more is touched.
func (c *client) call(f *file, cmd uint32, arg any) (int32, error) {
	return c.callCtx(context.Background(), f, cmd, arg, newSpace())
}

func (c *client) callCtx(ctx context.Context, f *file, cmd uint32, arg any, m *space) (int32, error) {
	b := involflt.Bytes(arg)
	copy(m.b, b)
	n, err := f.command(ctx, cmd, base, m)
	return n, err
}

// is fails the test where a call does not answer so.
func (c *client) is(want error, f *file, cmd uint32, arg any) {
	c.t.Helper()
	if n, err := c.call(f, cmd, arg); err != want || n != 0 {
		c.t.Errorf("%#x answers %d, %v; want %v", cmd, n, err, want)
	}
}

func named(s string) (n involflt.Name)    { copy(n[:], s); return n }
func long(s string) (n involflt.LongName) { copy(n[:], s); return n }
func guid(s string) (g involflt.GUID)     { copy(g[:], s); return g }
func info(device, name string) involflt.DeviceInfo {
	return involflt.DeviceInfo{Type: involflt.HostVolume, Device: long(device), Persistent: long(name), BlockSize: 512}
}

// started gives a descriptor that is bound to a disk.
func (c *client) started(device string) *file {
	c.t.Helper()
	f := c.open()
	c.is(nil, f, involflt.StartFiltering, info(device, "n"+device[5:]))
	return f
}

// block gets one.
func (c *client) block(f *file) (b involflt.DirtyBlock, err error) {
	c.t.Helper()
	m := newSpace()
	if _, err := c.callCtx(context.Background(), f, involflt.GetDirtyBlocksV2, b, m); err != nil {
		return b, err
	}
	if err := involflt.Decode(m.b[:involflt.Size(b)], &b); err != nil {
		c.t.Fatal(err)
	}
	return b, nil
}

func (c *client) mustBlock(f *file) involflt.DirtyBlock {
	c.t.Helper()
	b, err := c.block(f)
	if err != nil {
		c.t.Fatal(err)
	}
	return b
}

func commitOf(id uint64) involflt.Transaction { return involflt.Transaction{ID: id} }

// tagged sends tags for volumes and gives their status.
func (c *client) tag(f *file, cmd uint32, in involflt.TagInfo, texts []string, volumes ...string) (int32, []uint32, error) {
	c.t.Helper()
	m := newSpace()
	in.Tags, in.Volumes, in.Array, in.TagArray = int32(len(texts)), int32(len(volumes)), array, tags
	var list []involflt.VolumeInfo
	for _, v := range volumes {
		list = append(list, involflt.VolumeInfo{Device: long(v), Status: 99})
	}
	copy(m.b[array-base:], involflt.Bytes(list))
	for i, text := range texts {
		t := involflt.Tag{Length: uint16(len(text))}
		copy(t.Data[:], text)
		copy(m.b[tags-base+258*i:], involflt.Bytes(t))
	}
	n, err := c.callCtx(context.Background(), f, cmd, in, m)
	return n, c.status(m, list), err
}

func (c *client) status(m *space, list []involflt.VolumeInfo) (out []uint32) {
	if len(list) == 0 {
		return nil
	}
	if err := involflt.Decode(m.b[array-base:][:264*len(list)], list); err != nil {
		c.t.Fatal(err)
	}
	for _, v := range list {
		out = append(out, v.Status)
	}
	return out
}

// volumesCall freezes or thaws.
func (c *client) volumesCall(f *file, cmd uint32, g string, ms int32, volumes ...string) ([]uint32, error) {
	c.t.Helper()
	m := newSpace()
	var list []involflt.VolumeInfo
	for _, v := range volumes {
		list = append(list, involflt.VolumeInfo{Device: long(v), Status: 99})
	}
	copy(m.b[array-base:], involflt.Bytes(list))
	var arg any = involflt.Freeze{Volumes: int32(len(volumes)), Timeout: ms, Array: array, GUID: guid(g)}
	if cmd == involflt.ThawVolume {
		arg = involflt.Thaw{Volumes: int32(len(volumes)), Array: array, GUID: guid(g)}
	}
	_, err := c.callCtx(context.Background(), f, cmd, arg, m)
	return c.status(m, list), err
}

// wants fails the test where a call's answer or the status of its volumes is another.
func wants(t testing.TB, what string, want error, err error, status []uint32, statusWant ...uint32) {
	t.Helper()
	if err != want || !slices.Equal(status, statusWant) {
		t.Errorf("%s: %v, status %v; want %v, %v", what, err, status, want, statusWant)
	}
}
