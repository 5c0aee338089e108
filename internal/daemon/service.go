package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"tidemark/internal/backing"
	"tidemark/internal/cbt"
	"tidemark/internal/control/api"
	"tidemark/internal/deposit"
	"tidemark/internal/diff"
	"tidemark/internal/disk"
	"tidemark/internal/dm"
	"tidemark/internal/drain"
	"tidemark/internal/filter/barrier"
	"tidemark/internal/freeze"
	"tidemark/internal/health"
	"tidemark/internal/protect"
	"tidemark/internal/segment"
	"tidemark/internal/serve"
	"tidemark/internal/snapshot"
	"tidemark/internal/spool"
	"tidemark/internal/stack"
	"tidemark/internal/stream"
	"tidemark/internal/tap"
	"tidemark/internal/timeline"
	"tidemark/internal/vault"
)

// service is the api.Service: it finds the group and translates errors.
type service struct {
	version string
	env     *protect.Env
	health  health.Set
	devices *serve.Server

	making sync.Mutex // one group is made at a time; a vault that hangs must not keep status waiting
	mu     sync.Mutex // held for a moment
	groups map[string]*protect.Group
	drains map[string]*consumers // of the groups
	copies copies
}

var _ api.Service = (*service)(nil)

// open finds the groups that the state folder knows.
func (s *service) open() error {
	entries, err := os.ReadDir(filepath.Join(s.env.StateDir, "groups"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		g, err := protect.Open(s.env, e.Name())
		if errors.Is(err, protect.ErrNoGroup) {
			continue // of a protect that was killed before it was durable
		}
		if err != nil {
			s.health.Raise(health.Condition{Code: "group-unreadable", Severity: health.Error, Subject: e.Name(),
				Detail: err.Error(), Remedy: "Remove the folder and protect the disks again; the vault goes on with their history."})
			continue
		}
		s.groups[e.Name()] = g
		s.openConsumers(g)
	}
	return nil
}

// start has them work.
func (s *service) start() {
	s.env.Served = servedDevices{s.devices}
	for _, g := range s.list() {
		g.Start()
	}
}

func (s *service) stop() {
	s.making.Lock() // a group that is just being made is stopped too
	defer s.making.Unlock()
	var all sync.WaitGroup
	for _, g := range s.list() {
		all.Go(g.Stop)
	}
	all.Wait()
}

func (s *service) list() []*protect.Group {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*protect.Group
	for _, g := range s.groups {
		out = append(out, g)
	}
	slices.SortFunc(out, func(a, b *protect.Group) int {
		if a.Config().Name < b.Config().Name {
			return -1
		}
		return 1
	})
	return out
}

func (s *service) find(name string) (*protect.Group, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if g, ok := s.groups[name]; ok {
		return g, nil
	}
	return nil, &api.Error{Code: api.CodeNotFound, Message: fmt.Sprintf("no group %q", name), Remedy: "tidemark status lists the groups."}
}

func (s *service) Status(ctx context.Context) (api.Status, error) {
	out := api.Status{Version: s.version, Groups: []api.Group{}, Conditions: append(s.health.List(), s.devices.Conditions()...)}
	for _, g := range s.list() {
		out.Groups = append(out.Groups, s.groupOf(ctx, g.Status(ctx)))
	}
	out.Totals = totalsOf(out.Groups)
	return out, nil
}

func (s *service) Protect(ctx context.Context, r api.ProtectRequest) (api.Group, error) {
	s.making.Lock()
	defer s.making.Unlock()
	var others []*protect.Config
	for _, g := range s.list() {
		others = append(others, g.Config())
	}
	if _, err := s.find(r.Name); err == nil {
		return api.Group{}, &api.Error{Code: api.CodeInUse, Message: fmt.Sprintf("group %s is protected already", r.Name), Remedy: "Give another --name, or unprotect it first."}
	}
	if err := s.apart(r.Vault); err != nil {
		return api.Group{}, err
	}
	g, err := protect.Create(ctx, s.env, protect.Request{Name: r.Name, Vault: r.Vault, Devices: r.Devices, Settings: protect.Settings{
		RingBytes: int(r.RingBytes), SegmentBytes: int(r.SegmentBytes), SealEvery: time.Duration(r.SealMillis) * time.Millisecond,
		SpoolBytes: r.SpoolBytes, FillRate: r.FillRate, HookDir: r.HookDir, Metadata: r.MetadataOnly, BackPressure: r.BackPressure, Force: r.Force,
	}}, others)
	if err != nil {
		return api.Group{}, coded(err)
	}
	if ctx.Err() != nil { // who asked is gone, and would not know of it
		if err := g.Unprotect(context.WithoutCancel(ctx), true); err == nil {
			return api.Group{}, ctx.Err()
		}
	}
	s.mu.Lock()
	s.groups[g.Config().Name] = g
	s.openConsumers(g)
	s.mu.Unlock()
	return s.groupOf(ctx, g.Status(ctx)), nil
}

// apart refuses a vault among the daemon's own things: it must outlive them, and
// would be taken for a group.
func (s *service) apart(where string) error {
	dir, err := vault.Folder(where)
	if err != nil {
		return nil // not a local one
	}
	if realPath(dir) != realPath(s.env.StateDir) && !strings.HasPrefix(realPath(dir), realPath(s.env.StateDir)+"/") {
		return nil
	}
	return &api.Error{Code: api.CodeRefused, Message: fmt.Sprintf("%s lies in the daemon's state folder %s", where, s.env.StateDir), Remedy: "Give a folder outside it, on another disk as a rule."}
}

// realPath follows symbolic links as far as a path exists.
func realPath(path string) string {
	if real, err := filepath.EvalSymlinks(path); err == nil || path == filepath.Dir(path) {
		return real
	}
	return filepath.Join(realPath(filepath.Dir(path)), filepath.Base(path))
}

// groupOf is a group with its consumers.
func (s *service) groupOf(ctx context.Context, st protect.Status) api.Group {
	out := groupOf(st)
	out.Consumers = s.consumersOf(ctx, st.Name)
	out.Conditions = append(out.Conditions, conditionsOf(st.Name, out.Consumers)...)
	return out
}

func (s *service) Unprotect(ctx context.Context, name string, abandon, force bool) error {
	g, err := s.find(name)
	if err != nil {
		return err
	}
	if d, err := s.consumers(name); err == nil && !abandon && !force {
		if err := s.drained(ctx, d, name); err != nil {
			return coded(err)
		}
	}
	s.closeConsumers(name) // their states go with the group's folder
	if err := g.Unprotect(ctx, abandon); err != nil {
		s.mu.Lock()
		s.openConsumers(g)
		s.mu.Unlock()
		return coded(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.groups, name)
	return nil
}

func (s *service) Bookmark(ctx context.Context, name string, r api.BookmarkRequest) (api.Bookmark, error) {
	g, err := s.find(name)
	if err != nil {
		return api.Bookmark{}, err
	}
	at, err := g.Bookmark(ctx, r.Name, r.Consistency)
	if err != nil {
		return api.Bookmark{}, coded(err)
	}
	return api.Bookmark{Group: name, Name: r.Name, Position: at.Position, Time: at.Time.UTC(), Consistency: r.Consistency}, nil
}

func (s *service) VerifyLive(ctx context.Context, name string) ([]api.LiveDisk, error) {
	g, err := s.find(name)
	if err != nil {
		return nil, err
	}
	disks, err := g.VerifyLive(ctx)
	return liveOf(disks), coded(err)
}

// coded gives an error the code that clients branch on: the only place where
// the packages' sentinels become the API's codes.
func coded(err error) error {
	if err == nil {
		return nil
	}
	var held *vault.HeldError
	if errors.As(err, &held) {
		return api.Wrap(api.CodeInUse, err, "Stop that daemon, or unprotect the group there.")
	}
	for _, c := range []struct {
		is     error
		code   api.Code
		remedy string
	}{
		{drain.ErrNothing, api.CodeNothing, ""},
		{drain.ErrCommit, api.CodeNotGiven, ""},
		{drain.ErrNoConsumer, api.CodeNotFound, "tidemark drain ls lists the consumers; drain next makes one."},
		{drain.ErrName, api.CodeUsage, ""},
		{drain.ErrOptions, api.CodeUsage, ""},
		{drain.ErrExists, api.CodeInUse, "Give another name, or the options that it was made with."},
		{drain.ErrPending, api.CodeRefused, "Drain it first, or give --force."},
		{drain.ErrState, api.CodeDamaged, ""},
		{drain.ErrStopped, api.CodeUnreachable, "The group is being unprotected, or the daemon ends: tidemark status tells."},
		{timeline.ErrInsideGap, api.CodeInsideGap, ""},
		{timeline.ErrNoPoint, api.CodeNotFound, "tidemark points lists the points."},
		{protect.ErrInsideGap, api.CodeInsideGap, "tidemark status shows how far the gap is filled."},
		{protect.ErrSettings, api.CodeUsage, ""},
		{stream.ErrBadPoint, api.CodeUsage, ""},
		{vault.ErrName, api.CodeUsage, ""},
		{vault.ErrScheme, api.CodeUsage, ""},
		{protect.ErrExists, api.CodeInUse, "Give another --name, or unprotect it first."},
		{protect.ErrInUse, api.CodeInUse, ""},
		{protect.ErrBookmarkExists, api.CodeInUse, "Choose another name."},
		{protect.ErrRefused, api.CodeRefused, ""},
		{protect.ErrOtherDisks, api.CodeRefused, "Give another --name."},
		{protect.ErrNoHooks, api.CodeRefused, "Give hooks, or ask for less consistency."},
		{protect.ErrNoMark, api.CodeNotFound, "tidemark bookmark --pending lists those that wait for a verdict."},
		{protect.ErrRevoked, api.CodeRefused, "Prepare it again."},
		{protect.ErrCommitted, api.CodeRefused, "A bookmark that is committed stays."},
		{protect.ErrNotPrepared, api.CodeRefused, ""},
		{protect.ErrUndelivered, api.CodeUnreachable, "It is decided; nothing is to be done but to bring the group back."},
		{protect.ErrStoodTooLong, api.CodeUnreachable, "Try again when the machine is less busy."},
		{protect.ErrBarrier, api.CodeRefused, "Leave --barrier out: a mark of tapped disks is one cut through their writes, and needs none to be held."},
		{barrier.ErrUp, api.CodeInUse, "Try again when the snapshot or mark that is being taken is done."},
		{barrier.ErrExpired, api.CodeUnreachable, "Try again."},
		{barrier.ErrLost, api.CodeUnreachable, "Try again."},
		{protect.ErrNotFrozen, api.CodeRefused, "Ask for --consistency crash."},
		{freeze.ErrForeign, api.CodeInUse, ""},
		{freeze.ErrUnsupported, api.CodeRefused, "Ask for --consistency crash."},
		{freeze.ErrOwn, api.CodeRefused, "Put state and vault on another file system."},
		{freeze.ErrHook, api.CodeRefused, ""},
		{freeze.ErrTimeout, api.CodeRefused, ""},
		{freeze.ErrNotHeld, api.CodeRefused, ""},
		{vault.ErrConflict, api.CodeRefused, ""},
		{disk.ErrNotFound, api.CodeNotFound, "Name a block device."},
		{disk.ErrNotBlock, api.CodeRefused, "Name a block device."},
		{vault.ErrNotVault, api.CodeNotAVault, ""},
		{segment.ErrDamaged, api.CodeDamaged, "tidemark verify tells what is damaged."},
		{tap.ErrConfig, api.CodeUsage, ""},
		{tap.ErrKernel, api.CodeRefused, "tidemark doctor says what is missing."},
		{tap.ErrLayout, api.CodeRefused, ""},
		{tap.ErrExists, api.CodeInUse, "tidemark doctor says whose it is."},
		{freeze.ErrWatchdog, api.CodeRefused, "Ask for --consistency crash."},
		{vault.ErrNoGroup, api.CodeNotFound, ""},
		{tap.ErrRingFull, api.CodeUnreachable, "The ring is full; try again when the spool drains, or give more with --ring-size."},
		{spool.ErrFull, api.CodeUnreachable, "Try again when the spool has room; tidemark status says what it waits for."},
		{vault.ErrUnreachable, api.CodeUnreachable, ""},
		{serve.ErrName, api.CodeUsage, "Give another --name."},
		{serve.ErrExists, api.CodeInUse, "Give another --name."},
		{serve.ErrInUse, api.CodeInUse, "End what uses it first, or name another."},
		{serve.ErrNoFilter, api.CodeNotFound, "tidemark device filters NAME lists those that a device has."},
		{serve.ErrSetting, api.CodeUsage, ""},
		{serve.ErrSpoils, api.CodeRefused, ""},
		{stack.ErrStalled, api.CodeUnreachable, "Try again when its requests have ended."},
		{serve.ErrNotFound, api.CodeNotFound, "tidemark device ls lists the devices."},
		{serve.ErrFront, api.CodeRefused, "tidemark doctor says what this machine can do."},
		{backing.ErrInUse, api.CodeInUse, "Unmount it, or end what has it open."},
		{serve.ErrNoFront, api.CodeUsage, ""},
		{backing.ErrEmpty, api.CodeRefused, "Make it larger first: truncate -s SIZE FILE."},
		{backing.ErrKind, api.CodeRefused, "Name a disk or an image file."},
		{cbt.ErrFullCopy, api.CodeFullCopy, "Copy the whole device, from a snapshot, and ask from that snapshot on."},
		{serve.ErrRefused, api.CodeRefused, ""},
		{dm.ErrNoMapper, api.CodeRefused, ""},
		{snapshot.ErrRequest, api.CodeUsage, ""},
		{snapshot.ErrNoSuch, api.CodeNotFound, "tidemark snapshot ls lists the snapshots."},
		{snapshot.ErrNoDevice, api.CodeNotFound, "tidemark device ls lists the devices."},
		{snapshot.ErrTaken, api.CodeRefused, "Make another one: tidemark snapshot create."},
		{snapshot.ErrNotTaken, api.CodeRefused, "tidemark snapshot take makes its images."},
		{snapshot.ErrNoStorage, api.CodeRefused, "Give it some: tidemark snapshot append."},
		{diff.ErrRefused, api.CodeRefused, ""},
		{diff.ErrSpoiled, api.CodeRefused, "Destroy the snapshot and take another, with more difference storage where it was full."},
		{diff.ErrFull, api.CodeRefused, "Give more room, or a larger limit."},
		{snapshot.ErrStopped, api.CodeUnreachable, "Try again when the daemon is back."},
		{deposit.ErrOtherDisks, api.CodeRefused, "Give another --name."},
		{deposit.ErrOlder, api.CodeRefused, "Points of a group are in the order of time: give another --name."},
		{deposit.ErrPoint, api.CodeInUse, "Give another --bookmark."},
		{deposit.ErrChanged, api.CodeInUse, ""},
		{serve.ErrSize, api.CodeUsage, ""},
		{serve.ErrDamaged, api.CodeDamaged, ""},
		{fs.ErrNotExist, api.CodeNotFound, "Look at the path: its folder must be there."},
		{fs.ErrPermission, api.CodeRefused, "The daemon may not do that: look at its owner, mode and attributes (lsattr)."},
		{syscall.ENOSPC, api.CodeRefused, "Make room there, or name another place."},
		{protect.ErrOffline, api.CodeUnreachable, ""},
		{syscall.EIO, api.CodeUnreachable, "The disk gives errors: look at the kernel's log, and name another one."},
	} {
		if errors.Is(err, c.is) {
			return api.Wrap(c.code, err, c.remedy)
		}
	}
	return err
}
