package protect

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"tidemark/internal/source"
)

// tracked is a source that says whether it tracks.
type tracked struct {
	flights
	on bool
}

func (t *tracked) SetEnds(on bool) error { t.on = on; return nil }
func (t *tracked) Ends() bool            { return t.on }
func (t *tracked) Drops() uint64         { return 0 }

// TestQuiet: it lasts until all that was submitted before the call has ended,
// tracked or older than the tracking, and nothing switches that off meanwhile.
func TestQuiet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &tracked{flights: flights{scan: source.Scan{Producer: 100, Low: 40}}}
		s := &session{source: f, requests: make(chan request), over: make(chan struct{})}
		go func() { // the session's own loop
			for r := range s.requests {
				r.done <- r.do()
			}
		}()
		defer close(s.requests)
		set := func(scan source.Scan) {
			t.Helper()
			if err := s.ask(t.Context(), func() error { f.scan = scan; s.lastScan = time.Time{}; return s.endsOff() }); err != nil {
				t.Fatal(err)
			}
		}
		ended := make(chan error, 1)
		go func() { ended <- s.quiet(t.Context()) }()
		for _, scan := range []source.Scan{
			{Producer: 200, Low: 99, OldKnownEnded: true}, // one from before is on its way
			{Producer: 300, Low: 300},                     // perhaps one that is older than the tracking
		} {
			time.Sleep(time.Second)
			set(scan)
			time.Sleep(time.Second)
			if len(ended) > 0 || !f.on {
				t.Fatalf("%+v: it has ended, or nothing is tracked any more", scan)
			}
		}
		set(source.Scan{Producer: 400, Low: 100, OldKnownEnded: true}) // later ones do not matter
		if err := <-ended; err != nil {
			t.Error(err)
		}
		synctest.Wait()
		if set(f.scan); f.on {
			t.Error("it is tracked when nobody needs it any more")
		}

		set(source.Scan{Producer: 500, Low: 1})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := s.quiet(ctx); !errors.Is(err, context.DeadlineExceeded) || s.quieters != 0 {
			t.Errorf("%v, %d", err, s.quieters)
		}
	})
}
