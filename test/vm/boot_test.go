package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"tidemark/internal/testkit"
)

// guest is one virtual machine: a kernel, and what runs on it.
type guest struct {
	suite   string // Debian suite whose newest kernel it boots
	jobs    []job
	timeout time.Duration // from power-on to power-off
	drives  []string      // disks besides its own: an NBD URI each, whose export's name is the serial number
}

// machine is what a guest is started from; it is made once, also for several starts.
type machine struct {
	dir, kernel, initramfs, program string
}

// results is what a guest left in the folder that it shares with the host.
type results struct {
	dir     string
	console string
	busy    time.Duration // time of this machine's processors that the emulator took
}

// boots is how often a guest is begun that its emulator crashes (emulated).
const boots = 3

// boot runs a guest to its end. It fails the test, with the console, where the
// guest did not reach its script; a guest that ended later is looked at by its results.
func (g *guest) boot(t testing.TB) *results {
	t.Helper()
	m := g.prepare(t)
	for try := 1; ; try++ {
		res, err := g.run(t.Context(), t, m, strconv.Itoa(try))
		switch {
		case res.has("finished"):
			return res
		case try < boots && res.emulated():
			t.Logf("the emulator crashed the kernel; once more. %v; the console:\n%s", err, res.tail())
			continue
		case !res.has("booted"):
			t.Fatalf("the guest did not boot: %v; its console:\n%s", err, res.tail())
		}
		t.Errorf("the guest did not finish: %v; its console:\n%s", err, res.tail())
		return res
	}
}

// prepare fetches the kernel, and builds what runs on it.
func (g *guest) prepare(t testing.TB) machine {
	t.Helper()
	kernel, err := output(t, "./kernel.sh", g.suite)
	if err != nil && g.suite == debianNewest {
		testkit.Lack(t, "vm-newest", err) // it moves, and must not stop everything when it stumbles
	}
	if err != nil {
		testkit.Lack(t, "vm", err)
	}
	dir := t.TempDir()
	initramfs := filepath.Join(dir, "initramfs")
	if _, err := output(t, "./initramfs.sh", kernel, initramfs); err != nil {
		t.Fatalf("initramfs: %v", err)
	}
	for i := range g.jobs {
		g.jobs[i].build(t, i)
	}
	return machine{dir, kernel, initramfs, binaries.get(t, "tidemark", "build", "./cmd/tidemark")}
}

// run is one start of the guest, with new disks of its own, in a folder of this
// name. What ends ctx cuts its power.
func (g *guest) run(ctx context.Context, t testing.TB, m machine, name string) (*results, error) {
	t.Helper()
	dir := filepath.Join(m.dir, name)
	res := &results{dir: filepath.Join(dir, "results"), console: filepath.Join(dir, "console")}
	disks := []string{filepath.Join(dir, "virtio"), filepath.Join(dir, "nvme"), filepath.Join(dir, "paths"), filepath.Join(dir, "large")}
	if err := os.MkdirAll(res.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, d := range disks {
		size := int64(diskSize)
		if filepath.Base(d) == "large" {
			size = largeSize
		}
		if err := errors.Join(os.WriteFile(d, nil, 0o600), os.Truncate(d, size)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(res.dir, "run.sh"), []byte(g.script(m.kernel, m.program)), 0o755); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	err := g.qemu(ctx, m, disks, res)
	t.Logf("%s: ran for %v, of which its processors were busy for %v", filepath.Base(m.kernel), time.Since(begun).Round(time.Second), res.busy.Round(time.Second))
	return res, err
}

// has says whether the guest came to a place of its script.
func (r *results) has(mark string) bool {
	_, err := os.Stat(filepath.Join(r.dir, mark))
	return err == nil
}

// emulated says whether the kernel died of its emulator, and of nothing that we
// could do to it: processors that QEMU emulates side by side may see half of an
// instruction that the kernel patches into itself on another one.
func (r *results) emulated() bool {
	b, _ := os.ReadFile(r.console)
	return strings.Contains(string(b), "Oops: int3: ") || strings.Contains(string(b), "int3: 0000 [#1]")
}

// Of the disks that QEMU has, in bytes.
const (
	diskSize  = 16 << 20
	largeSize = 256 << 20
)

// qemu is emulation only: where nested virtualisation is offered, guests may hang in it.
func (g *guest) qemu(ctx context.Context, m machine, disks []string, res *results) error {
	ctx, cancel := context.WithTimeoutCause(ctx, g.timeout, fmt.Errorf("killed after %v", g.timeout))
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-M", "q35", "-smp", "2", "-m", "3072",
		"-nodefaults", "-display", "none", "-no-reboot", "-serial", "file:"+res.console,
		"-kernel", filepath.Join(m.kernel, "vmlinuz"), "-initrd", m.initramfs, "-append", "console=ttyS0 panic=-1 oops=panic loglevel=5",
		"-virtfs", "local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap",
		"-virtfs", "local,path="+res.dir+",mount_tag=results,security_model=none,multidevs=remap",
		"-device", "virtio-blk-pci,drive=virtio,serial=virtio", "-device", "virtio-blk-pci,drive=large,serial=large", "-device", "nvme,drive=nvme,serial=nvme",
		"-device", "nvme-subsys,id=subsystem,nqn=paths", "-device", "nvme,id=path,serial=paths,subsys=subsystem", "-device", "nvme-ns,drive=paths,bus=path")
	for _, d := range disks {
		cmd.Args = append(cmd.Args, "-drive", "if=none,format=raw,cache=unsafe,discard=unmap,id="+filepath.Base(d)+",file="+d)
	}
	for i, uri := range g.drives { // with a cache that only a flush empties
		_, serial, _ := strings.Cut(uri, ":///")
		serial, _, _ = strings.Cut(serial, "?")
		cmd.Args = append(cmd.Args, "-drive", fmt.Sprintf("if=none,format=raw,cache=none,id=drive%d,file=%s", i, uri),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=drive%d,serial=%s", i, serial))
	}
	cmd.WaitDelay = 5 * time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // also where the test is killed
	runtime.LockOSThread()                                             // the signal is sent when the starting thread ends
	defer runtime.UnlockOSThread()
	out, err := cmd.CombinedOutput()
	if p := cmd.ProcessState; p != nil {
		res.busy = p.UserTime() + p.SystemTime()
	}
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	if err != nil {
		return fmt.Errorf("qemu: %w: %s", err, out)
	}
	return nil
}

// tail is the console's end.
func (r *results) tail() string {
	b, _ := os.ReadFile(r.console)
	lines := strings.Split(strings.ReplaceAll(string(b), "\r", ""), "\n")
	return strings.Join(lines[max(0, len(lines)-60):], "\n")
}

// output runs a script and gives the last line that it printed.
func output(t testing.TB, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(t.Context(), name, args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, stderr.String())
	}
	if stderr.Len() > 0 {
		t.Log(strings.TrimSpace(stderr.String()))
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return lines[len(lines)-1], nil
}
