package serve

import (
	"errors"
	"testing"

	"tidemark/internal/disk"
	"tidemark/internal/loop"
	"tidemark/internal/testkit"
)

// TestOtherDisk: another disk has the path of the one that was served by the
// time the daemon is started again. It is left alone; the disk itself is taken
// again, with a file system that was made while it was served.
func TestOtherDisk(t *testing.T) {
	testkit.Need(t, "root", "loop", "ext4")
	env := newEnv(t)
	d := testkit.NewDisk(t, 16*mib)
	s := open(t, env)
	create(t, s, Spec{Name: "data", Backing: d.Path, Front: FrontNBDServer})
	find := func() *Device {
		t.Helper()
		dev, err := s.find("data")
		if err != nil {
			t.Fatal(err)
		}
		return dev
	}
	stop := func() {
		t.Helper()
		if err := s.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	stop()
	testkit.Mkfs(t, d.Path, "ext4")
	s = open(t, env)
	if dev := find(); dev.served == nil {
		t.Fatalf("its own disk is refused: %+v", dev.health.List())
	}
	stop()
	r, err := s.load("data")
	if err != nil || r.Disk == nil || r.Disk.FSUUID == "" {
		t.Fatalf("remembered: %+v, %v", r, err)
	}

	// The same loop device over another file: what becomes of /dev/sdb when a disk is missing.
	if err := loop.Detach(d.Path); err != nil {
		t.Fatal(err)
	}
	other := imageFile(t, 16*mib)
	testkit.Mkfs(t, other, "ext4")
	taken, err := loop.Attach(other, loop.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = taken.Close(); _ = loop.Detach(taken.Path) })
	if taken.Path != d.Path {
		t.Logf("somebody else has %s by now; %s stands for it", d.Path, taken.Path)
		r.Spec.Backing = taken.Path
		if err := s.save(r); err != nil {
			t.Fatal(err)
		}
	}
	s = open(t, env)
	defer stop()
	dev := find()
	if c := dev.health.List(); dev.served != nil || len(c) != 1 || c[0].Code != "device-offline" {
		t.Errorf("another disk is served: %+v", c)
	}
	if err := s.Remove(t.Context(), "data"); err != nil {
		t.Error(err)
	}
}

func TestCheckDisk(t *testing.T) {
	was := disk.Identity{ByID: "serial:1", Size: 100, Name: "sdb", BootID: "a"}
	bare := disk.Identity{Size: 100, Name: "vdb", DiskSeq: 7, BootID: "a"}
	content := disk.Identity{FSUUID: "x", Size: 100, Name: "vdb", DiskSeq: 7, BootID: "a"}
	for _, c := range []struct {
		name     string
		was, now *disk.Identity
		other    bool
	}{
		{"a file", nil, nil, false},
		{"the same drive under another name", &was, &disk.Identity{ByID: "serial:1", Size: 100, Name: "sdc", BootID: "b"}, false},
		{"another drive under the same name", &was, &disk.Identity{ByID: "serial:2", Size: 100, Name: "sdb", BootID: "b"}, true},
		{"no name, same boot, same number", &bare, &disk.Identity{FSUUID: "new", Size: 100, Name: "vdb", DiskSeq: 7, BootID: "a"}, false},
		{"no name, same boot, plugged in anew", &bare, &disk.Identity{Size: 100, Name: "vdb", DiskSeq: 8, BootID: "a"}, true},
		{"no name, another boot", &bare, &disk.Identity{Size: 100, Name: "vdb", DiskSeq: 3, BootID: "b"}, false},
		{"no name, another boot, grown", &bare, &disk.Identity{Size: 200, Name: "vdb", DiskSeq: 3, BootID: "b"}, false},
		{"no name, another boot, smaller", &bare, &disk.Identity{Size: 50, Name: "vdb", DiskSeq: 3, BootID: "b"}, true},
		{"known by what is on it", &content, &disk.Identity{FSUUID: "x", Size: 100, Name: "vdc", DiskSeq: 3, BootID: "b"}, false},
		{"something else is on it", &content, &disk.Identity{FSUUID: "y", Size: 100, Name: "vdb", DiskSeq: 3, BootID: "b"}, true},
	} {
		if err := checkDisk("/dev/x", c.was, c.now); errors.Is(err, ErrOtherDisk) != c.other {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}
