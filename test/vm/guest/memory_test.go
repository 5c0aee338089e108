//go:build guest

package guest

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// hogging has this binary be the hog: it keeps so many bytes of memory available, and no more.
const hogging = "TIDEMARK_TEST_HOG"

func TestMain(m *testing.M) {
	if keep, err := strconv.ParseInt(os.Getenv(hogging), 10, 64); err == nil {
		hog(keep)
	}
	os.Exit(m.Run())
}

// hog takes memory until so much is available, tells so once, and from then on
// takes what becomes available and gives back a little where there is too little.
func hog(keep int64) {
	const piece = 8 << 20
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("1000"), 0) // the first to go
	var pieces [][]byte
	told := false
	for {
		switch n := available(); {
		case n > keep+piece:
			b, err := unix.Mmap(-1, 0, piece, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE|unix.MAP_POPULATE)
			if err == nil {
				pieces = append(pieces, b)
			}
			continue
		case n < keep/2 && len(pieces) > 0:
			_ = unix.Munmap(pieces[len(pieces)-1])
			pieces = pieces[:len(pieces)-1]
		}
		if !told {
			told = true
			fmt.Println("full")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// available is what the kernel could give away without swapping, in bytes.
func available() int64 {
	text, _ := os.ReadFile("/proc/meminfo")
	_, rest, _ := strings.Cut(string(text), "MemAvailable:")
	n, _ := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
	return n << 10
}

// scarce leaves so many bytes of memory available until the test ends, and has
// nothing written back before memory is short.
func scarce(t *testing.T, keep int64) {
	t.Helper()
	for _, name := range []string{"dirty_background_bytes", "dirty_bytes"} {
		path := "/proc/sys/vm/" + strings.Replace(name, "bytes", "ratio", 1)
		was, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		write(t, "/proc/sys/vm/"+name, strconv.Itoa(1<<30))
		t.Cleanup(func() { write(t, path, strings.TrimSpace(string(was))) })
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), fmt.Sprint(hogging, "=", keep))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	full := make(chan error, 1)
	go func() { _, err := bufio.NewReader(out).ReadString('\n'); full <- err }()
	select {
	case err := <-full:
		if err != nil {
			t.Fatalf("the hog ended before memory was short: %v", err)
		}
	case <-time.After(time.Minute):
		t.Fatal("memory does not become short")
	}
}

// TestMemoryPressure: without swap, and with far less memory than is dirty, the
// kernel has to write to a served device to get memory. It goes on, and its
// server is not killed. Over both kernels every front has its turn.
func TestMemoryPressure(t *testing.T) {
	if swaps, err := os.ReadFile("/proc/swaps"); err != nil || strings.Count(string(swaps), "\n") > 1 {
		t.Fatalf("there is swap: %s (%v)", swaps, err)
	}
	disk := bySerial(t, "vd*", "serial", "large")
	d := program.New(t)
	daemon := d.PID()
	scarce(t, 48<<20)
	wanted := fronts()[:1] // ublk here, the kernel's NBD there: each takes its time under pressure
	if wanted[0] == "nbd" {
		wanted = append(wanted, "loop")
	}
	for _, front := range wanted {
		t.Run(front, func(t *testing.T) {
			node := strings.TrimSpace(d.Run("device", "create", "--backing", disk, "--front", front, "--name", "data"))
			d.FlushersOnly()
			if status := d.Proc("status"); lockedKB(status) == 0 {
				t.Errorf("the server's memory is not locked: %s", status)
			}
			dir := t.TempDir()
			testkit.Run(t, "mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", node)
			testkit.Run(t, "mount", node, dir)
			t.Cleanup(func() { _ = exec.Command("umount", dir).Run() })
			b := &bulk{path: filepath.Join(dir, "bulk")}
			b.finish(t, d)
			testkit.Run(t, "umount", dir)
			testkit.Run(t, "e2fsck", "-fn", node)
			d.Run("device", "rm", "data")
			if d.PID() != daemon || unix.Kill(daemon, 0) != nil {
				t.Error("the server has ended")
			}
		})
	}
	if said := testkit.Run(t, "dmesg"); strings.Contains(said, "Killed process "+strconv.Itoa(daemon)) {
		t.Errorf("the server was killed: %s", said[max(0, len(said)-2000):])
	}
}

func lockedKB(status string) int {
	_, rest, _ := strings.Cut(status, "VmLck:")
	n, _ := strconv.Atoi(append(strings.Fields(rest), "0")[0])
	return n
}

// bulk writes a file through the page cache, then reads it back from the disk.
type bulk struct {
	path string
	done atomic.Int64 // blocks
}

const (
	bulkBlock = 64 << 10
	bulkBytes = 64 << 20
)

func (b *bulk) run() error {
	f, err := os.OpenFile(b.path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	p := make([]byte, bulkBlock)
	for off := int64(0); off < bulkBytes; off += bulkBlock {
		binary.LittleEndian.PutUint64(p, uint64(off)|1)
		if _, err := f.WriteAt(p, off); err != nil {
			return err
		}
		b.done.Add(1)
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return err
	}
	got := make([]byte, bulkBlock)
	for off := int64(0); off < bulkBytes; off += bulkBlock {
		if _, err := f.ReadAt(got, off); err != nil {
			return err
		}
		if binary.LittleEndian.PutUint64(p, uint64(off)|1); !bytes.Equal(got, p) {
			return fmt.Errorf("at %d it reads % x, and % x was written", off, got[:16], p[:16])
		}
		b.done.Add(1)
	}
	return nil
}

// finish fails the test where nothing moves any more.
func (b *bulk) finish(t *testing.T, d *program.Daemon) {
	t.Helper()
	ended := make(chan error, 1)
	go func() { ended <- b.run() }()
	for last := int64(-1); ; {
		select {
		case err := <-ended:
			if err != nil {
				t.Error(err)
			}
			return
		case <-time.After(time.Minute):
			now := b.done.Load()
			if now == last {
				said, _ := exec.Command("sh", "-c", "echo w >/proc/sysrq-trigger; dmesg | tail -150").CombinedOutput()
				t.Fatalf("nothing moves any more after %d blocks, %d bytes available; the kernel: %s\n%s", now, available(), said, d.Log())
			}
			last = now
		}
	}
}
