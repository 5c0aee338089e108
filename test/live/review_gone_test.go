package live

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"tidemark/internal/loop"
	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// lastWords protects a disk, writes numbered blocks that only the ring holds,
// kills the daemon and takes the disk away. It gives what the disk held last.
func lastWords(t *testing.T) (*program.Daemon, *testkit.Disk, []byte) {
	disk := testkit.NewDisk(t, 8*mib)
	testkit.Mkfs(t, disk.Path, "ext4") // by which it is known again
	d := program.New(t)
	d.Protect("g", "--seal-every", "1m", disk.Path)
	f, buf := open(t, disk.Path, unix.O_DIRECT), aligned(t, 4096)
	for n := range 50 {
		at := int64(4*mib + n*4096)
		testkit.Fill(buf, 0, at, uint64(n+1))
		if _, err := f.WriteAt(buf, at); err != nil {
			t.Fatal(err)
		}
	}
	last := content(t, disk.Path)
	d.Kill()
	f.Close()
	if err := loop.Detach(disk.Path); err != nil {
		t.Fatal(err)
	}
	return d, disk, last
}

func reaches(t *testing.T, d *program.Daemon, want []byte) {
	t.Helper()
	program.Eventually(t, patience, "the vault has what was written last", func() error {
		if have := image(t, d, "g", "", "latest"); !bytes.Equal(have, want) {
			return program.ErrNotYet
		}
		return nil
	})
}

// TestDiskGone: a disk dies while no daemon runs. What it wrote last is in the
// ring, and goes to the vault although the disk does not come back.
func TestDiskGone(t *testing.T) {
	d, _, last := lastWords(t)
	d.Start()
	reaches(t, d, last)
	g := d.Group("g")
	if g.State != "offline" || !g.Has("offline") {
		t.Errorf("without its disk the group is %s: %v", g.State, g.Conditions)
	}
}

// TestDiskComesBackAsAnother: the same file attached again is another device to
// the kernel. What the old one's ring held is not thrown away with it.
func TestDiskComesBackAsAnother(t *testing.T) {
	d, disk, last := lastWords(t)
	reattach(t, disk)
	d.Start()
	identical(t, d, "g")
	all := stretches(t, d, "g")
	if len(all) != 2 {
		t.Fatalf("stretches %v, want two", all)
	}
	same(t, "the end of the first stretch", last, image(t, d, "g", "", seq(all[0].last)))
}

// TestDiskGoneAndVaultLate: what waits in the spool for a vault that was away
// gets there although the disk has died meanwhile.
func TestDiskGoneAndVaultLate(t *testing.T) {
	disk := testkit.NewDisk(t, 8*mib)
	testkit.Mkfs(t, disk.Path, "ext4")
	d := program.New(t)
	d.Protect("g", "--seal-every", "20ms", disk.Path)
	if err := os.Rename(d.Vault, d.Vault+".away"); err != nil {
		t.Fatal(err)
	}
	f, buf := open(t, disk.Path, unix.O_DIRECT), aligned(t, 4096)
	testkit.Fill(buf, 0, 5*mib, 1)
	if _, err := f.WriteAt(buf, 5*mib); err != nil {
		t.Fatal(err)
	}
	d.Await("g", "told that the vault is away", func(g *program.Group) bool { return g.Has("vault-unreachable") })
	last := content(t, disk.Path)
	d.Kill()
	f.Close()
	if err := loop.Detach(disk.Path); err != nil {
		t.Fatal(err)
	}
	d.Start()
	if err := os.Rename(d.Vault+".away", d.Vault); err != nil {
		t.Fatal(err)
	}
	reaches(t, d, last)
}

// reattach attaches a disk's file once more, and gives the device.
func reattach(t *testing.T, disk *testkit.Disk) string {
	t.Helper()
	dev, err := loop.Attach(disk.File, loop.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := loop.Detach(dev.Path); err != nil && !errors.Is(err, loop.ErrBusy) { // the daemon has it for another moment
			t.Error(err)
		}
	})
	return dev.Path
}
