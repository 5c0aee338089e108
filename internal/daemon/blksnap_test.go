package daemon

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	abi "tidemark/internal/abi/blksnap"
	"tidemark/internal/block"
	"tidemark/internal/health"
	"tidemark/internal/serve"
	"tidemark/internal/snapshot"
	"tidemark/internal/testkit"
)

// TestForeignStorage: a client of /dev/blksnap gives ranges of a file on a mounted disk
// that is not served: refused as busy, with a condition that names the disk and
// what else can be given. A disk that nobody uses is taken.
func TestForeignStorage(t *testing.T) {
	testkit.Need(t, "root", "loop")
	dir := t.TempDir()
	s, err := serve.Open(t.Context(), &serve.Env{StateDir: filepath.Join(dir, "state"), Nodes: filepath.Join(dir, "nodes"), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(dir, "image")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 4<<20)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Create(t.Context(), serve.Spec{Name: "data", Backing: image, Front: serve.FrontNBDServer}); err != nil {
		t.Fatal(err)
	}
	i, err := s.CreateSnapshot(snapshot.Request{Devices: []string{"data"}})
	if err != nil {
		t.Fatal(err)
	}
	id, err := snapshot.ParseID(i.ID)
	if err != nil {
		t.Fatal(err)
	}
	mounted, free := testkit.NewDisk(t, 16<<20), testkit.NewDisk(t, 16<<20)
	mount := t.TempDir()
	testkit.Run(t, "mkfs.ext4", "-q", mounted.Path)
	testkit.Run(t, "mount", mounted.Path, mount)
	umount := func() { testkit.Run(t, "umount", mount) }
	t.Cleanup(func() { umount() })

	b := &blksnapSystem{devices: s, health: &health.Set{}, tracked: map[string]bool{}}
	ranges := []block.Range{{Off: 8 << 20, Len: 4 << 20}}
	give := func(d *testkit.Disk) (abi.Dev, error) {
		dev, ok := numberOf(d.Path)
		if !ok {
			t.Fatalf("%s is no block device", d.Path)
		}
		return dev, b.Append(abi.ID(id), dev, ranges)
	}
	dev, err := give(mounted)
	if !errors.Is(err, syscall.EBUSY) {
		t.Errorf("ranges of a mounted disk: %v, want EBUSY", err)
	}
	named := func(c health.Condition) bool {
		return c.Code == "snapshot-foreign-storage" && c.Subject == dev.String() && strings.Contains(c.Detail, mounted.Path) && strings.Contains(c.Remedy, "tidemark snapshot append "+i.ID)
	}
	if !slices.ContainsFunc(b.health.List(), named) {
		t.Errorf("conditions: %+v", b.health.List())
	}
	if now, err := s.Snapshot(id); err != nil || now.Capacity != 0 {
		t.Errorf("it was refused, and the snapshot is %+v, %v", now, err)
	}
	if _, err := give(free); err != nil || len(b.health.List()) != 1 {
		t.Errorf("a disk that nobody uses: %v, conditions %+v", err, b.health.List())
	}
	umount()
	umount = func() {}
	if _, err := give(mounted); err != nil || len(b.health.List()) > 0 {
		t.Errorf("once it is not mounted any more: %v, conditions %+v", err, b.health.List())
	}
	if err := errors.Join(s.DestroySnapshot(t.Context(), id), s.Remove(t.Context(), "data"), s.Stop(t.Context())); err != nil {
		t.Error(err)
	}
}
