//go:build guest

package guest

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// TestZeroCopy: what no filter needs to see does not come into the daemon, and
// what one does need to see does; filters that come and go under load, snapshots
// and a daemon that is killed change nothing of what is read.
func TestZeroCopy(t *testing.T) {
	testkit.Need(t, "ublk")
	for _, kind := range []string{"file", "disk"} {
		t.Run(kind, func(t *testing.T) {
			backing := ""
			if kind == "disk" {
				backing = scsi(t)
			} else {
				disk := bySerial(t, "vd*", "serial", "large")
				testkit.Run(t, "mkfs.ext4", "-q", disk)
				backing = filepath.Join(testkit.Mount(t, disk), "image")
				testkit.Run(t, "truncate", "-s", "48M", backing)
			}
			d := program.New(t)
			node := zeroCopy(t, d, backing)
			if kind == "file" { // what the kernel does with threads of its own
				underLoad(t, d, node, backing)
			}
			d.Run("device", "rm", "data")
		})
	}
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
	return node
}

// underLoad has filters, a snapshot and a daemon come and go while a file system
// on the device is written to.
func underLoad(t *testing.T, d *program.Daemon, node, backing string) {
	dir := t.TempDir()
	testkit.Run(t, "mkfs.ext4", "-q", node)
	testkit.Run(t, "mount", node, dir)
	t.Cleanup(func() { _ = exec.Command("umount", dir).Run() })
	fio := startFio(t, dir, 6)
	for i := range 2 {
		time.Sleep(300 * time.Millisecond)
		d.Run("device", "filters", "data", "--attach", "delay=1ms")
		id := strings.TrimSpace(d.Run("snapshot", "create", "--storage", filepath.Join(t.TempDir(), "diff")+":32M", "data"))
		d.Run("snapshot", "take", id)
		if i == 0 {
			d.Kill()
			time.Sleep(300 * time.Millisecond)
			d.Start()
		} else {
			d.Run("device", "filters", "data", "--detach", "delay")
		}
		d.Run("snapshot", "destroy", id)
	}
	fio.wait(t, d)
	testkit.Run(t, "umount", dir)
	testkit.Run(t, "e2fsck", "-fn", node)
	seen, below := testkit.Run(t, "sha256sum", node), testkit.Run(t, "sha256sum", backing)
	if strings.Fields(seen)[0] != strings.Fields(below)[0] {
		t.Error("the device shows something else than lies on its backing")
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
