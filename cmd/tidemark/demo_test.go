package main

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// TestDemoServed: the demonstration that needs neither root nor eBPF comes to its
// end for whoever has neither.
func TestDemoServed(t *testing.T) {
	dir := t.TempDir()
	for from, to := range map[string]string{program.Binary(t): "bin/tidemark", "../../test/demo-served.sh": "test/demo-served.sh"} {
		to = filepath.Join(dir, to)
		testkit.Run(t, "install", "-D", "-m", "755", from, to)
	}
	tmp := filepath.Join(dir, "tmp") // for anybody
	if err := errors.Join(os.Mkdir(tmp, 0o700), os.Chmod(tmp, 0o777)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(dir, "test/demo-served.sh"))
	cmd.Dir, cmd.Env, cmd.WaitDelay = dir, append(os.Environ(), "TMPDIR="+tmp), 10*time.Second
	if os.Geteuid() == 0 {
		const nobody = 65534
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		for at := dir; at != os.TempDir() && len(at) > 1; at = filepath.Dir(at) {
			if err := os.Chmod(at, 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "restore and read back") {
		t.Errorf("%v\n%s", err, out)
	}
}
