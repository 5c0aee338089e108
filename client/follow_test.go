package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"tidemark/internal/batch"
)

// daemon answers as the real one does, with batches of one bookmark each, or of no
// writes where plain is set, and cuts every few answers off.
type daemon struct {
	committed, given, last uint64
	plain                  bool
	most                   uint64 // batches that were given and not committed at any time
	answers                int
	cut                    int    // every so many answers
	heard                  func() // called at the last of these
	deaf                   int    // this many commits get no answer, and are not done
}

func (d *daemon) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var in struct{ After, Number, Batches uint64 }
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
	case after-d.committed >= 256:
		refuse("usage", http.StatusBadRequest)
	default:
		for n := after; n < min(after+max(in.Batches, 1), d.last, d.committed+256); n++ {
			d.batch(n+1, &out)
		}
		d.most = max(d.most, d.given-d.committed)
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

func (d *daemon) batch(n uint64, to io.Writer) {
	d.given = max(d.given, n)
	h := batch.Header{Kind: batch.Bookmark, Number: n, Consistent: true, Bookmark: fmt.Sprint(n)}
	if d.plain {
		h.Kind = batch.Writes
	}
	e, err := new(batch.Builder).Encode(h)
	if err != nil {
		panic(err)
	}
	e.WriteTo(to) // into memory
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

// dialed is a client of a daemon.
func dialed(t *testing.T, d *daemon) *Client {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: serial(d)}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	return Dial(path)
}

// TestFarBehind: whoever is behind by more batches than may be given and not
// committed gets all of them, in order and once, however small they are.
func TestFarBehind(t *testing.T) {
	d := &daemon{last: 1500, plain: true}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	c := &numbers{last: d.last, end: cancel}
	if err := dialed(t, d).Consumer("g", "c", Options{}).Follow(ctx, c); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if c.newest != d.last || c.wrong > 0 || d.most >= 256 {
		t.Errorf("it came to %d of %d, %d out of order; %d were given and not committed", c.newest, d.last, c.wrong, d.most)
	}
}

// numbers counts the batches that it gets.
type numbers struct {
	newest, last, wrong uint64
	end                 context.CancelFunc
}

func (c *numbers) Apply(b *Batch) error {
	if b.Number != c.newest+1 {
		c.wrong++
	}
	c.newest = b.Number
	return nil
}

func (c *numbers) Sync() error {
	if c.newest == c.last {
		defer c.end()
	}
	return nil
}

// TestBatches: batches come one behind the other with few answers, up to the last;
// an answer that is cut off is an error, and what came before it was right.
func TestBatches(t *testing.T) {
	d := &daemon{last: 200}
	c := dialed(t, d).Consumer("g", "c", Options{})
	n := uint64(0)
	for b, err := range c.Batches(t.Context(), 0) {
		if err != nil {
			if !errors.Is(err, ErrNothing) || n != d.last {
				t.Fatalf("behind batch %d: %v", n, err)
			}
			n++
			continue
		}
		if n++; b.Number != n || b.Bookmark != fmt.Sprint(n) {
			t.Fatalf("batch %d is %+v", n, b)
		}
	}
	if want := 200/inAnAnswer + 2; n != d.last+1 || d.answers > want {
		t.Errorf("%d batches and errors in %d answers, want %d in %d", n, d.answers, d.last+1, want)
	}
	for b, err := range c.Batches(t.Context(), 150) {
		if err != nil || b.Number != 151 {
			t.Errorf("behind 150: %+v, %v", b, err)
		}
		break // which ends the asking
	}
	d.cut, d.answers = 1, 0
	n = 0
	for b, err := range c.Batches(t.Context(), 0) {
		if err == nil {
			n = b.Number
			continue
		}
		if !errors.Is(err, ErrUnreachable) && !errors.Is(err, ErrDamaged) {
			t.Errorf("cut off: %v", err)
		}
	}
	if n == 0 || n >= inAnAnswer {
		t.Errorf("of an answer that was cut in the middle came %d batches", n)
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
