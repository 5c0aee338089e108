package api

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
)

// ChangeMap is the change map of a served device, or of a tapped disk (GROUP/DISK).
type ChangeMap struct {
	Name       string `json:"name"`
	WayIn      string `json:"way_in"` // "serve" or "tap"
	SizeBytes  int64  `json:"size_bytes"`
	BlockSize  int64  `json:"block_size"`
	Generation string `json:"generation"`
	Snapshot   uint8  `json:"snapshot"` // number of the newest snapshot; 0: none in this generation
	Writing    uint8  `json:"writing"`  // number that writes mark their blocks with
}

// Changes is what changed after a snapshot (Since; 0: after the generation
// began) up to another one (UpTo; 0: up to now).
type Changes struct {
	ChangeMap
	Since        uint8       `json:"since"`
	UpTo         uint8       `json:"up_to"`
	ChangedBytes int64       `json:"changed_bytes"`
	Extents      []ByteRange `json:"extents"`
}

// ByteRange is a range of a disk, in bytes.
type ByteRange struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
}

// ChangesRequest asks for Changes. Generation "" takes the current one.
type ChangesRequest struct {
	Generation string `json:"generation,omitempty"`
	Since      uint8  `json:"since,omitempty"`
	Live       bool   `json:"live,omitempty"` // up to now, also where there is a snapshot
}

// MarkRequest marks ranges as changed that no write told of.
type MarkRequest struct {
	Ranges []ByteRange `json:"ranges"`
}

// ChangeMaps is the part of the Service that is about changed-block tracking.
type ChangeMaps interface {
	ChangeMaps(ctx context.Context) ([]ChangeMap, error)
	// Changes: CodeFullCopy where it is not known any more what changed since then.
	Changes(ctx context.Context, name string, r ChangesRequest) (Changes, error)
	MarkChanged(ctx context.Context, name string, r MarkRequest) error
	ResetChanges(ctx context.Context, name string) error
}

// The name of a map can have a slash in it: GROUP/DISK. It is the last part of the path.
var changeRoutes = []route{
	{"GET", "/v1/changes", func(s Service, r *http.Request) (any, error) { return s.ChangeMaps(r.Context()) }},
	{"POST", "/v1/changes/read/{name...}", func(s Service, r *http.Request) (any, error) {
		var req ChangesRequest
		if err := decode(r.Body, &req); err != nil {
			return nil, err
		}
		return s.Changes(r.Context(), r.PathValue("name"), req)
	}},
	{"POST", "/v1/changes/mark/{name...}", func(s Service, r *http.Request) (any, error) {
		var req MarkRequest
		if err := decode(r.Body, &req); err != nil {
			return nil, err
		}
		return struct{}{}, s.MarkChanged(r.Context(), r.PathValue("name"), req)
	}},
	{"POST", "/v1/changes/reset/{name...}", func(s Service, r *http.Request) (any, error) {
		return struct{}{}, s.ResetChanges(r.Context(), r.PathValue("name"))
	}},
}

func changesPath(action, name string) string {
	return fmt.Sprintf("/v1/changes/%s/%s", action, (&url.URL{Path: name}).EscapedPath())
}

// ChangeMaps, Changes, MarkChanged and ResetChanges call the Service's methods of the same names.
func (c *Client) ChangeMaps(ctx context.Context) ([]ChangeMap, error) {
	return call[[]ChangeMap](ctx, c, "GET", "/v1/changes", nil)
}

func (c *Client) Changes(ctx context.Context, name string, r ChangesRequest) (Changes, error) {
	return call[Changes](ctx, c, "POST", changesPath("read", name), r)
}

func (c *Client) MarkChanged(ctx context.Context, name string, r MarkRequest) error {
	_, err := call[struct{}](ctx, c, "POST", changesPath("mark", name), r)
	return err
}

func (c *Client) ResetChanges(ctx context.Context, name string) error {
	_, err := call[struct{}](ctx, c, "POST", changesPath("reset", name), nil)
	return err
}
