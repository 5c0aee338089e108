package bench

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"tidemark/internal/backing"
	"tidemark/internal/block"
	"tidemark/internal/cbt"
	"tidemark/internal/filter/track"
	"tidemark/internal/health"
	"tidemark/internal/loop"
	"tidemark/internal/stack"
	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// Peers are measured in turns, several times over, and what is reported is the
// medians: a machine that is busy with other work is so for all of them.
const (
	turnTime    = "1"
	servedBytes = 256 << 20
)

// peer is one of those that do the same work.
type peer struct {
	name string
	fio  []string // that leads fio to it
	pid  int      // whose processor time counts; 0: nobody's
	uri  string   // of NBD servers
}

// figure is what one peer did: medians.
type figure struct {
	iops float64
	cpu  float64 // microseconds of processor time a request, of the server's
}

// figures are those of several turns.
type figures struct{ iops, cpu []float64 }

// add measures one turn.
func (f *figures) add(b *testing.B, p peer, args []string) {
	b.Helper()
	before := 0.0
	if p.pid != 0 {
		before = processor(b, p.pid)
	}
	l := measured(b, append(slices.Clone(p.fio), args...)...)
	f.iops = append(f.iops, l.IOPS)
	if p.pid != 0 {
		f.cpu = append(f.cpu, 1e6*(processor(b, p.pid)-before)/max(l.Requests, 1))
	}
}

// compare has every peer do the same load in turns.
func compare(b *testing.B, peers []peer, args ...string) map[string]figure {
	b.Helper()
	all := make([]figures, len(peers))
	for range turns {
		for i, p := range peers {
			all[i].add(b, p, args)
		}
	}
	out := map[string]figure{}
	for i, p := range peers {
		out[p.name] = figure{median(all[i].iops), median(all[i].cpu)}
	}
	return out
}

func median(all []float64) float64 {
	if len(all) == 0 {
		return 0
	}
	return slices.Sorted(slices.Values(all))[len(all)/2]
}

type turn struct {
	load
	Requests float64 `json:"total_ios"`
}

// measured is fio, with one job that reads or writes.
func measured(b *testing.B, args ...string) turn {
	b.Helper()
	report := filepath.Join(b.TempDir(), "fio")
	testkit.Run(b, "fio", append([]string{"--name=x", "--output-format=json", "--output=" + report}, args...)...)
	text, err := os.ReadFile(report)
	if err != nil {
		b.Fatal(err)
	}
	var out struct {
		Jobs []struct{ Read, Write turn }
	}
	if err := json.Unmarshal(text[max(0, strings.Index(string(text), "{")):], &out); err != nil || len(out.Jobs) != 1 {
		b.Fatalf("%v in %s", err, text)
	}
	if j := out.Jobs[0]; j.Read.Requests > j.Write.Requests {
		return j.Read
	}
	return out.Jobs[0].Write
}

// filled is a file in memory with data that does not compress.
func filled(b *testing.B, name string) string { return filledOf(b, name, servedBytes) }

func filledOf(b *testing.B, name string, size int64) string {
	b.Helper()
	path := filepath.Join(testkit.MemoryDir(b), name)
	f, err := os.Create(path)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	if _, err := io.CopyN(f, rand.Reader, size); err != nil {
		b.Fatal(err)
	}
	return path
}

// started runs a server until the benchmark ends, and waits until it answers.
func started(b *testing.B, uri string, args ...string) *os.Process {
	b.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	program.Eventually(b, time.Minute, args[0]+" answers", func() error { return exec.Command("nbdinfo", "--size", uri).Run() })
	return cmd.Process
}

func overNBD(uri string) []string {
	return []string{"--ioengine=nbd", "--uri=" + uri, fmt.Sprint("--size=", servedBytes)}
}

// timed are the loads that go on for a while.
var timed = map[string][]string{
	"randread4k-1":   {"--rw=randread", "--bs=4k", "--iodepth=1"},
	"randwrite4k-1":  {"--rw=randwrite", "--bs=4k", "--iodepth=1"},
	"randread4k-32":  {"--rw=randread", "--bs=4k", "--iodepth=32"},
	"randwrite4k-32": {"--rw=randwrite", "--bs=4k", "--iodepth=32"},
	"read1m":         {"--rw=read", "--bs=1m", "--iodepth=4"},
	"write1m":        {"--rw=write", "--bs=1m", "--iodepth=4"},
}

