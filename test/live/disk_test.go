package live

import (
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"tidemark/internal/loop"
	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// changing is a protected disk that something else than writes happens to.
type changing struct {
	t    *testing.T
	d    *program.Daemon
	disk *testkit.Disk
	dev  string // protected: the disk or its partition
	was  []byte // content at the bookmark "before"

	stretches int // of the history so far
}

// newChanging protects a disk, or its one partition, with numbered sectors on
// all of it and a partition table's signature by which it is known again.
func newChanging(t *testing.T, partition bool) *changing {
	c := &changing{t: t, stretches: 1, disk: testkit.NewDisk(t, 8*mib)}
	c.dev = c.disk.Path
	c.fill(c.dev, 1)
	signature := []byte("tide")
	if partition {
		testkit.OnePartition(t, c.disk)
		c.dev += "p1"
	} else {
		signature = append(signature, make([]byte, 68)...)
		signature[66+4], signature[67+4] = 0x55, 0xaa
	}
	f := open(t, c.disk.Path, 0)
	if _, err := f.WriteAt(signature, 440); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	f.Close()
	c.d = program.New(t)
	c.d.Protect("g", c.dev)
	c.d.Run("bookmark", "g", "before")
	c.was = content(t, c.dev)
	return c
}

// fill numbers every sector of a device but the first 64 KiB.
func (c *changing) fill(dev string, seq uint64) {
	c.t.Helper()
	f, buf := open(c.t, dev, unix.O_DIRECT), aligned(c.t, 64<<10)
	defer f.Close()
	size, err := f.Seek(0, 2)
	if err != nil {
		c.t.Fatal(err)
	}
	for off := int64(len(buf)); off < size; off += int64(len(buf)) {
		testkit.Fill(buf, 0, off, seq)
		if _, err := f.WriteAt(buf[:min(int64(len(buf)), size-off)], off); err != nil {
			c.t.Fatal(err)
		}
	}
}

// resize gives the disk another size as its user does.
func (c *changing) resize(size int64) {
	c.t.Helper()
	if err := os.Truncate(c.disk.File, size); err != nil {
		c.t.Fatal(err)
	}
	testkit.Run(c.t, "losetup", "-c", c.disk.Path)
}

// offline waits until the group says that it has stopped, and why.
func (c *changing) offline(why string) {
	c.t.Helper()
	c.d.Await("g", "offline: "+why, func(g *program.Group) bool {
		return g.State == "offline" && strings.Contains(fmt.Sprint(g.Conditions), why)
	})
}

// back waits until the group is sound again: what the vault has is the disk, and
// the history says that something lay between.
func (c *changing) back() {
	c.t.Helper()
	c.d.Await("g", "online", online)
	f, buf := open(c.t, c.dev, unix.O_DIRECT), aligned(c.t, 64<<10)
	defer f.Close()
	testkit.Fill(buf, 0, mib, 9) // it is captured as before
	if _, err := f.WriteAt(buf, mib); err != nil {
		c.t.Fatal(err)
	}
	identical(c.t, c.d, "g")
	same(c.t, "before", c.was, image(c.t, c.d, "g", "", "before"))
	all := stretches(c.t, c.d, "g")
	if len(all) <= c.stretches {
		c.t.Errorf("stretches %v: the change is not in the history", all)
	}
	c.stretches = len(all)
}

// TestResized: a disk that became smaller and has its size again holds something
// else than what was written to it. With another size for good it is another
// disk, until it is protected anew.
func TestResized(t *testing.T) {
	c := newChanging(t, false)
	c.resize(4 * mib)
	c.offline("size (bytes) changed")
	c.resize(8 * mib)
	c.back()
	c.d.Stop()
	c.resize(4 * mib)
	c.d.Start()
	c.offline("protect it again")
	c.resize(8 * mib)
	c.back()
	c.resize(12 * mib)
	c.offline("protect it again")
	c.d.Run("unprotect", "--abandon", "g")
	c.d.Protect("g2", c.dev)
	identical(t, c.d, "g2")
}

// TestResizedUnseen: the same between two looks of the daemon.
func TestResizedUnseen(t *testing.T) {
	c := newChanging(t, false)
	if err := unix.Kill(c.d.PID(), unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	c.resize(4 * mib)
	c.resize(8 * mib)
	if err := unix.Kill(c.d.PID(), unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	c.d.Await("g", "in its second stretch", func(g *program.Group) bool { return g.State == "protected" && g.Since > 1 })
	c.back()
}

// TestDetached: a loop device that is detached stays until the daemon lets go of
// it; then the group waits for its disk, whatever else comes under the device's
// name, and finds it under another one.
func TestDetached(t *testing.T) {
	c := newChanging(t, false)
	testkit.Run(t, "losetup", "-d", c.disk.Path)
	f := open(t, c.disk.Path, unix.O_DIRECT)
	if _, err := f.WriteAt(aligned(t, 4096), mib); err != nil {
		t.Fatal(err)
	}
	f.Close()
	identical(t, c.d, "g") // lazily: it is still there
	c.d.Stop()
	other := testkit.NewDisk(t, 8*mib)
	if other.Path != c.disk.Path {
		t.Logf("the other disk is %s, not %s", other.Path, c.disk.Path) // somebody was faster
	}
	c.d.Start()
	c.offline("is not on this machine")
	dev, err := loop.Attach(c.disk.File, loop.Options{})
	if err != nil {
		t.Fatal(err)
	}
	c.disk.Path = dev.Path
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = loop.Detach(dev.Path) })
	c.dev = dev.Path
	c.back()
}

// TestPartitionChanged: a partition that another table makes smaller, and that
// is written to through the whole disk before it has its size again.
func TestPartitionChanged(t *testing.T) {
	c := newChanging(t, true)
	testkit.Run(t, "resizepart", c.disk.Path, "1", "4096")
	c.offline("size (bytes) changed")
	f, buf := open(t, c.disk.Path, unix.O_DIRECT), aligned(t, 64<<10)
	testkit.Fill(buf, 0, 5*mib, 7)
	if _, err := f.WriteAt(buf, 6*mib); err != nil {
		t.Fatal(err)
	}
	f.Close()
	testkit.Run(t, "resizepart", c.disk.Path, "1", fmt.Sprint((8*mib-mib)/512))
	c.back()
	// With no daemon alive it is moved: that is not the disk that was protected.
	c.d.Stop()
	c.partition(4096)
	c.d.Start()
	c.offline("bytes and had")
	c.d.Stop()
	c.partition(2048)
	c.d.Start()
	c.back()
}

// partition has the disk's one partition begin at a sector and reach to the end.
func (c *changing) partition(first uint32) {
	c.t.Helper()
	testkit.Run(c.t, "partx", "--delete", c.disk.Path)
	f := open(c.t, c.disk.Path, 0)
	defer f.Close()
	var entry [8]byte
	binary.LittleEndian.PutUint32(entry[:], first)
	binary.LittleEndian.PutUint32(entry[4:], uint32(c.disk.Size/512)-first)
	if _, err := f.WriteAt(entry[:], 446+8); err != nil {
		c.t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		c.t.Fatal(err)
	}
	testkit.Run(c.t, "partx", "--update", "--nr", "1", c.disk.Path)
	if err := loop.WaitNode(c.disk.Path+"p1", patience); err != nil {
		c.t.Fatal(err)
	}
}
