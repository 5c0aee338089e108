package program

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tidemark/internal/loop"
	"tidemark/internal/testkit"
)

// TestSweep: of a daemon that its test left behind, alive or killed, nothing stays:
// no process, tap, loop device, memory or folder.
func TestSweep(t *testing.T) {
	testkit.Need(t, "root", "tap", "loop", "fuse", "tmpfs")
	for name, left := range map[string]func(*Daemon){"alive": func(*Daemon) {}, "killed": (*Daemon).Kill} {
		t.Run(name, func(t *testing.T) {
			d, disk := New(t), testkit.NewDisk(t, 8<<20)
			d.Kill()
			d.State = filepath.Join(d.Dir, "other", "state")
			d.Start()
			image := filepath.Join(d.Dir, "image")
			if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 8<<20)); err != nil {
				t.Fatal(err)
			}
			d.Run("device", "create", "--front", "loop", "--backing", image, "--name", "served")
			d.Protect("tapped", disk.Path)
			d.Protect("captured", "served")
			served := loops(d.State)
			if len(served) != 1 {
				t.Fatalf("its loop devices: %+v", served)
			}
			instance, err := os.ReadFile(filepath.Join(d.State, "instance"))
			if err != nil {
				t.Fatal(err)
			}
			taps := filepath.Join(pins, strings.TrimSpace(string(instance)))
			for _, path := range []string{memory(d.State), taps} {
				if _, err := os.Stat(path); err != nil {
					t.Fatal(err)
				}
			}
			left(d)
			sweepDaemon(d.Dir)
			select {
			case <-d.ended:
			case <-time.After(dumpMax):
				t.Error("the daemon lives")
			}
			if now, err := loop.Status(served[0].Path); err == nil && now.DiskSeq == served[0].DiskSeq {
				t.Errorf("%s is left", now.Path)
			}
			for _, path := range []string{memory(d.State), taps, d.Dir} {
				if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%s is left: %v", path, err)
				}
			}
		})
	}
}
