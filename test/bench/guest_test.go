//go:build guest

package bench

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tidemark/internal/loop"
	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// What only a kernel with ublk, NBD and device-mapper can run, in the virtual
// machine. Its processors are emulated: no figure means anything but against
// another of the same run.

const (
	turns      = 3
	guestBytes = 64 << 20 // of the devices
)

// plainLoop is a loop device over a file in memory.
func plainLoop(b *testing.B, name string) string {
	b.Helper()
	dev, err := loop.Attach(filledOf(b, name, guestBytes), loop.Options{DirectIO: true})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = dev.Detach(); dev.Close() })
	return dev.Path
}

// mapped is a device of the kernel's device-mapper, until the benchmark ends.
func mapped(b *testing.B, name, table string) string {
	b.Helper()
	cmd := exec.Command("dmsetup", "create", name)
	cmd.Stdin = strings.NewReader(table)
	if out, err := cmd.CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	b.Cleanup(func() { testkit.Run(b, "dmsetup", "remove", "--retry", name) })
	return "/dev/mapper/" + name
}

// servedAt is a device of ours over a loop device.
func servedAt(b *testing.B, d *program.Daemon, name, front string) string {
	b.Helper()
	node := strings.TrimSpace(d.Run("device", "create", "--backing", plainLoop(b, name), "--front", front, "--name", name))
	b.Cleanup(func() { d.Run("device", "rm", name) })
	return node
}

func directly(path string) []string {
	return []string{"--filename=" + path, "--ioengine=libaio", "--direct=1", fmt.Sprint("--size=", guestBytes)}
}

// BenchmarkGuestFronts: a device of each front, with all filters, beside the kernel's own NBD
// client with qemu-nbd, and beside a linear target of device-mapper, all over loop devices.
func BenchmarkGuestFronts(b *testing.B) {
	testkit.Need(b, "fio", "dm", "nbd", "ublk", "nbdservers")
	d := program.New(b)
	const qemu = "/dev/nbd15"
	testkit.Run(b, "qemu-nbd", "-c", qemu, "-f", "raw", "--cache=none", "--aio=native", plainLoop(b, "qemu"))
	b.Cleanup(func() { testkit.Run(b, "qemu-nbd", "-d", qemu) })
	linear := mapped(b, "bench-linear", fmt.Sprintf("0 %d linear %s 0\n", guestBytes/512, plainLoop(b, "linear")))
	peers := []peer{{name: "ublk", fio: directly(servedAt(b, d, "u", "ublk"))}, {name: "nbd", fio: directly(servedAt(b, d, "n", "nbd"))},
		{name: "qemu-nbd", fio: directly(qemu)}, {name: "linear", fio: directly(linear)}}
	for name, args := range timed {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				all := compare(b, peers, append(args, "--time_based", "--runtime="+turnTime)...)
				for _, p := range peers {
					b.ReportMetric(all[p.name].iops, p.name+"-iops")
				}
				b.ReportMetric(all["ublk"].iops/all["nbd"].iops, "ublk/nbd")
				b.ReportMetric(all["ublk"].iops/all["linear"].iops, "ublk/linear")
				b.ReportMetric(all["nbd"].iops/all["qemu-nbd"].iops, "nbd/qemu-nbd")
			}
		})
	}
}

// BenchmarkGuestFirstWrite: what a snapshot costs the first write of 4 KiB to each
// chunk, and the second, against the same device without one: ours (ublk), and dm-snapshot.
func BenchmarkGuestFirstWrite(b *testing.B) {
	testkit.Need(b, "fio", "dm", "ublk")
	testkit.Run(b, "modprobe", "dm-snapshot")
	for _, chunk := range []int{4, 64, 256} {
		b.Run(fmt.Sprint(chunk, "k"), func(b *testing.B) {
			for b.Loop() {
				guestFirstWrites(b, chunk)
			}
		})
	}
}

func guestFirstWrites(b *testing.B, chunk int) {
	d := program.New(b)
	ours, storage := servedAt(b, d, "x", "ublk"), filepath.Join(testkit.MemoryDir(b), "diff")
	theirs := mapped(b, "bench-origin", fmt.Sprintf("0 %d linear %s 0\n", guestBytes/512, plainLoop(b, "origin")))
	store := plainLoop(b, "store")
	// One write of 4 KiB to a chunk, every one once, in order, not too many, and
	// not so many that the kept chunks fill the store of dm-snapshot.
	count := min(guestBytes>>10/chunk*3/4, 512)
	pass := []string{"--bs=4k", "--iodepth=1", fmt.Sprintf("--rw=write:%dk", chunk-4), fmt.Sprintf("--io_size=%dk", count*4)}
	if chunk == 4 {
		pass[2] = "--rw=write"
	}
	got := map[string][]float64{}
	once := func(name, path string) {
		b.Helper()
		got[name] = append(got[name], measured(b, append(directly(path), pass...)...).IOPS)
	}
	for range turns {
		once("bare", ours)
		id := strings.TrimSpace(d.Run("snapshot", "create", "--chunk", fmt.Sprint(chunk, "K"), "--storage", storage+":100M", "x"))
		d.Run("snapshot", "take", id)
		once("first", ours)
		once("second", ours)
		d.Run("snapshot", "destroy", id)

		once("dm-bare", theirs)
		dmSnapshot(b, theirs, store, chunk, func(origin string) {
			once("dm-first", origin)
			once("dm-second", origin)
		})
	}
	bare, theirBare := median(got["bare"]), median(got["dm-bare"])
	b.ReportMetric(bare/median(got["first"]), "first-costs")
	b.ReportMetric(bare/median(got["second"]), "second-costs")
	b.ReportMetric(theirBare/median(got["dm-first"]), "dm-first-costs")
	b.ReportMetric(theirBare/median(got["dm-second"]), "dm-second-costs")
	b.ReportMetric(median(got["first"])/median(got["dm-first"]), "first/dm-first")
	b.ReportMetric(bare/theirBare, "bare/dm-bare")
}

// dmSnapshot has a persistent snapshot of device-mapper over a device meanwhile.
func dmSnapshot(b *testing.B, disk, store string, chunk int, meanwhile func(origin string)) {
	b.Helper()
	remove := func(name string) {
		testkit.Run(b, "dmsetup", "remove", "--retry", name)
	}
	create := func(name, table string) {
		b.Helper()
		cmd := exec.Command("dmsetup", "create", name)
		cmd.Stdin = strings.NewReader(table)
		if out, err := cmd.CombinedOutput(); err != nil {
			b.Fatalf("%v: %s", err, out)
		}
	}
	testkit.Run(b, "dd", "if=/dev/zero", "of="+store, "bs=64k", "count=1", "conv=fsync", "status=none") // a store without a header is new
	create("bench-snapshot-origin", fmt.Sprintf("0 %d snapshot-origin %s\n", guestBytes/512, disk))
	defer remove("bench-snapshot-origin")
	create("bench-snapshot", fmt.Sprintf("0 %d snapshot %s %s P %d\n", guestBytes/512, disk, store, chunk*2))
	defer remove("bench-snapshot")
	if err := loop.WaitNode("/dev/mapper/bench-snapshot-origin", 5*time.Second); err != nil {
		b.Fatal(err)
	}
	meanwhile("/dev/mapper/bench-snapshot-origin")
}
