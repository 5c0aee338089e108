package mount

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"tidemark/internal/block"
)

// fileSystem is what a magic number says of a range of a view.
type fileSystem struct {
	kind string // as mount(2) knows it
	uuid string // of btrfs: its fsid
}

// detect looks for a file system in r of the view. ErrNoFileSystem names what
// is there instead, where that can be told.
func detect(view io.ReaderAt, r block.Range) (fileSystem, error) {
	head := make([]byte, min(r.Len, 68<<10))
	if n, err := view.ReadAt(head, r.Off); n < len(head) {
		return fileSystem{}, fmt.Errorf("looking for a file system: %w", err)
	}
	at := func(off int, magic string) bool {
		return len(head) >= off+len(magic) && string(head[off:off+len(magic)]) == magic
	}
	const btrfsSuper = 64 << 10
	switch {
	case at(btrfsSuper+0x40, "_BHRfS_M"):
		return fileSystem{"btrfs", uuid(head[btrfsSuper+0x20:])}, nil
	case at(0, "XFSB"):
		return fileSystem{"xfs", uuid(head[32:])}, nil
	case at(0x438, "\x53\xef"):
		return fileSystem{extKind(head[0x400:]), uuid(head[0x468:])}, nil
	}
	for _, other := range []struct {
		off   int
		magic string
		name  string
	}{
		{0, "LUKS\xba\xbe", "an encrypted volume (LUKS): restore or export it, and open it with cryptsetup"},
		{512, "LABELONE", "an LVM physical volume: restore or export it, and activate it apart from its original"},
		{4096 - 10, "SWAPSPACE2", "swap space"},
		{4096, "\xfc\x4e\x2b\xa9", "a member of an md array"},
		{54, "FAT1", "a FAT file system: name it with an explicit type"},
		{82, "FAT32", "a FAT file system: name it with an explicit type"},
		{3, "NTFS    ", "an NTFS file system: name it with an explicit type"},
	} {
		if at(other.off, other.magic) {
			return fileSystem{}, fmt.Errorf("%w: it holds %s", ErrNoFileSystem, other.name)
		}
	}
	return fileSystem{}, fmt.Errorf("%w: no magic number of ext2, ext3, ext4, xfs or btrfs", ErrNoFileSystem)
}

// extKind tells ext2, ext3 and ext4 apart by the features that only the later ones have.
func extKind(super []byte) string {
	const (
		hasJournal   = 0x4              // compatible
		ext3Incompat = 0x2 | 0x4 | 0x10 // file types, needs recovery, meta block groups
		ext3ROCompat = 0x1 | 0x2 | 0x4  // sparse superblocks, large files, btree directories
	)
	compat, incompat, ro := binary.LittleEndian.Uint32(super[0x5c:]), binary.LittleEndian.Uint32(super[0x60:]), binary.LittleEndian.Uint32(super[0x64:])
	switch {
	case incompat&^ext3Incompat != 0 || ro&^ext3ROCompat != 0:
		return "ext4"
	case compat&hasJournal != 0:
		return "ext3"
	}
	return "ext2"
}

func uuid(b []byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[0:4], b[4:6], b[6:8], b[8:10], b[10:16])
}

// checkBtrfs refuses a btrfs whose fsid is on this machine already: the kernel
// takes all devices with one fsid for parts of one file system and would mix them up.
func checkBtrfs(fsid string) error {
	if _, err := os.Stat("/sys/fs/btrfs/" + fsid); err == nil {
		return fmt.Errorf("%w: it is mounted; restore to a machine without it, or export it to one", sameFS(fsid))
	}
	names, err := filepath.Glob("/sys/class/block/*")
	if err != nil {
		return err
	}
	var devs []string
	for _, n := range names {
		if size, err := os.ReadFile(n + "/size"); err == nil && strings.TrimSpace(string(size)) != "0" {
			devs = append(devs, "/dev/"+strings.ReplaceAll(filepath.Base(n), "!", "/"))
		}
	}
	return lookFor(fsid, devs, fsidOf, diskTime)
}

// diskTime is how long the disks of the machine have to say what they hold.
const diskTime = 10 * time.Second

// lookFor asks all devices at once, and does not wait for one that hangs: what
// it holds is not known then.
func lookFor(fsid string, devs []string, read func(dev string) (string, error), patience time.Duration) error {
	type answer struct{ dev, fsid string }
	answers, silent := make(chan answer, len(devs)), map[string]bool{}
	for _, dev := range devs {
		silent[dev] = true
		go func() {
			got, err := read(dev)
			if err != nil {
				got = "" // what cannot be read cannot be mounted with it
			}
			answers <- answer{dev, got}
		}()
	}
	end := time.After(patience)
	for len(silent) > 0 {
		select {
		case a := <-answers:
			if a.fsid == fsid {
				return fmt.Errorf("%w: it is on %s; take that away, or export the view to another machine", sameFS(fsid), a.dev)
			}
			delete(silent, a.dev)
		case <-end:
			names := strings.Join(slices.Sorted(maps.Keys(silent)), ", ")
			return fmt.Errorf("%w for all that can be told: %s has not answered for %v; take that away, or export the view to another machine", sameFS(fsid), names, patience)
		}
	}
	return nil
}

func sameFS(fsid string) error { return fmt.Errorf("btrfs %s: %w", fsid, ErrSameFS) }

// fsidOf reads a device's btrfs fsid.
func fsidOf(dev string) (string, error) {
	f, err := os.Open(dev)
	if err != nil {
		return "", err
	}
	defer f.Close()
	super := make([]byte, 4096)
	if _, err := f.ReadAt(super, 64<<10); err != nil {
		return "", err
	}
	if string(super[0x40:0x48]) != "_BHRfS_M" {
		return "", errors.New("no btrfs")
	}
	return uuid(super[0x20:]), nil
}
