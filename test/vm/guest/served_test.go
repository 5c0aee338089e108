//go:build guest

package guest

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"tidemark/internal/front/nbdk"
	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// TestServed: a mounted file system on a served device sees a pause and no error
// when the daemon is killed under load and started again, and when it ends in
// order; the device goes when it is removed, and what is behind it stays.
func TestServed(t *testing.T) {
	for _, module := range []string{"ublk_drv", "nbd"} {
		_ = exec.Command("modprobe", module).Run() // one of them is enough
	}
	front := "nbd"
	if _, err := os.Stat("/dev/ublk-control"); err == nil {
		front = "ublk"
	}
	d := program.New(t)
	image := filepath.Join(d.Dir, "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 96<<20); err != nil {
		t.Fatal(err)
	}
	node := strings.TrimSpace(d.Run("device", "create", "--backing", image, "--front", front, "--name", "data"))
	if node != "/dev/tidemark/data" {
		t.Fatalf("the node is %q", node)
	}
	dir := t.TempDir()
	testkit.Run(t, "mkfs.ext4", "-q", node)
	testkit.Run(t, "mount", node, dir)
	t.Cleanup(func() { _ = exec.Command("umount", dir).Run() })

	fio := startFio(t, dir, 8)
	for range 2 {
		time.Sleep(2 * time.Second)
		d.Kill()
		time.Sleep(500 * time.Millisecond)
		d.Start()
	}
	if _, err := d.Verb("device", "rm", "data"); err == nil {
		t.Error("a mounted device was removed")
	}
	if err := syscall.Kill(d.PID(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second)
	if text := d.Run("status"); !strings.Contains(text, "stop-refused") {
		t.Errorf("it was asked to end while a device is mounted, and says nothing of it: %s", text)
	}
	fio.wait(t, d)
	testkit.Run(t, "umount", dir)
	testkit.Run(t, "e2fsck", "-fn", node)
	if text := d.Run("device", "ls", "--json"); !strings.Contains(text, `"open":false`) {
		t.Errorf("devices: %s", text)
	}
	// In order: the daemon ends, the device waits, the next daemon has it.
	d.Stop()
	d.Start()
	testkit.Run(t, "e2fsck", "-fn", node)
	d.Run("device", "rm", "data")
	if _, err := os.Lstat(node); err == nil {
		t.Errorf("%s is still there", node)
	}
	testkit.Run(t, "e2fsck", "-fn", image)
}

// TestServedPulled: a disk is pulled from under a served device that is mounted and
// snapshotted. Requests fail, the daemon says why and lives on, and the device goes.
func TestServedPulled(t *testing.T) {
	dev := scsi(t)
	d := program.New(t)
	served := strings.TrimSpace(d.Run("device", "create", "--backing", dev, "--name", "pulled"))
	d.FlushersOnly()
	dir := t.TempDir()
	testkit.Run(t, "mkfs.ext4", "-q", served)
	testkit.Run(t, "mount", served, dir)
	t.Cleanup(func() { _ = exec.Command("umount", dir).Run() })
	id := strings.TrimSpace(d.Run("snapshot", "create", "--storage", filepath.Join(d.Dir, "diff")+":16M", "pulled"))
	d.Run("snapshot", "take", id)
	f, err := os.OpenFile(filepath.Join(dir, "file"), os.O_RDWR|os.O_CREATE|syscall.O_DIRECT, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf := aligned(t, 4096)
	if _, err := f.WriteAt(buf, 0); err != nil {
		t.Fatal(err)
	}
	device, err := filepath.EvalSymlinks("/sys/block/" + filepath.Base(dev) + "/device")
	if err != nil {
		t.Fatal(err)
	}
	write(t, device+"/delete", "1")
	program.Eventually(t, time.Minute, "the daemon notices", func() error {
		if text := d.Run("device", "ls", "--json"); !strings.Contains(text, "backing-gone") {
			return fmt.Errorf("it says %s", text)
		}
		return nil
	})
	if _, err := f.WriteAt(buf, 0); err == nil {
		t.Error("a disk that is gone takes writes")
	}
	f.Close()
	testkit.Run(t, "umount", dir)
	d.Run("snapshot", "destroy", id)
	d.Run("device", "rm", "pulled")
	if text := d.Run("device", "ls", "--json"); strings.Contains(text, "pulled") {
		t.Errorf("it is still there: %s", text)
	}
}

// TestServedAfterReboot: after a start of the machine, of which nothing is left but the
// state folder, the device is there again under its name, with what was written.
func TestServedAfterReboot(t *testing.T) {
	module, front := "ublk_drv", "ublk"
	if exec.Command("modprobe", module).Run() != nil { // 6.1
		module, front = "nbd", "nbd"
		testkit.Run(t, "modprobe", module)
	}
	d := program.New(t)
	image := filepath.Join(d.Dir, "image")
	testkit.Run(t, "truncate", "-s", "16M", image)
	node := strings.TrimSpace(d.Run("device", "create", "--backing", image, "--front", front, "--name", "data"))
	testkit.Run(t, "dd", "if=/dev/urandom", "of="+node, "bs=1M", "count=4", "oflag=direct", "conv=fsync", "status=none")
	d.Kill()
	connected, _ := filepath.Glob("/sys/block/nbd*/backend") // which hold the module, as ublk's devices do not
	for _, path := range connected {
		identity, err := os.ReadFile(path)
		if err == nil {
			name, _, _ := strings.Cut(strings.TrimSpace(string(identity)), "#")
			err = nbdk.Forget(t.Context(), name)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	program.Eventually(t, time.Minute, "all devices are gone", func() error {
		out, err := exec.Command("rmmod", module).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	if err := os.RemoveAll("/dev/tidemark"); err != nil {
		t.Fatal(err)
	}
	testkit.Run(t, "modprobe", module)
	d.Start()
	if text := d.Run("device", "ls", "--json"); !strings.Contains(text, `"node":"`+node+`"`) || !strings.Contains(text, `"conditions":[]`) {
		t.Errorf("it is not there again: %s", text)
	}
	testkit.Run(t, "cmp", "-n", "16777216", node, image)
	d.Run("device", "rm", "data")
}

// TestServedLimits: block sizes, what can be discarded, and whether it turns, are the
// disk's own, on every front that the kernel has.
func TestServedLimits(t *testing.T) {
	for _, module := range []string{"ublk_drv", "nbd"} {
		_ = exec.Command("modprobe", module).Run() // 6.1 has no ublk
	}
	testkit.Run(t, "modprobe", "sd_mod")
	testkit.Run(t, "modprobe", "scsi_debug", "dev_size_mb=32", "delay=0", "sector_size=4096", "physblk_exp=1", "lbpu=1", "lbpws=1", "unmap_granularity=4", "unmap_max_blocks=1024")
	t.Cleanup(func() { testkit.Run(t, "rmmod", "scsi_debug") })
	dev := scsiDisk(t)
	limit := func(node, name string) string {
		real, err := filepath.EvalSymlinks(node)
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile("/sys/block/" + filepath.Base(real) + "/queue/" + name)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(b))
	}
	if limit(dev, "logical_block_size") != "4096" || limit(dev, "physical_block_size") != "8192" || limit(dev, "discard_max_bytes") == "0" {
		t.Fatal("the simulated disk is not what this test is about")
	}
	d := program.New(t)
	for _, front := range []string{"ublk", "nbd", "loop"} {
		same := []string{"logical_block_size"}
		switch front {
		case "ublk":
			if _, err := os.Stat("/dev/ublk-control"); err != nil {
				d.Refused(5, "device", "create", "--backing", dev, "--front", front, "--name", front)
				continue
			}
			same = append(same, "physical_block_size", "discard_granularity", "discard_max_bytes", "rotational")
		case "nbd":
			if _, err := os.Stat("/sys/block/nbd0"); err != nil {
				t.Error("the guest has no kernel NBD")
				continue
			}
		}
		node := strings.TrimSpace(d.Run("device", "create", "--backing", dev, "--front", front, "--name", front))
		for _, name := range same {
			if got, want := limit(node, name), limit(dev, name); got != want {
				t.Errorf("%s: %s is %s, of the disk %s", front, name, got, want)
			}
		}
		if limit(node, "discard_max_bytes") == "0" {
			t.Errorf("%s: nothing can be discarded", front)
		}
		testkit.Run(t, "dd", "if=/dev/urandom", "of="+node, "bs=4096", "count=64", "oflag=direct", "status=none")
		testkit.Run(t, "blkdiscard", "-z", "-o", "16384", "-l", "32768", node)
		testkit.Run(t, "blkdiscard", "-o", "65536", "-l", "65536", node)
		testkit.Run(t, "cmp", "-n", "32768", node, "/dev/zero", "-i", "16384:0")
		d.Run("device", "rm", front)
	}
}

// load is fio, which checks what it reads.
type load struct {
	cmd   *exec.Cmd
	out   strings.Builder
	ended chan error
}

func startFio(t *testing.T, dir string, seconds int) *load {
	t.Helper()
	l := &load{ended: make(chan error, 1)}
	l.cmd = exec.Command("fio", "--name=served", "--directory="+dir, "--size=16m", "--rw=randwrite", "--bs=4k", "--iodepth=8", "--ioengine=libaio",
		"--direct=1", "--verify=crc32c", "--verify_fatal=1", "--time_based", "--runtime="+strconv.Itoa(seconds), "--randseed=7")
	l.cmd.Stdout, l.cmd.Stderr = &l.out, &l.out
	if err := l.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { l.ended <- l.cmd.Wait() }()
	t.Cleanup(func() { _ = l.cmd.Process.Kill() })
	return l
}

func (l *load) wait(t *testing.T, d *program.Daemon) {
	t.Helper()
	select {
	case err := <-l.ended:
		if err != nil {
			t.Errorf("fio: %v: %s", err, l.out.String())
		}
	case <-time.After(2 * time.Minute):
		t.Fatalf("fio hangs: %s", d.Run("device", "ls"))
	}
}

// TestSplice: a mounted file system on a mapped device sees no error while a
// served device is put under it, while the daemon is killed, while somebody gives
// the volume another table, and while the served device is taken out again.
func TestSplice(t *testing.T) {
	for _, module := range []string{"ublk_drv", "nbd"} {
		_ = exec.Command("modprobe", module).Run() // one of them is enough
	}
	dev := linear(t)
	name := strings.TrimSpace(testkit.Run(t, "dmsetup", "info", "-c", "--noheadings", "-o", "name", dev))
	original := testkit.Run(t, "dmsetup", "table", name)
	d := program.New(t)
	dir := t.TempDir()
	testkit.Run(t, "mkfs.ext4", "-q", dev)
	testkit.Run(t, "mount", dev, dir)
	t.Cleanup(func() { _ = exec.Command("umount", dir).Run() })
	fio := startFio(t, dir, 10)
	if out := strings.TrimSpace(d.Run("device", "splice", dev, "--name", "data")); out != "data" {
		t.Fatalf("spliced as %q", out)
	}
	table := testkit.Run(t, "dmsetup", "table", name)
	if table == original {
		t.Error("the volume has its old table")
	}
	if text, err := d.Verb("device", "splice", dev, "--name", "again"); err == nil {
		t.Errorf("spliced twice: %s", text)
	}
	if text, err := d.Verb("device", "rm", "data"); err == nil {
		t.Errorf("removed under a volume: %s", text)
	}
	time.Sleep(2 * time.Second)
	d.Kill()
	time.Sleep(500 * time.Millisecond)
	d.Start()
	if now := testkit.Run(t, "dmsetup", "table", name); now != table {
		t.Errorf("after a kill the table is %s, and was %s", now, table)
	}
	before := generation(t, d)
	input(t, original, "dmsetup", "reload", name)
	testkit.Run(t, "dmsetup", "resume", name)
	deadline := time.Now().Add(time.Minute)
	for !strings.Contains(d.Run("device", "ls"), "splice-replaced") {
		if time.Now().After(deadline) {
			t.Fatalf("nobody noticed that the volume has another table: %s", d.Run("device", "ls"))
		}
		time.Sleep(200 * time.Millisecond)
	}
	if now := generation(t, d); now == before {
		t.Error("the generation goes on though writes went past the map")
	}
	d.Run("device", "unsplice", "data")
	if now := testkit.Run(t, "dmsetup", "table", name); now != original {
		t.Errorf("afterwards the table is %s, and was %s", now, original)
	}
	fio.wait(t, d)
	testkit.Run(t, "umount", dir)
	testkit.Run(t, "e2fsck", "-fn", dev)
	if left := testkit.Run(t, "dmsetup", "ls"); strings.Contains(left, "tidemark") {
		t.Errorf("left behind: %s", left)
	}
}

func generation(t *testing.T, d *program.Daemon) string {
	t.Helper()
	var maps []struct{ Generation string }
	if err := json.Unmarshal([]byte(d.Run("cbt", "ls", "--json")), &maps); err != nil || len(maps) != 1 {
		t.Fatalf("change maps: %+v (%v)", maps, err)
	}
	return maps[0].Generation
}
