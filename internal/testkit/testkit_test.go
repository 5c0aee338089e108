package testkit

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"tidemark/internal/loop"
)

func TestSectorTellsWhatIsWrong(t *testing.T) {
	p := make([]byte, 4*Sector)
	Fill(p[:2*Sector], 1, 8192, 7)
	if seqs, err := Check(p, 1, 8192); err != nil || fmt.Sprint(seqs) != "[7 7 0 0]" {
		t.Fatalf("%v %v", seqs, err)
	}
	if _, err := Check(p, 2, 8192); err == nil {
		t.Error("a sector of another disk passed")
	}
	if _, err := Check(p, 1, 4096); err == nil {
		t.Error("a sector of another place passed")
	}
	for i := range 2 * Sector {
		p[i] ^= 0x10
		if _, err := Check(p, 1, 8192); err == nil {
			t.Fatalf("flipped byte %d passed", i)
		}
		p[i] ^= 0x10
	}
}

// TestLeftovers: a run that was killed with its disk mounted is cleared by the next.
func TestLeftovers(t *testing.T) {
	Need(t, "root", "loop", "ext4")
	dir := filepath.Join(Dir(t), "left") // with our own process id: another test's sweep must not come first
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "disk")
	if err := os.WriteFile(file, make([]byte, 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	Mkfs(t, file, "ext4")
	dev, err := loop.Attach(file, loop.Options{})
	if err != nil {
		t.Fatal(err)
	}
	dev.Close()
	at := t.TempDir()
	Run(t, "mount", dev.Path, at)
	sweepLeftovers(t, func(path string) bool { return path == file })
	sweepDirs([]string{dir})
	if _, err := os.Stat(dir); err == nil {
		t.Error("the folder is still there")
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	if strings.Contains(string(mounts), at) {
		t.Error("still mounted")
	}
	if info, err := loop.Status(dev.Path); err == nil && info.Backing == file {
		t.Error("still attached")
	}
}

// TestOrphans: the folders of processes that live are nobody else's to remove, and
// those of daemons are not for this package: it does not know what goes with them.
func TestOrphans(t *testing.T) {
	dead := exec.Command("true")
	if err := dead.Run(); err != nil {
		t.Fatal(err)
	}
	if ours, theirs := fmt.Sprint("/tmp/", prefix, os.Getpid(), "-x/disk"), fmt.Sprint("/tmp/", prefix, dead.Process.Pid, "-x/disk"); orphaned(ours) || !orphaned(theirs) || orphaned("/tmp/disk") {
		t.Errorf("of a process that lives: %t, of one that does not: %t, of nobody: %t", orphaned(ours), orphaned(theirs), orphaned("/tmp/disk"))
	}
	daemons := Dir(t)
	if err := os.WriteFile(filepath.Join(daemons, DaemonPID), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	sweepDirs([]string{daemons})
	if _, err := os.Stat(daemons); err != nil {
		t.Errorf("nobody knows any more what went with a daemon's folder: %v", err)
	}
}

// TestNeed runs itself in a process where a feature is required, and in one where skips are recorded.
func TestNeed(t *testing.T) {
	if os.Getenv("TESTKIT_CHILD") != "" {
		probes["nothing"] = func() error { return fmt.Errorf("never\nthere") }
		Need(t, "nothing")
		return
	}
	skips := filepath.Join(t.TempDir(), "skips")
	run := func(env ...string) error {
		cmd := exec.Command(os.Args[0], "-test.run=^TestNeed$")
		cmd.Env = append(os.Environ(), append(env, "TESTKIT_CHILD=1", "TIDEMARK_SKIPS="+skips)...)
		return cmd.Run()
	}
	if err := run("TIDEMARK_REQUIRE=other,nothing"); err == nil {
		t.Error("a required feature was missing and the test passed")
	}
	if err := run("TIDEMARK_REQUIRE="); err != nil {
		t.Errorf("a skip is a failure: %v", err)
	}
	got, err := os.ReadFile(skips)
	if want := "nothing: never there: internal/testkit TestNeed\n"; err != nil || string(got) != want {
		t.Errorf("recorded %q, %v; want %q", got, err, want)
	}
}
