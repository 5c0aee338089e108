package program

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"tidemark/internal/testkit"
)

const (
	pidFile = "daemon.pid"
	pins    = "/sys/fs/bpf/tidemark"
)

var sweep sync.Once

// cleanup runs when the test ends, however it ends.
func (d *Daemon) cleanup() {
	if d.t.Failed() {
		text, _ := d.Verb("status", "--json")
		d.t.Logf("status %s\nthe daemon said:\n%s", text, d.Log())
		if d.awaiting != "" {
			d.t.Logf("while the group was awaited to be %s the daemon did:\n%s", d.awaiting, d.dump())
		}
	}
	d.Kill()
	if err := errors.Join(removePins(d.State), os.RemoveAll(memory(d.State))); err != nil {
		d.t.Error(err)
	}
}

// memory is where a daemon keeps what outlives it, and not a reboot: the folder
// that internal/serve names after the state folder.
func memory(state string) string {
	sum := sha256.Sum256([]byte(state))
	return filepath.Join("/dev/shm", "tidemark-"+hex.EncodeToString(sum[:8]))
}

// removePins removes a daemon's taps, as nobody will adopt them any more.
func removePins(state string) error {
	if os.Geteuid() != 0 {
		return nil // it can have none
	}
	id, err := os.ReadFile(filepath.Join(state, "instance"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if name := strings.TrimSpace(string(id)); err == nil && name != "" && !strings.ContainsAny(name, "/.") {
		return os.RemoveAll(filepath.Join(pins, name))
	}
	return err
}

// sweepDaemons ends daemons of test runs that no longer live and removes their taps.
func sweepDaemons() {
	for _, dir := range testkit.OrphanedDirs() {
		text, _ := os.ReadFile(filepath.Join(dir, pidFile))
		pid, _ := strconv.Atoi(string(text))
		line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if pid > 1 && bytes.Contains(line, []byte(dir)) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		_ = removePins(filepath.Join(dir, "state"))
		_ = os.RemoveAll(memory(filepath.Join(dir, "state")))
	}
	testkit.SweepDirs()
	if cache, err := os.UserCacheDir(); err == nil {
		old, _ := filepath.Glob(filepath.Join(cache, "tidemark", "test-bin", "tidemark-*"))
		for _, bin := range old {
			pid, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(bin), "tidemark-"))
			if err == nil && errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
				_ = os.Remove(bin)
			}
		}
	}
}
