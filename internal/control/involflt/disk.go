package involflt

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"tidemark/internal/abi/involflt"
)

// disk is one that is filtered.
//
// Of its blocks one is out at most: the first part of the batch under way. It is
// given again, with the same transaction number, until that is committed.
type disk struct {
	s            *Server
	device, name string
	queue        Queue
	busy         gate        // held while a command works on the blocks
	stopped      atomic.Bool // for good
	died         atomic.Bool // the drainer has; what is out is out no more
	tagless      atomic.Uint64

	// Within busy.
	batch  uint64
	parts  []*part // of it; the first is out, if given says so
	given  *given
	orphan uint64         // a transaction that was out when its block was dropped; its commit does nothing
	empty  *given         // the last answer was that there is nothing
	prev   involflt.Stamp // end of the last committed block
	split  uint32
	lastID uint64

	mu     sync.Mutex
	woken  chan struct{} // closed at the next wake
	count  counters
	passed Pending // parts that were committed of the batch that is out
}

// given is a block that a client has.
type given struct {
	id     uint64
	end    involflt.Stamp
	path   string // of its data file, if it has one
	resync uint64 // so many reasons for a resync were told with it
}

// counters are of what was committed since the daemon began.
type counters struct {
	Blocks, Tags, Copies, Ranges, Empty uint64
	Bytes, Changes                      int64
	TagsLost, Clears, Failed            uint64
	Given, Committed, Cleared           time.Time // last
}

func newDisk(s *Server, device, name string, q Queue) *disk {
	return &disk{s: s, device: device, name: name, queue: q, busy: newGate(), prev: q.State().Committed, woken: make(chan struct{})}
}

// enter begins a command on the blocks.
func (d *disk) enter(ctx context.Context) error {
	if err := d.busy.enter(ctx); err != nil {
		return err
	}
	if d.died.Swap(false) {
		d.withdraw()
	}
	return nil
}

// withdraw takes back what is out: it is given again.
func (d *disk) withdraw() {
	if d.given == nil {
		return
	}
	d.unlink(d.given)
	if p := d.parts[0]; p.kind == Ranges {
		p.id = 0
	}
	d.given = nil
}

func (d *disk) unlink(g *given) {
	if g == nil || g.path == "" {
		return
	}
	if err := remove(g.path); err != nil {
		d.s.trouble("a data file stays", "error", err)
	}
}

// forget drops what is out and what was to come.
func (d *disk) forget() {
	if d.given != nil {
		d.unlink(d.given)
		d.orphan = d.given.id
	}
	d.parts, d.given, d.empty = nil, nil, nil
	d.pass(nil)
	d.tagless.Add(1)
}

// pass notes that a part of a batch was committed; nil: that no batch is out.
func (d *disk) pass(p *part) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if p == nil {
		d.passed = Pending{}
		return
	}
	d.passed.Bytes, d.passed.Changes = d.passed.Bytes+p.bytes, d.passed.Changes+p.ended()
}

// pending counts what a client has not committed.
func (d *disk) pending(ctx context.Context) (Pending, error) {
	p, err := d.queue.Pending(ctx)
	d.mu.Lock()
	defer d.mu.Unlock()
	p.Bytes, p.Changes = max(p.Bytes-d.passed.Bytes, 0), max(p.Changes-d.passed.Changes, 0)
	return p, err
}

// counted changes the counters.
func (d *disk) counted(do func(c *counters)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	do(&d.count)
}

// ours gives the disk that a descriptor is for.
func (f *file) ours() (*disk, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.bound == nil:
		return nil, syscall.EINVAL
	case f.bound.stopped.Load():
		return nil, syscall.EBUSY
	}
	return f.bound, nil
}

// get answers with the block that is out, or the next one. It does not wait for one.
func (f *file) get(ctx context.Context, arg uint64, m memory) error {
	d, err := f.ours()
	if err != nil {
		return err
	}
	if err := d.enter(ctx); err != nil {
		return err
	}
	defer d.busy.leave()
	if d.stopped.Load() {
		return syscall.EBUSY
	}
	state := d.queue.State() // before: what comes after this look is later than its Known
	p, err := d.current(ctx)
	if err != nil {
		return err
	}
	pending, _ := d.pending(ctx) // a block that can be had is handed over though not all behind it can be counted
	b, g, err := d.render(p, state, pending)
	if err != nil {
		d.s.trouble("a block cannot be handed over", "device", d.device, "error", err)
		return syscall.ENOMEM
	}
	if err := put(m, arg, b); err != nil {
		if d.given == nil {
			d.unlink(&g)
		}
		return err
	}
	d.lastID = max(d.lastID, g.id)
	if p == nil {
		d.empty = &g
		d.counted(func(c *counters) { c.Empty++; c.Given = time.Now() })
		return nil
	}
	p.id = g.id
	d.empty, d.given = nil, &g
	d.counted(func(c *counters) { c.Given = time.Now() })
	return nil
}

