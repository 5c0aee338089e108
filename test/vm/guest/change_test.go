//go:build guest

package guest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tidemark/internal/loop"
	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// TestPulled: a disk that is pulled away while it is written to, and put back.
func TestPulled(t *testing.T) {
	dev := scsi(t)
	r, rng, buf := openRaw(t, dev), seed(t), aligned(t, 128<<10)
	d := program.New(t)
	d.Protect("g", dev)
	if err := r.scribble(buf, 50, rng); err != nil {
		t.Fatal(err)
	}
	d.Run("bookmark", "g", "before")
	before := r.content()
	device, err := filepath.EvalSymlinks("/sys/block/" + filepath.Base(dev) + "/device")
	if err != nil {
		t.Fatal(err)
	}
	host := device[:strings.Index(device, "/target")]
	write(t, device+"/delete", "1")
	if err := r.scribble(buf, 50, rng); err == nil {
		t.Error("a disk that is gone takes writes")
	}
	r.file.Close()
	d.Await("g", "offline, as its disk is gone", func(g *program.Group) bool {
		return g.State == "offline" && (g.Has("offline") || g.Has("unknown-territory"))
	})
	if got := restored(t, d, "before"); string(got) != string(before) {
		t.Error("the disk at the bookmark is not what it was then")
	}
	scans, _ := filepath.Glob(host + "/scsi_host/host*/scan")
	if len(scans) != 1 {
		t.Fatalf("%v below %s", scans, host)
	}
	write(t, scans[0], "- - -")
	again := scsiDisk(t)
	d.Await("g", "online", func(g *program.Group) bool { return g.State != "offline" })
	r = openRaw(t, again)
	if err := r.scribble(buf, 50, rng); err != nil {
		t.Fatal(err)
	}
	d.Settle("g")
	r.same("latest", restored(t, d, "latest"))
	d.Run("unprotect", "g")
	r.file.Close()
}

func write(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0); err != nil {
		t.Fatal(err)
	}
}

// TestTableChanged: what a mapped device leads to is changed, once before the
// daemon's eyes, once while there is none. No point claims what was never written.
func TestTableChanged(t *testing.T) {
	lower := testkit.NewDisk(t, 2*small)
	raw := openRaw(t, lower.Path)
	if err := raw.scribble(aligned(t, 128<<10), 200, seed(t)); err != nil {
		t.Fatal(err)
	}
	at := func(start int64) string { return fmt.Sprintf("0 %d linear %s %d\n", small/512, lower.Path, start/512) }
	dev := table(t, "moved", at(0))
	d := program.New(t)
	d.Protect("g", dev)
	lead := func(start int64) {
		t.Helper()
		testkit.Run(t, "dmsetup", "suspend", "--noflush", dev)
		input(t, at(start), "dmsetup", "load", dev)
		testkit.Run(t, "dmsetup", "resume", dev)
	}
	moved := func(since uint64) uint64 {
		t.Helper()
		g := d.Await("g", "consistent again", func(g *program.Group) bool { return g.Since > since && g.State == "protected" })
		d.Settle("g")
		openRaw(t, dev).same("latest", restored(t, d, "latest"))
		return g.Since
	}
	since := d.Group("g").Since
	lead(small)
	since = moved(since)
	d.Kill()
	lead(0)
	d.Start()
	moved(since)
	d.Run("verify", "--vault", d.Vault)
	d.Run("unprotect", "g")
}

// TestRefused: disks whose writes cannot all be seen, each with its reason.
func TestRefused(t *testing.T) {
	d := program.New(t)
	for name, c := range map[string]struct {
		code string // empty: it is taken
		make func(t testing.TB) string
	}{
		"member of an array": {"disk-stacked-on", func(t testing.TB) string {
			a, b := testkit.NewDisk(t, size), testkit.NewDisk(t, size)
			arrayOf(t, a.Path, b.Path)
			return a.Path
		}},
		"below a mapping": {"disk-stacked-on", func(t testing.TB) string {
			a := testkit.NewDisk(t, size)
			table(t, "above", fmt.Sprintf("0 %d linear %s 0\n", size/512, a.Path))
			return a.Path
		}},
		"path": {"disk-multipath-path", func(t testing.TB) string {
			testkit.Run(t, "modprobe", "dm-multipath")
			testkit.Run(t, "modprobe", "dm-round-robin")
			a := testkit.NewDisk(t, size)
			input(t, fmt.Sprintf("0 %d multipath 2 queue_mode bio 0 1 1 round-robin 0 1 1 %s 1\n", size/512, a.Path), "dmsetup", "create", "paths", "--uuid", "mpath-test")
			t.Cleanup(func() { testkit.Run(t, "dmsetup", "remove", "--retry", "paths") })
			return a.Path
		}},
		"swap": {"disk-swap", func(t testing.TB) string {
			a := testkit.NewDisk(t, size)
			testkit.Run(t, "mkswap", a.Path)
			testkit.Run(t, "swapon", a.Path)
			t.Cleanup(func() { testkit.Run(t, "swapoff", a.Path) })
			return a.Path
		}},
		"zoned": {"disk-zoned", func(t testing.TB) string {
			testkit.Run(t, "modprobe", "null_blk", "nr_devices=1", "gb=1", "zoned=1", "zone_size=64")
			t.Cleanup(func() { testkit.Run(t, "rmmod", "null_blk") })
			return node(t, "/dev/nullb0")
		}},
		"empty": {"disk-empty", func(t testing.TB) string { return node(t, "/dev/loop15") }},
		"rw_page": {map[bool]string{true: "disk-rw-page"}[oldPages(t)], func(t testing.TB) string {
			testkit.Run(t, "modprobe", "brd", "rd_nr=1", "rd_size=16384")
			t.Cleanup(func() { testkit.Run(t, "rmmod", "brd") })
			return node(t, "/dev/ram0")
		}},
	} {
		t.Run(name, func(t *testing.T) {
			dev := c.make(t)
			if c.code == "" {
				d.Protect("g", dev)
				d.Run("unprotect", "g")
				return
			}
			text := d.Refused(5, "protect", "--vault", filepath.Join(d.Dir, name), "--name", "g", dev)
			if !strings.Contains(text, "["+c.code+"]") || !strings.Contains(text, filepath.Base(dev)) {
				t.Errorf("protect said: %s", text)
			}
			if name == "path" { // all of them come from one list
				if report, _ := d.Verb("doctor", dev, "--json"); !strings.Contains(report, c.code) {
					t.Errorf("doctor does not say %s: %s", c.code, report)
				}
			}
			if _, err := os.Stat(filepath.Join(d.Dir, name)); err == nil {
				t.Error("a vault was made for a refused group")
			}
		})
	}
	if len(d.Status().Groups) > 0 {
		t.Error("a refused group is there")
	}
}

func node(t testing.TB, path string) string {
	t.Helper()
	if err := loop.WaitNode(path, 10*time.Second); err != nil {
		t.Fatal(err)
	}
	return path
}

// oldPages: up to Linux 6.3 some drivers could be handed single pages.
func oldPages(t testing.TB) bool {
	t.Helper()
	return strings.HasPrefix(strings.TrimSpace(testkit.Run(t, "uname", "-r")), "6.1.")
}
