package api

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"time"

	"tidemark/internal/stream"
)

// Consumer is a named reader of a group, as it is now.
type Consumer struct {
	Name        string          `json:"name"`
	Disk        string          `json:"disk,omitempty"` // none: all of the group
	BatchBytes  int64           `json:"batch_bytes"`
	Ranges      bool            `json:"ranges"`
	Committed   uint64          `json:"committed"`   // number of the newest committed batch
	Outstanding int             `json:"outstanding"` // batches given since and not committed
	Position    stream.Position `json:"position"`    // its copy is, or was last, right at it
	NeedsFill   bool            `json:"needs_fill"`  // what its copy lacks comes as a fill
	Cleared     bool            `json:"cleared"`     // because what was pending was cleared
	Behind      stream.Position `json:"behind"`      // positions that are sealed and that it has not committed
	// PendingBytes is payload of writes that are sealed and that it has not committed. None: it is not known,
	// as it needs a fill, or its group is offline, or so much is pending that it is still being counted.
	PendingBytes *int64  `json:"pending_bytes,omitempty"`
	LagSeconds   float64 `json:"lag_seconds"` // between its position and the newest sealed
	Error        string  `json:"error,omitempty"`
}

// DrainRequest asks for a batch. All but After are for the consumer that it makes
// where there is none of the name; one that is there must not be otherwise.
type DrainRequest struct {
	After      uint64 `json:"after,omitempty"`       // the batch behind this one, which was given and is not committed; 0: behind the newest committed
	Batches    int    `json:"batches,omitempty"`     // most batches of the answer, one behind the other; 0: one
	From       string `json:"from,omitempty"`        // "empty", or the point that the copy is: latest, seq:N, a time, a bookmark
	Disk       string `json:"disk,omitempty"`        // none: all of the group
	BatchBytes int64  `json:"batch_bytes,omitempty"` // most payload of a batch, unless one record has more
	Ranges     bool   `json:"ranges,omitempty"`      // while a gap is open, tell what to read from the disk meanwhile
}

// BatchesMax bounds DrainRequest.Batches.
const BatchesMax = 256

// DrainCommit says that the consumer has everything up to a batch for good.
type DrainCommit struct {
	Number uint64 `json:"number"`
}

// DrainWait waits until so much is pending, or a bookmark is.
type DrainWait struct {
	After         uint64 `json:"after,omitempty"` // behind this batch
	Bytes         int64  `json:"bytes,omitempty"` // of payload; 0: anything
	TimeoutMillis int64  `json:"timeout_ms"`
}

// DrainPending is what a wait has found.
type DrainPending struct {
	Batches  int   `json:"batches"`
	Bytes    int64 `json:"bytes"` // of payload, as far as it was counted
	Bookmark bool  `json:"bookmark"`
	Woken    bool  `json:"woken"`
}

// DrainClear drops what is pending.
type DrainClear struct {
	Skip bool `json:"skip,omitempty"` // no fill: the consumer makes its copy right by itself
}

// Drains is the part of the Service that hands the stream to consumers.
type Drains interface {
	// DrainNext gives a batch in the form of docs/formats/batch.md, or as many as there
	// are up to what was asked for; close it. It may end behind any whole batch.
	// CodeNothing: there is none yet. CodeNotGiven: After was not given.
	DrainNext(ctx context.Context, group, consumer string, r DrainRequest) (io.ReadCloser, error)
	// DrainCommit: CodeNotGiven where the batch was not given.
	DrainCommit(ctx context.Context, group, consumer string, r DrainCommit) error
	// DrainWait: CodeNothing where the time-out has passed.
	DrainWait(ctx context.Context, group, consumer string, r DrainWait) (DrainPending, error)
	DrainClear(ctx context.Context, group, consumer string, r DrainClear) error
	// DrainWake ends every wait of the group's consumers.
	DrainWake(ctx context.Context, group string) error
	Consumers(ctx context.Context, group string) ([]Consumer, error)
	// RemoveConsumer is refused while something is pending, unless force.
	RemoveConsumer(ctx context.Context, group, consumer string, force bool) error
}

// WaitMax bounds DrainWait.TimeoutMillis.
const WaitMax = time.Hour

