package tap

import (
	"errors"
	"path/filepath"
	"testing"

	"tidemark/internal/testkit"
)

// TestWaiting: what a ring holds is told from beside it, and nothing is taken.
func TestWaiting(t *testing.T) {
	testkit.Need(t, "root", "tap", "loop")
	d := testkit.NewDisk(t, 1<<20)
	tp := start(t, 64<<10, Options{MetadataOnly: true}, d)
	waits := func() uint64 {
		t.Helper()
		n, err := Waiting("test", filepath.Base(tp.pins.dir))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if n := waits(); n != 0 {
		t.Errorf("%d bytes before anything was written", n)
	}
	if _, err := tp.Bookmark(Mark{Name: "here"}); err != nil {
		t.Fatal(err)
	}
	if n, want := waits(), uint64(tp.Producer()-tp.Consumer()); n != want || n == 0 {
		t.Errorf("%d bytes wait, want %d", n, want)
	}
	tp.Commit(tp.Producer())
	if n := waits(); n != 0 {
		t.Errorf("%d bytes when all was let go", n)
	}
	if _, err := Waiting("test", "nobody"); !errors.Is(err, ErrNoPins) {
		t.Errorf("of no tap: %v, want ErrNoPins", err)
	}
}
