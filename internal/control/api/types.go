// Package api is the daemon's JSON interface over a unix socket: the types that
// travel, the handlers that call the Service the daemon supplies, and the client
// that the command line uses. openapi.json describes it; a test holds the two together.
package api

import (
	"context"
	"time"

	"tidemark/internal/health"
	"tidemark/internal/stream"
)

// State is what people want to know first about a group.
type State string

const (
	Filling   State = "filling"   // a gap is open and being filled; no new points yet
	Protected State = "protected" // every write is captured; the newest position is a point
	Degraded  State = "degraded"  // capture or delivery is weaker than asked; Conditions say how
	Offline   State = "offline"   // a disk, or the capture itself, is not there
)

// Mode is how much of a write is kept at this moment.
type Mode string

const (
	ModeData     Mode = "data"     // range and payload
	ModeMetadata Mode = "metadata" // ranges only
	ModeBitmap   Mode = "bitmap"   // changed blocks only
)

// Status is the answer to GET /v1/status.
type Status struct {
	Version string  `json:"version"`
	Groups  []Group `json:"groups"`
	Totals  Totals  `json:"totals"`
	// Conditions are those of the daemon itself; each group has its own.
	Conditions []health.Condition `json:"conditions"`
}

// Group is one group's state. Positions are 0 where there is none yet.
type Group struct {
	Name             string             `json:"name"`
	State            State              `json:"state"`
	Mode             Mode               `json:"mode"`
	WayIn            string             `json:"way_in"` // "tap" or "serve"
	Vault            string             `json:"vault"`
	ConsistentSince  stream.Position    `json:"consistent_since"`
	CapturedPosition stream.Position    `json:"captured_position"`
	DurablePosition  stream.Position    `json:"durable_position"`
	LagSeconds       float64            `json:"lag_seconds"`
	RingBytes        int64              `json:"ring_bytes"`
	RingUsedBytes    int64              `json:"ring_used_bytes"`
	SpoolBytes       int64              `json:"spool_bytes"`
	Disks            []Disk             `json:"disks"`
	Consumers        []Consumer         `json:"consumers"`
	Stats            GroupStats         `json:"stats"`
	Conditions       []health.Condition `json:"conditions"`
}

// Disk is one disk of a group.
type Disk struct {
	Name         string `json:"name"`
	Device       string `json:"device"`
	SizeBytes    int64  `json:"size_bytes"`
	GapBytes     int64  `json:"gap_bytes"`
	Identity     string `json:"identity"`
	Writes       uint64 `json:"writes"`
	WrittenBytes uint64 `json:"written_bytes"`
	LostWrites   uint64 `json:"lost_writes"`
	FailedWrites uint64 `json:"failed_writes"`
	// The rest counts since the daemon began.
	TakenWrites    uint64   `json:"taken_writes"`
	TakenBytes     uint64   `json:"taken_bytes"` // with their content
	ZeroedBytes    uint64   `json:"zeroed_bytes"`
	DiscardedBytes uint64   `json:"discarded_bytes"`
	WriteSizes     []uint64 `json:"write_sizes"` // by class: up to 512 bytes, 1 KiB, ... 8 MiB, and above
	Gaps           uint64   `json:"gaps"`        // that were opened over blocks of it, or became wider by them

	ChurnBytesPerSecond     float64 `json:"churn_bytes_per_second"`      // written, over the last minute
	ChurnPeakBytesPerSecond uint64  `json:"churn_peak_bytes_per_second"` // in the busiest second
	PendingBytes            uint64  `json:"pending_bytes"`               // of writes' content, captured and not in the vault
	PendingSeconds          float64 `json:"pending_seconds"`             // age of its oldest write that is not in the vault
}

// ProtectRequest is the body of POST /v1/groups. Zero settings mean the defaults.
type ProtectRequest struct {
	Name         string   `json:"name,omitempty"`
	Vault        string   `json:"vault"`
	Devices      []string `json:"devices"`
	RingBytes    int64    `json:"ring_bytes,omitempty"`
	SegmentBytes int64    `json:"segment_bytes,omitempty"`
	SealMillis   int64    `json:"seal_ms,omitempty"`
	SpoolBytes   int64    `json:"spool_bytes,omitempty"`
	FillRate     int64    `json:"fill_rate,omitempty"` // bytes a second
	HookDir      string   `json:"hook_dir,omitempty"`
	Force        bool     `json:"force,omitempty"`
	BackPressure bool     `json:"back_pressure,omitempty"` // writes wait for room in the ring; served devices only
	// MetadataOnly makes the tap keep ranges only; for tests and for machines where payload capture is unwanted.
	MetadataOnly bool `json:"metadata_only,omitempty"`
}

// BookmarkRequest is the body of POST /v1/groups/{name}/bookmarks.
type BookmarkRequest struct {
	Name        string             `json:"name"`
	Consistency stream.Consistency `json:"consistency"`
}

// Bookmark is its answer.
type Bookmark struct {
	Group       string             `json:"group"`
	Name        string             `json:"bookmark"`
	Position    stream.Position    `json:"position"`
	Time        time.Time          `json:"time"`
	Consistency stream.Consistency `json:"consistency"`
}

// LiveDisk is one disk's result of a comparison of a vault with the disk itself.
type LiveDisk struct {
	Disk           string          `json:"disk"`
	Position       stream.Position `json:"position"`
	ComparedBytes  int64           `json:"compared_bytes"`
	DifferentBytes int64           `json:"different_bytes"`
	FirstDifferent int64           `json:"first_different"` // byte offset; -1 where all is equal
	Settled        bool            `json:"settled"`         // false: the disk never held still for the comparison
}

// Service is what the daemon does for its clients. Methods are called concurrently;
// their errors should be, or wrap, *Error where a client is to branch on them.
type Service interface {
	Marks
	Devices
	ChangeMaps
	Snapshots
	Copies
	Drains
	Status(ctx context.Context) (Status, error)
	Protect(ctx context.Context, r ProtectRequest) (Group, error)
	// Unprotect is refused while a consumer has something pending, unless abandon or force.
	Unprotect(ctx context.Context, group string, abandon, force bool) error
	Bookmark(ctx context.Context, group string, r BookmarkRequest) (Bookmark, error)
	VerifyLive(ctx context.Context, group string) ([]LiveDisk, error)
}
