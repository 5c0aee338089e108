package api

import (
	"context"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"tidemark/internal/health"
	"tidemark/internal/stream"
)

// Snapshot is a snapshot of several served devices at one instant.
type Snapshot struct {
	ID         string           `json:"id"`
	State      string           `json:"state"` // "created", "taken" or "spoiled"
	Taken      time.Time        `json:"taken,omitzero"`
	Durable    bool             `json:"durable"`
	ChunkBytes int64            `json:"chunk_bytes"`
	Devices    []SnapshotDevice `json:"devices"`
	Storage    SnapshotStorage  `json:"storage"`
	// Consistency is filesystem where file systems were mounted from the devices, all frozen at the instant.
	Consistency stream.Consistency `json:"consistency"`
	Copies      []Copying          `json:"copies"` // into vaults, under way
	Conditions  []health.Condition `json:"conditions"`
}

// SnapshotDevice is one device of a snapshot. Image, Generation and Number are
// empty until it is taken.
type SnapshotDevice struct {
	Device     string `json:"device"` // as device create printed it
	Image      string `json:"image"`  // a block device, or an NBD URI
	Generation string `json:"generation"`
	Number     uint8  `json:"number"`            // of the snapshot in the device's change map
	Spoiled    string `json:"spoiled,omitempty"` // why the image gives errors
}

// SnapshotStorage is a snapshot's difference storage, in bytes.
type SnapshotStorage struct {
	Capacity int64 `json:"capacity_bytes"`
	Used     int64 `json:"used_bytes"`
	Limit    int64 `json:"limit_bytes"` // it grows to that by itself
}

// StorageSpec is a file or device for difference storage. Limit 0 of a device
// is all of it.
type StorageSpec struct {
	Path  string `json:"path"` // absolute; a file is made where it is absent
	Limit int64  `json:"limit_bytes,omitempty"`
}

// SnapshotRequest is the body of POST /v1/snapshots. Devices are names, or what device create printed.
type SnapshotRequest struct {
	Devices    []string      `json:"devices"`
	Storage    []StorageSpec `json:"storage"`
	ChunkBytes int64         `json:"chunk_bytes,omitempty"`
	Durable    bool          `json:"durable,omitempty"`
}

// SnapshotEvent tells of a snapshot: low-space, overflow or corrupt.
type SnapshotEvent struct {
	Sequence uint64    `json:"sequence"` // from 1; ask for those after it
	Time     time.Time `json:"time"`
	Kind     string    `json:"kind"`
	Device   string    `json:"device,omitempty"`
	Wanted   int64     `json:"wanted_bytes,omitempty"` // of low-space: how much more to append
	Detail   string    `json:"detail"`
}

// Snapshots is the part of the Service that is about snapshots.
type Snapshots interface {
	Snapshots(ctx context.Context) ([]Snapshot, error)
	CreateSnapshot(ctx context.Context, r SnapshotRequest) (Snapshot, error)
	TakeSnapshot(ctx context.Context, id string) (Snapshot, error)
	AppendStorage(ctx context.Context, id string, r StorageSpec) (Snapshot, error)
	DestroySnapshot(ctx context.Context, id string) error
	// SnapshotEvents gives the events after a sequence number, waiting for one for at most wait.
	SnapshotEvents(ctx context.Context, id string, after uint64, wait time.Duration) ([]SnapshotEvent, error)
}

// waitMax bounds what a client may make the daemon wait for an event.
const waitMax = time.Minute

var snapshotRoutes = []route{
	{"GET", "/v1/snapshots", func(s Service, r *http.Request) (any, error) { return s.Snapshots(r.Context()) }},
	{"POST", "/v1/snapshots", func(s Service, r *http.Request) (any, error) {
		var req SnapshotRequest
		if err := decode(r.Body, &req); err != nil {
			return nil, err
		}
		return s.CreateSnapshot(r.Context(), req)
	}},
	{"POST", "/v1/snapshots/{name}/take", func(s Service, r *http.Request) (any, error) {
		return s.TakeSnapshot(r.Context(), r.PathValue("name"))
	}},
	{"POST", "/v1/snapshots/{name}/storage", func(s Service, r *http.Request) (any, error) {
		var req StorageSpec
		if err := decode(r.Body, &req); err != nil {
			return nil, err
		}
		return s.AppendStorage(r.Context(), r.PathValue("name"), req)
	}},
	{"DELETE", "/v1/snapshots/{name}", func(s Service, r *http.Request) (any, error) {
		return struct{}{}, s.DestroySnapshot(r.Context(), r.PathValue("name"))
	}},
	{"GET", "/v1/snapshots/{name}/events", getEvents},
}

func getEvents(s Service, r *http.Request) (any, error) {
	after, err := strconv.ParseUint("0"+r.URL.Query().Get("after"), 10, 64)
	if err != nil {
		return nil, &Error{Code: CodeUsage, Message: fmt.Sprintf("after=%q: want a sequence number", r.URL.Query().Get("after"))}
	}
	ms, err := strconv.ParseInt("0"+r.URL.Query().Get("wait_ms"), 10, 64)
	if err != nil || ms > waitMax.Milliseconds() {
		return nil, &Error{Code: CodeUsage, Message: fmt.Sprintf("wait_ms=%q: want 0 to %d", r.URL.Query().Get("wait_ms"), waitMax.Milliseconds())}
	}
	return s.SnapshotEvents(r.Context(), r.PathValue("name"), after, time.Duration(ms)*time.Millisecond)
}

func snapshotPath(id string) string { return "/v1/snapshots/" + segment(id) }

// Snapshots and the rest call the Service's methods of the same names.
func (c *Client) Snapshots(ctx context.Context) ([]Snapshot, error) {
	return call[[]Snapshot](ctx, c, "GET", "/v1/snapshots", nil)
}

func (c *Client) CreateSnapshot(ctx context.Context, r SnapshotRequest) (Snapshot, error) {
	return call[Snapshot](ctx, c, "POST", "/v1/snapshots", r)
}

func (c *Client) TakeSnapshot(ctx context.Context, id string) (Snapshot, error) {
	return call[Snapshot](ctx, c, "POST", snapshotPath(id)+"/take", nil)
}

func (c *Client) AppendStorage(ctx context.Context, id string, r StorageSpec) (Snapshot, error) {
	return call[Snapshot](ctx, c, "POST", snapshotPath(id)+"/storage", r)
}

func (c *Client) DestroySnapshot(ctx context.Context, id string) error {
	_, err := call[struct{}](ctx, c, "DELETE", snapshotPath(id), nil)
	return err
}

func (c *Client) SnapshotEvents(ctx context.Context, id string, after uint64, wait time.Duration) ([]SnapshotEvent, error) {
	return call[[]SnapshotEvent](ctx, c, "GET", fmt.Sprintf("%s/events?after=%d&wait_ms=%d", snapshotPath(id), after, wait.Milliseconds()), nil)
}
