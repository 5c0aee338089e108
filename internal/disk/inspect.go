package disk

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
)

// Kind is what sort of device a whole disk is.
type Kind string

// The kinds that rules depend on; a driver that is not listed is Other.
const (
	Loop   Kind = "loop"
	DM     Kind = "dm"
	MD     Kind = "md"
	SCSI   Kind = "scsi"
	NVMe   Kind = "nvme"
	Virtio Kind = "virtio"
	Zram   Kind = "zram"
	Brd    Kind = "brd"
	Pmem   Kind = "pmem"
	NBD    Kind = "nbd"
	Ublk   Kind = "ublk"
	MMC    Kind = "mmc"
	Other  Kind = "other"
)

// Info is a disk or partition as it was at one moment.
type Info struct {
	Name           string   `json:"name"`  // kernel name
	Path           string   `json:"path"`  // /dev/NAME
	Dev            uint32   `json:"dev"`   // kernel's number: major<<20|minor
	Whole          string   `json:"whole"` // kernel name of the whole disk; Name itself where it is one
	WholeDev       uint32   `json:"whole_dev"`
	Partition      bool     `json:"partition"`
	Number         int      `json:"number,omitempty"` // of the partition
	Start          int64    `json:"start"`            // bytes from the start of the whole disk
	Size           int64    `json:"size"`             // bytes
	LogicalSector  int64    `json:"logical_sector"`   // bytes
	PhysicalSector int64    `json:"physical_sector"`  // bytes
	DiskSeq        uint64   `json:"diskseq"`          // of the whole disk in this boot; 0: the kernel does not tell
	Kind           Kind     `json:"kind"`             // of the whole disk
	BioBased       bool     `json:"bio_based"`        // bios end without becoming requests
	ReadOnly       bool     `json:"read_only"`
	Identity       Identity `json:"identity"`

	Stack   Stack    `json:"stack"`
	Mounts  []Mount  `json:"mounts,omitempty"`  // of this disk, its partitions, and all above them
	Swap    []string `json:"swap,omitempty"`    // as /proc/swaps names them, on this disk or above it
	Holders []string `json:"holders,omitempty"` // what is stacked directly on this disk or a part that it shares
	Mapping *Mapping `json:"mapping,omitempty"` // of a device-mapper device
	Backing *Backing `json:"backing,omitempty"` // of a loop device

	zoned     string // queue/zoned of the whole disk
	dax       bool   // the driver can map its memory
	crypto    bool   // the queue encrypts in the drive
	hidden    bool
	clustered bool // md array shared by machines
	fs        string
	host      Host
}

// Backing is what a loop device reads and writes.
type Backing struct {
	File   string `json:"file"`             // as the kernel has it: " (deleted)" follows the name of one without a name
	Offset int64  `json:"offset,omitempty"` // bytes
}

// Inspect describes the block device that spec names: a path of a node or of a
// link to one, MAJ:MIN, UUID=…, PARTUUID=…, or a kernel name.
// Errors: ErrNotFound, ErrNotBlock.
func Inspect(spec string) (*Info, error) { return Host{}.Inspect(spec) }

// Inspect is the function of the same name for this host.
func (h Host) Inspect(spec string) (*Info, error) {
	i, err := h.named(spec)
	if err != nil {
		return nil, err
	}
	i.Identity = h.identity(i)
	if err := h.surround(i); err != nil {
		return nil, err
	}
	return i, nil
}

// Glance is Inspect without reading the device, which can wait while something
// below it is frozen or away. Identity has only what is known without that.
func Glance(spec string) (*Info, error) {
	i, err := Host{}.named(spec)
	if err != nil {
		return nil, err
	}
	i.Identity = i.host.given(i)
	if err := i.host.surround(i); err != nil {
		return nil, err
	}
	return i, nil
}

func (h Host) named(spec string) (*Info, error) {
	name, err := h.resolve(spec)
	if err != nil {
		return nil, err
	}
	return h.facts(name)
}

// surround adds what has to do with other devices.
func (h Host) surround(i *Info) error {
	v, err := h.survey()
	if err != nil {
		return err
	}
	i.Stack = v.stack(i.Name)
	i.Holders = v.holdersOf(i.Name)
	i.Mounts = v.mountsOf(i.Name)
	i.Swap = v.swapsOf(i.Name)
	return nil
}

// again is the device as it is now, without reading from it: what only its
// content tells is taken from the last look.
func (i *Info) again() (*Info, error) {
	now, err := i.host.facts(i.Name)
	if err != nil {
		return nil, err
	}
	now.Identity, now.fs = i.Identity, i.fs
	now.Identity.ByID = i.host.driveName(now.Whole)
	now.Identity.Size, now.Identity.DiskSeq = now.Size, now.DiskSeq
	return now, i.host.surround(now)
}

