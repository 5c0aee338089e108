//go:build guest

package guest

import (
	"encoding/binary"
	"fmt"
	mrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// volume is a mapped device with a mounted file system.
type volume struct {
	dev, name, original, dir string
}

func mountedVolume(t *testing.T, dev string) *volume {
	t.Helper()
	for _, module := range []string{"ublk_drv", "nbd"} {
		_ = exec.Command("modprobe", module).Run() // one of them is enough
	}
	v := &volume{dev: dev, dir: t.TempDir()}
	v.name = strings.TrimSpace(testkit.Run(t, "dmsetup", "info", "-c", "--noheadings", "-o", "name", dev))
	v.original = v.table(t)
	testkit.Run(t, "mkfs.ext4", "-q", dev)
	testkit.Run(t, "mount", dev, v.dir)
	t.Cleanup(func() { _ = exec.Command("umount", v.dir).Run() })
	return v
}

func (v *volume) table(t *testing.T) string {
	t.Helper()
	return testkit.Run(t, "dmsetup", "table", "--showkeys", v.name)
}

// clean unmounts the volume, which must be sound and as it was.
func (v *volume) clean(t *testing.T) {
	t.Helper()
	if now := v.table(t); now != v.original {
		t.Errorf("afterwards the table is %s, and was %s", now, v.original)
	}
	testkit.Run(t, "umount", v.dir)
	testkit.Run(t, "e2fsck", "-fn", v.dev)
	if left := testkit.Run(t, "dmsetup", "ls"); strings.Contains(left, "tidemark") {
		t.Errorf("left behind: %s", left)
	}
	program.Eventually(t, time.Minute, "no served device is left", func() error { // whoever looks at it just now holds it
		left, _ := filepath.Glob("/sys/block/ublkb*")
		nbd, _ := filepath.Glob("/sys/block/nbd*/backend")
		if left = append(left, nbd...); len(left) > 0 {
			return fmt.Errorf("%v", left)
		}
		return nil
	})
}

// guards are the processes that guard a splice.
func guards(t *testing.T) (pids []string) {
	t.Helper()
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range all {
		if b, _ := os.ReadFile(path); strings.HasPrefix(string(b), "tidemark\x00splice-guard\x00") {
			pids = append(pids, strings.Split(path, "/")[2])
		}
	}
	return pids
}

func oneGuard(t *testing.T) string {
	t.Helper()
	var pids []string
	program.Eventually(t, time.Minute, "one guard", func() error {
		if pids = guards(t); len(pids) != 1 {
			return fmt.Errorf("guards: %v", pids)
		}
		return nil
	})
	return pids[0]
}

// needsNoDisk: all of a guard is in memory and stays there, it has no file open, and
// what ends the daemon with all that is its own does not end it.
func needsNoDisk(t *testing.T, d *program.Daemon, pid string) {
	t.Helper()
	status, err := os.ReadFile("/proc/" + pid + "/status")
	if err != nil || !strings.Contains(string(status), "VmLck:") || strings.Contains(string(status), "VmLck:\t       0 kB") {
		t.Errorf("the guard's memory is not locked: %s (%v)", status, err)
	}
	open, _ := filepath.Glob("/proc/" + pid + "/fd/*")
	for _, fd := range open {
		if to, _ := os.Readlink(fd); strings.HasPrefix(to, "/") && !strings.HasPrefix(to, "/dev/") && !strings.HasPrefix(to, "/run/") {
			t.Errorf("the guard has %s open", to)
		}
	}
	sessions := map[string]bool{}
	for _, of := range []string{pid, strconv.Itoa(d.PID())} {
		stat, _ := os.ReadFile("/proc/" + of + "/stat")
		_, fields, _ := strings.Cut(string(stat), ") ")
		if f := strings.Fields(fields); len(f) > 3 {
			sessions[f[3]] = true
		}
	}
	if len(sessions) != 2 {
		t.Errorf("sessions of the guard and the daemon: %v", sessions)
	}
}

func noGuard(t *testing.T) {
	t.Helper()
	program.Eventually(t, time.Minute, "the guard has ended", func() error {
		if pids := guards(t); len(pids) != 0 {
			stack, _ := os.ReadFile("/proc/" + pids[0] + "/stack")
			said, _ := exec.Command("sh", "-c", "dmesg | grep tidemark: | tail -3").Output()
			return fmt.Errorf("guards: %v\n%s\n%s", pids, stack, said)
		}
		return nil
	})
}

// writer writes blocks that tell which they are to a file, slowly, until it is told to stop.
type writer struct {
	t    *testing.T
	path string
	file *os.File
	last map[int64]uint64 // what was written to each block, acknowledged
	stop chan struct{}
	quit sync.Once
	done chan error

	written atomic.Int64
}

const (
	writerBlock  = 4096
	writerBlocks = 1024
)

func startWriter(t *testing.T, dir string) *writer {
	t.Helper()
	w := &writer{t: t, path: filepath.Join(dir, "written"), last: map[int64]uint64{}, stop: make(chan struct{}), done: make(chan error, 1)}
	f, err := os.OpenFile(w.path, os.O_RDWR|os.O_CREATE|syscall.O_DIRECT, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	w.file = f
	buf := aligned(t, writerBlock)
	go func() { w.done <- w.run(buf); close(w.done) }()
	t.Cleanup(func() { // also where the test has failed: the buffer goes next
		w.quit.Do(func() { close(w.stop) })
		select {
		case <-w.done:
		case <-time.After(30 * time.Second):
		}
		f.Close()
	})
	return w
}

func (w *writer) run(buf []byte) error {
	rng := mrand.New(mrand.NewPCG(1, 2))
	for n := uint64(1); ; n++ {
		select {
		case <-w.stop:
			return nil
		case <-time.After(time.Millisecond):
		}
		block := rng.Int64N(writerBlocks)
		for at := 0; at < len(buf); at += 16 {
			binary.LittleEndian.PutUint64(buf[at:], uint64(block))
			binary.LittleEndian.PutUint64(buf[at+8:], n)
		}
		if _, err := w.file.WriteAt(buf, block*writerBlock); err != nil {
			return err
		}
		if n%64 == 0 {
			if err := w.file.Sync(); err != nil {
				return err
			}
		}
		w.last[block] = n
		w.written.Add(1)
	}
}

// end stops it, and holds what can be read against what was written.
func (w *writer) end() {
	w.t.Helper()
	w.quit.Do(func() { close(w.stop) })
	select {
	case err := <-w.done:
		if err != nil {
			w.t.Fatalf("after %d blocks: %v", len(w.last), err)
		}
	case <-time.After(2 * time.Minute):
		w.t.Fatal("a write does not end")
	}
	if len(w.last) == 0 {
		w.t.Error("nothing was written")
	}
	buf := aligned(w.t, writerBlock)
	for block, n := range w.last {
		if _, err := w.file.ReadAt(buf, block*writerBlock); err != nil {
			w.t.Fatal(err)
		}
		for at := 0; at < len(buf); at += 16 {
			if is, was := binary.LittleEndian.Uint64(buf[at:]), binary.LittleEndian.Uint64(buf[at+8:]); is != uint64(block) || was != n {
				w.t.Fatalf("block %d, written as %d, is block %d of %d", block, n, is, was)
			}
		}
	}
	w.file.Close()
}

// TestGivenBack: with the daemon gone for longer than the bound, the volume has its
// own table again, and what uses it sees no error. The next daemon says so, and
// the volume can be spliced again, as a new generation. The front is the best that
// the kernel has: ublk on 6.12, NBD on 6.1.
func TestGivenBack(t *testing.T) {
	v := mountedVolume(t, linear(t))
	d := program.New(t)
	w := startWriter(t, v.dir)
	d.Run("device", "splice", v.dev, "--name", "data", "--give-back", "2s")
	before := generation(t, d)
	first := oneGuard(t)
	needsNoDisk(t, d, first)

	// A daemon that is back in time keeps the volume; its guard is a new one.
	d.Kill()
	d.Start()
	program.Eventually(t, time.Minute, "the first guard has ended", func() error {
		if _, err := os.Stat("/proc/" + first); err == nil {
			return fmt.Errorf("guards: %v", guards(t))
		}
		return nil
	})
	if strings.Contains(d.Run("device", "ls"), "splice-given-back") { // it was slow to start
		d.Run("device", "splice", v.dev, "--name", "data", "--give-back", "2s")
	}
	if v.table(t) == v.original {
		t.Error("the volume is not spliced though there is a daemon")
	}
	oneGuard(t)

	d.Kill()
	noGuard(t)
	if now := v.table(t); now != v.original {
		t.Errorf("after the bound the table is %s, and was %s", now, v.original)
	}
	d.Start()
	if text := d.Run("device", "ls"); !strings.Contains(text, "splice-given-back") {
		t.Errorf("the daemon says nothing of the volume that was given back: %s", text)
	}
	d.Run("device", "splice", v.dev, "--name", "data", "--give-back", "0")
	if text := d.Run("device", "ls"); strings.Contains(text, "splice-given-back") {
		t.Errorf("it is spliced again: %s", text)
	}
	if now := generation(t, d); now == before {
		t.Error("the generation goes on though writes went past the map")
	}
	if pids := guards(t); len(pids) != 0 {
		t.Errorf("no guard was wanted: %v", pids)
	}

	// Without a guard it waits for ever, and doctor --fix gives it back. A daemon that
	// comes back all the same splices it again, as after a start of the machine.
	before = generation(t, d)
	if text := d.Run("doctor", "--fix"); strings.Contains(text, "own table") {
		t.Errorf("there is a daemon, and doctor says: %s", text)
	}
	d.Kill()
	time.Sleep(500 * time.Millisecond)
	if v.table(t) == v.original {
		t.Error("the volume was given back, and nobody was to do that")
	}
	if text := d.Run("doctor", "--fix"); v.table(t) != v.original {
		t.Errorf("doctor --fix did not give it back: %s", text)
	}
	if left := testkit.Run(t, "dmsetup", "ls"); strings.Contains(left, "tidemark") {
		t.Errorf("left behind: %s", left)
	}
	d.Start()
	if text := d.Run("device", "ls"); !strings.Contains(text, "splice-replaced") || v.table(t) == v.original {
		t.Errorf("the volume is not spliced again: %s", text)
	}
	if now := generation(t, d); now == before {
		t.Error("the generation goes on though writes went past the map")
	}
	d.Run("device", "unsplice", "data")
	w.end()
	v.clean(t)
}

// TestGuardMakesWay: a guard that cannot give the volume back says why and serves it
// meanwhile; a daemon that comes back takes it over from there. Whenever a daemon
// comes back, one of the two has the volume, and no write is lost.
func TestGuardMakesWay(t *testing.T) {
	v := mountedVolume(t, linear(t))
	d := program.New(t)
	w := startWriter(t, v.dir)
	d.Run("device", "splice", v.dev, "--name", "data", "--give-back", "1s")
	guard := oneGuard(t)
	input(t, v.original, "dmsetup", "load", v.name) // somebody is about to change the table: it is not ours to swap
	d.Kill()
	program.Eventually(t, time.Minute, "the guard says why it cannot", func() error {
		if said := testkit.Run(t, "dmesg"); !strings.Contains(said, "tidemark: giving the volume "+v.name+" its own table back: ") {
			return fmt.Errorf("the kernel's log ends with %s", said[max(0, len(said)-500):])
		}
		return nil
	})
	served := w.written.Load()
	program.Eventually(t, time.Minute, "writes go on", func() error {
		if now := w.written.Load(); now < served+5 {
			return fmt.Errorf("%d writes, before %d", now, served)
		}
		return nil
	})
	if v.table(t) == v.original {
		t.Error("the guard took a table that was another's")
	}
	d.Start()
	if text := d.Run("device", "ls"); strings.Contains(text, "splice-given-back") || strings.Contains(text, "device-offline") {
		t.Errorf("the daemon has not taken over: %s", text)
	}
	if now := oneGuard(t); now == guard {
		t.Error("the guard is the old one")
	}
	testkit.Run(t, "dmsetup", "clear", v.name)

	d.Kill()
	time.Sleep(900 * time.Millisecond) // to come back about when it is given back
	d.Start()
	text := d.Run("device", "ls")
	back := strings.Contains(text, "splice-given-back")
	if back != (v.table(t) == v.original) || strings.Contains(text, "device-offline") {
		t.Fatalf("the table is %s, and the daemon says: %s", v.table(t), text)
	}
	t.Logf("given back: %v", back)
	d.Run("device", "unsplice", "data")
	noGuard(t)
	w.end()
	v.clean(t)
}

// TestSpliceTables: which tables can be spliced; the others are refused with the
// reason and what else can be done, by splice and by doctor.
func TestSpliceTables(t *testing.T) {
	d := program.New(t)
	key := strings.Repeat("5eC2e7", 11)[:64]
	sectors := size / 512
	for _, c := range []struct {
		kind, modules string
		disks         int
		table         string // %[1]d sectors, then the disks; empty: see prepare
	}{
		{"striped", "", 2, "0 %[1]d striped 2 16 %[2]s 0 %[3]s 0\n"},
		{"crypt", "dm-crypt aes xts", 1, "0 %[1]d crypt aes-xts-plain64 " + key + " 0 %[2]s 0\n"},
		{"multipath", "dm-multipath dm-round-robin", 1, "0 %[1]d multipath 2 queue_mode bio 0 1 1 round-robin 0 1 1 %[2]s 1\n"},
		{"thin-pool", "dm-thin-pool", 2, "0 %[1]d thin-pool %[2]s %[3]s 128 0\n"},
		{"raid", "dm-raid raid1", 2, "0 %[1]d raid raid1 3 0 region_size 1024 2 - %[2]s - %[3]s\n"},
		{"mirror", "dm-mirror", 2, "0 %[1]d mirror core 2 1024 nosync 2 %[2]s 0 %[3]s 0\n"},
		{"cache", "dm-cache dm-cache-smq", 3, "0 %[1]d cache %[2]s %[3]s %[4]s 128 1 writethrough default 0\n"},
		{"writecache", "dm-writecache", 2, "0 %[1]d writecache s %[2]s %[3]s 4096 0\n"},
		{"era", "dm-era", 2, "0 %[1]d era %[2]s %[3]s 128\n"},
		{"snapshot", "dm-snapshot", 2, "0 %[1]d snapshot %[2]s %[3]s N 16\n"},
		{"snapshot-origin", "dm-snapshot", 1, "0 %[1]d snapshot-origin %[2]s\n"},
		{"flakey", "dm-flakey", 1, "0 %[1]d flakey %[2]s 0 3600 0\n"},
	} {
		t.Run(c.kind, func(t *testing.T) {
			for _, m := range strings.Fields(c.modules) {
				_ = exec.Command("modprobe", m).Run() // built in, or the table is refused below
			}
			args := []any{sectors}
			for range c.disks {
				args = append(args, testkit.NewDisk(t, size).Path)
			}
			dev := table(t, c.kind, fmt.Sprintf(c.table, args...))
			report := ""
			if c.kind == "striped" || c.kind == "mirror" { // it tries out much else
				report = d.Run("doctor", dev, "--json")
			}
			if c.kind != "striped" && c.kind != "crypt" {
				text := d.Refused(5, "device", "splice", dev, "--name", "data")
				if !strings.Contains(text, "type "+c.kind+": ") || !strings.Contains(text, "tap") {
					t.Errorf("splice said: %s", text)
				}
				if report != "" && !strings.Contains(report, "type "+c.kind+": ") {
					t.Errorf("doctor said: %s", report)
				}
				return
			}
			if report != "" && !strings.Contains(report, `{"way":"splice","answer":"yes"}`) {
				t.Errorf("doctor said: %s", report)
			}
			v := mountedVolume(t, dev)
			w := startWriter(t, v.dir)
			d.Run("device", "splice", dev, "--name", "data")
			time.Sleep(200 * time.Millisecond)
			if c.kind == "crypt" { // the next daemon needs no key
				d.Kill()
				d.Start()
			}
			if found, _ := exec.Command("grep", "-rli", key, d.State, d.Dir).Output(); len(found) > 0 {
				t.Errorf("the key lies in %s", found)
			}
			d.Run("device", "unsplice", "data")
			w.end()
			v.clean(t)
		})
	}
}
