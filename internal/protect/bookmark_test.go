package protect

import (
	"errors"
	"testing"

	"tidemark/internal/block"
	"tidemark/internal/segment"
	"tidemark/internal/source"
	"tidemark/internal/stream"
)

func bookmarking() *session {
	return &session{cfg: &Config{}, builder: segment.NewBuilder(segmentMin), waiters: map[uint64]*waiter{}, names: map[string]bool{}}
}

func (s *session) waitFor(token uint64, name string) *waiter {
	w := &waiter{name: name, token: token, reply: make(chan error, 1), verdict: make(chan bool, 1)}
	s.waiters[token] = w
	return w
}

// TestSameNameTwiceInTheRing: two were asked for at once and the second was
// refused. The daemon dies before either is durable; the next one reads both
// again, with nobody waiting, and must come to the same end.
func TestSameNameTwiceInTheRing(t *testing.T) {
	take := func(s *session) stream.Position {
		t.Helper()
		for token := uint64(1); token <= 2; token++ {
			if err := s.takeBookmark(&source.Record{Kind: source.Bookmark, Name: "noon", Token: token}); err != nil {
				t.Fatal(err)
			}
		}
		return s.position
	}
	first, second := bookmarking(), bookmarking()
	first.waitFor(1, "noon")
	refused := first.waitFor(2, "noon")
	if p := take(first); p != 1 {
		t.Errorf("position %d with somebody waiting, want 1", p)
	}
	if err := <-refused.reply; !errors.Is(err, ErrBookmarkExists) {
		t.Errorf("the second: %v, want ErrBookmarkExists", err)
	}
	if p := take(second); p != 1 {
		t.Errorf("position %d when read again, want 1: two bookmarks have one name", p)
	}
}

// TestTokenOfAnEarlierDaemon: a bookmark that an earlier daemon left in the ring
// does not answer who waits for another, and lends it no consistency.
func TestTokenOfAnEarlierDaemon(t *testing.T) {
	s := bookmarking()
	w := s.waitFor(1, "new")
	w.verdict <- true
	for _, r := range []source.Record{{Name: "old", Token: 1}, {Name: "older", Token: 1, Consistency: stream.Filesystem}} {
		r.Kind = source.Bookmark
		if err := s.takeBookmark(&r); err != nil {
			t.Fatal(err)
		}
	}
	if w.taken || s.names["older"] {
		t.Errorf("who waits for another bookmark was answered: %v, names %v", w.at, s.names)
	}
}

// TestSalvagedBookmark: of a source that has ended nobody was told of a bookmark
// that is not durable, and writes may have gone past before it.
func TestSalvagedBookmark(t *testing.T) {
	s := bookmarking()
	s.salvaging = true
	if err := s.takeBookmark(&source.Record{Kind: source.Bookmark, Name: "noon", Token: 1}); err != nil {
		t.Fatal(err)
	}
	if s.position != 0 || s.builder.Records() != 0 {
		t.Errorf("position %d, %d records", s.position, s.builder.Records())
	}
}

// lent is a view that is closed when nobody wants it.
type lent struct {
	block.Device
	closed int
}

func (l *lent) Close() error { l.closed++; return nil }

// TestSalvageComparesNothing: a session that only salvages what a tap of disks
// that are gone holds has nothing to fill, and lets go of what it could compare with.
func TestSalvageComparesNothing(t *testing.T) {
	s, l := bookmarking(), &lent{}
	s.salvaging = true
	s.compareWith(base{views: []block.Device{l}})
	if l.closed != 1 {
		t.Errorf("closed %d times", l.closed)
	}
}
