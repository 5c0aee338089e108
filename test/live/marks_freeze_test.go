package live

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// TestMarkOverFileSystems: a consistent bookmark over two groups, in one phase or two,
// finds both file systems frozen together, each clean by itself and both of one instant; where the
// hooks of one fail there is a bookmark in none.
func TestMarkOverFileSystems(t *testing.T) {
	testkit.Need(t, "root", "tap", "loop", "ext4")
	var disks [2]*testkit.Disk
	var files [2]*os.File
	for i := range disks {
		disks[i] = testkit.NewDisk(t, 32*mib)
		testkit.Mkfs(t, disks[i].Path, "ext4")
		mnt := mountThawed(t, disks[i].Path)
		var err error
		if files[i], err = os.Create(filepath.Join(mnt, "counter")); err != nil {
			t.Fatal(err)
		}
		defer files[i].Close()
	}
	fails := filepath.Join(t.TempDir(), "fails")
	first, firstCalls := hookFolder(t, map[string]string{"first": "exit 0"})
	second, secondCalls := hookFolder(t, map[string]string{"second": "! test -e " + fails})
	d := program.New(t)
	d.Protect("ga", "--hook-dir", first, disks[0].Path)
	d.Protect("gb", "--hook-dir", second, disks[1].Path)

	var n atomic.Uint64
	count := countInto(t, files, &n)
	for k, consistency := range []string{"filesystem", "application"} {
		at := n.Load()
		program.Eventually(t, patience, "the counter goes on", func() error {
			if n.Load() < at+2 {
				return program.ErrNotYet
			}
			return nil
		})
		d.Run("bookmark", "ga", "gb", string(rune('a'+k)), "--consistency", consistency)
	}
	d.Run("bookmark", "--prepare", "ga", "gb", "c", "--consistency", "filesystem") // they go on before its verdict
	at := n.Load()
	program.Eventually(t, patience, "the counter goes on", func() error {
		if n.Load() < at+2 {
			return program.ErrNotYet
		}
		return nil
	})
	d.Run("bookmark", "--commit", "c")
	if err := os.WriteFile(fails, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if text := d.Refused(exitRefused, "bookmark", "ga", "gb", "failed", "--consistency", "application"); !strings.Contains(text, "second") {
		t.Errorf("which hook failed is not said: %s", text)
	}
	count()
	for _, calls := range []func() string{firstCalls, secondCalls} {
		if got := calls(); strings.Count(got, "freeze") != 4 || strings.Count(got, "thaw") != 4 {
			t.Errorf("hooks: %s", got)
		}
	}
	for i, f := range files {
		lives(t, filepath.Dir(f.Name()))
		g := []string{"ga", "gb"}[i]
		d.Settle(g)
		var names []string
		for _, p := range d.Points(g) {
			if p.Bookmark != "" {
				names = append(names, p.Bookmark)
			}
		}
		if !slices.Equal(names, []string{"a", "b", "c"}) {
			t.Errorf("group %s offers %q", g, names)
		}
	}
	for _, name := range []string{"a", "b", "c"} {
		var have [2]uint64
		for i, g := range []string{"ga", "gb"} {
			c := &copied{t, "ext4", d.Restored(g, "", name)}
			c.clean(c.file) // nothing is to be replayed
			c.replayed(func(dir string) {
				b, err := os.ReadFile(filepath.Join(dir, "counter"))
				if err != nil || len(b) < 8 {
					t.Fatalf("%s in %s: %d bytes, %v", name, g, len(b), err)
				}
				have[i] = binary.LittleEndian.Uint64(b)
			})
		}
		if have[1] != have[0] && have[1]+1 != have[0] {
			t.Errorf("at %s the first file system has number %d and the second %d", name, have[0], have[1])
		}
	}
}

// countInto writes a number to the first file, then to the second, each stable
// before the next, until the end that it gives is called.
func countInto(t *testing.T, files [2]*os.File, n *atomic.Uint64) (end func()) {
	var all sync.WaitGroup
	var stop atomic.Bool
	step := func() error {
		for _, f := range files {
			if _, err := f.WriteAt(binary.LittleEndian.AppendUint64(nil, n.Load()+1), 0); err != nil {
				return err
			}
			if err := f.Sync(); err != nil {
				return err
			}
		}
		n.Add(1)
		return nil
	}
	if err := step(); err != nil { // a file with nothing in it has no number
		t.Fatal(err)
	}
	all.Go(func() {
		for !stop.Load() {
			if err := step(); err != nil {
				t.Error(err)
				return
			}
		}
	})
	end = func() { stop.Store(true); all.Wait() }
	t.Cleanup(end)
	return end
}
