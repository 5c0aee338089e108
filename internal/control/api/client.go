package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"strings"
)

// Client speaks to a daemon. It may be used concurrently.
type Client struct {
	http   http.Client
	socket string
}

// Dial gives a client of the daemon behind the unix socket; nothing is sent yet.
func Dial(socket string) *Client {
	c := &Client{socket: socket}
	c.http.Transport = &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
		DisableKeepAlives: true,
	}
	c.http.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse } // another operation is not what was asked for
	return c
}

// segment is a name as a part of a path; one of dots alone would lead to another operation.
func segment(name string) string {
	if name == "." || name == ".." {
		return strings.ReplaceAll(name, ".", "%2E")
	}
	return url.PathEscape(name)
}

// Status, Protect, Unprotect, Bookmark and VerifyLive call the Service's methods of the same names.
func (c *Client) Status(ctx context.Context) (Status, error) {
	return call[Status](ctx, c, "GET", "/v1/status", nil)
}

func (c *Client) Protect(ctx context.Context, r ProtectRequest) (Group, error) {
	return call[Group](ctx, c, "POST", "/v1/groups", r)
}

func (c *Client) Unprotect(ctx context.Context, group string, abandon, force bool) error {
	_, err := call[struct{}](ctx, c, "DELETE", fmt.Sprintf("/v1/groups/%s?abandon=%t&force=%t", segment(group), abandon, force), nil)
	return err
}

func (c *Client) Bookmark(ctx context.Context, group string, r BookmarkRequest) (Bookmark, error) {
	return call[Bookmark](ctx, c, "POST", "/v1/groups/"+segment(group)+"/bookmarks", r)
}

func (c *Client) VerifyLive(ctx context.Context, group string) ([]LiveDisk, error) {
	return call[[]LiveDisk](ctx, c, "POST", "/v1/groups/"+segment(group)+"/verify", nil)
}

var _ Service = (*Client)(nil)

func call[T any](ctx context.Context, c *Client, method, path string, body any) (T, error) {
	var out T
	resp, err := c.send(ctx, method, path, body)
	if err != nil {
		return out, err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&out); err != nil {
		return out, c.gone(err)
	}
	return out, nil
}

// gone is a daemon that has not answered, or not to the end.
func (c *Client) gone(err error) error {
	return &Error{Code: CodeNoDaemon, Message: fmt.Sprintf("the daemon at %s went away before it answered: %v", c.socket, err),
		Remedy: "Start it again; tidemark status tells whether it was done.", err: err}
}

// answered is an answer that is read by others, who learn when the daemon goes away in its middle.
type answered struct {
	io.ReadCloser
	c *Client
}

func (a answered) Read(p []byte) (int, error) {
	n, err := a.ReadCloser.Read(p)
	if err != nil && err != io.EOF { // it comes as itself
		err = a.c.gone(err)
	}
	return n, err
}

// send gives the answer to a request that was not refused; its body is to be closed.
func (c *Client) send(ctx context.Context, method, path string, body any) (*http.Response, error) {
	var send io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		send = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://tidemark"+path, send)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		var op *net.OpError
		if errors.Is(err, fs.ErrPermission) {
			return nil, &Error{Code: CodeRefused, Message: fmt.Sprintf("the socket %s is not for this user: %v", c.socket, fs.ErrPermission), Remedy: "Run as root.", err: err}
		}
		if errors.As(err, &op) && op.Op == "dial" {
			return nil, &Error{Code: CodeNoDaemon, Message: fmt.Sprintf("no daemon answers at %s: %v", c.socket, op.Err),
				Remedy: "Start one with: tidemark daemon (or name its socket with --socket or TIDEMARK_SOCKET).", err: err}
		}
		if ctx.Err() != nil {
			return nil, fmt.Errorf("daemon at %s: %w", c.socket, err)
		}
		return nil, c.gone(errors.Unwrap(err))
	}
	if resp.StatusCode >= 300 {
		defer resp.Body.Close()
		var e struct{ Error *Error }
		if err := json.NewDecoder(io.LimitReader(resp.Body, bodyMax)).Decode(&e); err != nil && resp.Header.Get("Content-Type") == "application/json" {
			return nil, c.gone(err) // in the middle of its refusal
		} else if err != nil || e.Error == nil {
			return nil, fmt.Errorf("daemon at %s: HTTP status %s", c.socket, resp.Status)
		}
		return nil, e.Error
	}
	return resp, nil
}
