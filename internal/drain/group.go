package drain

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"tidemark/internal/batch"
	"tidemark/internal/stream"
	"tidemark/internal/vfs"
)

// Config says whose consumers they are.
type Config struct {
	FS    vfs.FS // nil: the operating system's
	Dir   string // holds a file for each
	Group string
	ID    [16]byte
	Disks []Disk
	// Source gives the group's stream as it is now; an error where it is away.
	Source func() (Source, error)
	// Committed, if there is one, is told with each commit when its newest record was captured.
	Committed func(captured time.Time)
}

// Group is a group's consumers. Its methods may be called concurrently.
type Group struct {
	cfg      Config
	stop     chan struct{}
	counting context.Context // ends with the group's use
	end      context.CancelFunc

	making    sync.Mutex // one consumer is made or removed at a time; taken before mu
	ending    sync.Mutex // held while a consumer's file is made, so that none is after Close
	mu        sync.Mutex
	consumers map[string]*consumer
	damaged   map[string]error
	woken     chan struct{} // closed and replaced
}

const stateEnd = ".consumer"

var consumerName = regexp.MustCompile(`^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}$`)

// CheckName returns an error wrapping ErrName where a consumer cannot be called so.
func CheckName(name string) error {
	if !consumerName.MatchString(name) {
		return fmt.Errorf("%q: want 1 to 64 of letters, digits, ., - and _, not beginning with a dot: %w", name, ErrName)
	}
	return nil
}

// Open finds the consumers that the folder knows. One whose state is damaged is
// there by name, and refuses everything but to be removed.
func Open(cfg Config) (*Group, error) {
	if cfg.FS == nil {
		cfg.FS = vfs.OS{}
	}
	g := &Group{cfg: cfg, stop: make(chan struct{}), consumers: map[string]*consumer{}, damaged: map[string]error{}, woken: make(chan struct{})}
	g.counting, g.end = context.WithCancel(context.Background())
	entries, err := cfg.FS.ReadDir(cfg.Dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), stateEnd)
		if !ok || CheckName(name) != nil {
			continue
		}
		c := g.fresh(name)
		if c.saved, c.noted, err = c.file.load(); err == nil {
			err = g.fits(c)
		}
		if err != nil {
			g.damaged[name] = fmt.Errorf("consumer %s: %w; remove it (drain rm --force) and begin anew", name, err)
			continue
		}
		c.told.Store(&told{saved: c.saved})
		g.consumers[name] = c
	}
	return g, nil
}

// fits holds a state that was read against the group.
func (g *Group) fits(c *consumer) error {
	switch v := &c.saved; {
	case v.group != g.cfg.ID:
		return fmt.Errorf("it belongs to group %x, and this is %x: %w", v.group, g.cfg.ID, ErrState)
	case v.disk != allDisks && (v.disk < 0 || v.disk >= len(g.cfg.Disks)):
		return fmt.Errorf("it is of disk %d of %d: %w", v.disk, len(g.cfg.Disks), ErrState)
	}
	return nil
}

func (g *Group) fresh(name string) *consumer {
	c := &consumer{name: name, counter: counter{busy: make(chan struct{}, 1)}, file: file{fs: g.cfg.FS, path: filepath.Join(g.cfg.Dir, name+stateEnd)}}
	c.m.names = batch.Header{GroupID: g.cfg.ID, Group: g.cfg.Group, Consumer: name}
	for _, d := range g.cfg.Disks {
		c.m.names.Disks = append(c.m.names.Disks, batch.Disk{Name: d.Name, Size: d.Size, SectorSize: d.SectorSize})
	}
	return c
}

// Options are what a consumer is made with; they do not change.
type Options struct {
	Disk       string // empty: all of the group
	BatchBytes int64  // 0: BatchDefault
	Ranges     bool   // while a gap is open, tell what to read from the disk meanwhile
	From       Start
}

// Start is where a new consumer's copy stands. The zero value: it is empty.
type Start struct {
	Position stream.Position
	Time     int64
	Sequence uint64 // of the segment in which the position lies
}

// Bounds and default of Options.BatchBytes, and the bound of what can be waited for.
const (
	WaitBytesMax = 1 << 30

	BatchDefault = 8 << 20
	BatchMin     = 64 << 10
	BatchMax     = 64 << 20
)

