package vm

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"tidemark/internal/testkit"
)

// BenchmarkGuest runs the benchmarks of test/bench that need ublk, the kernel's NBD and
// device-mapper, and prints what they report. Processors are emulated: only their ratios mean anything.
func BenchmarkGuest(b *testing.B) {
	testkit.Need(b, "vm")
	pattern := "^BenchmarkGuest"
	if only := os.Getenv("TIDEMARK_VM_RUN"); only != "" {
		pattern = only
	}
	g := &guest{suite: debian612, timeout: 25 * time.Minute, jobs: []job{{pkg: "test/bench", bench: pattern, timeout: 20 * time.Minute}}}
	for b.Loop() {
		res := g.boot(b)
		printed, err := os.ReadFile(filepath.Join(res.dir, g.jobs[0].out+".out"))
		exit, _ := os.ReadFile(filepath.Join(res.dir, g.jobs[0].out+".exit"))
		if err != nil || string(exit) != "0\n" {
			b.Fatalf("exit code %q, %v; it printed:\n%s\n%s", exit, err, printed, res.log())
		}
		fmt.Printf("\n%s", printed)
	}
}
