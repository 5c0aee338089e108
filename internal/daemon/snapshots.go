package daemon

import (
	"context"
	"fmt"
	"time"

	"tidemark/internal/control/api"
	"tidemark/internal/diff"
	"tidemark/internal/health"
	"tidemark/internal/serve"
	"tidemark/internal/snapshot"
	"tidemark/internal/stream"
)

// Snapshots lists the snapshots of served devices.
func (s *service) Snapshots(context.Context) ([]api.Snapshot, error) {
	out := []api.Snapshot{}
	for _, i := range s.devices.Snapshots() {
		out = append(out, s.snapshotOf(i))
	}
	return out, nil
}

func (s *service) snapshotOf(i snapshot.Info) api.Snapshot {
	out := api.Snapshot{ID: i.ID, State: i.State, Taken: i.TakenAt, Durable: i.Durable, ChunkBytes: i.Chunk, Devices: []api.SnapshotDevice{},
		Storage: api.SnapshotStorage{Capacity: i.Capacity, Used: i.Used, Limit: i.Capacity + i.Room}, Copies: s.copies.of(i.ID), Conditions: []health.Condition{}}
	if i.Filesystem {
		out.Consistency = stream.Filesystem
	}
	nodes := s.devices.Nodes()
	for _, d := range i.Devices {
		out.Devices = append(out.Devices, api.SnapshotDevice{Device: nodes[d.Name], Image: s.devices.ImageNode(d.Name, i.ID),
			Generation: d.Generation, Number: d.Number, Spoiled: d.Spoiled})
		if d.Spoiled != "" {
			out.Conditions = append(out.Conditions, health.Condition{Code: "snapshot-spoiled", Severity: health.Error, Subject: i.ID,
				Detail: fmt.Sprintf("The image of %s cannot be read: %s. The device itself lost nothing.", d.Name, d.Spoiled),
				Remedy: "Destroy the snapshot and take another, with more difference storage where it was full."})
		}
	}
	return out
}

func (s *service) CreateSnapshot(_ context.Context, r api.SnapshotRequest) (api.Snapshot, error) {
	req := snapshot.Request{Devices: r.Devices, Chunk: r.ChunkBytes, Durable: r.Durable}
	for _, p := range r.Storage {
		req.Storage = append(req.Storage, snapshot.Storage{Path: p.Path, Limit: p.Limit})
	}
	i, err := s.devices.CreateSnapshot(req)
	if err != nil {
		return api.Snapshot{}, coded(err)
	}
	return s.snapshotOf(i), nil
}

// withSnapshot does something to a snapshot, and describes it afterwards.
func (s *service) withSnapshot(id string, do func(snapshot.ID) error) (api.Snapshot, error) {
	parsed, err := snapshot.ParseID(id)
	if err != nil { // what cannot be an id is none
		return api.Snapshot{}, coded(fmt.Errorf("%q: %w", id, snapshot.ErrNoSuch))
	}
	if err := do(parsed); err != nil {
		return api.Snapshot{}, coded(err)
	}
	i, err := s.devices.Snapshot(parsed)
	if err != nil {
		return api.Snapshot{}, coded(err)
	}
	return s.snapshotOf(i), nil
}

func (s *service) TakeSnapshot(ctx context.Context, id string) (api.Snapshot, error) {
	return s.withSnapshot(id, func(id snapshot.ID) error { return s.devices.TakeSnapshot(ctx, id) })
}

func (s *service) AppendStorage(_ context.Context, id string, r api.StorageSpec) (api.Snapshot, error) {
	return s.withSnapshot(id, func(id snapshot.ID) error {
		return s.devices.AppendStorage(id, snapshot.Storage{Path: r.Path, Limit: r.Limit})
	})
}

func (s *service) DestroySnapshot(ctx context.Context, id string) error {
	parsed, err := snapshot.ParseID(id)
	if err != nil {
		return coded(fmt.Errorf("%q: %w", id, snapshot.ErrNoSuch))
	}
	return coded(s.devices.DestroySnapshot(ctx, parsed))
}

func (s *service) SnapshotEvents(ctx context.Context, id string, after uint64, wait time.Duration) ([]api.SnapshotEvent, error) {
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	events, err := s.devices.Events(ctx, id, after)
	if err != nil {
		return nil, coded(err)
	}
	out := []api.SnapshotEvent{}
	for _, e := range events {
		out = append(out, eventOf(e))
	}
	return out, nil
}

func eventOf(e serve.Event) api.SnapshotEvent {
	out := api.SnapshotEvent{Sequence: e.Sequence, Time: e.Time, Kind: string(e.Kind), Device: e.Device, Wanted: e.Bytes, Detail: e.Error}
	switch {
	case out.Detail != "":
	case e.Kind == diff.LowSpace:
		out.Detail = fmt.Sprintf("%d bytes more are wanted: tidemark snapshot append", e.Bytes)
	}
	return out
}
