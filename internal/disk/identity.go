package disk

import (
	"fmt"
	"os"
	"strings"
)

// Identity tells a disk from others, and finds it again under another name.
// It is kept in vaults and configurations: fields are only ever added.
type Identity struct {
	ByID      string `json:"by_id,omitempty"`     // of the drive: "wwid:…", "serial:…", "md:…"; a partition has its disk's
	Partition int    `json:"partition,omitempty"` // number of the partition; 0: a whole disk
	PartUUID  string `json:"partuuid,omitempty"`  // lower case
	PTUUID    string `json:"ptuuid,omitempty"`    // of the partition table on a whole disk
	FSUUID    string `json:"fsuuid,omitempty"`    // of the file system directly on it, lower case
	DMUUID    string `json:"dm_uuid,omitempty"`
	Served    string `json:"served,omitempty"` // of a device that Tidemark serves: its name and its backing
	Size      int64  `json:"size"`             // bytes
	Name      string `json:"name"`             // kernel name
	DiskSeq   uint64 `json:"diskseq,omitempty"`
	BootID    string `json:"boot_id,omitempty"` // the boot in which DiskSeq counts
}

// Same says whether both describe one disk, and by what that is known. The
// strongest name that both have decides: a drive's own, then a partition's,
// then the content's together with the size. A disk without any is known by
// kernel name, sequence number and size. Where nothing decides the answer is no.
func Same(a, b Identity) (bool, string) {
	if a.Partition != b.Partition && a.PartUUID == "" {
		return false, fmt.Sprintf("partition %d is not partition %d", a.Partition, b.Partition)
	}
	if a.Partition != 0 && a.PartUUID != "" && b.PartUUID != "" && a.PartUUID != b.PartUUID {
		return false, fmt.Sprintf("partition UUID %s is not %s", a.PartUUID, b.PartUUID)
	}
	if a.Served != "" || b.Served != "" {
		return a.Served == b.Served && a.Size == b.Size, fmt.Sprintf("served device %q with %d bytes, and %q with %d", a.Served, a.Size, b.Served, b.Size)
	}
	for _, c := range []struct{ what, a, b string }{
		{"device-mapper UUID", a.DMUUID, b.DMUUID},
		{"drive", a.ByID, b.ByID},
		{"partition UUID", a.PartUUID, b.PartUUID},
	} {
		if c.a == "" || c.b == "" {
			continue
		}
		if c.a != c.b {
			return false, fmt.Sprintf("%s %s is not %s", c.what, c.a, c.b)
		}
		return true, c.what + " " + c.a
	}
	return sameContent(a, b)
}

// sameContent compares what is written on the disk, which copies share: so the
// size must agree too, and within one boot the kernel's own number goes first.
func sameContent(a, b Identity) (bool, string) {
	kernel := fmt.Sprintf("name %s, disk sequence number %d and size %d", a.Name, a.DiskSeq, a.Size)
	alike := a.Name == b.Name && a.DiskSeq == b.DiskSeq && a.Size == b.Size
	if alike && a.DiskSeq != 0 && a.BootID == b.BootID {
		return true, kernel
	}
	if a.Size != b.Size {
		return false, fmt.Sprintf("size %d is not %d, and neither drive has a name of its own", a.Size, b.Size)
	}
	for _, c := range []struct{ what, a, b string }{
		{"partition table", a.PTUUID, b.PTUUID},
		{"file system UUID", a.FSUUID, b.FSUUID},
	} {
		switch {
		case c.a == "" && c.b == "":
			continue
		case c.a != c.b:
			return false, fmt.Sprintf("%s %q is not %q", c.what, c.a, c.b)
		}
		return true, fmt.Sprintf("%s %s and size %d", c.what, c.a, a.Size)
	}
	if alike {
		return true, kernel
	}
	return false, fmt.Sprintf("nothing shows that %s (sequence number %d) and %s (%d) are one disk", a.Name, a.DiskSeq, b.Name, b.DiskSeq)
}

// String is the strongest name, for people.
func (i Identity) String() string {
	for _, c := range []struct{ prefix, value string }{
		{"served:", i.Served}, {"dm:", i.DMUUID}, {"partuuid:", i.PartUUID}, {"", i.ByID}, {"ptuuid:", i.PTUUID}, {"uuid:", i.FSUUID},
	} {
		if c.value != "" {
			return c.prefix + c.value
		}
	}
	return fmt.Sprintf("%s seq:%d size:%d", i.Name, i.DiskSeq, i.Size)
}

// identity collects a device's names. What udev makes up is not used, because
// it may not have run yet: the same disk must get the same names at every time.
func (h Host) identity(i *Info) Identity {
	id := h.given(i)
	if i.Partition && id.PartUUID == "" {
		id.PartUUID = partUUIDIn(h.head(i.Whole), i.LogicalSector, i.Number)
	}
	head := h.head(i.Name)
	i.fs, id.FSUUID = superblock(head)
	if !i.Partition {
		id.PTUUID = tableUUID(head, i.LogicalSector)
	}
	return id
}

// given are the names that are known without reading the device.
func (h Host) given(i *Info) Identity {
	id := Identity{Size: i.Size, Name: i.Name, DiskSeq: i.DiskSeq, Partition: i.Number, ByID: h.driveName(i.Whole)}
	boot, _ := os.ReadFile(h.path("/proc/sys/kernel/random/boot_id")) // always there on Linux
	id.BootID = strings.TrimSpace(string(boot))
	if i.Mapping != nil && !i.Partition {
		id.DMUUID = i.Mapping.UUID
	}
	if i.Partition {
		id.PartUUID = strings.ToLower(h.uevent(i.Name, "PARTUUID"))
	}
	return id
}

// driveName is what a drive calls itself.
func (h Host) driveName(whole string) string {
	for _, attr := range []string{"wwid", "device/wwid"} {
		if v := h.attr(whole, attr); v != "" {
			return "wwid:" + strings.Join(strings.Fields(v), "_")
		}
	}
	for _, attr := range []string{"serial", "device/serial"} {
		if v := h.attr(whole, attr); v != "" {
			return "serial:" + strings.Join(strings.Fields(h.attr(whole, "device/model")+" "+v), "_")
		}
	}
	if v := h.attr(whole, "md/uuid"); v != "" {
		return "md:" + v
	}
	if v := h.attr(whole, "device/cid"); v != "" {
		return "cid:" + v
	}
	return ""
}

// uevent is one value of a device's uevent file.
func (h Host) uevent(name, key string) string {
	for line := range strings.Lines(h.attr(name, "uevent")) {
		if v, ok := strings.CutPrefix(line, key+"="); ok {
			return strings.TrimSpace(v)
		}
	}
	return ""
}
