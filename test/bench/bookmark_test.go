package bench

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/control/api"
	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

const (
	bookmarkDisks = 8
	bookmarkBytes = 64 << 20 // of each
	bookmarkTurns = 6
	bookmarkTurn  = time.Second
	writeEvery    = 2 * time.Millisecond // of each disk: the machine has time left
	markEvery     = 50 * time.Millisecond
)

// waits are how long writes took, by what went on meanwhile.
type waits struct {
	mu      sync.Mutex
	marking bool
	quiet   []time.Duration
	marked  []time.Duration
}

// writer writes 4 KiB again and again, and says how long each took.
func (w *waits) writer(path string, seed int64, stop *atomic.Bool) error {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	buf, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	defer unix.Munmap(buf)
	for n := seed; !stop.Load(); n += 7919 {
		start := time.Now()
		if _, err := f.WriteAt(buf, n*4096%bookmarkBytes); err != nil {
			return err
		}
		w.add(time.Since(start))
		time.Sleep(writeEvery)
	}
	return nil
}

func (w *waits) add(took time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.marking {
		w.marked = append(w.marked, took)
	} else {
		w.quiet = append(w.quiet, took)
	}
}

func (w *waits) turn(marking bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.marking = marking
}

// millis is a quantile of durations.
func millis(all []time.Duration, q float64) float64 {
	if len(all) == 0 {
		return 0
	}
	all = slices.Sorted(slices.Values(all))
	return all[min(int(q*float64(len(all))), len(all)-1)].Seconds() * 1e3
}

// underLoad puts bookmarks over disks that are written to, in turns with as much
// time without any, and reports how long they took and what the writers saw. put
// gives for how long writes were held.
func underLoad(b *testing.B, disks []string, put func(ctx context.Context, name string) (held time.Duration, err error)) {
	b.Helper()
	var w waits
	var stop atomic.Bool
	var all sync.WaitGroup
	for i, path := range disks {
		all.Go(func() {
			if err := w.writer(path, int64(i), &stop); err != nil {
				b.Error(err)
			}
		})
	}
	var took, held []time.Duration
	for turn := range bookmarkTurns {
		w.turn(false)
		time.Sleep(bookmarkTurn)
		w.turn(true)
		for end := time.Now().Add(bookmarkTurn); time.Now().Before(end); time.Sleep(markEvery) {
			start := time.Now()
			h, err := put(b.Context(), fmt.Sprint("b-", turn, "-", len(took)))
			if err != nil {
				b.Error(err)
				break
			}
			took, held = append(took, time.Since(start)), append(held, h)
		}
	}
	stop.Store(true)
	all.Wait()
	b.ReportMetric(millis(took, 0.5), "ms-bookmark")
	b.ReportMetric(millis(took, 1), "ms-bookmark-worst")
	b.ReportMetric(float64(len(took)), "bookmarks")
	if h := millis(held, 1); h > 0 {
		b.ReportMetric(millis(held, 0.5), "ms-held")
		b.ReportMetric(h, "ms-held-worst")
	}
	for name, all := range map[string][]time.Duration{"without": w.quiet, "with": w.marked} {
		b.ReportMetric(millis(all, 0.5), "ms-write-"+name)
		b.ReportMetric(millis(all, 0.999), "ms-write-99.9%-"+name)
		b.ReportMetric(millis(all, 1), "ms-write-worst-"+name)
	}
}

// marks puts bookmarks over groups.
func marks(d *program.Daemon, barrier string, groups ...string) func(ctx context.Context, name string) (time.Duration, error) {
	c := api.Dial(filepath.Join(d.Dir, "socket"))
	return func(ctx context.Context, name string) (time.Duration, error) {
		m, err := c.MarkGroups(ctx, api.MarkGroupsRequest{Groups: groups, Name: name, Barrier: barrier})
		return time.Duration(m.HeldSeconds * float64(time.Second)), err
	}
}

// servedLoops are devices that the daemon serves over files in memory.
func servedLoops(b *testing.B, d *program.Daemon, n int) (nodes []string) {
	b.Helper()
	testkit.Need(b, "fuse")
	dir := testkit.MemoryDir(b)
	for i := range n {
		name := fmt.Sprint("s", i)
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, make([]byte, bookmarkBytes), 0o600); err != nil {
			b.Fatal(err)
		}
		nodes = append(nodes, strings.TrimSpace(d.Run("device", "create", "--backing", file, "--front", "loop", "--name", name)))
		b.Cleanup(func() { d.Run("device", "rm", name) })
	}
	return nodes
}

func tappedLoops(b *testing.B, n int) (nodes []string) {
	b.Helper()
	for range n {
		disk := testkit.NewDisk(b, bookmarkBytes)
		testkit.Run(b, "dd", "if=/dev/zero", "of="+disk.Path, "bs=1M", fmt.Sprint("count=", bookmarkBytes>>20), "conv=fsync", "status=none") // its pages exist from here on
		nodes = append(nodes, disk.Path)
	}
	return nodes
}

// BenchmarkBookmark: bookmarks over eight disks that are written to: tapped ones,
// served ones with their writes held and not, and half of each in two groups.
func BenchmarkBookmark(b *testing.B) {
	run := func(name string, tapped int, put func(d *program.Daemon, groups ...string) func(context.Context, string) (time.Duration, error)) {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				disks := tappedLoops(b, tapped)
				d := program.New(b)
				var groups []string
				if tapped > 0 {
					d.Protect("tapped", disks...)
					groups = append(groups, "tapped")
				}
				if served := servedLoops(b, d, bookmarkDisks-tapped); len(served) > 0 {
					d.Protect("served", served...)
					groups, disks = append(groups, "served"), append(disks, served...)
				}
				underLoad(b, disks, put(d, groups...))
				for _, g := range groups {
					d.Settle(g)
					d.Run("unprotect", g)
				}
			}
		})
	}
	over := func(barrier string) func(d *program.Daemon, groups ...string) func(context.Context, string) (time.Duration, error) {
		return func(d *program.Daemon, groups ...string) func(context.Context, string) (time.Duration, error) {
			return marks(d, barrier, groups...)
		}
	}
	alone := func(d *program.Daemon, groups ...string) func(context.Context, string) (time.Duration, error) {
		c := api.Dial(filepath.Join(d.Dir, "socket"))
		return func(ctx context.Context, name string) (time.Duration, error) {
			_, err := c.Bookmark(ctx, groups[0], api.BookmarkRequest{Name: name})
			return 0, err
		}
	}
	run("tapped", bookmarkDisks, alone)
	run("tapped-cut", bookmarkDisks, over("cut"))
	run("served", 0, alone)
	run("served-held", 0, over("held"))
	run("mixed-cut", bookmarkDisks/2, over("cut"))
	run("mixed-held", bookmarkDisks/2, over(""))
}
