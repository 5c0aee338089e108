package protect

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"tidemark/internal/stream"
	"tidemark/internal/tap"
	"tidemark/internal/testkit"
	"tidemark/internal/vault"
)

// TestNothingStays: a group that was made, used, stopped, opened again and given
// up leaves no goroutine, no open file and no pins.
func TestNothingStays(t *testing.T) {
	testkit.NoLeaks(t)
	testkit.Need(t, "root", "tap", "loop")
	disk := testkit.NewDisk(t, 8<<20)
	const instance = "feedbeef00000001"
	env := &Env{StateDir: filepath.Join(t.TempDir(), "state"), Instance: instance, Log: slog.New(slog.DiscardHandler),
		Holder: vault.Holder{Host: "here", PID: os.Getpid(), Instance: instance, Since: time.Now()}}
	t.Cleanup(func() { _ = tap.Discard(instance, "g") })
	lifeOf(t, env, disk, "first") // libraries open what they keep open
	before := openFiles(t)
	lifeOf(t, env, disk, "second")
	if after := openFiles(t); !slices.Equal(before, after) {
		t.Errorf("open files were %q\nand are %q", before, after)
	}
	pins, err := tap.Pinned()
	if err != nil {
		t.Fatal(err)
	}
	if slices.ContainsFunc(pins, func(p tap.Pin) bool { return p.Instance == instance }) {
		t.Errorf("pins stay: %+v", pins)
	}
}

// lifeOf is a group from its making to its end, with all that can be asked of it.
func lifeOf(t *testing.T, env *Env, disk *testkit.Disk, name string) {
	t.Helper()
	where := filepath.Join(filepath.Dir(env.StateDir), "vault-"+name)
	g, err := Create(t.Context(), env, Request{Name: "g", Vault: where, Devices: []string{disk.Path}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	protected(t, g)
	if err := os.WriteFile(disk.Path, []byte(fmt.Sprintf("%-512s", name)), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Bookmark(t.Context(), "mark", stream.Crash); err != nil {
		t.Error(err)
	}
	if _, err := g.VerifyLive(t.Context()); err != nil {
		t.Error(err)
	}
	g.Stop()
	if g, err = Open(env, "g"); err != nil {
		t.Fatal(err)
	}
	g.Start()
	protected(t, g)
	if err := g.Unprotect(t.Context(), false); err != nil {
		t.Error(err)
	}
}

// protected waits until a group is.
func protected(t *testing.T, g *Group) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		st := g.Status(t.Context())
		if st.State == Protected {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the group is not protected: %+v", st)
		}
	}
}

// openFiles are this process's, by what they lead to.
func openFiles(t *testing.T) (files []string) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		to, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err == nil { // not the folder itself, which is closed by now
			files = append(files, to)
		}
	}
	slices.Sort(files)
	return files
}