// BenchmarkNBD: our NBD server, with all filters of a device, beside qemu-nbd and nbdkit.
func BenchmarkNBD(b *testing.B) {
	testkit.Need(b, "fio", "nbdclients", "nbdservers")
	d := program.New(b)
	uri := strings.TrimSpace(d.Run("device", "create", "--backing", filled(b, "ours"), "--front", "nbd-server", "--name", "x"))
	q, k := filepath.Join(d.Dir, "qemu.sock"), filepath.Join(d.Dir, "kit.sock")
	qemuURI, kitURI := "nbd+unix:///x?socket="+q, "nbd+unix:///?socket="+k
	qemu := started(b, qemuURI, "qemu-nbd", "-k", q, "-f", "raw", "-x", "x", "-t", "-e", "8", filled(b, "qemu"))
	kit := started(b, kitURI, "nbdkit", "-f", "-U", k, "file", filled(b, "kit"))
	peers := []peer{{"ours", overNBD(uri), d.PID(), uri}, {"qemu", overNBD(qemuURI), qemu.Pid, qemuURI}, {"kit", overNBD(kitURI), kit.Pid, kitURI}}
	for name, args := range timed {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				all := compare(b, peers, append(args, "--time_based", "--runtime="+turnTime)...)
				report(b, all, max(all["qemu"].iops, all["kit"].iops))
			}
		})
	}
	file := filled(b, "file")
	for name, args := range map[string]func(uri string) []string{
		"nbdcopyfrom": func(uri string) []string { return []string{uri, "null:"} },
		"nbdcopyto":   func(uri string) []string { return []string{file, uri} },
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				copies(b, peers, args)
			}
		})
	}
}

// copies has nbdcopy copy a disk from or to every peer in turns.
func copies(b *testing.B, peers []peer, args func(uri string) []string) {
	b.Helper()
	took, cpu := map[string][]float64{}, map[string][]float64{}
	for range 2 * turns { // they are short
		for _, p := range peers {
			before := processor(b, p.pid)
			took[p.name] = append(took[p.name], seconds(func() { testkit.Run(b, "nbdcopy", args(p.uri)...) }))
			cpu[p.name] = append(cpu[p.name], processor(b, p.pid)-before)
		}
	}
	for _, p := range peers {
		b.ReportMetric(servedBytes/1e6/median(took[p.name]), p.name+"-MB/s")
		b.ReportMetric(median(cpu[p.name]), p.name+"-s-cpu")
	}
	b.ReportMetric(min(median(took["qemu"]), median(took["kit"]))/median(took["ours"]), "ours/best")
}

// report tells what each did, and ours against the better one.
func report(b *testing.B, all map[string]figure, best float64) {
	for name, f := range all {
		b.ReportMetric(f.iops, name+"-iops")
		if f.cpu > 0 {
			b.ReportMetric(f.cpu, name+"-µs-cpu")
		}
	}
	b.ReportMetric(all["ours"].iops/best, "ours/best")
}

// BenchmarkLoopFront: a device of the loop front, with all its filters, beside a plain loop device.
func BenchmarkLoopFront(b *testing.B) {
	testkit.Need(b, "fio", "fuse")
	d := program.New(b)
	node := strings.TrimSpace(d.Run("device", "create", "--backing", filled(b, "ours"), "--front", "loop", "--name", "x"))
	b.Cleanup(func() { d.Run("device", "rm", "x") }) // the daemon's death would leave it
	plain, err := loop.Attach(filled(b, "plain"), loop.Options{DirectIO: true})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = plain.Detach(); plain.Close() })
	direct := func(path string) []string {
		return []string{"--filename=" + path, "--ioengine=libaio", "--direct=1", fmt.Sprint("--size=", servedBytes)}
	}
	peers := []peer{{"ours", direct(node), d.PID(), ""}, {"plain", direct(plain.Path), 0, ""}}
	for name, args := range timed {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				all := compare(b, peers, append(args, "--time_based", "--runtime="+turnTime)...)
				report(b, all, all["plain"].iops)
			}
		})
	}
}

// BenchmarkFirstWrite: 4 KiB into each chunk of a device under a snapshot, one
// after the other, beside qemu's copy-before-write; then to the same places for
// a while, when nothing is to be kept any more and what was kept is stored, in
// turns with a device that has no snapshot. qemu 7.2 copies 64 KiB at least:
// beside 4 KiB chunks of ours too each write is the first to one of its own.
func BenchmarkFirstWrite(b *testing.B) {
	testkit.Need(b, "fio", "nbdclients", "nbdservers")
	for _, chunk := range []int{4, 64, 256} {
		b.Run(fmt.Sprint(chunk, "k"), func(b *testing.B) {
			for b.Loop() {
				firstWrites(b, chunk)
			}
		})
	}
}

