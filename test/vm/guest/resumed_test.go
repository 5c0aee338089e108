//go:build guest

package guest

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/health"
	"tidemark/internal/serve"
	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// TestSpliceToldByEvents: that a spliced volume has another table is seen because
// device-mapper tells of it: nobody looks by himself here.
func TestSpliceToldByEvents(t *testing.T) {
	fronts()
	dev := linearOf(t, servedSize)
	name := filepath.Base(dev)
	original := testkit.Run(t, "dmsetup", "table", name)
	dir := t.TempDir()
	s, err := serve.Open(t.Context(), &serve.Env{StateDir: dir, Nodes: filepath.Join(dir, "nodes"), Look: 24 * time.Hour,
		Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	// One that fails half way leaves nothing.
	records := filepath.Join(dir, "devices")
	write(t, records, "no folder")
	if _, err := s.Splice(t.Context(), dev, "data", "", 0); err == nil || !strings.Contains(err.Error(), records) {
		t.Errorf("a splice that cannot be remembered: %v", err)
	}
	if now, left := testkit.Run(t, "dmsetup", "table", name), testkit.Run(t, "dmsetup", "ls"); now != original || strings.Contains(left, "tidemark") || len(s.List()) > 0 {
		t.Errorf("it failed, and left table %s, mapped devices %s", now, left)
	}
	if err := os.Remove(records); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Splice(t.Context(), dev, "data", "", 0); err != nil {
		t.Fatal(err)
	}
	before, err := s.Changes("data")
	if err != nil {
		t.Fatal(err)
	}
	generation := before.Info().Generation
	input(t, original, "dmsetup", "load", name)
	testkit.Run(t, "dmsetup", "resume", name)
	program.Eventually(t, time.Minute, "the volume is spliced again", func() error {
		var conditions []health.Condition // for a moment there is no device
		for _, d := range s.List() {
			conditions = append(conditions, d.Conditions...)
		}
		if !slices.ContainsFunc(conditions, func(c health.Condition) bool { return c.Code == "splice-replaced" }) {
			return fmt.Errorf("conditions: %+v", conditions)
		}
		return nil
	})
	if after, err := s.Changes("data"); err != nil || after.Info().Generation == generation {
		t.Errorf("the generation goes on though writes went past the map (%v)", err)
	}
	if err := errors.Join(s.Unsplice(t.Context(), "data"), s.Stop(t.Context())); err != nil {
		t.Error(err)
	}
	if now := testkit.Run(t, "dmsetup", "table", name); now != original {
		t.Errorf("afterwards the table is %s, and was %s", now, original)
	}
}

// TestTableAwayAndBack: between two looks of the daemon volumes lead elsewhere for a
// while, where they are written to. Only the kernel's events tell of that: the table
// is the same as before. What the daemon knows of them is not to be trusted then.
func TestTableAwayAndBack(t *testing.T) {
	fronts()
	one, other := testkit.NewDisk(t, servedSize), testkit.NewDisk(t, servedSize)
	at := func(d *testkit.Disk) string {
		return fmt.Sprintf("0 %d linear %s 0\n", servedSize/512, d.Path)
	}
	tapped := table(t, "tapped", at(one))
	spliced := linearOf(t, servedSize)
	past := testkit.Run(t, "dmsetup", "table", spliced)
	d := program.New(t)
	d.Run("device", "splice", spliced, "--name", "data")
	through := testkit.Run(t, "dmsetup", "table", spliced)
	d.Protect("g", tapped)
	d.Protect("served", "data")
	rng, buf := seed(t), aligned(t, 128<<10)
	volumes := map[string]*raw{"g": openRaw(t, tapped), "served": openRaw(t, spliced)}
	scribble := func(r *raw) {
		t.Helper()
		if err := r.scribble(buf, 20, rng); err != nil {
			t.Fatal(err)
		}
	}
	since := map[string]uint64{}
	for group, r := range volumes {
		scribble(r)
		since[group] = d.Settle(group).Since
	}
	id := strings.TrimSpace(d.Run("snapshot", "create", "--storage", filepath.Join(d.Dir, "diff")+":16M", "data"))
	d.Run("snapshot", "take", id)
	before := d.Run("cbt", "ls")

	lead := func(dev, table string) {
		t.Helper()
		input(t, table, "dmsetup", "load", dev)
		testkit.Run(t, "dmsetup", "resume", dev)
	}
	if err := unix.Kill(d.PID(), unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	lead(tapped, at(other))
	lead(spliced, past)
	for _, r := range volumes {
		scribble(r)
	}
	lead(tapped, at(one))
	lead(spliced, through)
	if err := unix.Kill(d.PID(), unix.SIGCONT); err != nil {
		t.Fatal(err)
	}

	for group, r := range volumes {
		d.Await(group, "consistent again", func(g *program.Group) bool { return g.Since > since[group] && g.State == "protected" })
		scribble(r)
		d.Settle(group)
		file := d.Restored(group, "", "latest")
		image, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		r.same("latest of "+group, image)
	}
	if text := d.Run("device", "ls", "--json"); !strings.Contains(text, "splice-replaced") {
		t.Errorf("the device says nothing of it: %s", text)
	}
	for line := range strings.Lines(before) {
		if f := strings.Fields(line); f[0] == "data" && strings.Contains(d.Run("cbt", "ls"), f[len(f)-2]) {
			t.Errorf("the generation goes on though writes went past the map: %s", line)
		}
	}
	if text := d.Run("snapshot", "ls", "--json"); !strings.Contains(text, "spoiled") {
		t.Errorf("the snapshot of a volume that was written past: %s", text)
	}
	d.Run("snapshot", "destroy", id)
	for group, r := range volumes {
		d.Run("unprotect", group)
		r.file.Close()
	}
	d.Run("device", "unsplice", "data")
	if now := testkit.Run(t, "dmsetup", "table", spliced); now != past {
		t.Errorf("afterwards the table is %s, and was %s", now, past)
	}
}
