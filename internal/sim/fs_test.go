package sim

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func put(t *testing.T, f *FS, name string, b []byte, sync bool) {
	t.Helper()
	h, err := f.OpenFile(name, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.Write(b); err != nil {
		t.Fatal(err)
	}
	if sync {
		if err := h.Sync(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestCrashOutcomes: what was synced always survives, and what was not survives
// whole, not at all and torn, each for some seed.
func TestCrashOutcomes(t *testing.T) {
	data := bytes.Repeat([]byte("x"), 4*sector)
	var gone, whole, torn int
	for seed := range uint64(200) {
		f := New(seed)
		put(t, f, "/stable", data, true)
		if err := f.SyncDir("/"); err != nil {
			t.Fatal(err)
		}
		put(t, f, "/loose", data, false)
		f = f.Crash()
		if b, err := f.ReadFile("/stable"); err != nil || !bytes.Equal(b, data) {
			t.Fatalf("seed %d: stable content is lost: %v", seed, err)
		}
		b, err := f.ReadFile("/loose")
		switch {
		case err != nil:
			gone++
		case bytes.Equal(b, data):
			whole++
		default:
			torn++
		}
	}
	if gone == 0 || whole == 0 || torn == 0 {
		t.Errorf("of 200 crashes %d lose the file, %d keep it, %d tear it", gone, whole, torn)
	}
}

// TestRenameIsWhole: after a crash a replaced file has the old content or the new.
func TestRenameIsWhole(t *testing.T) {
	seen := map[string]int{}
	for seed := range uint64(100) {
		f := New(seed)
		put(t, f, "/a", []byte("old"), true)
		_ = f.SyncDir("/")
		put(t, f, "/b", []byte("new"), true)
		if err := f.Rename("/b", "/a"); err != nil {
			t.Fatal(err)
		}
		b, err := f.Crash().ReadFile("/a")
		if err != nil {
			t.Fatal(err)
		}
		seen[string(b)]++
	}
	if seen["old"] == 0 || seen["new"] == 0 || len(seen) != 2 {
		t.Errorf("after a crash: %v", seen)
	}
}

// TestFailedSyncLoses: what a failed Sync lost, a later one does not bring back.
func TestFailedSyncLoses(t *testing.T) {
	lost := 0
	for seed := range uint64(50) {
		f := New(seed)
		h, _ := f.OpenFile("/a", os.O_CREATE|os.O_WRONLY, 0o600)
		_, _ = h.Write([]byte("content"))
		f.Fail(1, 1, unix.EIO)
		if err := h.Sync(); !errors.Is(err, unix.EIO) {
			t.Fatal(err)
		}
		if err := errors.Join(h.Sync(), f.SyncDir("/")); err != nil {
			t.Fatal(err)
		}
		if b, _ := f.Crash().ReadFile("/a"); string(b) != "content" {
			lost++
		}
	}
	if lost == 0 || lost == 50 {
		t.Errorf("%d of 50 lost", lost)
	}
}

// TestNewFolderCanGo: until the folder above is synced, with all that is in it.
func TestNewFolderCanGo(t *testing.T) {
	crash := func(seed uint64, dirs ...string) bool {
		f := New(seed)
		if err := f.MkdirAll("/a/b", 0o700); err != nil {
			t.Fatal(err)
		}
		put(t, f, "/a/b/c", []byte("content"), true)
		for _, d := range dirs {
			if err := f.SyncDir(d); err != nil {
				t.Fatal(err)
			}
		}
		_, err := f.Crash().ReadFile("/a/b/c")
		return err == nil
	}
	seen := map[bool]int{}
	for seed := range uint64(50) {
		seen[crash(seed, "/a/b", "/a")]++
		if !crash(seed, "/a/b", "/a", "/") {
			t.Fatalf("seed %d: what was stable is gone", seed)
		}
	}
	if len(seen) != 2 {
		t.Errorf("the file was there: %v", seen)
	}
}