func firstWrites(b *testing.B, chunk int) {
	d := program.New(b)
	device := func(name string) string {
		return strings.TrimSpace(d.Run("device", "create", "--backing", filled(b, name), "--front", "nbd-server", "--name", name))
	}
	ours, plain := device("ours"), device("plain")
	// One write of 4 KiB to a chunk of either, every one once, in order.
	stride := max(chunk, 64)
	places := []string{"--bs=4k", "--iodepth=1", fmt.Sprintf("--rw=write:%dk", stride-4)}
	once := append(slices.Clone(places), fmt.Sprintf("--io_size=%dk", servedBytes>>10/stride*4))
	awhile := append(slices.Clone(places), "--time_based", "--runtime="+turnTime)
	theirs, storage := filled(b, "qemu"), filepath.Join(testkit.MemoryDir(b), "diff")
	var first, qemuFirst []float64
	var second, bare figures
	for range turns {
		id := strings.TrimSpace(d.Run("snapshot", "create", "--chunk", fmt.Sprint(chunk, "K"), "--storage", storage+":300M", "ours"))
		d.Run("snapshot", "take", id)
		first = append(first, measured(b, append(overNBD(ours), once...)...).IOPS)
		atRest(b, d.PID())
		second.add(b, peer{fio: overNBD(ours), pid: d.PID()}, awhile)
		for range 2 { // neither is always the first
			bare.add(b, peer{fio: overNBD(plain), pid: d.PID()}, awhile)
		}
		second.add(b, peer{fio: overNBD(ours), pid: d.PID()}, awhile)
		d.Run("snapshot", "destroy", id)
		qemu, uri := copyBeforeWrite(b, theirs, stride)
		qemuFirst = append(qemuFirst, measured(b, append(overNBD(uri), once...)...).IOPS)
		_ = qemu.Kill() // it holds a lock on the disk
		_, _ = qemu.Wait()
	}
	b.ReportMetric(median(first), "first-iops")
	b.ReportMetric(median(qemuFirst), "qemu-first-iops")
	b.ReportMetric(median(first)/median(qemuFirst), "first/qemu")
	b.ReportMetric(median(second.iops), "second-iops")
	b.ReportMetric(median(bare.iops), "bare-iops")
	b.ReportMetric(median(second.cpu), "second-µs-cpu")
	b.ReportMetric(median(bare.cpu), "bare-µs-cpu")
	b.ReportMetric(median(ratios(second.iops, bare.iops)), "second/bare")
	b.ReportMetric(median(ratios(second.cpu, bare.cpu)), "second/bare-cpu")
}

// atRest waits until a process has done for a second what it did in the background.
func atRest(b *testing.B, pid int) {
	b.Helper()
	program.Eventually(b, time.Minute, "the daemon rests", func() error {
		before := processor(b, pid)
		time.Sleep(time.Second)
		if did := processor(b, pid) - before; did > 0.03 {
			return fmt.Errorf("it worked for %.2f s of a second", did)
		}
		return nil
	})
}

// ratios are those of each turn with its neighbour: what disturbs one mostly disturbs the other.
func ratios(over, under []float64) []float64 {
	out := make([]float64, len(over))
	for i := range over {
		out[i] = over[i] / under[i]
	}
	return out
}

// copyBeforeWrite is qemu with a file whose old content goes to another before it is overwritten.
func copyBeforeWrite(b *testing.B, disk string, chunk int) (*os.Process, string) {
	b.Helper()
	dir := testkit.MemoryDir(b)
	target, socket := filepath.Join(dir, "target"), filepath.Join(dir, "s")
	testkit.Run(b, "qemu-img", "create", "-q", "-f", "qcow2", "-o", fmt.Sprintf("cluster_size=%dk", chunk), target, fmt.Sprint(servedBytes))
	uri := "nbd+unix:///x?socket=" + socket
	return started(b, uri, "qemu-storage-daemon",
		"--blockdev", "driver=file,node-name=disk,filename="+disk,
		"--blockdev", "driver=file,node-name=storage,filename="+target, "--blockdev", "driver=qcow2,node-name=target,file=storage",
		"--blockdev", "driver=copy-before-write,node-name=cbw,file=disk,target=target",
		"--nbd-server", "addr.type=unix,addr.path="+socket, "--export", "type=nbd,id=e,node-name=cbw,name=x,writable=on"), uri
}

// BenchmarkTrack: writes of 4 KiB to a file in memory through a stack, with and
// without the filter that marks what changed.
func BenchmarkTrack(b *testing.B) {
	dev, err := backing.Open(filled(b, "disk"), backing.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer dev.Close()
	y := stack.New(stack.Config{}, &health.Set{})
	defer y.Close()
	s, err := y.Add("x", dev)
	if err != nil {
		b.Fatal(err)
	}
	m := cbt.New(servedBytes)
	for b.Loop() {
		var bare, tracked []float64
		for range 40 { // short turns: what disturbs one disturbs the next
			bare = append(bare, writes(b, s))
			if _, err := s.Attach(track.Name, track.Altitude, track.Driver(m)); err != nil {
				b.Fatal(err)
			}
			tracked = append(tracked, writes(b, s))
			if err := s.Detach(track.Name); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(1e9*median(bare), "bare-ns")
		b.ReportMetric(1e9*median(tracked), "tracked-ns")
		b.ReportMetric(100*(median(tracked)/median(bare)-1), "%cost")
	}
}

// writes gives the seconds of one write of 4 KiB, the median of many.
func writes(b *testing.B, s block.Device) float64 {
	p := make([]byte, 64<<10)[:4096] // aligned
	var all []float64
	for i := range int64(5000) {
		off := (i * 7919 * 4096) % servedBytes
		all = append(all, seconds(func() {
			if _, err := s.WriteAt(p, off); err != nil {
				b.Fatal(err)
			}
		}))
	}
	return median(all)
}
