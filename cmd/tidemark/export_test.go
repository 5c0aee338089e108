package main

import (
	"bufio"
	"bytes"
	"fmt"
	"math/rand/v2"
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

// exporting is one `tidemark export` in the foreground.
type exporting struct {
	t   *testing.T
	cmd *exec.Cmd
	uri string // where it says that it serves
}

// startExport starts one and waits until it serves. It is ended with the test.
func startExport(t *testing.T, d *program.Daemon, uri string, more ...string) *exporting {
	t.Helper()
	args := append([]string{"export", "--vault", d.Vault, "g", "--at", "before", "--nbd", uri}, more...)
	e := &exporting{t: t, cmd: exec.Command(program.Binary(t), args...)}
	e.cmd.Stderr = os.Stderr
	out, err := e.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := e.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.cmd.Process.Kill() })
	killer := time.AfterFunc(time.Minute, func() { _ = e.cmd.Process.Kill() })
	defer killer.Stop()
	line, err := bufio.NewReader(out).ReadString('\n')
	_, rest, ok := strings.Cut(line, " at nbd")
	if err != nil || !ok || !strings.HasSuffix(line, "; interrupt ends it.\n") {
		t.Fatalf("export says %q, %v", line, err)
	}
	e.uri = "nbd" + strings.TrimSuffix(rest, "; interrupt ends it.\n")
	return e
}

// end interrupts it, as a user does; it is done then, and did not fail.
func (e *exporting) end() {
	e.t.Helper()
	_ = e.cmd.Process.Signal(syscall.SIGINT)
	killer := time.AfterFunc(30*time.Second, func() { _ = e.cmd.Process.Kill() })
	defer killer.Stop()
	if err := e.cmd.Wait(); err != nil {
		e.t.Errorf("export ended with %v", err)
	}
}

// TestExport: unmodified NBD clients get the disk as it was, not as it is; what they write
// is theirs alone, and is gone with the export.
func TestExport(t *testing.T) {
	testkit.Need(t, "nbdclients")
	testkit.Need(t, "root", "tap", "loop")
	disk := testkit.NewDisk(t, 24<<20)
	d := program.New(t) // ended before the disk
	f, err := os.OpenFile(disk.Path, os.O_RDWR|syscall.O_SYNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	write := func(off int64, n int) {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rand.Uint32()) | 1
		}
		if _, err := f.WriteAt(b, off); err != nil {
			t.Fatal(err)
		}
	}
	write(1<<20, 1<<20)
	d.Protect("g", disk.Path)
	for i := range int64(20) {
		write(rand.Int64N(5000)*4096, 4096<<(i%4))
	}
	d.Run("bookmark", "g", "before")
	write(0, 4<<20)
	d.Settle("g")
	want := d.Restored("g", "", "before")

	socket := filepath.Join(d.Dir, "s")
	e := startExport(t, d, "nbd+unix:///x?socket="+socket)
	t.Run("read-only", func(t *testing.T) { readsExport(t, e.uri, want) })
	t.Run("refused", func(t *testing.T) {
		point := []string{"export", "--vault", d.Vault, "g", "--at", "before", "--nbd"}
		d.Refused(exitInUse, append(point, e.uri)...)
		d.Refused(exitInUse, append(point, "nbd+unix:///x?socket="+want)...)
		d.Refused(exitUsage, append(point, "nbds://127.0.0.1/x?tls-certificates="+d.Dir)...)
		d.Refused(exitNotFound, append(point, "nbd://127.0.0.1:0/x", "--writable", "--scratch", filepath.Join(d.Dir, "no"))...)
	})
	e.end()
	if _, err := os.Stat(socket); err == nil {
		t.Error("the socket is left")
	}
	t.Run("writable", func(t *testing.T) { writesExport(t, d, want) })
}

func readsExport(t *testing.T, uri, want string) {
	if out := testkit.Run(t, "nbdinfo", uri); !strings.Contains(out, "is_read_only: true") || !strings.Contains(out, "can_multi_conn: true") || !strings.Contains(out, "base:allocation") {
		t.Errorf("nbdinfo:\n%s", out)
	}
	testkit.Run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", want, uri)
	copied, converted := filepath.Join(t.TempDir(), "copy"), filepath.Join(t.TempDir(), "qcow2")
	testkit.Run(t, "nbdcopy", uri, copied)
	sameFiles(t, copied, want)
	testkit.Run(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, converted)
	testkit.Run(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", converted, want)
	if out, err := exec.Command("qemu-io", "-f", "raw", "-c", "write 0 512", uri).CombinedOutput(); err == nil && !strings.Contains(string(out), "ead-only") && !strings.Contains(string(out), "permitted") {
		t.Errorf("a write was taken: %s", out)
	}
}

func writesExport(t *testing.T, d *program.Daemon, want string) {
	scratch := t.TempDir()
	e := startExport(t, d, "nbd://127.0.0.1:0/x", "--writable", "--scratch", scratch)
	var commands []string
	for _, c := range []string{"write -P 0x5a 3000 70000", "discard 1M 64k", "write -z 2M 64k", "flush", "write -f -P 7 0 512"} {
		commands = append(commands, "-c", c)
	}
	if out := testkit.Run(t, "qemu-io", append(append([]string{"-f", "raw"}, commands...), e.uri)...); strings.Contains(out, "failed") {
		t.Errorf("qemu-io:\n%s", out)
	}
	b, err := os.ReadFile(want)
	if err != nil {
		t.Fatal(err)
	}
	copy(b[3000:], bytes.Repeat([]byte{0x5a}, 70000))
	clear(b[2<<20:][:64<<10])
	copy(b, bytes.Repeat([]byte{7}, 512))
	copied := filepath.Join(t.TempDir(), "copy")
	testkit.Run(t, "nbdcopy", e.uri, copied)
	got, err := os.ReadFile(copied)
	if err != nil {
		t.Fatal(err)
	}
	copy(b[1<<20:][:64<<10], got[1<<20:]) // discarded: may be anything
	if !bytes.Equal(got, b) {
		t.Errorf("what was written does not come back: first difference at %d", differ(got, b))
	}
	if left, _ := os.ReadDir(scratch); len(left) != 0 {
		t.Errorf("the scratch file has a name: %v", left) // kill -9 would leave it
	}
	// A second export of the point knows nothing of the first one's changes.
	other := startExport(t, d, "nbd://127.0.0.1:0/x", "--writable", "--scratch", scratch)
	testkit.Run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", want, other.uri)
	other.end()
	e.end()
	sameFiles(t, d.Restored("g", "", "before"), want)
}

func sameFiles(t *testing.T, a, b string) {
	t.Helper()
	x, err := os.ReadFile(a)
	if err != nil {
		t.Fatal(err)
	}
	y, err := os.ReadFile(b)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(x, y) {
		t.Error(fmt.Errorf("%s and %s differ, first at %d", a, b, differ(x, y)))
	}
}

// differ gives the first byte at which two contents differ.
func differ(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}
