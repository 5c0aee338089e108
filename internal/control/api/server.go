package api

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path"
	"slices"
	"time"
)

//go:embed openapi.json
var openAPI []byte

// bodyMax bounds what a client may send, in bytes.
const bodyMax = 1 << 20

// route is one operation; openapi.json must list the same ones.
type route struct {
	method, path string
	handle       func(s Service, r *http.Request) (any, error)
}

var routes = slices.Concat(groupRoutes, markRoutes, deviceRoutes, changeRoutes, snapshotRoutes, copyRoutes, drainRoutes)

var groupRoutes = []route{
	{"GET", "/v1/status", func(s Service, r *http.Request) (any, error) { return s.Status(r.Context()) }},
	{"POST", "/v1/groups", postGroup},
	{"DELETE", "/v1/groups/{name}", deleteGroup},
	{"POST", "/v1/groups/{name}/bookmarks", postBookmark},
	{"POST", "/v1/groups/{name}/verify", func(s Service, r *http.Request) (any, error) {
		return s.VerifyLive(r.Context(), r.PathValue("name"))
	}},
}

// Handler serves s, and its own description at /v1/openapi.json.
func Handler(s Service) http.Handler {
	mux := http.NewServeMux()
	for _, rt := range routes {
		mux.HandleFunc(rt.method+" "+rt.path, func(w http.ResponseWriter, r *http.Request) {
			out, err := rt.handle(s, r)
			answer(w, out, err)
		})
	}
	mux.HandleFunc("GET /v1/openapi.json", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(openAPI) // the client is gone if it fails
	})
	mux.HandleFunc("/", noOperation)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// The mux would send the client on to what a path with "..", "." or an empty name in it comes to, with the same method.
		if escaped := r.URL.EscapedPath(); path.Clean(escaped) != escaped {
			noOperation(w, r)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

func noOperation(w http.ResponseWriter, r *http.Request) {
	answer(w, nil, &Error{Code: CodeNotFound, Message: fmt.Sprintf("no operation %s %s", r.Method, r.URL.EscapedPath()), Remedy: "GET /v1/openapi.json lists them."})
}

func postGroup(s Service, r *http.Request) (any, error) {
	var req ProtectRequest
	if err := decode(r.Body, &req); err != nil {
		return nil, err
	}
	return s.Protect(r.Context(), req)
}

func deleteGroup(s Service, r *http.Request) (any, error) {
	asked := func(what string) bool { return r.URL.Query().Get(what) == "true" }
	return struct{}{}, s.Unprotect(r.Context(), r.PathValue("name"), asked("abandon"), asked("force"))
}

func postBookmark(s Service, r *http.Request) (any, error) {
	var req BookmarkRequest
	if err := decode(r.Body, &req); err != nil {
		return nil, err
	}
	return s.Bookmark(r.Context(), r.PathValue("name"), req)
}

func decode(body io.Reader, into any) error {
	d := json.NewDecoder(io.LimitReader(body, bodyMax))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return &Error{Code: CodeUsage, Message: "request body: " + err.Error(), Remedy: "GET /v1/openapi.json describes it."}
	}
	return nil
}

func answer(w http.ResponseWriter, out any, err error) {
	if body, ok := out.(io.ReadCloser); ok && err == nil {
		send(w, body)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		var e *Error
		if !errors.As(err, &e) {
			e = &Error{Code: CodeInternal, Message: err.Error()}
			if errors.Is(err, context.Canceled) {
				e.Message = "interrupted: " + e.Message
			}
		} else if e.Message != err.Error() && e.err != err {
			e = &Error{Code: e.Code, Message: err.Error()}
		}
		w.WriteHeader(httpStatus[e.Code])
		out = struct {
			Error *Error `json:"error"`
		}{e}
	}
	_ = json.NewEncoder(w).Encode(out) // the client is gone if it fails
}

const (
	pieceBytes = 1 << 20
	stallMax   = time.Minute // for a client to take one piece
)

// send answers with batches, in pieces.
func send(w http.ResponseWriter, body io.ReadCloser) {
	defer body.Close()
	w.Header().Set("Content-Type", "application/octet-stream")
	p := pieces{w, http.NewResponseController(w)}
	_, _ = io.Copy(p, body) // the client is gone if it fails
	_ = p.c.SetWriteDeadline(time.Time{})
}

// pieces writes an answer. A client that stands still in the middle is cut off: what
// is on its way takes memory, and the place of another's.
type pieces struct {
	w http.ResponseWriter
	c *http.ResponseController
}

func (p pieces) Write(b []byte) (total int, err error) {
	for len(b) > 0 && err == nil {
		var n int
		p.hurry()
		n, err = p.w.Write(b[:min(len(b), pieceBytes)])
		total, b = total+n, b[n:]
	}
	return total, err
}

// Flush has the client get everything that was written.
func (p pieces) Flush() {
	p.hurry()
	_ = p.c.Flush() // the next Write fails
}

// hurry gives the client the time for one piece. Where there are no deadlines it is waited for.
func (p pieces) hurry() { _ = p.c.SetWriteDeadline(time.Now().Add(stallMax)) }
