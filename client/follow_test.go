package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"tidemark/internal/batch"
)

// daemon answers as the real one does, with batches of one bookmark each, and
// cuts every few answers off.
type daemon struct {
	committed, given, last uint64
	answers                int
	cut                    int    // every so many answers
	heard                  func() // called at the last of these
	deaf                   int    // this many commits get no answer, and are not done
}

func (d *daemon) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var in struct{ After, Number uint64 }
	_ = json.NewDecoder(r.Body).Decode(&in)
	var out bytes.Buffer
	w.Header().Set("Content-Type", "application/json")
	refuse := func(code string, status int) {
		w.WriteHeader(status)
		fmt.Fprintf(&out, `{"error":{"code":%q,"message":"no"}}`, code)
	}
	switch after := max(in.After, d.committed); {
	case strings.HasSuffix(r.URL.Path, "/wait"):
		fmt.Fprint(&out, `{}`)
	case strings.HasSuffix(r.URL.Path, "/commit") && d.deaf > 0:
		if d.deaf--; d.deaf == 0 {
			d.heard()
		}
		panic(http.ErrAbortHandler)
	case strings.HasSuffix(r.URL.Path, "/commit") && in.Number <= d.given && in.Number >= d.committed:
		d.committed = in.Number
		fmt.Fprint(&out, `{}`)
	case strings.HasSuffix(r.URL.Path, "/commit"), in.After != 0 && (in.After < d.committed || in.After > d.given):
		refuse("not-given", http.StatusConflict)
	case after >= d.last:
		refuse("nothing", http.StatusTooEarly)
	default:
		d.given = max(d.given, after+1)
		e, err := new(batch.Builder).Encode(batch.Header{Kind: batch.Bookmark, Number: after + 1, Consistent: true, Bookmark: fmt.Sprint(after + 1)})
		if err != nil {
			panic(err)
		}
		e.WriteTo(&out) // into memory
	}
	d.answers++
	if d.cut > 0 && d.answers%d.cut == 0 {
		w.Header().Set("Content-Length", fmt.Sprint(out.Len()))
		_, _ = w.Write(out.Bytes()[:out.Len()/2])
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	_, _ = w.Write(out.Bytes())
}

// collector notes what it was given, and ends with the last.
type collector struct {
	seen   []string
	synced int
	last   string
	end    context.CancelFunc
}

func (c *collector) Apply(b *Batch) error {
	c.seen = append(c.seen, b.Bookmark)
	return nil
}

func (c *collector) Sync() error {
	if c.synced = len(c.seen); c.seen[c.synced-1] == c.last {
		defer c.end()
	}
	return nil
}

// TestFollowThroughCuts: answers that are cut off, at any place, are asked for
// again; nothing is left out and nothing comes before what it follows.
func TestFollowThroughCuts(t *testing.T) {
	for _, cut := range []int{2, 3, 4, 7} {
		path := filepath.Join(t.TempDir(), "s")
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		const last = 6
		srv := &http.Server{Handler: serial(&daemon{last: last, cut: cut})}
		go srv.Serve(l)
		ctx, cancel := context.WithCancel(t.Context())
		c := &collector{last: fmt.Sprint(last), end: cancel}
		err = Dial(path).Consumer("g", "c", Options{}).Follow(ctx, c)
		cancel()
		srv.Close()
		if !errors.Is(err, context.Canceled) {
			t.Fatalf("every %d answers cut: %v", cut, err)
		}
		newest := 0
		for _, s := range c.seen {
			var n int
			fmt.Sscan(s, &n)
			if n > newest+1 {
				t.Fatalf("every %d answers cut: applied %v", cut, c.seen)
			}
			if n < newest {
				t.Fatalf("every %d answers cut: a bookmark came again with the copy beyond it: %v", cut, c.seen)
			}
			newest = n
		}
		if newest != last {
			t.Errorf("every %d answers cut: applied %v", cut, c.seen)
		}
	}
}

// TestBookmarkFirst: nothing is applied behind a bookmark that could not be
// committed, so that whoever is killed then finds the copy at it again.
func TestBookmarkFirst(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	srv := &http.Server{Handler: serial(&daemon{last: 5, deaf: 3, heard: cancel})}
	go srv.Serve(l)
	defer srv.Close()
	c := &collector{end: cancel}
	if err := Dial(path).Consumer("g", "c", Options{}).Follow(ctx, c); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if len(c.seen) != 1 {
		t.Errorf("applied while bookmark 1 could not be committed: %v", c.seen)
	}
}

// serial answers one request at a time.
func serial(h http.Handler) http.Handler {
	turn := make(chan struct{}, 1)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		turn <- struct{}{}
		defer func() { <-turn }()
		h.ServeHTTP(w, r)
	})
}
