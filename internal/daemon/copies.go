package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"tidemark/internal/block"
	"tidemark/internal/control/api"
	"tidemark/internal/deposit"
	"tidemark/internal/serve"
	"tidemark/internal/snapshot"
	"tidemark/internal/stream"
	"tidemark/internal/vault"
)

// copies are those of snapshots into vaults that are under way.
type copies struct {
	mu      sync.Mutex
	running map[*api.Copying]string // whose snapshot each copies
}

// begin gives a copy its folder. What a daemon before this one left there goes.
func (c *copies) begin(dir, id string, now *api.Copying) (folder string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.running) == 0 {
		c.running = map[*api.Copying]string{}
		if err := os.RemoveAll(dir); err != nil {
			return "", err
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	if folder, err = os.MkdirTemp(dir, "copy-"); err == nil {
		c.running[now] = id
	}
	return folder, err
}

func (c *copies) end(now *api.Copying, folder string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.running, now)
	return os.RemoveAll(folder)
}

func (c *copies) progress(now *api.Copying, done, total int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now.Done, now.Total = done, total
}

func (c *copies) of(id string) []api.Copying {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := []api.Copying{}
	for now, whose := range c.running {
		if whose == id {
			out = append(out, *now)
		}
	}
	slices.SortFunc(out, func(a, b api.Copying) int {
		return cmp.Or(strings.Compare(a.Vault, b.Vault), strings.Compare(a.Group, b.Group))
	})
	return out
}

// CopySnapshot puts a snapshot into a vault as a recovery point.
func (s *service) CopySnapshot(ctx context.Context, id string, r api.CopyRequest) (out api.SnapshotCopy, err error) {
	parsed, err := snapshot.ParseID(id)
	if err != nil {
		return out, coded(fmt.Errorf("%q: %w", id, snapshot.ErrNoSuch))
	}
	info, parts, err := s.devices.SnapshotParts(parsed)
	if err != nil {
		return out, coded(err)
	}
	if r.Group == "" && len(parts) > 1 {
		return out, &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf("the snapshot has %d devices, and a group of several needs a name", len(parts)), Remedy: "Give one with --name."}
	}
	req := deposit.Request{Group: cmp.Or(r.Group, parts[0].Device), Point: cmp.Or(r.Bookmark, info.ID), Snapshot: info.ID, Time: info.TakenAt, Holder: s.env.Holder}
	if info.Filesystem {
		req.Consistency = stream.Filesystem
	}
	for _, p := range parts {
		req.Disks = append(req.Disks, depositDisk(p))
	}
	v, err := vault.Create(ctx, r.Vault)
	if err != nil {
		return out, coded(err)
	}
	now := &api.Copying{Vault: v.Dir(), Group: req.Group}
	if req.Folder, err = s.copies.begin(filepath.Join(s.env.StateDir, "copies"), info.ID, now); err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, s.copies.end(now, req.Folder)) }()
	req.Progress = func(done, total int64) { s.copies.progress(now, done, total) }
	point, err := deposit.Put(ctx, v, req)
	if err != nil {
		return out, coded(err)
	}
	return copyOf(v.Dir(), point), nil
}

func depositDisk(p serve.SnapshotPart) deposit.Disk {
	return deposit.Disk{Name: p.Device, Size: p.Image.Size(), SectorSize: p.SectorSize, BlockSize: p.BlockSize, Image: p.Image,
		Generation: p.Generation, Number: p.Number, Private: p.Image.Private,
		Since: func(generation string, number uint8) (iter.Seq[block.Range], error) {
			changes, err := p.Since(generation, number)
			if err != nil {
				return nil, err
			}
			return changes.Ranges(), nil
		}}
}

func copyOf(where string, p deposit.Result) api.SnapshotCopy {
	out := api.SnapshotCopy{Vault: where, Group: p.Group, Point: p.Point, Position: p.Position, Time: p.Time, Consistency: p.Consistency, Already: p.Already, Devices: []api.CopiedDevice{}}
	for _, d := range p.Disks {
		out.Devices = append(out.Devices, api.CopiedDevice{Device: d.Name, Whole: d.Why != "", Why: d.Why, Read: d.Read, Stored: d.Stored})
	}
	return out
}
