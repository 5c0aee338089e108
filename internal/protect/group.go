// Package protect runs one group: it takes records from the tap, gives them
// positions, opens and fills gaps, seals segments into the spool and carries
// them to the vault.
//
// A Group lives as long as its daemon. It assembles a session, runs it, and
// assembles the next when that one fails: capture itself goes on meanwhile, in
// the kernel.
package protect

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"tidemark/internal/disk"
	"tidemark/internal/health"
	"tidemark/internal/tap"
	"tidemark/internal/timeline"
	"tidemark/internal/vault"
	"tidemark/internal/vfs"
)

// Group is one protected group. All methods may be called concurrently.
type Group struct {
	env    *Env
	cfg    *Config
	health health.Set
	stats  *Stats
	live   atomic.Pointer[session]
	cancel context.CancelFunc
	done   chan struct{}
	mu     sync.Mutex
	failed error
}

// Request is what a new group is made from.
type Request struct {
	Name     string
	Vault    string
	Devices  []string
	Settings Settings
}

// Create starts to protect disks. Where it fails nothing stays behind, but a
// vault that it made. protected are the disks of other groups.
func Create(ctx context.Context, env *Env, r Request, others []*Config) (*Group, error) {
	cfg, err := configure(env, r, others)
	if err != nil {
		return nil, err
	}
	v, err := vault.Create(ctx, r.Vault)
	if err != nil {
		return nil, err
	}
	dir := env.dir(cfg.Name)
	if _, err := os.Stat(filepath.Join(dir, configName)); err == nil {
		return nil, fmt.Errorf("group %s: %w", cfg.Name, ErrExists)
	}
	goesOn, err := cfg.join(ctx, v)
	if err == nil {
		err = cfg.claim(ctx, env, v, others)
	}
	if err == nil && !goesOn {
		err = clearLeftovers(env, cfg)
	}
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	g := &Group{env: env, cfg: cfg, stats: newStats(len(cfg.Disks)), done: make(chan struct{})}
	s, err := assemble(ctx, env, cfg, &g.health, g.stats)
	if err == nil {
		if err = cfg.save(dir); err != nil {
			err = errors.Join(err, s.close())
		}
	}
	if err != nil {
		return nil, errors.Join(err, cfg.wayIn(env).discard(), os.RemoveAll(dir))
	}
	g.start(s)
	return g, nil
}

// Open gives a group that this daemon knows from before; Start has it work.
func Open(env *Env, name string) (*Group, error) {
	cfg, err := LoadConfig(env.dir(name))
	if err != nil {
		return nil, err
	}
	return &Group{env: env, cfg: cfg, stats: newStats(len(cfg.Disks)), done: make(chan struct{})}, nil
}

// Start has a group of Open work. It does not fail where its disks or vault are
// away: the group is offline until they are back.
func (g *Group) Start() { g.start(nil) }

func configure(env *Env, r Request, others []*Config) (*Config, error) {
	settings, err := r.Settings.withDefaults()
	if err != nil {
		return nil, err
	}
	cfg := &Config{Version: 1, Name: r.Name, Vault: r.Vault, Settings: settings}
	if _, err := rand.Read(cfg.ID[:]); err != nil {
		return nil, err
	}
	if len(r.Devices) == 0 || len(r.Devices) > tap.DisksMax {
		return nil, fmt.Errorf("%d devices: want 1 to %d in a group: %w", len(r.Devices), tap.DisksMax, ErrSettings)
	}
	devices, err := servedOf(env, r)
	if err != nil {
		return nil, err
	}
	taken := disksOf(env, others)
	folders := written(env, r.Vault, others, taken)
	if len(devices) > 0 {
		err = cfg.admitServed(env, r, devices, folders, taken, others)
	} else {
		err = cfg.admitTapped(r, folders, taken)
	}
	if err != nil {
		return nil, err
	}
	if cfg.Name == "" {
		if len(cfg.Disks) > 1 {
			return nil, fmt.Errorf("a group of %d disks needs a name (--name): %w", len(cfg.Disks), ErrSettings)
		}
		cfg.Name = cfg.Disks[0].Name
		if err := vault.CheckName(cfg.Name); err != nil {
			return nil, fmt.Errorf("the disk's own name does not do for the group's, give --name: %w", err)
		}
	}
	return cfg, vault.CheckName(cfg.Name)
}

