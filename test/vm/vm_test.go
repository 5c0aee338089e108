// Package vm runs tests on other kernels than this machine's: it boots Debian
// kernels under emulation, runs test binaries in them, and reports each of their
// tests as one of its own. docs/kernel-notes.md tells how to add one.
package vm

import (
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"tidemark/internal/testkit"
)

// jobs is what every guest runs: all that needs a device or a kernel that CI's
// own machine lacks, and of what runs there too the tests that another kernel
// could answer otherwise. What is left out was proven natively a minute ago.
// The timeouts only end what hangs: on a busy machine emulation is very slow.
func jobs() []job {
	return []job{
		{pkg: "test/vm/guest", timeout: 30 * time.Minute},
		{pkg: "internal/tap", run: "^Test(Calibration|OlderLayout|KilledHolder|EndsUnderLoad|FlushesWithoutData|Passthrough|MarksExactly|Replica|OddShapes|Overflow|VoidWrite)$",
			timeout: 8 * time.Minute},
		{pkg: "internal/loop", run: "^Test(AttachDetach|AutoClear)$", timeout: 3 * time.Minute},
		{pkg: "internal/disk", run: "^Test(Mapper|InspectLoop|Partitions|Watch)", timeout: 5 * time.Minute},
		{pkg: "internal/dm", timeout: 3 * time.Minute},
		{pkg: "internal/splice", timeout: 5 * time.Minute},
		{pkg: "internal/freeze", run: "^Test(FreezeAndThaw|ForeignFreeze|CallerKilled|Stacked)$", timeout: 5 * time.Minute},
		{pkg: "internal/front/loop", run: "^Test(Serve|ServerKilled)$", timeout: 5 * time.Minute},
		{pkg: "internal/front/nbdk", timeout: 5 * time.Minute},
		{pkg: "internal/control/cuse", timeout: 3 * time.Minute},
		{pkg: "internal/uring", timeout: 3 * time.Minute},
		{pkg: "internal/backing", timeout: 5 * time.Minute},
		{pkg: "internal/front/ublk", timeout: 5 * time.Minute},
		{pkg: "internal/mount", run: "^Test(DirtyJournal|MounterKilled)$/^ext4$", timeout: 5 * time.Minute},
	}
}

const (
	debian61  = "bookworm"
	debian612 = "bookworm-backports"
	// The newest kernel that Debian has for a stable release.
	debianNewest = "trixie-backports"
)

// newest is what runs on the newest kernel unless TIDEMARK_VM_ALL is set: what
// the older ones cannot do.
var newest = []job{
	{pkg: "test/vm/guest", run: "^TestZeroCopy$", timeout: 5 * time.Minute},
	{pkg: "internal/front/ublk", timeout: 5 * time.Minute},
}

// once are tests that take long and that kernels do not answer differently: each
// runs on one of them, and is left out on the one named here.
var once = map[string]string{
	debian61:  "^Test(ZeroCopy|FillUnderLoad|TableChanged|UnderLoad|LVM|Splice|GuardMakesWay|ServedPulled|KilledWhileStorageGrows|KilledWhileTaking|Backings|TableAwayAndBack|InvolfltFuzzed|BlksnapBackup)$",
	debian612: "^Test(ZeroCopy|Pulled|Refused|ReconnectUnderLoad|OlderLayout|SpliceTables|InvolfltReplicates|BlksnapFuzzed)$",
}

// The guests run side by side: much of what they do is to wait.
func TestDebian61(t *testing.T)  { t.Parallel(); runGuest(t, debian61, jobs()) }
func TestDebian612(t *testing.T) { t.Parallel(); runGuest(t, debian612, jobs()) }

func TestDebianNewest(t *testing.T) {
	t.Parallel()
	if os.Getenv("TIDEMARK_VM_ALL") != "" || os.Getenv("TIDEMARK_VM_PACKAGES") != "" {
		runGuest(t, debianNewest, jobs())
		return
	}
	runGuest(t, debianNewest, newest)
}

func runGuest(t *testing.T, suite string, jobs []job) {
	testkit.Need(t, "vm")
	g := &guest{suite: suite, jobs: jobs, timeout: 45 * time.Minute}
	if only := os.Getenv("TIDEMARK_VM_PACKAGES"); only != "" {
		g.jobs = slices.DeleteFunc(g.jobs, func(j job) bool { return !slices.Contains(strings.Split(only, ","), j.pkg) })
	}
	for i := range g.jobs {
		g.jobs[i].skip = once[suite]
		if run, ok := os.LookupEnv("TIDEMARK_VM_RUN"); ok { // empty: all of them
			g.jobs[i].run, g.jobs[i].skip = run, ""
		}
		if n, err := strconv.Atoi(os.Getenv("TIDEMARK_VM_COUNT")); err == nil { // to find what fails now and then
			g.jobs[i].count = n
			g.jobs[i].timeout *= time.Duration(n)
			g.timeout = max(g.timeout, 2*g.jobs[i].timeout)
		}
	}
	g.report(t, g.boot(t))
}

// TestReport: what a guest prints becomes the same tree of results, also where it was cut off.
func TestReport(t *testing.T) {
	const printed = "\x16=== RUN   TestA\n\x16=== RUN   TestA/x\n    a_test.go:1: why\n\x16--- FAIL: TestA/x (0.50s)\n" +
		"\x16=== NAME  TestA\n\x16--- FAIL: TestA (0.50s)\n\x16=== NAME  \n\x16=== RUN   TestA\n\x16--- PASS: TestA (0.20s)\n\x16=== RUN   TestB\n\x16--- PASS: TestB (0.10s)\n\x16=== RUN   TestC\n    c_test.go:1: last words\n"
	all, err := parse("p", []byte(printed))
	if err != nil {
		t.Fatal(err)
	}
	if len(all.children) != 3 {
		t.Fatalf("%d tests", len(all.children))
	}
	a, b, c := all.children[0], all.children[1], all.children[2]
	if a.result != "fail" || len(a.children) != 1 || a.children[0].result != "fail" || a.children[0].name != "x" {
		t.Errorf("TestA: %+v", a)
	}
	if b.result != "pass" || b.elapsed != 0.1 {
		t.Errorf("TestB: %+v", b)
	}
	if c.result != "" && c.result != "fail" {
		t.Errorf("TestC was cut off and counts as %q", c.result)
	}
}
