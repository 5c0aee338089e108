package protect

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"tidemark/internal/block"
	"tidemark/internal/disk"
	"tidemark/internal/tap"
	"tidemark/internal/vault"
)

// vaultFolder is where a local vault lies; empty where it is none.
func vaultFolder(where string) string {
	dir, err := vault.Folder(where)
	if err != nil {
		return ""
	}
	return dir
}

// written are the folders that a write to a new group's disks leads to writes
// in: its own vault and, where that lies on disks that are protected too, the
// vaults of those, and so on. None of them may lie on the new disks.
func written(env *Env, to string, groups []*Config, taken []occupied) []string {
	folders := []string{env.StateDir, vaultFolder(to)}
	seen := map[string]bool{}
	for at := 1; at < len(folders); at++ {
		for _, g := range groups {
			holds := func(o occupied) bool { return o.group == g.Name && disk.Holds(o.Info, folders[at]) }
			if folders[at] != "" && !seen[g.Name] && slices.ContainsFunc(taken, holds) {
				seen[g.Name] = true
				folders = append(folders, vaultFolder(g.Vault))
			}
		}
	}
	return folders
}

// claim makes sure that nobody else is at work on the group's history or on
// its disks. The history first: its lock tells who it is.
func (c *Config) claim(ctx context.Context, env *Env, v *vault.Vault, groups []*Config) error {
	lock, err := v.Lock(ctx, c.Name, env.Holder)
	if err != nil {
		return err
	}
	if err := lock.Unlock(); err != nil {
		return err
	}
	if c.Served() {
		return nil // nobody else can have a device of this daemon's
	}
	pins, err := tap.Pinned()
	if err != nil {
		return err
	}
	for _, p := range pins {
		ours := p.Group == c.Name || slices.ContainsFunc(groups, func(g *Config) bool { return g.Name == p.Group })
		if p.Instance == env.Instance && ours {
			continue // of a protect that was killed, or compared with already
		}
		for _, d := range c.Disks {
			if i, err := find(d); err == nil && slices.ContainsFunc(p.Targets, func(t tap.Target) bool { return touches(t, i) }) {
				return foreign(p, i)
			}
		}
	}
	return nil
}

// touches says whether a tap of this boot sees bytes of a disk.
func touches(t tap.Target, i *disk.Info) bool {
	return t.Whole == i.WholeDev && t.DiskSeq == i.DiskSeq &&
		block.Range{Off: t.Start, Len: t.Len}.Overlaps(block.Range{Off: i.Start, Len: i.Size})
}

func foreign(p tap.Pin, i *disk.Info) error {
	owner := tap.Owner(p.Instance, p.Group)
	if owner == "" {
		owner = "a state folder that is not known"
	}
	return fmt.Errorf("%s is captured already, by group %s of the daemon with %s: unprotect it there; where that daemon is gone for good, tidemark doctor --fix takes its capture away: %w", i.Path, p.Group, owner, ErrInUse)
}

// clearLeftovers removes what a protect left that was killed before it was
// durable. Where the vault has the group's history, what is there may follow it.
func clearLeftovers(env *Env, c *Config) error {
	return errors.Join(c.wayIn(env).discard(), os.RemoveAll(env.dir(c.Name)))
}
