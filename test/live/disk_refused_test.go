package live

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tidemark/internal/loop"
	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// TestRefusedDisks: disks that are not to be tapped, or not beside the others,
// each with its reason; nothing stays of the attempt. Those that need drivers of
// other kernels are tested in the virtual machine.
func TestRefusedDisks(t *testing.T) {
	const refused, inUse = 5, 9
	d := program.New(t)
	refuse := func(exit int, reason string, args ...string) {
		t.Helper()
		vault := filepath.Join(d.Dir, "none")
		if text := d.Refused(exit, append([]string{"protect", "--vault", vault, "--name", "x"}, args...)...); !strings.Contains(text, reason) {
			t.Errorf("%v: %s", args, text)
		}
		if _, err := os.Stat(vault); err == nil {
			t.Errorf("%v: a vault was made", args)
		}
	}
	shared := testkit.NewDisk(t, 8*mib)
	f := open(t, shared.Path, 0)
	if _, err := f.WriteAt([]byte{0x01, 0x16, 0x19, 0x70, 0, 0, 0, 1}, 64<<10); err != nil { // a gfs2 superblock
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	refuse(refused, "[disk-cluster]", shared.Path)
	d.Protect("forced", "--force", shared.Path)
	d.Run("unprotect", "forced")

	own := testkit.NewDisk(t, 32*mib)
	testkit.Mkfs(t, own.Path, "ext4")
	dir := testkit.Mount(t, own.Path)
	text := d.Refused(refused, "protect", "--vault", filepath.Join(dir, "vault"), "--name", "x", own.Path)
	if !strings.Contains(text, "[disk-holds-own-data]") {
		t.Error(text)
	}
	file := filepath.Join(dir, "image") // a disk that lies on another
	if err := os.WriteFile(file, make([]byte, mib), 0o600); err != nil {
		t.Fatal(err)
	}
	above, err := loop.Attach(file, loop.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := loop.Detach(above.Path); err != nil {
			t.Error(err)
		}
	})
	if err := above.Close(); err != nil {
		t.Fatal(err)
	}
	refuse(inUse, "protect it once", own.Path, above.Path)
	d.Protect("below", own.Path)
	refuse(inUse, "lies in one stack with", above.Path)
	refuse(inUse, "is protected already, by group below", own.Path)
	d.Run("unprotect", "below")

	parts := testkit.NewDisk(t, 8*mib)
	testkit.OnePartition(t, parts)
	d.Protect("part", parts.Path+"p1")
	refuse(inUse, "lies in one stack with", parts.Path)
	d.Run("unprotect", "part")
	if left := d.Status().Groups; len(left) > 0 {
		t.Errorf("groups %+v", left)
	}
}
