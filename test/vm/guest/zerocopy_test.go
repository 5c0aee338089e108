//go:build guest

package guest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// TestZeroCopy: what no filter needs to see does not come into the daemon, and what one
// does need to see does: filters that come and go under load, snapshots, protection, a daemon
// that is killed, errors, and memory that the disk cannot take change nothing of what is read.
func TestZeroCopy(t *testing.T) {
	testkit.Need(t, "ublk")
	t.Run("file", func(t *testing.T) { // what the kernel does with threads of its own
		disk := bySerial(t, "vd*", "serial", "large")
		testkit.Run(t, "mkfs.ext4", "-q", disk)
		backing := filepath.Join(testkit.Mount(t, disk), "image")
		testkit.Run(t, "truncate", "-s", "48M", backing)
		d := program.New(t)
		underLoad(t, d, zeroCopy(t, d, backing), backing)
		d.Run("device", "rm", "data")
	})
	t.Run("disk", func(t *testing.T) {
		backing := scsi(t)
		d := program.New(t)
		node := zeroCopy(t, d, backing)
		badPlace(t, node)
		d.Run("device", "rm", "data")
	})
}

// zeroCopy makes a device three ways and looks where its data goes; it gives the node.
func zeroCopy(t *testing.T, d *program.Daemon, backing string) string {
	create := func(args ...string) string {
		return strings.TrimSpace(d.Run(append([]string{"device", "create", "--front", "ublk", "--name", "data", "--backing", backing}, args...)...))
	}
	node := create("--no-zero-copy")
	if n := passed(t, d, node); n < 16<<20 {
		t.Errorf("with --no-zero-copy only %d bytes came into the daemon", n)
	}
	d.Run("device", "rm", "data")
	node = create()
	if n := passed(t, d, node); n >= 1<<20 && os.Getenv("TIDEMARK_NEWEST") != "" { // others cannot do it
		t.Errorf("%d bytes came into the daemon, and none needed to", n)
	}
	d.FlushersOnly() // the kernel's own threads for it too
	d.Run("device", "filters", "data", "--attach", "delay=1us")
	if n := passed(t, d, node); n < 16<<20 {
		t.Errorf("with a filter only %d bytes came into the daemon", n)
	}
	d.Run("device", "filters", "data", "--detach", "delay")
	oddMemory(t, node)
	return node
}

// underLoad has a snapshot, a daemon, filters and protection come and go while a file
// system on the device is written to.
func underLoad(t *testing.T, d *program.Daemon, node, backing string) {
	dir := t.TempDir()
	testkit.Run(t, "mkfs.ext4", "-q", node)
	testkit.Run(t, "mount", node, dir)
	t.Cleanup(func() { _ = exec.Command("umount", dir).Run() })
	fio := startFio(t, dir, 8)
	// A snapshot stays what it was: over what it has kept, writes go past its filter.
	id := strings.TrimSpace(d.Run("snapshot", "create", "--storage", filepath.Join(t.TempDir(), "diff")+":48M", "data"))
	d.Run("snapshot", "take", id)
	_, image, _ := strings.Cut(strings.TrimSpace(d.Run("snapshot", "images", id)), " ")
	then := sum(t, image)
	d.Kill() // with requests on their way that only the kernel sees
	time.Sleep(300 * time.Millisecond)
	d.Start()
	_, image, _ = strings.Cut(strings.TrimSpace(d.Run("snapshot", "images", id)), " ")
	testkit.Run(t, "e2fsck", "-fn", image)
	if now := sum(t, image); now != then {
		t.Error("the snapshot has changed")
	}
	d.Run("snapshot", "destroy", id)
	d.Run("device", "filters", "data", "--attach", "delay=1ms")
	d.Run("device", "filters", "data", "--detach", "delay")
	// The disk is copied while it is written to: a write past the capture would be missed.
	d.Protect("g", "data")
	fio.wait(t, d)
	testkit.Run(t, "umount", dir)
	testkit.Run(t, "e2fsck", "-fn", node)
	d.Settle("g")
	seen := sum(t, node)
	if seen != sum(t, backing) {
		t.Error("the device shows something else than lies on its backing")
	}
	if seen != sum(t, d.Restored("g", "data", "latest")) {
		t.Error("what was protected is not what was written")
	}
	d.Run("unprotect", "g")
}

