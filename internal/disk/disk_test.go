package disk_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tidemark/internal/disk"
	"tidemark/internal/loop"
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

// nested makes a file on a mounted file system, with a file system in it, and attaches it.
func nested(t *testing.T, dir, fs string) (dev, file string) {
	t.Helper()
	file = filepath.Join(dir, "image")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, 32<<20); err != nil {
		t.Fatal(err)
	}
	testkit.Mkfs(t, file, fs)
	d, err := loop.Attach(file, loop.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Detach(); err != nil {
			t.Error(err)
		}
	})
	return d.Path, file
}

// partition makes a table, also known to a kernel that cannot read tables itself.
func partition(t *testing.T, d *testkit.Disk, script string) {
	t.Helper()
	testkit.Run(t, "sh", "-c", "sfdisk -q "+d.Path+" <"+script)
	testkit.Run(t, "partx", "--update", d.Path)
	if err := loop.WaitNode(d.Path+"p1", 5*time.Second); err != nil {
		t.Fatal(err)
	}
}

// TestPartitions compares with what blkid says, on both kinds of table.
func TestPartitions(t *testing.T) {
	for _, label := range []string{"gpt", "dos"} {
		t.Run(label, func(t *testing.T) {
			d := testkit.NewDisk(t, 96<<20)
			script := filepath.Join(t.TempDir(), "layout")
			if err := os.WriteFile(script, []byte("label: "+label+"\nstart=2048,size=40960\nstart=43008\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			partition(t, d, script)
			testkit.Mkfs(t, d.Path+"p1", "ext4")
			testkit.Mkfs(t, d.Path+"p2", "ext4")
			whole, p1, p2 := inspect(t, d.Path), inspect(t, d.Path+"p1"), inspect(t, d.Path+"p2")
			blkid := func(dev, key string) string {
				return strings.TrimSpace(testkit.Run(t, "blkid", "-p", "-o", "value", "-s", key, dev))
			}
			if got, want := p2.Identity.PartUUID, blkid(p2.Path, "PART_ENTRY_UUID"); got != want {
				t.Errorf("partition UUID %q, want %q", got, want)
			}
			if got, want := whole.Identity.PTUUID, blkid(d.Path, "PTUUID"); got != want {
				t.Errorf("table UUID %q, want %q", got, want)
			}
			if p2.Start != 43008*512 || p2.Whole != whole.Name || p2.DiskSeq != whole.DiskSeq || p2.Number != 2 || !p2.Partition {
				t.Errorf("%+v", p2)
			}
			if disk.Related(p1, p2) || !disk.Related(whole, p2) {
				t.Error("relations of partitions")
			}
			if got := inspect(t, "PARTUUID="+p2.Identity.PartUUID); got.Name != p2.Name {
				t.Errorf("found %s", got.Name)
			}
			dir := testkit.Mount(t, p1.Path)
			if w, two := inspect(t, d.Path), inspect(t, p2.Path); len(w.Mounts) != 1 || len(two.Mounts) != 0 {
				t.Errorf("whole disk %+v, second partition %+v", w.Mounts, two.Mounts)
			}
			if !disk.Holds(whole, dir) || disk.Holds(p2, dir) {
				t.Error("who holds the mounted folder")
			}
		})
	}
}

func TestLoopOnFileSystem(t *testing.T) {
	testkit.Need(t, "xfs", "ext4")
	d := testkit.NewDisk(t, 320<<20)
	testkit.Mkfs(t, d.Path, "xfs")
	outer := testkit.Mount(t, d.Path)
	dev, _ := nested(t, outer, "ext4")
	inner := testkit.Mount(t, dev)
	below, above := inspect(t, d.Path), inspect(t, dev)
	if !disk.Related(below, above) || len(below.Mounts) != 2 || len(above.Mounts) != 1 {
		t.Errorf("mounts of the lower %+v, of the upper %+v", below.Mounts, above.Mounts)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(inner+"/vault", link); err != nil {
		t.Fatal(err)
	}
	if !disk.Holds(below, link) || !disk.Holds(above, link) || disk.Holds(above, outer) {
		t.Error("who holds what through the file")
	}
	if r := disk.TapRefusals(below); len(r) > 0 {
		t.Errorf("a file system with an image in it is no stack: %+v", r)
	}
}

func TestBtrfsOfTwo(t *testing.T) {
	testkit.Need(t, "btrfs")
	a, b := testkit.NewDisk(t, 160<<20), testkit.NewDisk(t, 160<<20)
	testkit.Run(t, "mkfs.btrfs", "-q", "-f", a.Path, b.Path)
	testkit.Run(t, "btrfs", "device", "scan", a.Path, b.Path)
	dir := testkit.Mount(t, a.Path)
	testkit.Run(t, "btrfs", "subvolume", "create", dir+"/sub")
	for _, d := range []*testkit.Disk{a, b} {
		i := inspect(t, d.Path)
		if len(i.Mounts) != 1 || i.Mounts[0].Point != dir || !disk.Holds(i, dir+"/sub/vault") {
			t.Errorf("%s: %+v", d.Path, i.Mounts)
		}
	}
}

func TestInspectRefuses(t *testing.T) {
	for spec, want := range map[string]error{
		"/dev/null": disk.ErrNotBlock, "/dev/nothing-here": disk.ErrNotFound, "nothing": disk.ErrNotFound, "": disk.ErrNotFound, "..": disk.ErrNotFound,
		"259:65000": disk.ErrNotFound, "UUID=../../loop0": disk.ErrNotFound, "LABEL=x": disk.ErrNotFound, t.TempDir(): disk.ErrNotBlock,
	} {
		if _, err := disk.Inspect(spec); !errors.Is(err, want) {
			t.Errorf("%q: %v, want %v", spec, err, want)
		}
	}
}

// watch collects the events of a disk until the test ends.
func watch(t *testing.T, i *disk.Info) <-chan disk.Event {
	t.Helper()
	events := make(chan disk.Event, 16)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- disk.Watch(ctx, []*disk.Info{i}, func(e disk.Event) { events <- e })
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return events
}

func expect(t *testing.T, events <-chan disk.Event, what string) disk.Event {
	t.Helper()
	var seen []string
	for over := time.After(10 * time.Second); ; {
		select {
		case e := <-events:
			seen = append(seen, e.Changed...)
			if strings.Contains(strings.Join(e.Changed, "\n"), what) {
				return e
			}
		case <-over:
			t.Fatalf("nobody told of %q, only of %q", what, seen)
		}
	}
}

func TestWatch(t *testing.T) {
	testkit.NoLeaks(t)
	d := testkit.NewDisk(t, 16<<20)
	events := watch(t, inspect(t, d.Path))
	if err := os.Truncate(d.File, 32<<20); err != nil {
		t.Fatal(err)
	}
	testkit.Run(t, "losetup", "-c", d.Path)
	if e := expect(t, events, "size"); e.Now == nil || e.Now.Size != 32<<20 || e.Removed {
		t.Errorf("%+v", e)
	}
	if err := loop.Detach(d.Path); err != nil {
		t.Fatal(err)
	}
	expect(t, events, "backing")
}

func TestWatchRemoved(t *testing.T) {
	testkit.NoLeaks(t)
	d := testkit.NewDisk(t, 64<<20)
	script := filepath.Join(t.TempDir(), "layout")
	if err := os.WriteFile(script, []byte("label: dos\nstart=2048\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	partition(t, d, script)
	events := watch(t, inspect(t, d.Path+"p1"))
	testkit.Run(t, "partx", "--delete", d.Path)
	if e := expect(t, events, "gone"); !e.Removed || e.Now != nil {
		t.Errorf("%+v", e)
	}
}

func TestStatCounts(t *testing.T) {
	d := testkit.NewDisk(t, 16<<20)
	i := inspect(t, d.Path)
	before, _, on, err := disk.Stat(i)
	if err != nil || !on {
		t.Fatal(on, err)
	}
	testkit.Run(t, "dd", "if=/dev/zero", "of="+d.Path, "bs=1M", "count=3", "oflag=direct", "status=none")
	if after, _, _, err := disk.Stat(i); after-before != 3<<20 || err != nil {
		t.Errorf("%d bytes counted for 3 MiB, %v", after-before, err)
	}
}
