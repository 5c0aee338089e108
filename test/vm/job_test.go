package vm

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// job is one package's tests, run in the guest.
type job struct {
	pkg     string        // folder below the repository's root
	run     string        // pattern of go test -run (TIDEMARK_VM_RUN replaces it); empty: all
	skip    string        // pattern of go test -skip; empty: none
	count   int           // how often they are run (TIDEMARK_VM_COUNT); 0: once
	timeout time.Duration // of its tests together, in the guest

	binary, out, root string
}

// build compiles the tests, statically and without the race detector, which
// emulation makes too slow.
func (j *job) build(t *testing.T, dir string, n int) {
	t.Helper()
	j.root = root(t)
	j.out = fmt.Sprintf("%02d-%s", n, strings.ReplaceAll(j.pkg, "/", "-"))
	j.binary = filepath.Join(dir, j.out+".test")
	goTool(t, "test", "-c", "-tags", "guest", "-o", j.binary, "./"+j.pkg)
}

// goTool runs go at the repository's root, for binaries that need no library.
func goTool(t *testing.T, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", args...)
	cmd.Dir = root(t)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd, err, out)
	}
}

func root(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// script is what the guest runs in place of an init. The host's files are all
// there, at their own paths; what it changes is gone when it ends.
func (g *guest) script(kernel, program string) string {
	var b strings.Builder
	fmt.Fprintf(&b, `#!/bin/bash
exec </dev/null >/results/log 2>&1
touch /results/booted
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C DM_DISABLE_UDEV=1
export TIDEMARK_REQUIRE=root,tap,loop,fuse,dm,nbd,cuse TIDEMARK_SKIPS=/results/skips TIDEMARK_BIN=%[2]s
mkdir -p /dev/shm /dev/pts /run
mount -t tmpfs shm /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs run /run
mount -t bpf bpf /sys/fs/bpf
mount -t tracefs trace /sys/kernel/tracing
[ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd
ln -sfn %[1]s/lib/modules/$(uname -r) /lib/modules/$(uname -r)
modprobe loop max_loop=16
for m in fuse virtio_blk nvme dm-mod ext4 xfs btrfs ublk_drv nbd cuse; do modprobe $m; done
busybox ip link set lo up
`, quote(kernel), quote(program))
	for _, j := range g.jobs {
		fmt.Fprintf(&b, "cd %s && timeout -s QUIT -k 10 %d %s -test.v=test2json -test.short -test.timeout=%v -test.count=%d -test.run=%s -test.skip=%s >/results/%s.out 2>&1\necho $? >/results/%[8]s.exit\n",
			quote(filepath.Join(j.root, j.pkg)), int(j.timeout.Seconds())+10, quote(j.binary), j.timeout, max(j.count, 1), quote(j.run), quote(j.skip), j.out)
	}
	b.WriteString("dmesg | grep -E 'BUG|WARNING|Call Trace' >/results/kernel-complaints\ntouch /results/finished\nsync\necho o >/proc/sysrq-trigger\nsleep 60\n")
	return b.String()
}

func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
