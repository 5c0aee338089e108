package api

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"

	"tidemark/internal/stream"
)

type service struct{ Service }

func (service) Bookmark(_ context.Context, group string, r BookmarkRequest) (Bookmark, error) {
	if group == "gap" {
		return Bookmark{}, Wrap(CodeInsideGap, errors.New("the group is filling"), "Wait.")
	}
	return Bookmark{Group: group, Name: r.Name, Position: 7, Consistency: r.Consistency}, nil
}

func dial(t *testing.T) (*Client, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: Handler(service{})}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	return Dial(path), path
}

func TestRoundTrip(t *testing.T) {
	c, _ := dial(t)
	got, err := c.Bookmark(t.Context(), "a b/c", BookmarkRequest{Name: "n", Consistency: stream.Filesystem})
	if err != nil || got.Group != "a b/c" || got.Consistency != stream.Filesystem || got.Position != 7 {
		t.Fatalf("got %+v, %v", got, err)
	}
	_, err = c.Bookmark(t.Context(), "gap", BookmarkRequest{Name: "n"})
	if CodeOf(err) != CodeInsideGap || !strings.Contains(err.Error(), "Wait.") {
		t.Fatalf("got %v with code %s, want %s with the remedy", err, CodeOf(err), CodeInsideGap)
	}
}

func TestNoDaemon(t *testing.T) {
	if _, err := Dial(filepath.Join(t.TempDir(), "none")).Status(t.Context()); CodeOf(err) != CodeNoDaemon {
		t.Fatalf("got %v, want code %s", err, CodeNoDaemon)
	}
}

func TestBadInput(t *testing.T) {
	c, _ := dial(t)
	for body, want := range map[string]Code{`{"nam":"x"}`: CodeUsage, `{"name":"x","consistency":"perfect"}`: CodeUsage, `[`: CodeUsage} {
		req, _ := http.NewRequest("POST", "http://tidemark/v1/groups/g/bookmarks", strings.NewReader(body))
		resp, err := c.http.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != httpStatus[want] {
			t.Errorf("%s: status %d, want %d", body, resp.StatusCode, httpStatus[want])
		}
	}
	if _, err := call[Status](t.Context(), c, "GET", "/v2/x", nil); CodeOf(err) != CodeNotFound {
		t.Errorf("unknown path: %v", err)
	}
}

// strict is a service of which nothing may be asked but what it has.
type strict struct {
	Service
	t *testing.T
}

func (s strict) Unprotect(_ context.Context, group string, _, _ bool) error {
	if group != ".." && group != "." {
		s.t.Errorf("group %q is unprotected", group)
	}
	return Wrap(CodeNotFound, errors.New(group), "")
}

func (s strict) RemoveConsumer(_ context.Context, group, consumer string, _ bool) error {
	return Wrap(CodeUsage, errors.New(group+"/"+consumer), "")
}

// TestNamesOfDots: a name of dots is one, and never a way to another operation: that
// of a consumer would be its group, and to remove it to unprotect the group.
func TestNamesOfDots(t *testing.T) {
	l := httptest.NewServer(Handler(strict{t: t}))
	defer l.Close()
	c := &Client{socket: l.URL}
	c.http.Transport = &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", l.Listener.Addr().String())
	}}
	for _, name := range []string{"..", "."} {
		if err := c.RemoveConsumer(t.Context(), "db", name, true); CodeOf(err) != CodeUsage || !strings.Contains(err.Error(), "db/"+name) {
			t.Errorf("consumer %s: %v", name, err)
		}
		if err := c.Unprotect(t.Context(), name, false, false); CodeOf(err) != CodeNotFound || err.Error() != name {
			t.Errorf("group %s: %v", name, err)
		}
	}
	// As somebody else's client sends it; with a client that goes where it is sent.
	for _, path := range []string{"/v1/groups/db/consumers/..", "/v1/groups/db/consumers/../", "/v1/groups//db", "/v1/./groups/db", "/v1/groups/db/"} {
		req, err := http.NewRequest("DELETE", l.URL+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusNotFound {
			t.Errorf("%s: %s", path, resp.Status)
		}
	}
}
