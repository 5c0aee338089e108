//go:build guest

package guest

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/testkit"
)

// TestInFlight: writes that a slow disk holds are seen from their queueing to
// their end, however few of them the disk itself admits to, and hold the
// low-water place back until then.
func TestInFlight(t *testing.T) {
	testkit.Run(t, "modprobe", "dm-delay")
	d := testkit.NewDisk(t, size)
	fewRequests(t, d.Path)
	w := watch(t, table(t, "delay", fmt.Sprintf("0 %d delay %s 0 0 %[2]s 0 400\n", size/512, d.Path)), 4<<20)
	if err := w.tap.SetEnds(true); err != nil {
		t.Fatal(err)
	}
	before := w.tap.Producer()
	const writers = 32
	var all sync.WaitGroup
	for i := range writers {
		all.Go(func() {
			buf, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
			if err != nil {
				t.Error(err)
				return
			}
			defer unix.Munmap(buf)
			for n := range 4 { // neighbours overlap by half a block
				for j := range buf {
					buf[j] = byte(i + 7*n)
				}
				if _, err := w.dev.WriteAt(buf, int64(i)*2048); err != nil {
					t.Error(err)
				}
			}
		})
	}
	ended := make(chan struct{})
	go func() { all.Wait(); close(ended) }()
	most := 0
	for running := true; running; {
		select {
		case <-ended:
			running = false
		case <-time.After(20 * time.Millisecond):
			s, err := w.tap.ScanInFlight()
			if err != nil {
				t.Fatal(err)
			}
			if s.InFlight > most {
				most = s.InFlight
			}
			if s.InFlight > 0 && s.Low < before {
				t.Fatalf("low-water place %d before anything was written at %d", s.Low, before)
			}
		}
	}
	s, err := w.tap.ScanInFlight()
	if err != nil || s.InFlight != 0 || s.Low < w.tap.Producer() {
		t.Errorf("all writes ended: %+v, %v, producer %d", s, err, w.tap.Producer())
	}
	if most < writers/2 {
		t.Errorf("of %d writers at once at most %d were seen in flight", writers, most)
	}
	w.pull()
	if w.tap.Drops() != 0 {
		t.Errorf("%d drops", w.tap.Drops())
	}
}

// fewRequests makes writes wait above the disk.
func fewRequests(t testing.TB, dev string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join("/sys/block", filepath.Base(dev), "queue/nr_requests"), []byte("4"), 0); err != nil {
		t.Fatal(err)
	}
}