// current is the part that is to be given; nil: nothing is pending.
func (d *disk) current(ctx context.Context) (*part, error) {
	for len(d.parts) == 0 {
		b, err := d.queue.Next(ctx)
		switch {
		case errors.Is(err, ErrEmpty) && d.s.held():
			return nil, syscall.EAGAIN
		case errors.Is(err, ErrEmpty):
			return nil, nil
		case err != nil:
			if !errors.Is(err, ErrVerdict) {
				d.s.trouble("no batch", "device", d.device, "error", err)
			}
			return nil, err
		}
		if d.batch, d.parts = b.Number, cut(&b); len(d.parts) > 0 {
			break
		}
		if err := d.queue.Commit(ctx, b.Number, 0); err != nil { // nothing in it is for a client
			return nil, err
		}
	}
	return d.parts[0], nil
}

// render makes the block of a part, or of none, and its data file. It changes nothing of the disk.
func (d *disk) render(p *part, s State, pending Pending) (b involflt.DirtyBlock, g given, err error) {
	if p == nil {
		at := d.prev
		if at.Before(s.Known) {
			at = s.Known // all that is earlier has been handed out
		}
		g = given{id: d.lastID + 1, end: at}
		b = involflt.DirtyBlock{Flags: involflt.FlagEmpty, WriteOrder: s.Order}
		b.Tags, err = involflt.TagList(at, at, involflt.SourceData, nil)
	} else {
		g = given{id: p.id, end: p.last}
		if g.id == 0 {
			g.id = d.lastID + 1
		}
		if d.given != nil {
			g.path = d.given.path
		} else if p.kind == Writes || p.kind == Copies {
			g.path, err = d.s.files.write(d.name, p)
		}
		if err == nil {
			b, err = p.block(g.path)
		}
		pending.Bytes, pending.Changes = pending.Bytes-p.bytes, pending.Changes-p.ended()
	}
	b.Transaction = g.id
	b.ChangesPending, b.BytesPending = uint32(min(max(pending.Changes, 0), 1<<32-1)), uint64(max(pending.Bytes, 0))
	b.PrevSequence, b.PrevTime, b.PrevSplit = d.prev.Sequence, d.prev.Time, d.split
	if r := s.Resync; r.Count > 0 {
		g.resync = r.Count
		b.Flags |= involflt.FlagResync
		b.ResyncCount, b.ResyncCode, b.ResyncTime = r.Count, uint64(r.Code), r.Time
		copy(b.ResyncText[:len(b.ResyncText)-1], r.Text)
	}
	return b, g, err
}

// commit lets the block go that is out.
func (f *file) commit(ctx context.Context, arg uint64, m memory) error {
	var in involflt.Transaction
	if err := get(m, arg, &in); err != nil {
		return err
	}
	f.mu.Lock()
	d := f.bound
	f.mu.Unlock()
	if d == nil {
		return syscall.EINVAL
	}
	if err := d.enter(ctx); err != nil {
		return err
	}
	defer d.busy.leave()
	switch {
	case d.given != nil && in.ID == d.given.id:
		return d.done(ctx, in.Flags)
	case d.given == nil && d.orphan != 0 && in.ID == d.orphan:
		d.orphan = 0
		return nil
	case d.stopped.Load():
		return syscall.EBUSY
	case d.empty != nil:
		return d.doneEmpty(ctx, in)
	}
	d.counted(func(c *counters) { c.Failed++ })
	return syscall.EFAULT
}

// done commits the first part; with the last one goes the batch.
func (d *disk) done(ctx context.Context, flags uint32) error {
	g, p := d.given, d.parts[0]
	resync := uint64(0)
	if flags&involflt.ResetResync != 0 {
		resync = g.resync
	}
	if len(d.parts) == 1 || resync > 0 {
		number := d.batch
		if len(d.parts) > 1 {
			number = 0 // only the resync
		}
		if err := d.queue.Commit(ctx, number, resync); err != nil {
			d.s.trouble("a commit fails", "device", d.device, "error", err)
			return err
		}
	}
	d.unlink(g)
	d.prev, d.split = p.last, p.split
	if d.parts, d.given = d.parts[1:], nil; len(d.parts) > 0 {
		d.pass(p)
	} else {
		d.pass(nil)
	}
	d.counted(func(c *counters) {
		c.Committed = time.Now()
		c.Blocks++
		c.Bytes += p.bytes
		c.Changes += p.ended()
		switch p.kind {
		case Tags:
			c.Tags++
		case Copies:
			c.Copies++
		case Ranges:
			c.Ranges++
		}
	})
	return nil
}

// doneEmpty takes any number, as clients expect; only the right one is an end.
func (d *disk) doneEmpty(ctx context.Context, in involflt.Transaction) error {
	if in.ID != d.empty.id {
		return nil
	}
	if in.Flags&involflt.ResetResync != 0 && d.empty.resync > 0 {
		if err := d.queue.Commit(ctx, 0, d.empty.resync); err != nil {
			return err
		}
	}
	d.prev, d.split = d.empty.end, 0
	return nil
}

// clear drops what is pending.
func (d *disk) clear(ctx context.Context) error {
	if err := d.enter(ctx); err != nil {
		return err
	}
	defer d.busy.leave()
	if d.stopped.Load() {
		return nil
	}
	if err := d.queue.Clear(ctx); err != nil {
		d.s.trouble("what is pending cannot be dropped", "device", d.device, "error", err)
		return err
	}
	d.forget()
	d.lastID, d.prev, d.split = 0, d.queue.State().Committed, 0
	d.counted(func(c *counters) { c.Clears++; c.Cleared = time.Now(); c.Blocks, c.Bytes, c.Changes = 0, 0, 0 })
	return nil
}