// facts reads what sysfs says of the device itself.
func (h Host) facts(name string) (*Info, error) {
	dev := h.devOf(name)
	if dev == 0 && h.attr(name, "dev") == "" {
		return nil, fmt.Errorf("%s: %w", name, ErrNotFound)
	}
	whole := h.wholeOf(name)
	seq, _ := strconv.ParseUint(h.attr(whole, "diskseq"), 10, 64)
	i := &Info{
		Name: name, Path: h.node(name), Dev: dev, Whole: whole, WholeDev: h.devOf(whole), Partition: whole != name,
		Number: int(h.number(name, "partition")), Start: h.number(name, "start") * block.SectorSize,
		Size:          h.number(name, "size") * block.SectorSize,
		LogicalSector: max(h.number(whole, "queue/logical_block_size"), block.SectorSize), PhysicalSector: h.number(whole, "queue/physical_block_size"),
		DiskSeq: seq, Kind: h.kind(whole), BioBased: !h.has(whole, "mq"), ReadOnly: h.number(name, "ro") != 0,
		zoned: h.attr(whole, "queue/zoned"), dax: h.number(whole, "queue/dax") != 0, crypto: h.has(whole, "queue/crypto"),
		hidden: h.number(whole, "hidden") != 0, clustered: h.attr(whole, "md/bitmap/metadata") == "clustered", host: h,
	}
	i.PhysicalSector = max(i.PhysicalSector, i.LogicalSector)
	if i.DiskSeq == 0 && h.live() {
		i.DiskSeq = diskSeq(h.node(whole))
	}
	if h.has(whole, "dm") {
		i.Mapping = h.mapping(whole, i.WholeDev)
	}
	if h.has(whole, "loop/backing_file") {
		i.Backing = &Backing{File: h.attr(whole, "loop/backing_file"), Offset: h.number(whole, "loop/offset")}
	}
	return i, nil
}

// node is the path of a device's node. The kernel writes "!" for "/" in names.
func (h Host) node(name string) string { return "/dev/" + strings.ReplaceAll(name, "!", "/") }

func diskSeq(node string) uint64 {
	f, err := os.Open(node)
	if err != nil {
		return 0
	}
	defer f.Close()
	seq, err := ioctlUint64(f, unix.BLKGETDISKSEQ)
	if err != nil {
		return 0
	}
	return seq
}

var kinds = []struct {
	prefix string
	kind   Kind
}{
	{"loop", Loop}, {"sd", SCSI}, {"sr", SCSI}, {"nvme", NVMe}, {"vd", Virtio}, {"zram", Zram}, {"ram", Brd},
	{"pmem", Pmem}, {"nbd", NBD}, {"ublkb", Ublk}, {"mmcblk", MMC},
}

func (h Host) kind(whole string) Kind {
	switch {
	case h.has(whole, "dm"):
		return DM
	case h.has(whole, "md"):
		return MD
	}
	for _, k := range kinds {
		rest, ok := strings.CutPrefix(whole, k.prefix)
		if ok && rest != "" {
			return k.kind
		}
	}
	return Other
}

// resolve turns what people call a device into its kernel name.
func (h Host) resolve(spec string) (string, error) {
	if kind, id, ok := strings.Cut(spec, "="); ok && !strings.Contains(kind, "/") {
		return h.byID(kind, id)
	}
	if dev, ok := parseDev(spec); ok {
		if name := h.nameOf(dev); name != "" {
			return name, nil
		}
		return "", fmt.Errorf("%s: %w with this number", spec, ErrNotFound)
	}
	if !strings.Contains(spec, "/") {
		if spec == "" || !h.has(spec, "dev") {
			return "", fmt.Errorf("%q: %w (give a path such as /dev/sda)", spec, ErrNotFound)
		}
		return spec, nil
	}
	if !h.live() {
		return h.resolveRecorded(spec)
	}
	var st unix.Stat_t
	if err := unix.Stat(spec, &st); err != nil {
		return "", fmt.Errorf("%s: %w: %w", spec, ErrNotFound, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return "", fmt.Errorf("%s: %w", spec, ErrNotBlock)
	}
	name := h.nameOf(kernelDev(st.Rdev))
	if name == "" {
		return "", fmt.Errorf("%s is %d:%d: %w with this number; the node is stale", spec, unix.Major(st.Rdev), unix.Minor(st.Rdev), ErrNotFound)
	}
	return name, nil
}

func (h Host) resolveRecorded(spec string) (string, error) {
	real, err := filepath.EvalSymlinks(h.path(spec))
	if err != nil {
		real = spec
	}
	name := strings.ReplaceAll(strings.TrimPrefix(strings.TrimPrefix(real, h.Root), "/dev/"), "/", "!")
	if !h.has(name, "dev") {
		return "", fmt.Errorf("%s: %w", spec, ErrNotFound)
	}
	return name, nil
}

// byID looks for UUID=, PARTUUID=: first where udev puts links, then on every device.
func (h Host) byID(kind, id string) (string, error) {
	var folder string
	var field func(Identity) string
	switch strings.ToUpper(kind) {
	case "UUID":
		folder, field = "by-uuid", func(i Identity) string { return i.FSUUID }
	case "PARTUUID":
		folder, field = "by-partuuid", func(i Identity) string { return i.PartUUID }
	default:
		return "", fmt.Errorf("%s=%s: %w: want UUID= or PARTUUID=", kind, id, ErrNotFound)
	}
	id = strings.Trim(id, `"`)
	for _, v := range []string{id, strings.ToLower(id)} {
		if filepath.Base(v) != v {
			break
		}
		if name, err := h.resolve("/dev/disk/" + folder + "/" + v); err == nil {
			return name, nil
		}
	}
	var found []string
	for _, name := range h.names() {
		i, err := h.facts(name)
		if err == nil && i.Size > 0 && strings.EqualFold(field(h.identity(i)), id) {
			found = append(found, name)
		}
	}
	switch len(found) {
	case 0:
		return "", fmt.Errorf("%s=%s: %w carries this id", kind, id, ErrNotFound)
	case 1:
		return found[0], nil
	}
	return "", fmt.Errorf("%s=%s: on %s alike: %w is meant for certain; name one by its path", kind, id, strings.Join(found, " and "), ErrNotFound)
}