func sum(t *testing.T, path string) string {
	t.Helper()
	return strings.Fields(testkit.Run(t, "sha256sum", path))[0]
}

// oddMemory writes from and reads into memory that ublk takes and the disk does not: the
// kernel cannot move it, and nobody notices.
func oddMemory(t *testing.T, node string) {
	f, err := os.OpenFile(node, os.O_RDWR|syscall.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const n = 96 << 10
	p, got := aligned(t, n+4096)[4:][:n], aligned(t, n+4096)
	for i := range p {
		p[i] = byte(i ^ i>>8)
	}
	if _, err := f.WriteAt(p, 1<<20); err != nil {
		t.Fatal(err)
	}
	for _, at := range []int{0, 4, 512} {
		if _, err := f.ReadAt(got[at:][:n], 1<<20); err != nil || !bytes.Equal(got[at:][:n], p) {
			t.Errorf("read into memory at %d: %v; the same %v", at, err, bytes.Equal(got[at:][:n], p))
		}
	}
}

// badPlace reads sectors of the simulated disk that have gone bad: the reader is told, and
// the place is as good as any afterwards.
func badPlace(t *testing.T, node string) {
	const opts, bad = "/sys/bus/pseudo/drivers/scsi_debug/opts", 0x1234 * 512
	f, err := os.OpenFile(node, os.O_RDWR|syscall.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p, got := aligned(t, 4096), aligned(t, 4096)
	for i := range p {
		p[i] = byte(i>>8) + 1
	}
	if _, err := f.WriteAt(p, bad); err != nil {
		t.Fatal(err)
	}
	write(t, opts, "2")
	defer write(t, opts, "0")
	if _, err := f.ReadAt(got, bad); !errors.Is(err, syscall.EIO) {
		t.Errorf("a bad place is read: %v", err)
	}
	if _, err := f.ReadAt(got, 1<<20); err != nil {
		t.Errorf("another is not: %v", err)
	}
	write(t, opts, "0")
	if _, err := f.ReadAt(got, bad); err != nil || !bytes.Equal(got, p) {
		t.Errorf("it is good again, and read as something else: %v", err)
	}
}

// passed writes 8 MiB to a device, reads them, and gives how many of those bytes
// went through the daemon's memory: for a write it has read them, for a read it has
// written them, whichever way its own reading and writing of the backing counts.
func passed(t *testing.T, d *program.Daemon, node string) (n int64) {
	t.Helper()
	pattern := filepath.Join(t.TempDir(), "pattern")
	testkit.Run(t, "dd", "if=/dev/urandom", "of="+pattern, "bs=1M", "count=8", "status=none")
	before := moved(t, d, "rchar")
	testkit.Run(t, "dd", "if="+pattern, "of="+node, "bs=256K", "oflag=direct", "conv=fsync,notrunc", "status=none")
	n = moved(t, d, "rchar") - before
	before = moved(t, d, "wchar")
	testkit.Run(t, "dd", "if="+node, "of="+pattern+".read", "bs=256K", "count=32", "iflag=direct", "status=none")
	n += moved(t, d, "wchar") - before
	same(t, pattern, pattern+".read")
	return n
}

func same(t *testing.T, a, b string) {
	t.Helper()
	x, err := os.ReadFile(a)
	if err != nil {
		t.Fatal(err)
	}
	if y, err := os.ReadFile(b); err != nil || !bytes.Equal(x, y) {
		t.Errorf("%s is read as something else: %v", a, err)
	}
}

// moved is how many bytes the daemon has read or written, by a name of /proc/PID/io.
func moved(t *testing.T, d *program.Daemon, name string) (n int64) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", d.PID()))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), name+": ")
	if _, err := fmt.Sscan(rest, &n); err != nil {
		t.Fatal(err)
	}
	return n
}
