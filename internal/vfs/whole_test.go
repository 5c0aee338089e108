package vfs_test

import (
	"errors"
	"io/fs"
	"testing"

	"tidemark/internal/sim"
	"tidemark/internal/vfs"
)

// TestWriteWhole: cut at every step, with all that a crash may do to what is not
// stable yet, the file is the old or the new one; once it is written, the new one.
func TestWriteWhole(t *testing.T) {
	const old, replaced = "what was there before", "and what is to be there, which is longer"
	for seed := range uint64(200) {
		for at := 1; ; at++ {
			disk := sim.New(seed)
			if err := errors.Join(disk.MkdirAll("/d", 0o700), disk.SyncDir("/"), vfs.WriteWhole(disk, "/d/f", []byte(old))); err != nil {
				t.Fatal(err)
			}
			disk.CrashAt(at)
			err := vfs.WriteWhole(disk, "/d/f", []byte(replaced))
			crashed := disk.Crashed()
			got, readErr := disk.Crash().ReadFile("/d/f")
			if readErr != nil || string(got) != replaced && (err == nil || string(got) != old) {
				t.Fatalf("seed %d, crash at step %d: holds %q, %v; writing said %v\n%s", seed, at, got, readErr, err, disk.History())
			}
			if !crashed {
				break
			}
		}
	}
}

// TestWriteWholeFails: an error leaves the old file, and nothing beside it.
func TestWriteWholeFails(t *testing.T) {
	disk, full := sim.New(1), errors.New("no room")
	if err := vfs.WriteWhole(disk, "/f", []byte("old")); err != nil {
		t.Fatal(err)
	}
	disk.Fail(2, 1, full)
	if err := vfs.WriteWhole(disk, "/f", []byte("new")); !errors.Is(err, full) {
		t.Fatalf("got %v, want %v", err, full)
	}
	if got, err := disk.ReadFile("/f"); err != nil || string(got) != "old" {
		t.Errorf("holds %q, %v", got, err)
	}
	if _, err := disk.Stat("/f.new"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the unfinished file is still there: %v", err)
	}
}