// Make makes a consumer. One that is there already is left as it is: ErrExists
// where it was made without what is asked for now.
func (g *Group) Make(ctx context.Context, name string, o Options) error {
	if err := CheckName(name); err != nil {
		return err
	}
	if o.BatchBytes != 0 && o.BatchBytes < BatchMin || o.BatchBytes > BatchMax {
		return fmt.Errorf("batches of %d bytes: want %d to %d: %w", o.BatchBytes, BatchMin, BatchMax, ErrOptions)
	}
	g.making.Lock()
	defer g.making.Unlock()
	c, err := g.find(name)
	if !errors.Is(err, ErrNoConsumer) {
		if err == nil {
			err = c.madeAs(g.cfg.Disks, o)
		}
		return err
	}
	c = g.fresh(name)
	if c.saved, err = g.begin(ctx, &c.m, o); err != nil {
		return err
	}
	if err := g.create(c); err != nil {
		return fmt.Errorf("consumer %s was not made: %w", name, err)
	}
	c.told.Store(&told{saved: c.saved})
	g.mu.Lock()
	defer g.mu.Unlock()
	g.consumers[name] = c
	return nil
}

// create makes a consumer's file. ErrStopped: the group's folder may be gone by now.
func (g *Group) create(c *consumer) error {
	g.ending.Lock()
	defer g.ending.Unlock()
	if g.counting.Err() != nil {
		return ErrStopped
	}
	if err := g.cfg.FS.MkdirAll(g.cfg.Dir, 0o700); err != nil {
		return err
	}
	if err := g.cfg.FS.SyncDir(filepath.Dir(g.cfg.Dir)); err != nil {
		return err
	}
	return c.file.create(&c.saved)
}

// Has says whether there is a consumer of this name.
func (g *Group) Has(name string) bool {
	_, err := g.find(name)
	return !errors.Is(err, ErrNoConsumer)
}

// madeAs refuses what was asked for and is not so.
func (c *consumer) madeAs(disks []Disk, o Options) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	is := ""
	if c.saved.disk != allDisks {
		is = disks[c.saved.disk].Name
	}
	if o.Disk != "" && is != o.Disk || o.BatchBytes != 0 && c.saved.most != o.BatchBytes || o.Ranges && !c.saved.ranges {
		return fmt.Errorf("consumer %s is of disk %q, with batches of %d bytes, ranges %t: %w", c.name, is, c.saved.most, c.saved.ranges, ErrExists)
	}
	return nil
}

// begin is the first state of a consumer.
func (g *Group) begin(ctx context.Context, m *maker, o Options) (v state, err error) {
	v = state{group: g.cfg.ID, disk: allDisks, most: cmp.Or(o.BatchBytes, BatchDefault), ranges: o.Ranges, stage: records, at: o.From.Position, time: o.From.Time}
	if o.Disk != "" {
		if v.disk = slices.IndexFunc(g.cfg.Disks, func(d Disk) bool { return d.Name == o.Disk }); v.disk < 0 {
			return v, fmt.Errorf("group %s has no disk %q: %w", g.cfg.Group, o.Disk, ErrOptions)
		}
	}
	in, err := g.cfg.Source()
	if err != nil {
		return v, err
	}
	if v.at == 0 {
		newest, _ := in.Newest() // none: the first settled mark is waited for
		v.place = place{Sequence: 1}
		return v.fillFrom(newest.Sequence), nil
	}
	m.in = in
	defer m.drop()
	f, err := m.open(ctx, o.From.Sequence)
	if err != nil {
		return v, err
	}
	for v.place = (place{Sequence: o.From.Sequence}); v.place.Entry < f.Len(); v.place.Entry++ {
		if e := f.Entry(v.place.Entry); e.Kind.TakesPosition() && e.Position > v.at {
			break
		}
	}
	return v, nil
}

func (g *Group) find(name string) (*consumer, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.damaged[name]; err != nil {
		return nil, err
	}
	if c := g.consumers[name]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("group %s, consumer %q: %w", g.cfg.Group, name, ErrNoConsumer)
}

// reach finds a consumer and the stream.
func (g *Group) reach(name string) (*consumer, Source, error) {
	c, err := g.find(name)
	if err != nil {
		return nil, nil, err
	}
	in, err := g.cfg.Source()
	return c, in, err
}

// Next gives a consumer's batch behind the newest committed one, the same each
// time, or, where after is not 0, the one behind that batch, which it must have
// been given. ErrNothing: there is none yet.
func (g *Group) Next(ctx context.Context, name string, after uint64) (*Batch, error) {
	c, in, err := g.reach(name)
	if err != nil {
		return nil, err
	}
	return c.next(ctx, in, after)
}

// Commit says that the consumer has every batch up to a number for good. It is
// stable when Commit returns. *CommitError: it was not given that one.
func (g *Group) Commit(ctx context.Context, name string, number uint64) error {
	c, err := g.find(name)
	if err != nil {
		return err
	}
	in, err := g.cfg.Source()
	if err != nil {
		in = nil // what was given by this daemon can be committed all the same
	}
	before := c.told.Load().saved.number
	if err := c.commit(ctx, in, number); err != nil {
		return err
	}
	if is := c.told.Load().saved; g.cfg.Committed != nil && is.stage == records && is.number > before {
		g.cfg.Committed(time.Unix(0, is.time))
	}
	return nil
}

