package loop_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"tidemark/internal/loop"
	"tidemark/internal/testkit"
)

func sparse(t *testing.T, size int64) string {
	path := filepath.Join(t.TempDir(), "backing")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

func attach(t *testing.T, path string, o loop.Options) *loop.Device {
	t.Helper()
	d, err := loop.Attach(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Detach() })
	return d
}

func TestAttachDetach(t *testing.T) {
	testkit.Need(t, "root", "loop")
	path := sparse(t, 1<<20)
	d := attach(t, path, loop.Options{Offset: 4096, SizeLimit: 64 << 10, BlockSize: 4096})
	size, err := unix.IoctlGetInt(int(d.File().Fd()), unix.BLKSSZGET)
	if err != nil || size != 4096 {
		t.Errorf("logical block size %d, %v", size, err)
	}
	if _, err := d.File().WriteAt(bytes.Repeat([]byte{7}, 4096), 4096); err != nil {
		t.Fatal(err)
	}
	if err := d.File().Sync(); err != nil {
		t.Fatal(err)
	}
	b, _ := os.ReadFile(path)
	if b[8192] != 7 || b[8191] != 0 {
		t.Error("the write did not reach its place in the file")
	}
	st, err := loop.Status(d.Path)
	if err != nil || st.Backing != path || st.Offset != 4096 || st.SizeLimit != 64<<10 || st.ReadOnly || st.Deleted {
		t.Errorf("status %+v, %v", st, err)
	}
	if err := d.Detach(); err != nil {
		t.Fatal(err)
	}
	if st, err := loop.Status(d.Path); err == nil && st.Backing == path {
		t.Error("still attached")
	}
}

// TestStatusForAnybody: who may not open a loop device may know what is behind it.
func TestStatusForAnybody(t *testing.T) {
	testkit.Need(t, "root", "loop")
	path := sparse(t, 1<<20)
	d := attach(t, path, loop.Options{})
	type answer struct {
		info loop.Info
		err  error
	}
	told := make(chan answer)
	go func() {
		runtime.LockOSThread() // for ever: the thread ends with the goroutine
		const nobody = 65534
		_, err := unix.SetfsuidRetUid(nobody)
		if f, openErr := os.Open(d.Path); openErr == nil {
			err = errors.Join(err, errors.New("this thread may still open the device"), f.Close())
		}
		info, statusErr := loop.Status(d.Path)
		told <- answer{info, errors.Join(err, statusErr)}
	}()
	if a := <-told; a.err != nil || a.info.Backing != path {
		t.Errorf("%+v, %v", a.info, a.err)
	}
}

func TestReadOnly(t *testing.T) {
	testkit.Need(t, "root", "loop")
	path := sparse(t, 1<<20)
	if err := os.Chmod(path, 0o400); err != nil {
		t.Fatal(err)
	}
	d := attach(t, path, loop.Options{ReadOnly: true})
	if st, err := loop.Status(d.Path); err != nil || !st.ReadOnly {
		t.Errorf("%+v, %v", st, err)
	}
	if f, err := os.OpenFile(d.Path, os.O_WRONLY, 0); err == nil {
		_, err = f.Write(make([]byte, 512))
		if err == nil {
			err = f.Sync()
		}
		f.Close()
		if err == nil {
			t.Error("a read-only device took a write")
		}
	}
}

// TestAutoClear: the kernel detaches when the last opener goes, as it does for one that is killed.
func TestAutoClear(t *testing.T) {
	testkit.Need(t, "root", "loop")
	path := sparse(t, 1<<20)
	d := attach(t, path, loop.Options{AutoClear: true})
	if st, err := loop.Status(d.Path); err != nil || !st.AutoClear {
		t.Fatalf("%+v, %v", st, err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	all, err := loop.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range all {
		if i.Backing == path {
			t.Errorf("%s is still attached", i.Path)
		}
	}
}

func TestDetachBusy(t *testing.T) {
	testkit.Need(t, "root", "loop")
	d := attach(t, sparse(t, 1<<20), loop.Options{})
	other, err := os.Open(d.Path)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Detach(); !errors.Is(err, loop.ErrBusy) {
		t.Errorf("Detach of a device that is open: %v", err)
	}
	other.Close()
	if err := loop.Detach(d.Path); err != nil {
		t.Error(err)
	}
	if err := loop.Detach(d.Path); err != nil {
		t.Errorf("Detach of one that has no file: %v", err)
	}
}

// TestRace: many ask for a free device at one time, and each gets its own.
func TestRace(t *testing.T) {
	testkit.Need(t, "root", "loop")
	var mu sync.Mutex
	seen := map[string]bool{}
	var wg sync.WaitGroup
	for range 12 {
		path := sparse(t, 1<<20)
		wg.Go(func() {
			d, err := loop.Attach(path, loop.Options{})
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			if seen[d.Path] {
				t.Errorf("%s given twice", d.Path)
			}
			seen[d.Path] = true
			mu.Unlock()
			t.Cleanup(func() {
				if err := d.Detach(); err != nil {
					t.Error(err)
				}
			})
		})
	}
	wg.Wait()
}
