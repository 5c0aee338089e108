package restore

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"tidemark/internal/loop"
	"tidemark/internal/testkit"
)

// TestLargeSectors: a disk of 512-byte sectors on one of 4096, with an end between two of them.
func TestLargeSectors(t *testing.T) {
	testkit.Need(t, "root", "loop")
	backing := filepath.Join(t.TempDir(), "backing")
	if err := os.WriteFile(backing, bytes.Repeat([]byte{0x55}, 16<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := loop.Attach(backing, loop.Options{BlockSize: 4096, AutoClear: true})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for _, tail := range []int64{512, 4096 - 512} {
		view := paint(9<<20+tail, uint64(tail))
		rep, err := Write(t.Context(), view, d.Path, Options{Force: true})
		if err != nil {
			t.Fatal(err)
		}
		same(t, d.Path, append(view.want(), 0x55))
		if rep.Verified != view.Size() {
			t.Errorf("verified %d of %d", rep.Verified, view.Size())
		}
	}
}

// TestNoRoom: what does not fit is refused before anything is written; what
// runs out of room all the same leaves nothing.
func TestNoRoom(t *testing.T) {
	testkit.Need(t, "root")
	dir := t.TempDir()
	if err := unix.Mount("tidemark-test", dir, "tmpfs", 0, fmt.Sprintf("size=%d", 8<<20)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { testkit.Unmount(t, dir) })
	view := paint(64<<20, 21)
	path := filepath.Join(dir, "image")
	if _, err := Write(t.Context(), view, path, Options{Identity: "x"}); !errors.Is(err, ErrTooSmall) {
		t.Errorf("%v", err)
	}
	onlyFile(t, dir)
	if _, err := Write(t.Context(), view, path, Options{Identity: "x", Force: true}); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("with force: %v", err)
	}
	onlyFile(t, dir)
}

// TestTwoAtOnce: a target takes one restore at a time.
func TestTwoAtOnce(t *testing.T) {
	d := testkit.NewDisk(t, 8<<20)
	view := paint(8<<20, 2)
	for _, path := range []string{d.Path, filepath.Join(t.TempDir(), "image")} {
		var second error
		_, err := Write(t.Context(), view, path, Options{StateDir: t.TempDir(), Identity: "x", Progress: func(p Progress) {
			if second == nil {
				_, second = Write(t.Context(), view, path, Options{StateDir: t.TempDir(), Identity: "x", Force: true})
			}
		}})
		if err != nil || !errors.Is(second, ErrInUse) {
			t.Errorf("%s: first %v, second %v", path, err, second)
		}
		same(t, path, view.want())
	}
}
