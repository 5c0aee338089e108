//go:build guest

package guest

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// zram is a compressed disk in memory.
func zram(t testing.TB) string {
	t.Helper()
	testkit.Run(t, "modprobe", "zram", "num_devices=1")
	t.Cleanup(func() { testkit.Run(t, "rmmod", "zram") })
	write(t, "/sys/block/zram0/disksize", "64M")
	return "/dev/zram0"
}

// TestBackings: a served device over disks that no other test serves has their block sizes, and
// what is written to it through a file system, and discarded, is what is read; so
// is an image of it. The disk is nobody else's meanwhile, and free afterwards.
func TestBackings(t *testing.T) {
	for name, disk := range map[string]func(testing.TB) string{"zram": zram, "md": func(t testing.TB) string { return mirrorOf(t, size) }} {
		t.Run(name, func(t *testing.T) {
			dev := disk(t)
			d := program.New(t)
			node := strings.TrimSpace(d.Run("device", "create", "--backing", dev, "--name", "data"))
			for _, flag := range []string{"--getss", "--getsize64"} {
				if ours, theirs := testkit.Run(t, "blockdev", flag, node), testkit.Run(t, "blockdev", flag, dev); ours != theirs {
					t.Errorf("%s: the device has %s, its disk %s", flag, ours, theirs)
				}
			}
			testkit.Run(t, "mkfs.ext4", "-q", "-b", "4096", node)
			dir := t.TempDir()
			testkit.Run(t, "mount", "-o", "discard", node, dir)
			t.Cleanup(func() { _ = exec.Command("umount", dir).Run() })
			before := []byte(strings.Repeat("before", 1000))
			if err := os.WriteFile(filepath.Join(dir, "file"), before, 0o600); err != nil {
				t.Fatal(err)
			}
			id := strings.TrimSpace(d.Run("snapshot", "create", "--storage", filepath.Join(d.Dir, "diff")+":64M", "data"))
			d.Run("snapshot", "take", id)
			if err := errors.Join(os.Remove(filepath.Join(dir, "file")), os.WriteFile(filepath.Join(dir, "other"), before, 0o600)); err != nil {
				t.Fatal(err)
			}
			fio := startFio(t, dir, 2)
			fio.wait(t, d)
			testkit.Run(t, "fstrim", dir)
			if out, err := exec.Command("mkfs.ext4", "-q", "-F", dev).CombinedOutput(); err == nil {
				t.Errorf("somebody else could write to the disk: %s", out)
			}
			image := "/dev/tidemark/data@" + id
			testkit.Run(t, "e2fsck", "-fn", image)
			at := t.TempDir()
			testkit.Run(t, "mount", "-o", "ro", image, at)
			got, err := os.ReadFile(filepath.Join(at, "file"))
			testkit.Run(t, "umount", at)
			if err != nil || string(got) != string(before) {
				t.Errorf("the image's file is not what it was: %v", err)
			}
			testkit.Run(t, "umount", dir)
			testkit.Run(t, "e2fsck", "-fn", node)
			d.Run("snapshot", "destroy", id)
			d.Run("device", "rm", "data")
			testkit.Run(t, "e2fsck", "-fn", dev)
		})
	}
}
