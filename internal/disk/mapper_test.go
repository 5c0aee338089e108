package disk_test

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"tidemark/internal/disk"
	"tidemark/internal/testkit"
)

// TestMapper reads real mapping tables, of a stack and through a change.
func TestMapper(t *testing.T) {
	testkit.Need(t, "dm", "loop", "ext4")
	lower := testkit.NewDisk(t, 64<<20)
	name := fmt.Sprintf("tidemark-test-%d", os.Getpid())
	path := "/dev/mapper/" + name
	testkit.Run(t, "dmsetup", "create", name, "--uuid", "TEST-"+name, "--table", fmt.Sprintf("0 65536 linear %s 2048", lower.Path))
	t.Cleanup(func() { testkit.Run(t, "dmsetup", "remove", "--retry", name) })
	testkit.Run(t, "dmsetup", "mknodes", name) // where no udev does it
	top := inspect(t, path)
	if m := top.Mapping; m == nil || m.Name != name || m.UUID != "TEST-"+name || !slices.Equal(m.Targets, []string{"linear"}) || m.Table == "" {
		t.Fatalf("%+v", m)
	}
	if top.Kind != disk.DM || !top.BioBased || top.Identity.DMUUID != "TEST-"+name || len(disk.TapRefusals(top)) > 0 {
		t.Errorf("%+v", top)
	}
	below := inspect(t, lower.Path)
	if r := disk.TapRefusals(below); len(r) != 1 || r[0].Code != disk.CodeMember || !strings.Contains(r[0].Remedy, name) {
		t.Errorf("the lower disk: %+v", r)
	}
	if !disk.Related(top, below) {
		t.Error("not related")
	}
	testkit.Mkfs(t, path, "ext4")
	dir := testkit.Mount(t, path)
	if i := inspect(t, lower.Path); len(i.Mounts) != 1 || !disk.Holds(i, dir) {
		t.Errorf("mounts of the lower disk %+v", i.Mounts)
	}
	events := watch(t, inspect(t, path))
	testkit.Run(t, "dmsetup", "reload", name, "--table", fmt.Sprintf("0 65536 linear %s 4096", lower.Path))
	testkit.Run(t, "dmsetup", "suspend", name)
	testkit.Run(t, "dmsetup", "resume", name)
	expect(t, events, "table")
	testkit.Run(t, "dmsetup", "reload", name, "--table", fmt.Sprintf("0 65536 linear %s 2048", lower.Path))
	testkit.Run(t, "dmsetup", "suspend", name)
	testkit.Run(t, "dmsetup", "resume", name)
}
