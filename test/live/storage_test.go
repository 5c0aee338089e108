package live

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// TestStorageGrowsUnderItsWriters: difference storage in a file on the snapshotted
// device grows while that device's file system is written to. The growth waits for
// these writers, as they share a journal; they must not wait for it.
func TestStorageGrowsUnderItsWriters(t *testing.T) {
	testkit.Need(t, "root", "loop", "fuse", "ext4")
	d := daemonWithSnapshots(t)
	node := device(d, "data", memoryFile(t, 320*mib))
	testkit.Mkfs(t, node, "ext4", "-b", "4096", "-J", "size=4") // whose blocks are copied too
	mnt := testkit.Mount(t, node)
	const size = 54 * mib
	path := filepath.Join(mnt, "file")
	before := make([]byte, size)
	testkit.Fill(before, 0, 0, 1)
	if err := os.WriteFile(path, before, 0o600); err != nil {
		t.Fatal(err)
	}
	testkit.Run(t, "sync", "-f", mnt)
	// Beyond 64M a file does not get all of its limit at once. The limit is far away: small writes take whole chunks.
	id, images := take(t, d, "--storage", filepath.Join(mnt, "diff")+":200M", "data")
	room := func() (used, capacity int64) {
		var all []struct {
			Storage struct {
				Used     int64 `json:"used_bytes"`
				Capacity int64 `json:"capacity_bytes"`
			}
		}
		decode(t, d.Run("snapshot", "ls", "--json"), &all)
		return all[0].Storage.Used, all[0].Storage.Capacity
	}
	_, first := room()
	var stop atomic.Bool
	var others sync.WaitGroup
	t.Cleanup(func() { stop.Store(true); others.Wait() })
	for i := range 3 { // each has the journal committed, again and again
		others.Go(func() {
			for n := 0; !stop.Load(); n++ {
				f, err := os.OpenFile(filepath.Join(mnt, fmt.Sprint("small", i)), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
				if err == nil {
					_, err = f.WriteString(fmt.Sprint(n))
				}
				if err == nil {
					err = f.Sync()
				}
				if err != nil {
					t.Error(err)
					return
				}
				f.Close()
				time.Sleep(5 * time.Millisecond)
			}
		})
	}
	rewrite := func(from, to int64) {
		t.Helper()
		done := make(chan error, 1)
		go func() {
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			after := make([]byte, mib)
			for at := from; at < to && err == nil; at += mib {
				testkit.Fill(after, 0, at, 2)
				if _, err = f.WriteAt(after, at); err == nil {
					err = f.Sync()
				}
			}
			f.Close()
			done <- err
		}()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(2 * patience):
			t.Fatal("its writers hang")
		}
	}
	// A writer may be faster than any growth: this one leaves room until it has come.
	rewrite(0, size-6*mib)
	program.Eventually(t, patience, "the storage grows", func() error {
		if used, now := room(); now <= first {
			return fmt.Errorf("%d of %d bytes are used, as at the start", used, now)
		}
		return nil
	})
	rewrite(size-6*mib, size)
	stop.Store(true)
	others.Wait()
	if text := d.Run("snapshot", "events", id); strings.Contains(text, "overflow") || strings.Contains(text, "corrupt") {
		t.Fatalf("events: %s", text)
	}
	at := testkit.Mount(t, images[node], "ro")
	if got, err := os.ReadFile(filepath.Join(at, "file")); err != nil || !bytes.Equal(got, before) {
		t.Errorf("the image's file is not what it was: %v", err)
	}
	testkit.Unmount(t, at)
	d.Run("snapshot", "destroy", id)
	if _, err := os.Stat(filepath.Join(mnt, "diff")); !os.IsNotExist(err) {
		t.Errorf("its file is left: %v", err)
	}
	testkit.Unmount(t, mnt)
	fsck(t, "ext4", node)
}

// memoryFile is a backing in memory, where flushes cost nothing.
func memoryFile(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(testkit.MemoryDir(t), "backing")
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size)); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestStorageOnDisks: difference storage is any mix of files and disks, by hand and
// by itself, up to each one's limit, through a kill of the daemon; a disk is ours
// alone meanwhile, and only as much of it as was said is written.
func TestStorageOnDisks(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		const size = 6 * mib
		d := daemonWithSnapshots(t)
		r := &raw{size: size, seqs: make([]uint64, size/512)}
		r.node = device(d, "data", memoryFile(t, size))
		r.write(t, 1, [2]int64{0, size})
		whole, part := testkit.NewDisk(t, 3*mib), testkit.NewDisk(t, 8*mib)
		rest := bytes.Repeat([]byte("precious"), 5*mib/8)
		overwrite(t, part.Path, 3*mib, rest)
		used := testkit.NewDisk(t, 8*mib)
		testkit.Mkfs(t, used.Path, "ext4")
		mnt := testkit.Mount(t, used.Path)
		d.Refused(9, "snapshot", "create", "--storage", used.Path, "data")
		id, _ := take(t, d, "--storage", filepath.Join(d.Dir, "file")+":1M", "--storage", whole.Path, "--chunk", "4K", "data")
		want := slices.Clone(r.seqs)
		d.Refused(exitRefused, "snapshot", "create", "--storage", whole.Path, "data")
		if f, err := os.OpenFile(whole.Path, os.O_RDWR|unix.O_EXCL, 0); !errors.Is(err, unix.EBUSY) {
			f.Close()
			t.Errorf("somebody else could take the disk: %v", err)
		}
		r.write(t, 2, boundaries(rng, size/2, 4096, 8)...)
		// What is there is about half of what is needed: the event says so, in time.
		said := filepath.Join(d.Dir, "events")
		follow(t, d, id, said)
		r.write(t, 3, [2]int64{0, 3 * mib})
		program.Eventually(t, patience, "low space is told of", func() error {
			b, err := os.ReadFile(said)
			if !strings.Contains(string(b), `"low-space"`) {
				return fmt.Errorf("events: %s, %v", b, err)
			}
			return nil
		})
		d.Restart()
		if text := d.Run("snapshot", "append", id, part.Path+":3M"); text != "" {
			t.Errorf("append prints %q", text)
		}
		d.Run("snapshot", "append", id, filepath.Join(d.Dir, "more")+":2M")
		r.write(t, 4, [2]int64{2 * mib, 4 * mib})
		d.Restart()
		r.write(t, 5, boundaries(rng, size, 4096, 8)...)
		r.holds(t, imagesOf(t, d, id)[r.node], want, "the image")
		r.holds(t, r.node, r.seqs, "the device")
		d.Run("snapshot", "destroy", id)
		got := make([]byte, len(rest))
		f := open(t, part.Path, unix.O_EXCL) // it was let go
		if _, err := f.ReadAt(got, 3*mib); err != nil || !bytes.Equal(got, rest) {
			t.Errorf("what lies behind the limit was overwritten: %v", err)
		}
		testkit.Unmount(t, mnt)
		testkit.Run(t, "e2fsck", "-fn", used.Path)
	})
}

func overwrite(t *testing.T, path string, off int64, p []byte) {
	t.Helper()
	f := open(t, path, 0)
	if _, err := f.WriteAt(p, off); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// follow has a process of its own write a snapshot's events to a file.
func follow(t *testing.T, d *program.Daemon, id, to string) {
	t.Helper()
	f, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command(program.Binary(t), "snapshot", "events", id, "--follow", "--json")
	cmd.Env = append(os.Environ(), "TIDEMARK_SOCKET="+filepath.Join(d.Dir, "socket"))
	cmd.Stdout = f
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
}
