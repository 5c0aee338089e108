package vm

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// job is one package's tests, run in the guest.
type job struct {
	pkg     string        // folder below the repository's root
	run     string        // pattern of go test -run (TIDEMARK_VM_RUN replaces it); empty: all
	skip    string        // pattern of go test -skip; empty: none
	bench   string        // pattern of go test -bench; empty: tests are run
	count   int           // how often they are run (TIDEMARK_VM_COUNT); 0: once
	env     string        // NAME=VALUE for its tests; empty: none
	timeout time.Duration // of its tests together, in the guest

	binary, out, root string
}

// build compiles the tests, statically and without the race detector, which
// emulation makes too slow.
func (j *job) build(t testing.TB, n int) {
	t.Helper()
	j.root = root(t)
	j.out = fmt.Sprintf("%02d-%s", n, strings.ReplaceAll(j.pkg, "/", "-"))
	j.binary = binaries.get(t, strings.ReplaceAll(j.pkg, "/", "-")+".test", "test", "-c", "-tags", "guest", "./"+j.pkg)
}

// built are the binaries that all guests run; each is compiled once.
type built struct {
	dir  string // until the tests end
	mu   sync.Mutex
	made map[string]bool
}

var binaries built

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "tidemark-vm-")
	if err != nil {
		panic(err)
	}
	binaries = built{dir: dir, made: map[string]bool{}}
	code := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// get runs go at the repository's root, for a binary that needs no library.
func (b *built) get(t testing.TB, name string, args ...string) string {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	path := filepath.Join(b.dir, name)
	if b.made[name] {
		return path
	}
	cmd := exec.CommandContext(t.Context(), "go", slices.Insert(args, len(args)-1, "-o", path)...)
	cmd.Dir = root(t)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd, err, out)
	}
	b.made[name] = true
	return path
}

func root(t testing.TB) string {
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
	newest := "" // what only it can do must then be done
	if g.suite == debianNewest {
		newest = "export TIDEMARK_NEWEST=1"
	}
	fmt.Fprintf(&b, `#!/bin/bash
exec </dev/null >/results/log 2>&1
touch /results/booted
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C DM_DISABLE_UDEV=1
export TIDEMARK_REQUIRE=root,tap,loop,fuse,dm,nbd,cuse TIDEMARK_SKIPS=/results/skips TIDEMARK_BIN=%[2]s
%[3]s
mkdir -p /dev/shm /dev/pts /run
mount -t tmpfs shm /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs run /run
mkdir /run/lock
mount -t bpf bpf /sys/fs/bpf
mount -t tracefs trace /sys/kernel/tracing
[ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd
ln -sfn %[1]s/lib/modules/$(uname -r) /lib/modules/$(uname -r)
modprobe loop max_loop=16
for m in fuse virtio_blk nvme dm-mod ext4 xfs btrfs ublk_drv nbd cuse; do modprobe $m; done
busybox ip link set lo up
`, quote(kernel), quote(program), newest)
	for _, j := range g.jobs {
		what := fmt.Sprintf("-test.v=test2json -test.short -test.count=%d -test.run=%s -test.skip=%s", max(j.count, 1), quote(j.run), quote(j.skip))
		if j.bench != "" {
			what = fmt.Sprintf("-test.run='^$' -test.benchtime=1x -test.bench=%s", quote(j.bench))
		}
		fmt.Fprintf(&b, "cd %s && env %s timeout -s QUIT -k 10 %d %s -test.timeout=%v %s >/results/%s.out 2>&1\necho $? >/results/%[7]s.exit\n",
			quote(filepath.Join(j.root, j.pkg)), j.env, int(j.timeout.Seconds())+10, quote(j.binary), j.timeout, what, j.out)
	}
	b.WriteString("dmesg | grep -E 'BUG|WARNING|Call Trace' >/results/kernel-complaints\ntouch /results/finished\nsync\necho o >/proc/sysrq-trigger\nsleep 60\n")
	return b.String()
}

func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
