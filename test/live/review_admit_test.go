package live

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// TestNoCircle: two disks that hold each other's vaults would write for ever.
func TestNoCircle(t *testing.T) {
	a, b := testkit.NewDisk(t, 32*mib), testkit.NewDisk(t, 32*mib)
	for _, disk := range []*testkit.Disk{a, b} {
		testkit.Mkfs(t, disk.Path, "ext4")
	}
	onA, onB := testkit.Mount(t, a.Path), testkit.Mount(t, b.Path)
	d := program.New(t)
	t.Cleanup(d.Kill) // before the vault's file system is unmounted
	d.Run("protect", "--vault", filepath.Join(onA, "vault"), "--name", "b", b.Path)
	said := d.Refused(exitRefused, "protect", "--vault", filepath.Join(onB, "vault"), "--name", "a", a.Path)
	if !strings.Contains(said, filepath.Join(onA, "vault")) {
		t.Errorf("it does not say which folder is in the way: %s", said)
	}
	if _, err := os.Stat(filepath.Join(onB, "vault")); err == nil {
		t.Error("what was refused made a vault")
	}
	d.Protect("a", a.Path) // elsewhere it may lie
	d.Run("unprotect", "a")
	d.Run("unprotect", "b")
}

// TestTwoDaemonsOneDisk: the second is told who has it, by the disk alone.
func TestTwoDaemonsOneDisk(t *testing.T) {
	disk := testkit.NewDisk(t, 8*mib)
	first, second := program.New(t), program.New(t)
	first.Protect("g", disk.Path)
	said := second.Refused(exitInUse, "protect", "--vault", second.Vault, "--name", "other", disk.Path)
	if !strings.Contains(said, first.State) {
		t.Errorf("it does not say who: %s", said)
	}
	if n := len(second.Status().Groups); n != 0 {
		t.Errorf("the second daemon has %d groups", n)
	}
	first.Run("unprotect", "g")
	second.Protect("other", disk.Path)
}

// TestTooMany: a group has 64 disks at most.
func TestTooMany(t *testing.T) {
	disk := testkit.NewDisk(t, mib)
	d := program.New(t)
	args := []string{"protect", "--vault", d.Vault, "--name", "g"}
	for range 65 {
		args = append(args, disk.Path)
	}
	if said := d.Refused(2, args...); !strings.Contains(said, "64") {
		t.Errorf("it does not say how many there may be: %s", said)
	}
	if _, err := os.Stat(d.Vault); err == nil {
		t.Error("what was refused made a vault")
	}
}

// TestLeftoversOfAKilledProtect: what a protect left that was killed before it
// was durable does not stand in the way of the next.
func TestLeftoversOfAKilledProtect(t *testing.T) {
	disk := testkit.NewDisk(t, 8*mib)
	d := program.New(t)
	d.Protect("g", disk.Path)
	d.Kill()
	// As it was a moment before the group's configuration: pins, a spool, no configuration, nothing in the vault.
	for _, what := range []string{filepath.Join(d.State, "groups", "g", "group.json"), d.Vault} {
		if err := os.RemoveAll(what); err != nil {
			t.Fatal(err)
		}
	}
	d.Start()
	d.Protect("g", disk.Path)
	identical(t, d, "g")
}