// Clear drops what is pending. It comes as one fill, unless skip: then the
// consumer makes its copy right by itself.
func (g *Group) Clear(name string, skip bool) error {
	c, in, err := g.reach(name)
	if err != nil {
		return err
	}
	return c.clear(in, skip)
}

// Remove forgets a consumer. ErrPending: it has not got everything; force
// removes it all the same.
func (g *Group) Remove(ctx context.Context, name string, force bool) error {
	g.making.Lock()
	defer g.making.Unlock()
	c, err := g.find(name)
	switch {
	case errors.Is(err, ErrNoConsumer):
		return err
	case err != nil && !force:
		return err
	case err != nil:
		c = g.fresh(name)
	case !force:
		if err := g.drained(ctx, c); err != nil {
			return err
		}
	}
	if err := c.remove(); err != nil {
		return err
	}
	g.mu.Lock()
	delete(g.consumers, name)
	delete(g.damaged, name)
	g.mu.Unlock()
	g.Wake()
	return g.cfg.FS.SyncDir(g.cfg.Dir)
}

// drained is ErrPending where a consumer has something pending.
func (g *Group) drained(ctx context.Context, c *consumer) error {
	in, err := g.cfg.Source()
	if err != nil {
		return err
	}
	p, err := c.pending(ctx, in, 0, 0)
	if err == nil && (p.Batches > 0 || c.status(in).Filling) {
		err = fmt.Errorf("group %s, consumer %s: %w", g.cfg.Group, c.name, ErrPending)
	}
	return err
}

// Drained is ErrPending where some consumer has something pending.
func (g *Group) Drained(ctx context.Context) error {
	for _, c := range g.all() {
		if err := g.drained(ctx, c); err != nil {
			return err
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, err := range g.damaged {
		return err
	}
	return nil
}

// all are the consumers by name.
func (g *Group) all() (out []*consumer) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(g.consumers)) {
		out = append(out, g.consumers[name])
	}
	return out
}

// List says how the consumers are, by name.
func (g *Group) List() []Status {
	in, err := g.cfg.Source()
	if err != nil {
		in = nil // what is durable is told all the same
	}
	var out []Status
	for _, c := range g.all() {
		out = append(out, c.status(in))
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for name, err := range g.damaged {
		out = append(out, Status{Name: name, Err: err})
	}
	slices.SortFunc(out, func(a, b Status) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// Pending says what is pending behind a batch (0: the newest committed one), up to
// so many bytes of payload or the first bookmark. It waits for nothing to come, and does
// not read again what it has counted before. With an error it is what was counted before that.
func (g *Group) Pending(ctx context.Context, name string, after uint64, bytes int64) (Pending, error) {
	c, in, err := g.reach(name)
	if err != nil {
		return Pending{}, err
	}
	return c.pending(ctx, in, after, bytes)
}

// offlineEvery is how often a waiter looks whether the stream is back.
const offlineEvery = 200 * time.Millisecond

// Wait returns when bytes of payload are pending behind a batch (0: the newest
// committed one), or a bookmark is; with bytes 0, when anything is. woken: Wake
// was called meanwhile. Its error is ctx's where that ended before, ErrNoConsumer
// where the consumer was removed.
func (g *Group) Wait(ctx context.Context, name string, after uint64, bytes int64) (p Pending, woken bool, err error) {
	g.mu.Lock()
	wake := g.woken
	g.mu.Unlock()
	for {
		c, in, err := g.reach(name)
		var changed <-chan struct{}
		var retry <-chan time.Time
		switch {
		case err != nil && c == nil:
			return p, false, err
		case err != nil:
			retry = time.After(offlineEvery)
		default:
			changed = in.Changed() // before it is looked at
			if p, err = c.pending(ctx, in, after, bytes); err != nil {
				return p, false, err
			}
			if p.Batches > 0 && (p.Bytes >= bytes || p.Bookmark) {
				return p, false, nil
			}
		}
		select {
		case <-ctx.Done():
			return p, false, ctx.Err()
		case <-g.stop:
			return p, false, ErrStopped
		case <-wake:
			_, err := g.find(name) // its removal wakes too
			return p, err == nil, err
		case <-changed:
		case <-retry:
		}
	}
}

// Wake ends every Wait.
func (g *Group) Wake() {
	g.mu.Lock()
	defer g.mu.Unlock()
	close(g.woken)
	g.woken = make(chan struct{})
}

// Close ends every Wait, and the use of the consumers; their states stay.
func (g *Group) Close() {
	close(g.stop)
	g.ending.Lock()
	g.end()
	g.ending.Unlock()
	for _, c := range g.all() {
		c.close()
	}
}
