package disk

import (
	"strings"
	"testing"

	"tidemark/internal/health"
)

func codes(cs []health.Condition) []string {
	var out []string
	for _, c := range cs {
		out = append(out, c.Code)
	}
	return out
}

func TestSame(t *testing.T) {
	drive := Identity{ByID: "wwid:1", FSUUID: "a", Size: 100, Name: "sda", DiskSeq: 1, BootID: "b1"}
	file := Identity{FSUUID: "a", Size: 100, Name: "loop0", DiskSeq: 1, BootID: "b1"}
	bare := Identity{Size: 100, Name: "loop0", DiskSeq: 1, BootID: "b1"}
	with := func(i Identity, f func(*Identity)) Identity { f(&i); return i }
	for _, c := range []struct {
		what string
		a, b Identity
		want bool
	}{
		{"a drive under another name, grown, with another file system", drive, Identity{ByID: "wwid:1", FSUUID: "z", Size: 200, Name: "sdq", BootID: "b2"}, true},
		{"a copy on another drive", drive, with(drive, func(i *Identity) { i.ByID = "wwid:2" }), false},
		{"another partition of one drive", with(drive, func(i *Identity) { i.Partition = 1 }), with(drive, func(i *Identity) { i.Partition = 2 }), false},
		{"a partition made anew", with(drive, func(i *Identity) { i.Partition, i.PartUUID = 1, "p" }), with(drive, func(i *Identity) { i.Partition, i.PartUUID = 1, "q" }), false},
		{"a whole disk and its partition", drive, with(drive, func(i *Identity) { i.Partition = 1 }), false},
		{"a volume renamed", Identity{DMUUID: "LVM-1", Name: "dm-0"}, Identity{DMUUID: "LVM-1", Name: "dm-7"}, true},
		{"a file attached elsewhere", file, with(file, func(i *Identity) { i.Name, i.DiskSeq = "loop3", 9 }), true},
		{"a copy of another size", file, with(file, func(i *Identity) { i.Name, i.DiskSeq, i.Size = "loop3", 9, 200 }), false},
		{"mkfs on the disk", file, with(file, func(i *Identity) { i.FSUUID = "z" }), true},
		{"another file on the same device", file, with(file, func(i *Identity) { i.FSUUID, i.DiskSeq = "z", 2 }), false},
		{"a bare disk", bare, bare, true},
		{"a bare disk in another boot", bare, with(bare, func(i *Identity) { i.BootID = "b2" }), true},
		{"a bare disk attached anew", bare, with(bare, func(i *Identity) { i.DiskSeq = 2 }), false},
		{"a file system where there was none, in another boot", bare, with(file, func(i *Identity) { i.BootID = "b2" }), false},
	} {
		for _, pair := range [][2]Identity{{c.a, c.b}, {c.b, c.a}} {
			if got, why := Same(pair[0], pair[1]); got != c.want || why == "" {
				t.Errorf("%s: %v (%s), want %v", c.what, got, why, c.want)
			}
		}
	}
}

func TestChanged(t *testing.T) {
	base := func() *Info {
		return &Info{Name: "dm-0", Dev: 1, WholeDev: 1, Size: 100, DiskSeq: 3, Mapping: &Mapping{UUID: "u", Table: "t", Event: 1}, Backing: &Backing{File: "/a"}}
	}
	for want, f := range map[string]func(*Info){
		"size": func(i *Info) { i.Size++ }, "start": func(i *Info) { i.Start++ }, "sequence": func(i *Info) { i.DiskSeq++ },
		"table": func(i *Info) { i.Mapping.Table = "o" }, "event": func(i *Info) { i.Mapping.Event++ }, "vanished": func(i *Info) { i.Mapping = nil },
		"backing": func(i *Info) { i.Backing.File = "/b" }, "stacked": func(i *Info) { i.Holders = []string{"md0"} },
		"past the block layer": func(i *Info) { i.dax = true; i.Mounts = []Mount{{Point: "/a", FS: "xfs"}} },
		"encryption":           func(i *Info) { i.Mounts = []Mount{{Point: "/a", Options: []string{"inlinecrypt"}}} },
	} {
		now := base()
		f(now)
		if got := Changed(base(), now); len(got) != 1 || !strings.Contains(got[0], want) {
			t.Errorf("%s: %q", want, got)
		}
	}
	mounted := base()
	mounted.Mounts = []Mount{{Point: "/a", FS: "ext4"}}
	if got := Changed(base(), mounted); len(got) != 0 {
		t.Errorf("a mount is no change: %q", got)
	}
	if got := Changed(base(), nil); len(got) != 1 {
		t.Errorf("gone: %q", got)
	}
}

// FuzzHead: whatever is on a disk, looking at it ends well.
func FuzzHead(f *testing.F) {
	f.Add(make([]byte, headSize), int64(512), 1)
	gpt := make([]byte, 4096)
	copy(gpt[512:], "EFI PART")
	gpt[512+72], gpt[512+84] = 2, 128
	f.Add(gpt, int64(512), 3)
	f.Add([]byte("XFSB"), int64(4096), 0)
	f.Fuzz(func(t *testing.T, b []byte, sector int64, number int) {
		if sector <= 0 || sector > 64<<10 {
			return
		}
		fs, uuid := superblock(b)
		if fs == "" && uuid != "" {
			t.Error("a UUID of nothing")
		}
		tableUUID(b, sector)
		partUUIDIn(b, sector, number)
	})
}
