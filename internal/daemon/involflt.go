package daemon

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/control/api"
	"tidemark/internal/control/involflt"
	"tidemark/internal/disk"
	"tidemark/internal/drain"
	"tidemark/internal/freeze"
	"tidemark/internal/health"
	"tidemark/internal/protect"
	"tidemark/internal/vault"
)

// involfltSystem is what /dev/involflt commands: a consumer for each disk that a
// client has filtered, in the disk's group or, where it is in none, in one that
// is made for it. What is kept is what the consumers' names say, so it outlives
// the daemon: involfltJoined or involfltOwn, and the disk's persistent name.
type involfltSystem struct {
	s     *service
	vault string // of groups that are made; empty: none can be
	tags  *tagStore

	mu     sync.Mutex
	queues map[string]*involfltQueue // by consumer
	held   int                       // barriers that are up
}

const (
	involfltJoined = "involflt."     // in a group that was there
	involfltOwn    = "involflt-own." // in a group that ends with it

	// involfltBatch is the payload of a batch: with the headers of its writes it
	// fits into one block of 4 MiB, but for very small ones.
	involfltBatch = 3840 << 10
)

var _ involflt.System = (*involfltSystem)(nil)

// newInvolflt finds what earlier daemons kept.
func newInvolflt(s *service, dir, vault string) (*involfltSystem, error) {
	tags, err := openTags(filepath.Join(dir, "tags"))
	if err != nil {
		return nil, err
	}
	return &involfltSystem{s: s, vault: vault, tags: tags, queues: map[string]*involfltQueue{}}, nil
}

// member is a disk in its group.
type member struct {
	group *protect.Group
	disk  int
}

func (m member) config() protect.DiskConfig { return m.group.Config().Disks[m.disk] }

// deviceNumber is the number of a block device. ErrNoDevice.
func deviceNumber(path string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, fmt.Errorf("%s: %w: %w", path, involflt.ErrNoDevice, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return 0, fmt.Errorf("%s: %w: not a block device", path, involflt.ErrRefused)
	}
	return st.Rdev, nil
}

// locate finds the group that a device is in; false: it is in none.
func (b *involfltSystem) locate(ctx context.Context, number uint64) (member, bool) {
	for _, g := range b.s.list() {
		for i, d := range g.Status(ctx).Disks {
			if n, err := deviceNumber(d.Device); err == nil && n == number {
				return member{g, i}, true
			}
		}
	}
	return member{}, false
}

// Same compares the numbers of the nodes.
func (b *involfltSystem) Same(x, y string) bool {
	m, err := deviceNumber(x)
	n, failed := deviceNumber(y)
	return err == nil && failed == nil && m == n
}

func (b *involfltSystem) Start(ctx context.Context, device, name string) (involflt.Queue, error) {
	number, err := deviceNumber(device)
	if err != nil {
		return nil, err
	}
	if err := drain.CheckName(involfltOwn + name); err != nil {
		return nil, fmt.Errorf("%w: the persistent name: %w", involflt.ErrRefused, err)
	}
	prefix := involfltJoined
	m, ok := b.locate(ctx, number)
	if !ok {
		if m, err = b.protect(ctx, device, name, number); err != nil {
			return nil, err
		}
		prefix = involfltOwn
	}
	group := m.group.Config().Name
	consumers, err := b.s.consumers(group)
	if err != nil {
		return nil, err
	}
	at := func() string { return device }
	for _, p := range []string{involfltJoined, involfltOwn} {
		if consumers.Has(p + name) {
			return b.queue(m, p+name, at), nil
		}
	}
	if err := consumers.Make(ctx, prefix+name, drain.Options{Disk: m.config().Name, BatchBytes: involfltBatch, Ranges: true}); err != nil {
		return nil, err
	}
	// Of a group that is new all comes as copies. Of another: from now on, as with the
	// driver; what there is the client copies by itself.
	if prefix == involfltJoined {
		if err := consumers.Clear(prefix+name, true); err != nil && !errors.Is(err, drain.ErrNothing) {
			return nil, errors.Join(err, consumers.Remove(context.WithoutCancel(ctx), prefix+name, true))
		}
	}
	return b.queue(m, prefix+name, at), nil
}

var notInGroupNames = regexp.MustCompile(`[^A-Za-z0-9_-]+`)