func (c *Config) admitTapped(r Request, folders []string, taken []occupied) error {
	for _, dev := range r.Devices {
		i, err := disk.Inspect(dev)
		if err != nil {
			return err
		}
		if err := admit(i, r, folders, taken); err != nil {
			return err
		}
		taken = append(taken, occupied{i, ""})
		c.Disks = append(c.Disks, DiskConfig{Name: i.Name, Path: i.Path, Identity: i.Identity, Size: i.Size, SectorSize: i.LogicalSector, BlockSize: blockSize(i.Size)})
	}
	return nil
}

// occupied is a disk that a new one must not lie in one stack with.
type occupied struct {
	*disk.Info
	group string // empty: the new disk's own
}

func disksOf(env *Env, groups []*Config) []occupied {
	var out []occupied
	for _, g := range groups {
		for _, d := range g.Disks {
			if i, err := infoOf(env, d); err == nil {
				out = append(out, occupied{i, g.Name})
			}
		}
	}
	return out
}

// admit refuses what cannot be tapped, or not beside the others.
func admit(i *disk.Info, r Request, folders []string, others []occupied) error {
	refusals := disk.TapRefusals(i)
	if c := disk.HoldsRefusal(i, folders...); c != nil {
		refusals = append(refusals, *c)
	}
	for _, c := range refusals {
		if r.Settings.Force && disk.Forceable(c.Code) {
			continue
		}
		return refused(c)
	}
	return apart(i, others)
}

func refused(c health.Condition) error {
	return fmt.Errorf("%w: %s [%s]\n  %s", ErrRefused, c.Detail, c.Code, c.Remedy)
}

// apart refuses a disk that lies in one stack with another.
func apart(i *disk.Info, others []occupied) error {
	for _, o := range others {
		if !disk.Related(i, o.Info) {
			continue
		}
		switch {
		case o.group != "" && i.Path == o.Path:
			return fmt.Errorf("%s is protected already, by group %s: %w", i.Path, o.group, ErrInUse)
		case o.group != "":
			return fmt.Errorf("%s lies in one stack with %s, which group %s protects: %w", i.Path, o.Path, o.group, ErrInUse)
		default:
			return fmt.Errorf("%s and %s are one disk, or lie in one stack: protect it once: %w", i.Path, o.Path, ErrInUse)
		}
	}
	return nil
}

// join goes on with the history that the vault holds under this name, if it is
// one of the same disks, and says whether there is one.
func (c *Config) join(ctx context.Context, v *vault.Vault) (bool, error) {
	h, err := timeline.Load(ctx, v, c.Name)
	if errors.Is(err, vault.ErrNoGroup) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if h.Last().Sequence == 0 && h.Damage() == nil {
		return false, nil
	}
	if d := h.Damage(); d != nil {
		return false, d
	}
	old := h.Disks()
	if len(old) != len(c.Disks) {
		return false, fmt.Errorf("group %s: the vault has %d disks under this name: %w", c.Name, len(old), ErrOtherDisks)
	}
	for i := range old {
		if old[i].Size != c.Disks[i].Size || !sameIdentity(old[i].Identity, c.Disks[i].Identity) {
			var was disk.Identity
			_ = json.Unmarshal([]byte(old[i].Identity), &was) // one that cannot be read is another
			return false, fmt.Errorf("group %s: disk %s was %s with %d bytes, and %s is %s with %d: %w", c.Name, old[i].Name, was, old[i].Size,
				c.Disks[i].Path, c.Disks[i].Identity, c.Disks[i].Size, ErrOtherDisks)
		}
		c.Disks[i].Name, c.Disks[i].BlockSize = old[i].Name, old[i].BlockSize
	}
	c.ID = h.GroupID()
	return true, nil
}

// sameIdentity compares an identity as a segment holds it with a disk's.
func sameIdentity(stored string, is disk.Identity) bool {
	var was disk.Identity
	if err := json.Unmarshal([]byte(stored), &was); err != nil {
		return false
	}
	return sameDisk(was, is)
}

// sameDisk also takes a disk that kept its sequence number in this boot for the
// same one, whatever was written to it since.
func sameDisk(was, is disk.Identity) bool {
	if was.DiskSeq != 0 && was.DiskSeq == is.DiskSeq && was.BootID == is.BootID && was.Name == is.Name && was.Size == is.Size {
		return true
	}
	same, _ := disk.Same(was, is)
	return same
}

// retryEvery is how long an offline group waits before it tries again.
const retryEvery = 2 * time.Second

