package main

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestWriteWhole: a file is written whole for its owner alone, a link stays one, and
// where there is no room the file is what it was and nothing is beside it.
func TestWriteWhole(t *testing.T) {
	dir := t.TempDir()
	path, link := filepath.Join(dir, "batch"), filepath.Join(dir, "link")
	if err := os.Symlink("batch", link); err != nil {
		t.Fatal(err)
	}
	is := func(want []byte) {
		t.Helper()
		have, err := os.ReadFile(path)
		entries, _ := os.ReadDir(dir)
		if err != nil || !bytes.Equal(have, want) || len(entries) != 2 {
			t.Errorf("%d bytes, want %d; %v; the folder has %v", len(have), len(want), err, entries)
		}
		if st, err := os.Lstat(link); err != nil || st.Mode()&fs.ModeSymlink == 0 {
			t.Errorf("the link: %v, %v", st, err)
		}
	}
	if err := writeWhole(path, []byte("first")); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	if err := writeWhole(link, []byte("second")); err != nil {
		t.Fatal(err)
	}
	is([]byte("second"))

	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &was); err != nil {
		t.Fatal(err)
	}
	full := was
	full.Cur = 4096
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &full); err != nil { // as a full disk does; SIGXFSZ is ignored by the runtime
		t.Fatal(err)
	}
	err := writeWhole(path, make([]byte, 8192))
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &was); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(err, syscall.EFBIG) {
		t.Errorf("without room: %v", err)
	}
	is([]byte("second"))

	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := os.OpenFile(fifo, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := writeWhole(fifo, []byte("through a pipe")); err != nil {
		t.Error(err)
	}
	b := make([]byte, 14)
	if _, err := r.Read(b); err != nil || string(b) != "through a pipe" {
		t.Errorf("%q, %v", b, err)
	}

	for path, want := range map[string]int{dir: exitUsage, filepath.Join(dir, "none", "x"): exitNotFound, filepath.Join(path, "x"): exitNotFound, path: exitOK, filepath.Join(dir, "new"): exitOK} {
		err := canHold(path)
		if code := exitCode(t.Context(), err); err != nil && code != want || err == nil && want != exitOK {
			t.Errorf("%s: %v, code %d, want %d", path, err, code, want)
		}
	}
}
