package api

import (
	"context"
	"net/http"
	"time"

	"tidemark/internal/stream"
)

// MarkState is how far a bookmark over groups is.
type MarkState string

const (
	MarkPrepared  MarkState = "prepared" // durable in all groups, and no point before its commit
	MarkCommitted MarkState = "committed"
)

// MarkGroupsRequest is the body of POST /v1/bookmarks.
type MarkGroupsRequest struct {
	Groups      []string           `json:"groups"`
	Name        string             `json:"name"`
	Consistency stream.Consistency `json:"consistency"`
	// Barrier is "cut", "held" (served devices only), or "": held for served devices, cut for tapped disks.
	Barrier string `json:"barrier,omitempty"`
	// Prepare leaves it without a verdict, for TimeoutMillis; 0: a minute.
	Prepare       bool  `json:"prepare,omitempty"`
	TimeoutMillis int64 `json:"timeout_ms,omitempty"`
}

// Mark is a bookmark over groups, at one instant.
type Mark struct {
	Name        string             `json:"bookmark"`
	State       MarkState          `json:"state"`
	Consistency stream.Consistency `json:"consistency"`
	Until       time.Time          `json:"until,omitzero"` // prepared: when it is revoked by itself
	HeldSeconds float64            `json:"held_seconds"`   // how long new writes of served devices waited
	Groups      []MarkedGroup      `json:"groups"`
}

// MarkedGroup is its part in one group.
type MarkedGroup struct {
	Group    string          `json:"group"`
	Position stream.Position `json:"position"`
	Time     time.Time       `json:"time"`
	Barrier  string          `json:"barrier"` // "cut": the writers noticed nothing; "held": new writes waited
}

// Marks are bookmarks over several groups, and those in two phases. Errors wrap *Error.
type Marks interface {
	MarkGroups(ctx context.Context, r MarkGroupsRequest) (Mark, error)
	Marks(ctx context.Context) ([]Mark, error)
	CommitMark(ctx context.Context, name string) (Mark, error)
	RevokeMark(ctx context.Context, name string) error
}

var markRoutes = []route{
	{"GET", "/v1/bookmarks", func(s Service, r *http.Request) (any, error) { return s.Marks(r.Context()) }},
	{"POST", "/v1/bookmarks", func(s Service, r *http.Request) (any, error) {
		var req MarkGroupsRequest
		if err := decode(r.Body, &req); err != nil {
			return nil, err
		}
		return s.MarkGroups(r.Context(), req)
	}},
	{"POST", "/v1/bookmarks/{name}/commit", func(s Service, r *http.Request) (any, error) {
		return s.CommitMark(r.Context(), r.PathValue("name"))
	}},
	{"POST", "/v1/bookmarks/{name}/revoke", func(s Service, r *http.Request) (any, error) {
		return struct{}{}, s.RevokeMark(r.Context(), r.PathValue("name"))
	}},
}

// MarkGroups, Marks, CommitMark and RevokeMark call the Service's methods of the same names.
func (c *Client) MarkGroups(ctx context.Context, r MarkGroupsRequest) (Mark, error) {
	return call[Mark](ctx, c, "POST", "/v1/bookmarks", r)
}

func (c *Client) Marks(ctx context.Context) ([]Mark, error) {
	return call[[]Mark](ctx, c, "GET", "/v1/bookmarks", nil)
}

func (c *Client) CommitMark(ctx context.Context, name string) (Mark, error) {
	return call[Mark](ctx, c, "POST", "/v1/bookmarks/"+segment(name)+"/commit", nil)
}

func (c *Client) RevokeMark(ctx context.Context, name string) error {
	_, err := call[struct{}](ctx, c, "POST", "/v1/bookmarks/"+segment(name)+"/revoke", nil)
	return err
}
