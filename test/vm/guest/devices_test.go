//go:build guest

package guest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/loop"
	"tidemark/internal/testkit"
)

// Of the disks here, in bytes. What is read and written as a whole is small: the
// processors are emulated.
const (
	size  = 32 << 20
	small = 12 << 20
)

// TestCaptured: what the ring gives is the disk, on every kind of disk.
func TestCaptured(t *testing.T) {
	kinds := map[string]func(testing.TB) string{
		"virtio": virtio, "partition": partition, "scsi": scsi, "nvme": nvme, "paths": paths, "mirror": mirror,
		"linear": func(t testing.TB) string { return linearOf(t, small) }, "striped": striped,
	}
	for name, make := range kinds {
		t.Run(name, func(t *testing.T) {
			w := watch(t, make(t), 16<<20)
			w.write(300, w.whole())
			if gap := w.identical(); gap != 0 {
				t.Errorf("%d bytes of gap on a disk that failed nothing", gap)
			}
		})
	}
}

// The guest's own disks, known by their serial numbers.
func virtio(t testing.TB) string { return bySerial(t, "vd*", "serial", "virtio") }
func nvme(t testing.TB) string   { return bySerial(t, "nvme*", "device/serial", "nvme") }

// paths is an NVMe disk that its driver has put above its one path, without a queue of its own.
func paths(t testing.TB) string { return bySerial(t, "nvme*", "device/serial", "paths") }

func bySerial(t testing.TB, names, attr, serial string) string {
	t.Helper()
	found, _ := filepath.Glob("/sys/block/" + names)
	for _, dir := range found {
		hidden, _ := os.ReadFile(dir + "/hidden")
		if b, _ := os.ReadFile(filepath.Join(dir, attr)); strings.TrimSpace(string(b)) == serial && strings.TrimSpace(string(hidden)) != "1" {
			return "/dev/" + filepath.Base(dir)
		}
	}
	t.Fatalf("the guest has no disk %s with the serial number %s among %v", names, serial, found)
	return ""
}

func partition(t testing.TB) string {
	t.Helper()
	return onePartition(t, virtio(t))
}

// onePartition makes one partition on a disk, until the test ends.
func onePartition(t testing.TB, dev string) string {
	t.Helper()
	input(t, "label: dos\n2048,20480\n", "sfdisk", "--quiet", "--no-reread", "--wipe=never", dev)
	testkit.Run(t, "partx", "--update", dev)
	t.Cleanup(func() { testkit.Run(t, "partx", "--delete", dev); testkit.Run(t, "wipefs", "-qa", dev) })
	if err := loop.WaitNode(dev+"1", 5*time.Second); err != nil {
		t.Fatal(err)
	}
	return dev + "1"
}

func input(t testing.TB, text, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd, err, out)
	}
}

// scsi is a disk of the kernel's SCSI simulator.
func scsi(t testing.TB) string {
	t.Helper()
	testkit.Run(t, "modprobe", "sd_mod")
	testkit.Run(t, "modprobe", "scsi_debug", "dev_size_mb=16", "delay=0")
	t.Cleanup(func() { testkit.Run(t, "rmmod", "scsi_debug") })
	return scsiDisk(t)
}

// scsiDisk waits for the simulator's one disk.
func scsiDisk(t testing.TB) string {
	t.Helper()
	for range 200 {
		if found, _ := filepath.Glob("/sys/bus/pseudo/drivers/scsi_debug/adapter*/host*/target*/*/block/sd*"); len(found) == 1 {
			dev := "/dev/" + filepath.Base(found[0])
			if err := loop.WaitNode(dev, 5*time.Second); err != nil {
				t.Fatal(err)
			}
			return dev
		}
		time.Sleep(50 * time.Millisecond) // the kernel scans in its own time
	}
	t.Fatal("scsi_debug gave no disk")
	return ""
}

func mirror(t testing.TB) string { return mirrorOf(t, small) }

// mirrorOf is the top of an md RAID 1 of two disks of so many bytes.
func mirrorOf(t testing.TB, size int64) string {
	t.Helper()
	testkit.Run(t, "modprobe", "raid1")
	a, b := testkit.NewDisk(t, size), testkit.NewDisk(t, size)
	return arrayOf(t, a.Path, b.Path)
}

func arrayOf(t testing.TB, disks ...string) string {
	t.Helper()
	const dev = "/dev/md77"
	testkit.Run(t, "mdadm", "--create", dev, "--run", "--force", "--quiet", "--metadata=1.2", "--level=1", "--raid-devices=2", "--assume-clean", disks[0], disks[1])
	t.Cleanup(func() { testkit.Run(t, "mdadm", "--stop", "--quiet", dev) })
	return dev
}

// table makes a device-mapper device, until the test ends.
func table(t testing.TB, name, text string) string {
	t.Helper()
	testkit.Need(t, "dm")
	name = fmt.Sprintf("%s-%d", name, os.Getpid())
	input(t, text, "dmsetup", "create", name)
	t.Cleanup(func() { testkit.Run(t, "dmsetup", "remove", "--retry", name) })
	return "/dev/mapper/" + name
}

func linear(t testing.TB) string { return linearOf(t, size) }

// linearOf leads to a part of a disk of so many bytes.
func linearOf(t testing.TB, size int64) string {
	t.Helper()
	d := testkit.NewDisk(t, size)
	return table(t, "linear", fmt.Sprintf("0 %d linear %s 2048\n", size/512-2048, d.Path))
}

func striped(t testing.TB) string {
	t.Helper()
	testkit.Need(t, "dm")
	a, b := testkit.NewDisk(t, small/2), testkit.NewDisk(t, small/2)
	return table(t, "striped", fmt.Sprintf("0 %d striped 2 16 %s 0 %s 0\n", small/512, a.Path, b.Path))
}

// TestFailedWrites: what a disk refused is a gap, and nothing else is.
func TestFailedWrites(t *testing.T) {
	const half = small / 2
	bad := map[string]string{
		"error":  "0 %[2]d linear %[1]s 0\n%[2]d %[2]d error\n",
		"flakey": "0 %[2]d linear %[1]s 0\n%[2]d %[2]d flakey %[1]s %[2]d 0 3600 1 error_writes\n",
	}
	for name, format := range bad {
		t.Run(name, func(t *testing.T) {
			if name == "flakey" {
				testkit.Run(t, "modprobe", "dm-flakey")
			}
			d := testkit.NewDisk(t, small)
			w := watch(t, table(t, name, fmt.Sprintf(format, d.Path, half/512)), 16<<20)
			w.write(100, block.Range{Len: half})
			if gap := w.identical(); gap != 0 || w.failed != 0 {
				t.Errorf("%d writes failed, %d bytes of gap, before any write to the bad half", w.failed, gap)
			}
			w.write(50, block.Range{Off: half, Len: half})
			w.write(50, block.Range{Len: half})
			if gap := w.identical(); gap == 0 || w.failed != 50 {
				t.Errorf("%d of 50 writes failed, %d bytes of gap", w.failed, gap)
			}
			if w.tap.Drops() < uint64(w.failed) {
				t.Errorf("%d failed writes, %d of them counted", w.failed, w.tap.Drops())
			}
		})
	}
}
