package disk_test

import (
	"strings"
	"testing"

	"tidemark/internal/disk"
	"tidemark/internal/testkit"
)

func inspect(t *testing.T, spec string) *disk.Info {
	t.Helper()
	i, err := disk.Inspect(spec)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func TestInspectLoop(t *testing.T) {
	d := testkit.NewDisk(t, 64<<20)
	testkit.Mkfs(t, d.Path, "ext4")
	uuid := strings.TrimSpace(testkit.Run(t, "blkid", "-p", "-o", "value", "-s", "UUID", d.Path))
	i := inspect(t, d.Path)
	if i.Path != d.Path || i.Size != d.Size || i.Start != 0 || i.Kind != disk.Loop || i.DiskSeq == 0 || i.BioBased || i.Partition {
		t.Errorf("%+v", i)
	}
	if i.Identity.FSUUID != uuid {
		t.Errorf("file system UUID %q, blkid says %q", i.Identity.FSUUID, uuid)
	}
	if i.Backing == nil || i.Backing.File != d.File {
		t.Errorf("backing %+v", i.Backing)
	}
	if r := disk.TapRefusals(i); len(r) > 0 {
		t.Errorf("refused: %+v", r)
	}
	for _, spec := range []string{i.Name, "UUID=" + uuid, "UUID=" + strings.ToUpper(uuid)} {
		if o := inspect(t, spec); o.Dev != i.Dev {
			t.Errorf("%s is %s, not %s", spec, o.Name, i.Name)
		}
	}
	if len(i.Mounts) != 0 {
		t.Errorf("not mounted, yet %+v", i.Mounts)
	}
	dir := testkit.Mount(t, d.Path)
	if i = inspect(t, d.Path); len(i.Mounts) != 1 || i.Mounts[0].Point != dir {
		t.Errorf("mounted at %s, yet %+v", dir, i.Mounts)
	}
	if !disk.Holds(i, dir+"/not/there/yet") || disk.Holds(i, "/dev/shm/x") || disk.HoldsRefusal(i, "/dev/shm", dir) == nil {
		t.Error("what it holds")
	}
}
