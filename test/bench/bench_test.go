package bench

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

const diskSize = 1 << 30

// load is what fio reports of a run.
type load struct {
	IOPS float64 `json:"iops"`
	BW   float64 `json:"bw_bytes"`
}

// fio writes to a disk for some seconds.
func fio(b *testing.B, dev string, args ...string) load {
	b.Helper()
	args = append([]string{"--name=x", "--filename=" + dev, "--direct=1", "--ioengine=libaio", "--iodepth=16", "--time_based",
		"--runtime=6", "--refill_buffers", "--output-format=json"}, args...)
	var out struct {
		Jobs []struct {
			Write load `json:"write"`
		} `json:"jobs"`
	}
	text := testkit.Run(b, "fio", args...)
	if err := json.Unmarshal([]byte(text), &out); err != nil || len(out.Jobs) != 1 {
		b.Fatalf("%v in %s", err, text)
	}
	return out.Jobs[0].Write
}

// randomDisk is a disk whose first half holds data that does not compress.
func randomDisk(b *testing.B, size int64) *testkit.Disk {
	b.Helper()
	d := testkit.NewDisk(b, size)
	f, err := os.OpenFile(d.Path, os.O_WRONLY, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	if _, err := io.CopyN(f, rand.Reader, size/2); err != nil {
		b.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		b.Fatal(err)
	}
	return d
}

// seconds is how long a call takes.
func seconds(call func()) float64 {
	start := time.Now()
	call()
	return time.Since(start).Seconds()
}

// BenchmarkTap: a loop device on tmpfs as fast as it goes, without and with protection.
func BenchmarkTap(b *testing.B) {
	testkit.Need(b, "fio")
	for name, args := range map[string][]string{
		"rand4k":  {"--rw=randwrite", "--bs=4k", "--size=1G"},
		"seq128k": {"--rw=write", "--bs=128k", "--size=1G"},
		"sync4k":  {"--rw=randwrite", "--bs=4k", "--size=1G", "--iodepth=1"},
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				disk := testkit.NewDisk(b, diskSize)
				fio(b, disk.Path, args...) // the backing file's pages exist from here on
				bare := fio(b, disk.Path, args...)
				d := program.New(b)
				d.Protect("g", disk.Path)
				with := fio(b, disk.Path, args...)
				g := d.Group("g")
				b.ReportMetric(bare.IOPS, "bare-iops")
				b.ReportMetric(with.IOPS, "tapped-iops")
				b.ReportMetric(with.IOPS/bare.IOPS, "ratio")
				b.ReportMetric(100*float64(g.Disks[0].Lost)/(6*with.IOPS), "%lost-payload")
				d.Run("unprotect", "g")
			}
		})
	}
}

// BenchmarkDrain: writes at a fixed rate, from the ring to the durable vault.
func BenchmarkDrain(b *testing.B) {
	testkit.Need(b, "fio")
	for name, args := range map[string][]string{
		"40000x4k": {"--rw=randwrite", "--bs=4k", "--size=1G", "--rate_iops=40000"},
		"300MB/s":  {"--rw=randwrite", "--bs=128k", "--size=1G", "--rate=300m"},
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				disk := testkit.NewDisk(b, diskSize)
				d := program.New(b)
				d.Protect("g", disk.Path)
				cpu := processor(b, d.PID())
				var l load
				total := seconds(func() {
					l = fio(b, disk.Path, args...)
					d.Settle("g")
				})
				b.ReportMetric(l.BW/1e6, "MB/s")
				b.ReportMetric(l.IOPS, "iops")
				b.ReportMetric(total-6, "s-until-durable")
				b.ReportMetric((processor(b, d.PID())-cpu)/total, "processors")
				b.ReportMetric(float64(d.Group("g").Disks[0].Lost), "lost-payload")
				d.Run("unprotect", "g")
			}
		})
	}
}

// processor is the processor time of a process in seconds.
func processor(b *testing.B, pid int) float64 {
	b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	f := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	user, _ := strconv.ParseFloat(f[11], 64)
	system, _ := strconv.ParseFloat(f[12], 64)
	return (user + system) / 100
}

// BenchmarkCopy: the first copy of a disk, and its restore, beside dd and qemu-img.
func BenchmarkCopy(b *testing.B) {
	testkit.Need(b, "nbdclients")
	for b.Loop() {
		disk := randomDisk(b, diskSize)
		d := program.New(b)
		file := filepath.Join(d.Dir, "copy")
		dd := seconds(func() { testkit.Run(b, "dd", "if="+disk.Path, "of="+file, "bs=1M", "conv=sparse,fsync", "status=none") })
		os.Remove(file)
		qemu := seconds(func() {
			testkit.Run(b, "qemu-img", "convert", "-f", "raw", "-O", "raw", disk.Path, file)
			testkit.Run(b, "sync", file)
		})
		os.Remove(file)
		first := seconds(func() { d.Protect("g", "--fill-rate", "16G", disk.Path) })
		restore := seconds(func() { d.Restored("g", "", "latest") })
		b.ReportMetric(dd, "s-dd")
		b.ReportMetric(qemu, "s-qemu-img")
		b.ReportMetric(first, "s-first-copy")
		b.ReportMetric(restore, "s-restore")
		b.ReportMetric(first/min(dd, qemu), "first-copy/best")
		b.ReportMetric(restore/min(dd, qemu), "restore/best")
		d.Run("unprotect", "g")
	}
}

// BenchmarkMemory: what a daemon holds that protects 1 TiB, besides ring and maps.
func BenchmarkMemory(b *testing.B) {
	for b.Loop() {
		disk := testkit.NewDisk(b, 1<<40)
		d := program.New(b)
		d.Run("protect", "--vault", d.Vault, "--name", "big", "--fill-rate", "16G", disk.Path)
		var most float64
		for range 30 {
			most = max(most, anonymous(b, d.PID()))
			time.Sleep(time.Second)
		}
		b.ReportMetric(most/1e6, "MB")
		d.Kill() // the copy of 1 TiB would go on for long
	}
}

// anonymous is the memory of a process that is its own, in bytes: ring and maps are the kernel's.
func anonymous(b *testing.B, pid int) float64 {
	b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Fatal(err)
	}
	_, after, _ := strings.Cut(string(text), "RssAnon:")
	kib, err := strconv.ParseFloat(strings.Fields(after)[0], 64)
	if err != nil {
		b.Fatal(err)
	}
	return kib * 1024
}
