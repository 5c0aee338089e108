// Package testkit is what the tests of all packages share: the only way to
// skip (Need), real disks that clean up after themselves, and file systems on them.
package testkit

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"
)

// probes say why a feature is not there; nil means that it is.
var probes = map[string]func() error{
	"root": func() error {
		if os.Geteuid() != 0 {
			return errors.New("not root")
		}
		return nil
	},
	"tap":   probeTap,
	"loop":  probeLoop,
	"fuse":  func() error { return access("/dev/fuse") },
	"ext4":  tool("mkfs.ext4"),
	"xfs":   tool("mkfs.xfs"),
	"btrfs": tool("mkfs.btrfs"),
	"fio":   tool("fio"),
}

var probed sync.Map

// Need skips the test where the machine lacks a feature, saying why; where
// TIDEMARK_REQUIRE names the feature it fails instead. TIDEMARK_SKIPS names a
// file that collects what was skipped.
func Need(t testing.TB, wanted ...string) {
	t.Helper()
	for _, f := range wanted {
		probe, ok := probes[f]
		if !ok {
			t.Fatalf("testkit: no probe for %q", f)
		}
		v, ok := probed.Load(f)
		if !ok {
			v, _ = probed.LoadOrStore(f, errBox{probe()})
		}
		err := v.(errBox).error
		if err == nil {
			continue
		}
		if slices.Contains(strings.Split(os.Getenv("TIDEMARK_REQUIRE"), ","), f) {
			t.Fatalf("%s is required and missing: %v", f, err)
		}
		record(t, f, err)
		t.Skipf("needs %s: %v", f, err)
	}
}

type errBox struct{ error }

func record(t testing.TB, feature string, why error) {
	path := os.Getenv("TIDEMARK_SKIPS")
	if path == "" {
		return
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Errorf("recording a skip: %v", err)
		return
	}
	defer f.Close()
	fmt.Fprintf(f, "%s: %s: %v\n", t.Name(), feature, why)
}

func access(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

func tool(name string) func() error {
	return func() error {
		_, err := exec.LookPath(name)
		return err
	}
}

func probeLoop() error {
	if err := access("/dev/loop-control"); err != nil {
		return err
	}
	return tool("losetup")()
}

func probeTap() error {
	if _, err := btf.LoadKernelSpec(); err != nil {
		return fmt.Errorf("kernel type information: %w", err)
	}
	if err := errors.Join(rlimit.RemoveMemlock(), features.HaveMapType(ebpf.RingBuf), features.HaveProgramType(ebpf.Syscall)); err != nil {
		return err
	}
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.Tracing, AttachType: ebpf.AttachTraceRawTp, AttachTo: "block_bio_queue", License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	if err != nil {
		return fmt.Errorf("a program on the block layer's tracepoints: %w", err)
	}
	return p.Close()
}

// Disk is a loop device over a sparse file.
type Disk struct {
	Path string // /dev/loopN
	File string
	Size int64
}

// prefix marks our backing files; the owner's process id follows it.
const prefix = "tidemark-test-"

var sweep sync.Once

// NewDisk gives a loop device of a size in bytes, detached when the test ends.
// Devices that a killed test run left behind are detached first.
func NewDisk(t testing.TB, size int64) *Disk {
	t.Helper()
	Need(t, "root", "loop")
	sweep.Do(func() { sweepLeftovers(t) })
	dir := t.TempDir()
	if st, err := os.Stat("/dev/shm"); err == nil && st.IsDir() {
		var err error
		if dir, err = os.MkdirTemp("/dev/shm", fmt.Sprintf("%s%d-", prefix, os.Getpid())); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
	}
	d := &Disk{File: filepath.Join(dir, "disk"), Size: size}
	f, err := os.Create(d.File)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		t.Fatal(err)
	}
	d.Path = strings.TrimSpace(Run(t, "losetup", "-P", "--show", "-f", d.File))
	t.Cleanup(func() { Run(t, "losetup", "-d", d.Path) })
	return d
}

func sweepLeftovers(t testing.TB) {
	dirs, _ := filepath.Glob("/dev/shm/" + prefix + "*")
	for _, dir := range dirs {
		var pid int
		if _, err := fmt.Sscanf(filepath.Base(dir), prefix+"%d-", &pid); err != nil || unix.Kill(pid, 0) == nil {
			continue
		}
		out := Run(t, "losetup", "-n", "-O", "NAME", "-j", filepath.Join(dir, "disk"))
		for _, dev := range strings.Fields(out) {
			_ = exec.Command("umount", "-A", dev).Run() // often not mounted
			Run(t, "losetup", "-d", dev)
		}
		os.RemoveAll(dir)
	}
}

// Run runs a command and gives its standard output; a failure ends the test.
func Run(t testing.TB, name string, args ...string) string {
	t.Helper()
	var stderr strings.Builder
	cmd := exec.Command(name, args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, stderr.String())
	}
	return string(out)
}

// Mkfs makes a file system on a device.
func Mkfs(t testing.TB, dev, fstype string) {
	t.Helper()
	Need(t, fstype)
	args := map[string][]string{"ext4": {"-q", "-F"}, "xfs": {"-q", "-f"}, "btrfs": {"-q", "-f"}}[fstype]
	Run(t, "mkfs."+fstype, append(args, dev)...)
}

// Mount mounts a device until the test ends, and gives the folder.
func Mount(t testing.TB, dev string, options ...string) string {
	t.Helper()
	dir := t.TempDir()
	args := []string{dev, dir}
	if len(options) > 0 {
		args = append([]string{"-o", strings.Join(options, ",")}, args...)
	}
	Run(t, "mount", args...)
	t.Cleanup(func() { Unmount(t, dir) })
	return dir
}

// Unmount unmounts a folder; one that is not mounted is left as it is.
func Unmount(t testing.TB, dir string) {
	t.Helper()
	if err := unix.Unmount(dir, 0); err != nil && !errors.Is(err, unix.EINVAL) {
		t.Errorf("umount %s: %v", dir, err)
	}
}
