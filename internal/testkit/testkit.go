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
	"loop":  func() error { return access("/dev/loop-control") },
	"fuse":  func() error { return access("/dev/fuse") },
	"tmpfs": probeShm,
	"ext4":  tool("mkfs.ext4"),
	"xfs":   tool("mkfs.xfs"),
	"btrfs": tool("mkfs.btrfs"),
	"fio":   tool("fio"),
	"gcc":   tool("gcc"),

	"sqlite3":    tool("sqlite3"),
	"nbdservers": tool("qemu-nbd", "nbdkit", "qemu-storage-daemon"),
	"nbdclients": tool("nbdinfo", "nbdcopy", "qemu-img", "qemu-io"),
	"vm":         tool("qemu-system-x86_64"),
	"lvm":        tool("lvm"),
	"dm":         func() error { return access("/dev/mapper/control") },
	"nbd":        func() error { _, err := os.Stat("/sys/module/nbd"); return err }, // the kernel's own client
	"ublk":       func() error { return access("/dev/ublk-control") },
	"uring":      probeURing,
	"cuse":       func() error { return access("/dev/cuse") },
	"ioflusher": func() error { // PR_SET_IO_FLUSHER: needs CAP_SYS_RESOURCE, which containers often lack
		_, err := unix.PrctlRetInt(unix.PR_GET_IO_FLUSHER, 0, 0, 0, 0)
		return err
	},
}

var probed sync.Map

// Need skips the test where the machine lacks a feature, saying why; where
// TIDEMARK_REQUIRE names the feature it fails instead. TIDEMARK_SKIPS names a
// file that collects what was skipped, a line "feature: reason: folder test" each.
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
		if err := v.(errBox).error; err != nil {
			Lack(t, f, err)
		}
	}
}

// Lack is Need for a feature that the test itself found missing.
func Lack(t testing.TB, feature string, why error) {
	t.Helper()
	if slices.Contains(strings.Split(os.Getenv("TIDEMARK_REQUIRE"), ","), feature) {
		t.Fatalf("%s is required and missing: %v", feature, why)
	}
	record(t, feature, why)
	t.Skipf("needs %s: %v", feature, why)
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
	reason := strings.Join(strings.Fields(why.Error()), " ") // one line
	fmt.Fprintf(f, "%s: %s: %s %s\n", feature, reason, folder(), t.Name())
}

// folder is that of the package under test, from the repository's root.
func folder() string {
	dir, err := os.Getwd() // go test sets it
	if err != nil {
		return "?"
	}
	for root := dir; root != "/"; root = filepath.Dir(root) {
		if _, err := os.Stat(filepath.Join(root, "go.mod")); err == nil {
			return strings.TrimPrefix(dir, root+"/")
		}
	}
	return dir
}

func access(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

// probeURing asks for an io_uring with parameters that no kernel takes: one
// that has io_uring says that it does not take them.
func probeURing() error {
	_, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 0, 0, 0)
	if errno == unix.EFAULT || errno == unix.EINVAL {
		return nil
	}
	return fmt.Errorf("io_uring: %w", errno)
}

// probeShm finds a folder in memory that anybody may write to.
func probeShm() error {
	var st unix.Statfs_t
	if err := errors.Join(unix.Statfs("/dev/shm", &st), unix.Access("/dev/shm", unix.W_OK)); err != nil {
		return err
	}
	if st.Type != unix.TMPFS_MAGIC {
		return errors.New("/dev/shm is no tmpfs")
	}
	return nil
}

// tool gives a probe for programs that must be in PATH.
func tool(names ...string) func() error {
	return func() error {
		var errs []error
		for _, name := range names {
			_, err := exec.LookPath(name)
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	}
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
