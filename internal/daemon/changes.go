package daemon

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"

	"tidemark/internal/block"
	"tidemark/internal/cbt"
	"tidemark/internal/control/api"
	"tidemark/internal/protect"
)

// ChangeMaps lists the maps of served devices, then those of tapped disks.
func (s *service) ChangeMaps(ctx context.Context) ([]api.ChangeMap, error) {
	out := []api.ChangeMap{}
	for _, name := range slices.Sorted(maps.Keys(s.devices.Nodes())) {
		if m, err := s.devices.Changes(name); err == nil {
			out = append(out, servedMap(name, m))
		}
	}
	for _, g := range s.list() {
		maps, err := g.ChangeMaps(ctx)
		if errors.Is(err, protect.ErrOffline) {
			continue
		}
		if err != nil {
			return nil, coded(err)
		}
		for _, m := range maps {
			out = append(out, tappedMap(g.Config().Name, m))
		}
	}
	return out, nil
}

func servedMap(name string, m *cbt.Map) api.ChangeMap {
	i, w := m.Info(), m.Writing()
	out := api.ChangeMap{Name: name, WayIn: "serve", SizeBytes: w.Size, BlockSize: w.BlockSize, Generation: w.Generation.String(), Writing: w.Number}
	if i.Generation == w.Generation {
		out.Snapshot = i.Number
	}
	return out
}

func tappedMap(group string, m protect.ChangeMap) api.ChangeMap {
	return api.ChangeMap{Name: group + "/" + m.Disk, WayIn: "tap", SizeBytes: m.Size, BlockSize: m.BlockSize, Generation: m.Generation, Writing: 1}
}

// Changes of a served device are between snapshots; a tapped disk has none, so
// that only what changed since the tap began is known.
func (s *service) Changes(ctx context.Context, name string, r api.ChangesRequest) (api.Changes, error) {
	if group, disk, tapped := strings.Cut(name, "/"); tapped {
		return s.tappedChanges(ctx, group, disk, r)
	}
	m, err := s.devices.Changes(name)
	if err != nil {
		return api.Changes{}, coded(err)
	}
	out := api.Changes{ChangeMap: servedMap(name, m), Since: r.Since}
	g := m.Writing().Generation
	if r.Generation != "" {
		if g, err = cbt.ParseGeneration(r.Generation); err != nil {
			return api.Changes{}, &api.Error{Code: api.CodeUsage, Message: err.Error()}
		}
	}
	var changes *cbt.Changes
	newest, taken := m.Newest()
	switch {
	case r.Live || !taken || newest.Info().Generation != g:
		changes, err = m.Live(g, r.Since)
	case r.Since == 0:
		changes, out.UpTo = newest, newest.Info().Number
	default:
		changes, err = newest.Since(g, r.Since)
		out.UpTo = newest.Info().Number
	}
	if err != nil {
		return api.Changes{}, coded(fmt.Errorf("device %s: %w", name, err))
	}
	put(&out, changes.Ranges())
	return out, nil
}

// tappedChanges is what changed since the tap began: the map of a tap has no snapshots.
func (s *service) tappedChanges(ctx context.Context, group, disk string, r api.ChangesRequest) (api.Changes, error) {
	g, err := s.find(group)
	if err != nil {
		return api.Changes{}, err
	}
	maps, err := g.ChangeMaps(ctx)
	if err != nil {
		return api.Changes{}, coded(err)
	}
	for _, m := range maps {
		if m.Disk != disk {
			continue
		}
		if r.Since > 0 || r.Generation != "" && r.Generation != m.Generation {
			return api.Changes{}, coded(fmt.Errorf("%s/%s: the tap's map knows what changed since generation %s began, and nothing of %s:%d: %w", group, disk, m.Generation, r.Generation, r.Since, cbt.ErrFullCopy))
		}
		out := api.Changes{ChangeMap: tappedMap(group, m)}
		put(&out, m.Ranges())
		return out, nil
	}
	return api.Changes{}, &api.Error{Code: api.CodeNotFound, Message: fmt.Sprintf("group %s has no disk %q", group, disk), Remedy: "tidemark cbt ls lists the maps."}
}

func put(out *api.Changes, ranges iter.Seq[block.Range]) {
	out.Extents = []api.ByteRange{}
	for r := range ranges {
		out.ChangedBytes += r.Len
		out.Extents = append(out.Extents, api.ByteRange{Offset: r.Off, Length: r.Len})
	}
}

func (s *service) MarkChanged(_ context.Context, name string, r api.MarkRequest) error {
	m, err := s.servedChanges(name)
	if err != nil {
		return err
	}
	size := m.Writing().Size
	for _, e := range r.Ranges { // all of them, or none
		if err := block.CheckBounds(block.Range{Off: e.Offset, Len: e.Length}, size); err != nil {
			return &api.Error{Code: api.CodeUsage, Message: err.Error()}
		}
	}
	for _, e := range r.Ranges {
		if err := m.MarkDirty(block.Range{Off: e.Offset, Len: e.Length}); err != nil {
			return coded(err)
		}
	}
	return nil
}

func (s *service) ResetChanges(_ context.Context, name string) error {
	m, err := s.servedChanges(name)
	if err == nil {
		m.Reset()
	}
	return err
}

// servedChanges is the map of a device that can be changed by hand.
func (s *service) servedChanges(name string) (*cbt.Map, error) {
	if strings.Contains(name, "/") {
		return nil, &api.Error{Code: api.CodeRefused, Message: fmt.Sprintf("%s is tapped: its change map is the kernel's", name), Remedy: "Only maps of served devices can be marked and reset."}
	}
	m, err := s.devices.Changes(name)
	return m, coded(err)
}