var drainRoutes = []route{
	{"GET", "/v1/groups/{name}/consumers", func(s Service, r *http.Request) (any, error) {
		return s.Consumers(r.Context(), r.PathValue("name"))
	}},
	{"POST", "/v1/groups/{name}/consumers/{consumer}/next", func(s Service, r *http.Request) (any, error) {
		return posted(r, func(req DrainRequest) (any, error) {
			return s.DrainNext(r.Context(), r.PathValue("name"), r.PathValue("consumer"), req)
		})
	}},
	{"POST", "/v1/groups/{name}/consumers/{consumer}/commit", func(s Service, r *http.Request) (any, error) {
		return posted(r, func(req DrainCommit) (any, error) {
			return struct{}{}, s.DrainCommit(r.Context(), r.PathValue("name"), r.PathValue("consumer"), req)
		})
	}},
	{"POST", "/v1/groups/{name}/consumers/{consumer}/wait", func(s Service, r *http.Request) (any, error) {
		return posted(r, func(req DrainWait) (any, error) {
			return s.DrainWait(r.Context(), r.PathValue("name"), r.PathValue("consumer"), req)
		})
	}},
	{"POST", "/v1/groups/{name}/consumers/{consumer}/clear", func(s Service, r *http.Request) (any, error) {
		return posted(r, func(req DrainClear) (any, error) {
			return struct{}{}, s.DrainClear(r.Context(), r.PathValue("name"), r.PathValue("consumer"), req)
		})
	}},
	{"DELETE", "/v1/groups/{name}/consumers/{consumer}", func(s Service, r *http.Request) (any, error) {
		force := r.URL.Query().Get("force") == "true"
		return struct{}{}, s.RemoveConsumer(r.Context(), r.PathValue("name"), r.PathValue("consumer"), force)
	}},
	{"POST", "/v1/groups/{name}/wake", func(s Service, r *http.Request) (any, error) {
		return struct{}{}, s.DrainWake(r.Context(), r.PathValue("name"))
	}},
}

// posted hands a request's body on.
func posted[T any](r *http.Request, do func(T) (any, error)) (any, error) {
	var req T
	if err := decode(r.Body, &req); err != nil {
		return nil, err
	}
	return do(req)
}

func consumersOf(group string) string { return "/v1/groups/" + segment(group) + "/consumers" }

func consumerPath(group, consumer string) string {
	return consumersOf(group) + "/" + segment(consumer)
}

// The Client's methods call the Service's of the same names.
func (c *Client) DrainNext(ctx context.Context, group, consumer string, r DrainRequest) (io.ReadCloser, error) {
	resp, err := c.send(ctx, "POST", consumerPath(group, consumer)+"/next", r)
	if err != nil {
		return nil, err
	}
	return answered{resp.Body, c}, nil
}

func (c *Client) DrainCommit(ctx context.Context, group, consumer string, r DrainCommit) error {
	_, err := call[struct{}](ctx, c, "POST", consumerPath(group, consumer)+"/commit", r)
	return err
}

func (c *Client) DrainWait(ctx context.Context, group, consumer string, r DrainWait) (DrainPending, error) {
	return call[DrainPending](ctx, c, "POST", consumerPath(group, consumer)+"/wait", r)
}

func (c *Client) DrainClear(ctx context.Context, group, consumer string, r DrainClear) error {
	_, err := call[struct{}](ctx, c, "POST", consumerPath(group, consumer)+"/clear", r)
	return err
}

func (c *Client) DrainWake(ctx context.Context, group string) error {
	_, err := call[struct{}](ctx, c, "POST", "/v1/groups/"+segment(group)+"/wake", nil)
	return err
}

func (c *Client) Consumers(ctx context.Context, group string) ([]Consumer, error) {
	return call[[]Consumer](ctx, c, "GET", consumersOf(group), nil)
}

func (c *Client) RemoveConsumer(ctx context.Context, group, consumer string, force bool) error {
	_, err := call[struct{}](ctx, c, "DELETE", fmt.Sprintf("%s?force=%t", consumerPath(group, consumer), force), nil)
	return err
}
