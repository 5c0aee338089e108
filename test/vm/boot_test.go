package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
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
}

// results is what a guest left in the folder that it shares with the host.
type results struct {
	dir     string
	console string
}

// boot runs a guest to its end. It fails the test, with the console, where the
// guest did not reach its script; a guest that ended later is looked at by its results.
func (g *guest) boot(t *testing.T) *results {
	t.Helper()
	kernel, err := output(t, "./kernel.sh", g.suite)
	if err != nil {
		testkit.Lack(t, "vm", err)
	}
	dir := t.TempDir()
	res := &results{dir: filepath.Join(dir, "results"), console: filepath.Join(dir, "console")}
	initramfs, disks := filepath.Join(dir, "initramfs"), []string{filepath.Join(dir, "virtio"), filepath.Join(dir, "nvme"), filepath.Join(dir, "paths")}
	if _, err := output(t, "./initramfs.sh", kernel, initramfs); err != nil {
		t.Fatalf("initramfs: %v", err)
	}
	if err := os.Mkdir(res.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, d := range disks {
		if err := errors.Join(os.WriteFile(d, nil, 0o600), os.Truncate(d, diskSize)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range g.jobs {
		g.jobs[i].build(t, dir, i)
	}
	program := filepath.Join(dir, "tidemark")
	goTool(t, "build", "-o", program, "./cmd/tidemark")
	script := g.script(kernel, program)
	if err := os.WriteFile(filepath.Join(res.dir, "run.sh"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	err = g.qemu(t.Context(), kernel, initramfs, disks, res)
	t.Logf("%s: ran for %v", filepath.Base(kernel), time.Since(begun).Round(time.Second))
	if _, stat := os.Stat(filepath.Join(res.dir, "booted")); stat != nil {
		t.Fatalf("the guest did not boot: %v; its console:\n%s", err, res.tail())
	}
	if _, stat := os.Stat(filepath.Join(res.dir, "finished")); stat != nil {
		t.Errorf("the guest did not finish: %v; its console:\n%s", err, res.tail())
	}
	return res
}

const diskSize = 48 << 20 // of each disk that QEMU has, bytes

// qemu is emulation only: where nested virtualisation is offered, guests may hang in it.
func (g *guest) qemu(ctx context.Context, kernel, initramfs string, disks []string, res *results) error {
	ctx, cancel := context.WithTimeoutCause(ctx, g.timeout, fmt.Errorf("killed after %v", g.timeout))
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-M", "q35", "-smp", "2", "-m", "3072",
		"-nodefaults", "-display", "none", "-no-reboot", "-serial", "file:"+res.console,
		"-kernel", filepath.Join(kernel, "vmlinuz"), "-initrd", initramfs, "-append", "console=ttyS0 panic=-1 oops=panic loglevel=5",
		"-virtfs", "local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap",
		"-virtfs", "local,path="+res.dir+",mount_tag=results,security_model=none,multidevs=remap",
		"-device", "virtio-blk-pci,drive=virtio,serial=virtio", "-device", "nvme,drive=nvme,serial=nvme",
		"-device", "nvme-subsys,id=subsystem,nqn=paths", "-device", "nvme,id=path,serial=paths,subsys=subsystem", "-device", "nvme-ns,drive=paths,bus=path")
	for _, d := range disks {
		cmd.Args = append(cmd.Args, "-drive", "if=none,format=raw,cache=unsafe,discard=unmap,id="+filepath.Base(d)+",file="+d)
	}
	cmd.WaitDelay = 5 * time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // also where the test is killed
	runtime.LockOSThread()                                             // the signal is sent when the starting thread ends
	defer runtime.UnlockOSThread()
	out, err := cmd.CombinedOutput()
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
func output(t *testing.T, name string, args ...string) (string, error) {
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
