//go:build guest

package guest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// fronts are those of this kernel whose devices outlive a daemon, the best first.
func fronts() []string {
	for _, module := range []string{"ublk_drv", "nbd"} {
		_ = exec.Command("modprobe", module).Run() // one of them is enough
	}
	if _, err := os.Stat("/dev/ublk-control"); err == nil {
		return []string{"ublk", "nbd"}
	}
	return []string{"nbd"}
}

// served makes a device over an image file in memory.
func served(t testing.TB, d *program.Daemon, name, front string, size int64) string {
	t.Helper()
	image := filepath.Join(d.Dir, name+".img")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, size)); err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(d.Run("device", "create", "--backing", image, "--front", front, "--name", name))
}

const servedSize = 4 << 20 // of the small served devices, bytes

// TestServedProtect: one group over every front of this kernel and over a spliced
// volume with a mounted file system. Under load, and with the daemon killed
// in between, every point is a prefix of one order over all of them; a quiet
// bookmark is what a shadow copy is.
func TestServedProtect(t *testing.T) {
	rng := seed(t)
	kinds := fronts()
	d := program.New(t)
	v := mountedVolume(t, linearOf(t, 3*servedSize))
	d.Run("device", "splice", v.dev, "--name", "volume")
	first := openRaw(t, served(t, d, "first", kinds[0], servedSize))
	second := openRaw(t, served(t, d, "second", kinds[len(kinds)-1], servedSize))
	d.Protect("g", "first", "second", "volume")
	w := startWriter(t, v.dir)
	disks := []*raw{first, second}

	ended := counted(t, disks, rng)
	mark := func(name string, args ...string) {
		t.Helper()
		// After a kill what was on its way is a gap for a moment.
		d.Await("g", "consistent", func(g *program.Group) bool { return g.Since > 0 && g.State == "protected" })
		program.Eventually(t, time.Minute, "the bookmark "+name, func() error {
			_, err := d.Verb(append([]string{"bookmark", "g", name}, args...)...)
			return err
		})
	}
	mark("loaded", "--barrier", "held") // over the spliced volume too
	if text := d.Run("status", "g"); !strings.Contains(text, "loaded, barrier held") {
		t.Errorf("what kind of barrier it was is not said: %s", text)
	}
	d.Kill()
	d.Start()
	mark("frozen", "--consistency", "filesystem")
	ended()
	d.Run("bookmark", "g", "quiet")
	shadow := [][]byte{first.content(), second.content()}

	rest := counted(t, disks, rng)
	d.Kill()
	d.Start()
	rest()
	w.end() // under load it is never settled for long
	g := d.Settle("g")
	for _, disk := range g.Disks {
		if disk.Lost > 0 {
			t.Errorf("writes of %s were lost, though the ring has room: %+v", disk.Name, g)
		}
	}
	for i, r := range disks {
		name := []string{"first", "second"}[i]
		r.same(name+" at latest", imageOf(t, d, name, "latest"))
		if !bytes.Equal(shadow[i], imageOf(t, d, name, "quiet")) {
			t.Errorf("%s at the bookmark is not what it was then", name)
		}
	}
	for _, at := range []string{"loaded", "frozen"} {
		a, b := counter(imageOf(t, d, "first", at)), counter(imageOf(t, d, "second", at))
		if a != b && a != b+1 || a == 0 {
			t.Errorf("at %s the first device has write %d and the second %d, which came after it", at, a, b)
		}
	}
	frozen := d.Restored("g", "volume", "frozen")
	testkit.Run(t, "e2fsck", "-fn", frozen)
	d.Run("verify", "--vault", d.Vault)
	if text := d.Refused(9, "device", "rm", "first"); !strings.Contains(text, "unprotect g") {
		t.Errorf("device rm names no remedy: %s", text)
	}
	d.Run("unprotect", "g")
	for _, r := range disks {
		r.file.Close()
	}
	d.Run("device", "rm", "first")
	d.Run("device", "rm", "second")
	d.Run("device", "unsplice", "volume")
	v.clean(t)
}

