package api

import (
	"context"
	"net/http"
	"time"

	"tidemark/internal/stream"
)

// CopyRequest is the body of POST /v1/snapshots/{name}/copy.
type CopyRequest struct {
	Vault    string `json:"vault"`              // made where the folder is absent or empty
	Group    string `json:"group,omitempty"`    // default: the device's name, where there is one device
	Bookmark string `json:"bookmark,omitempty"` // the point's name; default: the snapshot's id
}

// Copying is a copy of a snapshot that is under way, in bytes read of its images.
type Copying struct {
	Vault string `json:"vault"`
	Group string `json:"group"`
	Done  int64  `json:"done_bytes"`
	Total int64  `json:"total_bytes"` // 0: not known yet
}

// SnapshotCopy is the point that a copy has made.
type SnapshotCopy struct {
	Vault       string             `json:"vault"`
	Group       string             `json:"group"`
	Point       string             `json:"point"` // the bookmark
	Position    stream.Position    `json:"position"`
	Time        time.Time          `json:"time"`
	Consistency stream.Consistency `json:"consistency"`
	Already     bool               `json:"already"` // the vault had this snapshot
	Devices     []CopiedDevice     `json:"devices"`
}

// CopiedDevice says what was done for one device.
type CopiedDevice struct {
	Device string `json:"device"`        // its name, and the disk's in the group
	Whole  bool   `json:"whole"`         // all of it was read
	Why    string `json:"why,omitempty"` // that was so
	Read   int64  `json:"read_bytes"`
	Stored int64  `json:"stored_bytes"` // content that went into the vault, before compression
}

// Copies is the part of the Service that carries snapshots into vaults.
type Copies interface {
	// CopySnapshot returns when the point is in the vault.
	CopySnapshot(ctx context.Context, id string, r CopyRequest) (SnapshotCopy, error)
}

var copyRoutes = []route{
	{"POST", "/v1/snapshots/{name}/copy", func(s Service, r *http.Request) (any, error) {
		var req CopyRequest
		if err := decode(r.Body, &req); err != nil {
			return nil, err
		}
		return s.CopySnapshot(r.Context(), r.PathValue("name"), req)
	}},
}

// CopySnapshot calls the Service's method of the same name.
func (c *Client) CopySnapshot(ctx context.Context, id string, r CopyRequest) (SnapshotCopy, error) {
	return call[SnapshotCopy](ctx, c, "POST", snapshotPath(id)+"/copy", r)
}