// protect makes a group of one disk.
func (b *involfltSystem) protect(ctx context.Context, device, name string, number uint64) (member, error) {
	if b.vault == "" {
		b.s.health.Raise(health.Condition{Code: "involflt-no-group", Severity: health.Error, Subject: device,
			Detail: "A program asked /dev/involflt for the changes of a disk that is in no group.",
			Remedy: "Put it into one (tidemark protect --vault URL " + device + "), or start the daemon with --compat-vault URL, so that groups are made for such disks."})
		return member{}, fmt.Errorf("%s is in no group, and there is no --compat-vault: %w", device, involflt.ErrRefused)
	}
	group := strings.TrimLeft(notInGroupNames.ReplaceAllString(name, "_"), "-")
	_, err := b.s.Protect(ctx, api.ProtectRequest{Name: group, Vault: b.vault, Devices: []string{device}})
	if err != nil {
		b.s.health.Raise(health.Condition{Code: "involflt-no-group", Severity: health.Error, Subject: device,
			Detail: "A program asked /dev/involflt for the changes of a disk that cannot be protected: " + err.Error() + ".", Remedy: "tidemark doctor " + device + " says what can be done."})
		return member{}, fmt.Errorf("%w: %w", involflt.ErrRefused, err)
	}
	b.s.health.Clear("involflt-no-group", device)
	if m, ok := b.locate(ctx, number); ok {
		return m, nil
	}
	return member{}, fmt.Errorf("%s is in no group: %w", device, involflt.ErrRefused)
}

// kept finds the consumers that are clients' disks.
func (b *involfltSystem) kept() (out []*involfltQueue) {
	for _, g := range b.s.list() {
		cfg := g.Config()
		consumers, err := b.s.consumers(cfg.Name)
		if err != nil {
			continue
		}
		for _, c := range consumers.List() {
			if !strings.HasPrefix(c.Name, involfltJoined) && !strings.HasPrefix(c.Name, involfltOwn) {
				continue
			}
			for i, d := range cfg.Disks {
				if d.Name == c.Disk {
					out = append(out, b.queue(member{g, i}, c.Name, func() string { return protect.Where(d) }))
				}
			}
		}
	}
	return out
}

func (b *involfltSystem) Kept() (out []involflt.Kept) {
	for _, q := range b.kept() {
		if q.device == "" {
			continue // it is known when it is started at its new place
		}
		name := strings.TrimPrefix(strings.TrimPrefix(q.consumer, involfltJoined), involfltOwn)
		out = append(out, involflt.Kept{Device: q.device, Name: name, Queue: q})
	}
	return out
}

// byDevice finds what is kept of a device; nil: nothing.
func (b *involfltSystem) byDevice(device string) *involfltQueue {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, q := range b.queues {
		if q.device != "" && (q.device == device || b.Same(q.device, device)) {
			return q
		}
	}
	return nil
}

func (b *involfltSystem) Stop(ctx context.Context, device string) error {
	q := b.byDevice(device)
	if q == nil {
		return nil
	}
	consumers, err := q.consumers()
	if err == nil {
		err = again(consumers.Remove(ctx, q.consumer, true))
	}
	if err != nil && !errors.Is(err, involflt.ErrNoDevice) { // it may have been removed by other means, or its group
		return err
	}
	group := q.m.group.Config().Name
	if g, err := b.s.find(group); err == nil && g == q.m.group && strings.HasPrefix(q.consumer, involfltOwn) {
		if err := b.s.Unprotect(ctx, group, true, true); err != nil {
			return err
		}
	}
	b.tags.dropConsumer(q.consumer)
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.queues, q.consumer)
	return nil
}

func (b *involfltSystem) Hold(ctx context.Context, until time.Time) (func() error, error) {
	var names []string
	for _, q := range b.kept() {
		for _, d := range q.m.group.Config().Disks { // a group has one order
			if d.Served != "" {
				names = append(names, d.Served)
			}
		}
	}
	release := func() error { return nil }
	if len(names) > 0 {
		up, err := b.s.devices.Hold(ctx, time.Until(until), unique(names))
		if err != nil {
			return nil, err
		}
		release = up.Release
	}
	b.mu.Lock()
	b.held++
	b.mu.Unlock()
	return func() error {
		b.mu.Lock()
		b.held--
		b.mu.Unlock()
		return release()
	}, nil
}

// Freeze freezes what is mounted from a device. The watchdog is a process of its own.
func (b *involfltSystem) Freeze(ctx context.Context, device string, until time.Time) (func() error, error) {
	info, err := disk.Inspect(device)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", involflt.ErrNoDevice, err)
	}
	r := freeze.Request{Timeout: time.Until(until), Own: []string{b.s.env.StateDir}}
	for _, m := range info.Mounts {
		r.Mounts = append(r.Mounts, m.Point)
	}
	if len(r.Mounts) == 0 {
		return nil, fmt.Errorf("%s: nothing of it is mounted: %w", device, involflt.ErrFrozen)
	}
	for _, g := range b.s.list() {
		if dir, err := vault.Folder(g.Config().Vault); err == nil {
			r.Own = append(r.Own, dir)
		}
	}
	f, err := freeze.Freeze(ctx, r)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", involflt.ErrFrozen, err)
	}
	return f.Thaw, nil
}