// imageOf is a disk of group g as it was at a point.
func imageOf(t testing.TB, d *program.Daemon, disk, at string) []byte {
	t.Helper()
	file := d.Restored("g", disk, at)
	defer os.Remove(file)
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// noiseStart is where, on counted devices, other writes begin.
const noiseStart = 1 << 20

// counted writes a number to the beginning of each disk, one after the other, then
// the next number, and other things elsewhere meanwhile. What it returns ends that.
func counted(t *testing.T, disks []*raw, rng *mrand.Rand) (end func()) {
	t.Helper()
	var stop atomic.Bool
	var all sync.WaitGroup
	var failed atomic.Pointer[error]
	begun := make(chan struct{})
	run := func(write func() error) {
		all.Go(func() {
			for !stop.Load() {
				if err := write(); err != nil {
					failed.CompareAndSwap(nil, &err)
					return
				}
			}
		})
	}
	number, buf := uint64(0), aligned(t, 4096)
	if _, err := disks[0].file.ReadAt(buf, 0); err != nil {
		t.Fatal(err)
	}
	number = binary.LittleEndian.Uint64(buf)
	var once sync.Once
	run(func() error {
		time.Sleep(5 * time.Millisecond)
		number++
		binary.LittleEndian.PutUint64(buf, number)
		for _, r := range disks {
			if _, err := r.file.WriteAt(buf, 0); err != nil {
				return err
			}
		}
		once.Do(func() { close(begun) })
		return nil
	})
	for _, r := range disks {
		own, noise := mrand.New(mrand.NewPCG(rng.Uint64(), 3)), aligned(t, 16<<10)
		run(func() error {
			n := int64(4096) << own.IntN(3)
			binary.LittleEndian.PutUint64(noise[own.Int64N(n/8)*8:], own.Uint64())
			time.Sleep(20 * time.Millisecond) // emulated processors are for all
			_, err := r.file.WriteAt(noise[:n], noiseStart+own.Int64N((r.size-noiseStart-n)/4096)*4096)
			return err
		})
	}
	var quit sync.Once
	end = func() {
		quit.Do(func() { stop.Store(true); all.Wait() })
		if err := failed.Load(); err != nil {
			t.Errorf("a write to a served device failed: %v", *err)
		}
	}
	t.Cleanup(func() { quit.Do(func() { stop.Store(true); all.Wait() }) })
	select {
	case <-begun:
	case <-time.After(time.Minute):
		t.Fatal("no write ends")
	}
	return end
}

func counter(image []byte) uint64 { return binary.LittleEndian.Uint64(image) }

// TestSpliceLost: a protected volume gets another table, behind a daemon's back, and
// by a guard. No point claims what went past, the group says so, snapshots are
// spoiled, and once the volume is spliced again the history goes on.
func TestSpliceLost(t *testing.T) {
	fronts()
	lower := testkit.NewDisk(t, servedSize)
	dev := table(t, "lost", fmt.Sprintf("0 %d linear %s 0\n", servedSize/512, lower.Path))
	name := filepath.Base(dev)
	original := testkit.Run(t, "dmsetup", "table", name)
	r, rng, buf := openRaw(t, dev), seed(t), aligned(t, 128<<10)
	scribbled := func() {
		t.Helper()
		if err := r.scribble(buf, 20, rng); err != nil {
			t.Fatal(err)
		}
	}
	d := program.New(t)
	d.Run("device", "splice", dev, "--name", "data", "--give-back", "2s")
	d.Protect("g", "data")
	scribbled()
	d.Run("bookmark", "g", "before")
	before := r.content()
	id := strings.TrimSpace(d.Run("snapshot", "create", "--storage", filepath.Join(d.Dir, "diff")+":16M", "data"))
	d.Run("snapshot", "take", id)
	scribbled()
	if text := d.Refused(9, "device", "unsplice", "data"); !strings.Contains(text, "unprotect g") {
		t.Errorf("unsplice names no remedy: %s", text)
	}

	// While the daemon cannot look the table is swapped, and another one loaded so
	// that it cannot splice again: from here on it must take no bookmark.
	since := d.Group("g").Since
	testkit.Run(t, "sync")
	if err := unix.Kill(d.PID(), unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	input(t, original, "dmsetup", "load", name)
	testkit.Run(t, "dmsetup", "resume", name)
	input(t, original, "dmsetup", "load", name)
	scribbled()
	if err := unix.Kill(d.PID(), unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if text, err := d.Verb("bookmark", "g", "lying"); err == nil {
		t.Errorf("a bookmark was put after writes had gone past: %s", text)
	}
	d.Await("g", "offline, for its table", func(g *program.Group) bool { return g.State == "offline" && g.Has("offline") })
	program.Eventually(t, time.Minute, "the device says why", func() error {
		if text := d.Run("device", "ls", "--json"); !strings.Contains(text, "splice-lost") {
			return fmt.Errorf("it says %s", text)
		}
		return nil
	})
	if text := d.Run("snapshot", "ls", "--json"); !strings.Contains(text, "spoiled") {
		t.Errorf("the snapshot of a volume that was written past: %s", text)
	}
	scribbled()
	climbed := func() {
		t.Helper()
		g := d.Await("g", "consistent again", func(g *program.Group) bool { return g.Since > since && g.State == "protected" })
		since = g.Since
		scribbled()
		d.Settle("g")
		r.same("latest", restored(t, d, "latest"))
		if !bytes.Equal(before, restored(t, d, "before")) {
			t.Error("the volume at the bookmark is not what it was then")
		}
		for _, p := range d.Points("g") {
			if p.Bookmark == "lying" {
				t.Errorf("a point that never was: %+v", p)
			}
		}
	}
	testkit.Run(t, "dmsetup", "clear", name) // nobody hinders it any more: it splices again by itself
	climbed()
	if text := d.Run("device", "ls", "--json"); !strings.Contains(text, "splice-replaced") || strings.Contains(text, "splice-lost") {
		t.Errorf("the device says %s", text)
	}
	if text := d.Run("snapshot", "ls", "--json"); !strings.Contains(text, "spoiled") {
		t.Errorf("the snapshot is no longer spoiled: %s", text)
	}

	// Given back by its guard.
	d.Kill()
	noGuard(t)
	scribbled()
	d.Start()
	d.Await("g", "offline, as the volume was given back", func(g *program.Group) bool { return g.State == "offline" && g.Has("offline") })
	if text := d.Run("device", "ls", "--json"); !strings.Contains(text, "splice-given-back") {
		t.Errorf("the device says %s", text)
	}
	scribbled()
	d.Run("device", "splice", dev, "--name", "data", "--give-back", "0")
	climbed()
	d.Restart() // the history goes on, the snapshot does not
	if g := d.Settle("g"); g.Since != since {
		t.Errorf("the history began anew with a restart: %+v", g)
	}
	if text := d.Run("snapshot", "ls", "--json"); !strings.Contains(text, "spoiled") {
		t.Errorf("the snapshot is no longer spoiled: %s", text)
	}
	d.Run("snapshot", "destroy", id)
	d.Run("verify", "--vault", d.Vault)
	d.Run("unprotect", "g")
	d.Run("device", "unsplice", "data")
	r.file.Close()
	if now := testkit.Run(t, "dmsetup", "table", name); now != original {
		t.Errorf("afterwards the table is %s, and was %s", now, original)
	}
	nothingLeft(t, "the splices and the image", 0)
}
