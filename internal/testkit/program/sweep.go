package program

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"tidemark/internal/loop"
	"tidemark/internal/testkit"
)

const (
	pidFile    = testkit.DaemonPID
	statesFile = "states" // the state folders that the daemons of a folder used, a line each
	pins       = "/sys/fs/bpf/tidemark"
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
	if err := removeTraces(d.Dir); err != nil {
		d.t.Error(err)
	}
}

// note remembers a state folder that a daemon is about to use, for removeTraces.
func (d *Daemon) note() error {
	f, err := os.OpenFile(filepath.Join(d.Dir, statesFile), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(f, d.State)
	return errors.Join(err, f.Close())
}

// removeTraces removes what the dead daemons of a folder left elsewhere.
func removeTraces(dir string) error {
	text, err := os.ReadFile(filepath.Join(dir, statesFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil // none was started, or all is removed
	}
	for state := range strings.Lines(string(text)) {
		err = errors.Join(err, RemoveTraces(strings.TrimSuffix(state, "\n")))
	}
	return err
}

// RemoveTraces removes what a dead daemon left outside of its state folder, which
// has to be there still: taps, loop devices, what it kept in memory.
func RemoveTraces(state string) error {
	return errors.Join(removePins(state), detachLoops(state), os.RemoveAll(memory(state)))
}

// memory is where a daemon keeps what outlives it, and not a reboot: the folder
// that internal/serve names after the state folder.
func memory(state string) string {
	sum := sha256.Sum256([]byte(state))
	return filepath.Join("/dev/shm", "tidemark-"+hex.EncodeToString(sum[:8]))
}

// detachLoops takes away the loop devices that a daemon served, which it remembers in
// its state folder. Whoever has one open gets nothing but errors from it, and it goes with them.
func detachLoops(state string) (err error) {
	for _, l := range loops(state) {
		if e := loop.Detach(l.Path); !errors.Is(e, loop.ErrBusy) {
			err = errors.Join(err, e)
		}
	}
	return err
}

// loops are the loop devices that a state folder remembers and that are still attached.
func loops(state string) (found []loop.Info) {
	paths, _ := filepath.Glob(filepath.Join(state, "devices", "*.json")) // a pattern without faults
	for _, path := range paths {
		var r struct {
			Record struct {
				Memory struct {
					Path string `json:"path"`
					Seq  uint64 `json:"disk_sequence"`
				} `json:"memory"`
			} `json:"record"`
		}
		text, err := os.ReadFile(path)
		if err != nil || json.Unmarshal(text, &r) != nil || !strings.HasPrefix(r.Record.Memory.Path, "/dev/loop") {
			continue // of another front
		}
		if i, err := loop.Status(r.Record.Memory.Path); err == nil && i.DiskSeq == r.Record.Memory.Seq {
			found = append(found, i)
		}
	}
	return found
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
		sweepDaemon(dir)
	}
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

// sweepDaemon removes a daemon's folder and all that goes with it.
func sweepDaemon(dir string) {
	text, err := os.ReadFile(filepath.Join(dir, pidFile))
	if pid, _ := strconv.Atoi(string(text)); pid > 1 {
		end(pid, dir)
	}
	if err != nil || removeTraces(dir) == nil { // otherwise the next run tries again
		_ = os.RemoveAll(dir)
	}
}

// end kills a daemon that has dir in its command line, and waits for its end.
func end(pid int, dir string) {
	for deadline := time.Now().Add(dumpMax); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)) // empty once it is dead
		if !bytes.Contains(line, []byte(dir)) {
			return
		}
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
}