// start begins the group's goroutine, with a session that is open already or none.
func (g *Group) start(s *session) {
	ctx, cancel := context.WithCancel(context.Background())
	g.cancel = cancel
	if s != nil {
		g.live.Store(s)
	}
	if s == nil {
		g.health.Raise(health.Condition{Code: "opening", Severity: health.Info, Subject: g.cfg.Name,
			Detail: "The group is being opened: its disks, its vault and its tap are looked at. Capture goes on in the kernel meanwhile."})
	}
	go func() {
		defer close(g.done)
		for s != nil || ctx.Err() == nil { // a session that is open is closed, also where it was stopped before it ran
			if s == nil {
				s = g.try(ctx)
			}
			if s != nil {
				g.live.Store(s)
				err := s.run(ctx)
				g.live.Store(nil)
				g.stats.moved("offline", moveOffline)
				g.fail(errors.Join(err, s.close()))
				s = nil
			}
			select {
			case <-ctx.Done():
			case <-time.After(retryEvery):
			}
		}
	}()
}

func (g *Group) try(ctx context.Context) *session {
	s, err := assemble(ctx, g.env, g.cfg, &g.health, g.stats)
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		return nil // the group is being stopped, and lacks nothing
	}
	g.fail(err)
	return s
}

// fail notes why the group is offline; nil: it is not.
func (g *Group) fail(err error) {
	g.mu.Lock()
	told := g.failed != nil && err != nil && g.failed.Error() == err.Error()
	g.failed = err
	g.mu.Unlock()
	g.health.Clear("opening", g.cfg.Name)
	if err == nil {
		g.health.Clear("offline", g.cfg.Name)
		return
	}
	if !told { // it is tried again every few seconds
		g.env.Log.Error("the group is offline", "group", g.cfg.Name, "error", err)
	}
	g.health.Raise(health.Condition{Code: "offline", Severity: health.Error, Subject: g.cfg.Name,
		Detail: "The group is offline: " + strings.TrimSuffix(err.Error(), ": "+ErrOffline.Error()), Remedy: "Bring back what is missing; it is tried again every few seconds. Capture goes on in the kernel as long as its ring has room."})
}

func (g *Group) current() *session { return g.live.Load() }

func (g *Group) offlineError() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case errors.Is(g.failed, ErrOffline):
		return g.failed // which says so
	case g.failed != nil:
		return fmt.Errorf("%w: %w", ErrOffline, g.failed)
	}
	return fmt.Errorf("%w: it is being opened; try again in a moment", ErrOffline)
}

// opened gives the session, after waiting for one that is just being opened.
func (g *Group) opened(ctx context.Context) *session {
	for {
		g.mu.Lock()
		failed := g.failed
		g.mu.Unlock()
		if s := g.current(); s != nil || failed != nil {
			return s
		}
		select {
		case <-ctx.Done():
			return nil
		case <-g.done:
			return nil
		case <-time.After(tick):
		}
	}
}

// Stats counts what the group does.
func (g *Group) Stats() *Stats { return g.stats }

// Config is what the group was made with; it is not to be changed.
func (g *Group) Config() *Config { return g.cfg }

// Stop ends the group's work here, if it was begun; the capture stays and goes on.
func (g *Group) Stop() {
	if g.cancel == nil {
		return
	}
	g.cancel()
	<-g.done
}

// Unprotect drains what is captured to the vault, then removes the tap and
// everything else of the group on this machine. The vault stays. With abandon
// it does not wait for the vault.
func (g *Group) Unprotect(ctx context.Context, abandon bool) error {
	if err := g.env.Ledger.release(ctx, g); err != nil {
		return fmt.Errorf("group %s stays protected: a mark is just being committed: %w", g.cfg.Name, err)
	}
	s := g.current()
	if s == nil && !abandon {
		s = g.opened(ctx)
	}
	if s != nil && !abandon {
		if err := s.drain(ctx); err != nil {
			return fmt.Errorf("group %s stays protected: %w", g.cfg.Name, err)
		}
	} else if s == nil && !abandon {
		return fmt.Errorf("%w; unprotect --abandon gives up what is not in the vault", g.offlineError())
	}
	g.Stop()
	g.env.Ledger.forget(g.cfg.ID)
	return errors.Join(g.cfg.wayIn(g.env).discard(), os.RemoveAll(g.env.dir(g.cfg.Name)), vfs.OS{}.SyncDir(filepath.Dir(g.env.dir(g.cfg.Name))))
}
