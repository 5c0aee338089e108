package disk

import (
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/cilium/ebpf/btf"

	"tidemark/internal/health"
)

// Codes of the reasons for which the tap is not put on a disk. They are stable.
const (
	CodeZoned      = "disk-zoned"
	CodeDAX        = "disk-dax"
	CodeRWPage     = "disk-rw-page"
	CodeMultipath  = "disk-multipath-path"
	CodeMember     = "disk-stacked-on"
	CodeEncryption = "disk-inline-encryption"
	CodeSwap       = "disk-swap"
	CodeCluster    = "disk-cluster"
	CodeMerge      = "disk-merge-running"
	CodeHidden     = "disk-hidden"
	CodeEmpty      = "disk-empty"
	CodeHoldsOwn   = "disk-holds-own-data"
)

// Forceable says whether a refusal may be overruled by whoever knows that only
// this machine writes to the disk.
func Forceable(code string) bool { return code == CodeCluster }

// TapRefusals lists every reason against tapping a disk, none where it may be
// tapped. A read-only disk may.
func TapRefusals(i *Info) []health.Condition {
	var out []health.Condition
	refuse := func(code, remedy, detail string, args ...any) {
		out = append(out, health.Condition{Code: code, Severity: health.Error, Subject: i.Name, Detail: i.Name + " " + fmt.Sprintf(detail, args...), Remedy: remedy})
	}
	if i.Size == 0 {
		refuse(CodeEmpty, "attach a file or insert a medium first", "has no size: there is nothing in it")
	}
	if i.hidden {
		refuse(CodeHidden, "tap the multipath device that it is a path of", "is hidden by its driver")
	}
	if i.zoned != "" && i.zoned != "none" {
		refuse(CodeZoned, "put a conventional disk, or dm-zoned with the tap on top of it, in its place", "is a zoned device (%s): zone commands change its content without writes", i.zoned)
	}
	if points := i.daxPoints(); points != "" {
		refuse(CodeDAX, "mount it with -o dax=never", "is mounted with direct access (DAX) at %s: stores to mapped files are no writes of the block layer", points)
	}
	if slices.Contains([]Kind{Zram, Brd, Pmem}, i.Kind) {
		i.refuseRWPage(refuse)
	}
	i.refuseStacked(refuse)
	if points := i.inlinePoints(); points != "" {
		refuse(CodeEncryption, "mount it without the option inlinecrypt", "is mounted with inline encryption at %s: what is seen being written is not what lies on the disk", points)
	} else if i.crypto {
		refuse(CodeEncryption, "use a disk without inline encryption, or dm-crypt with the tap on top of it", "can encrypt in the drive (inline encryption): what is seen being written need not be what lies on it")
	}
	if len(i.Swap) > 0 {
		refuse(CodeSwap, "swapoff "+strings.Join(i.Swap, " ")+", or protect the other partitions one by one", "is swapped to (%s)", strings.Join(i.Swap, ", "))
	}
	if why := i.cluster(); why != "" {
		refuse(CodeCluster, "if no other machine writes to it, repeat with --force", "%s: other machines may write to it unseen", why)
	}
	return out
}

func (i *Info) refuseRWPage(refuse func(code, remedy, detail string, args ...any)) {
	switch has, err := rwPage(); {
	case err != nil:
		refuse(CodeRWPage, "use a kernel with type information (CONFIG_DEBUG_INFO_BTF)", "is of kind %s, which on some kernels writes pages past the block layer, and it cannot be told for this one: %v", i.Kind, err)
	case has:
		refuse(CodeRWPage, "use Linux 6.4 or later, which has no such path, or another kind of disk", "is of kind %s, which on this kernel writes pages past the block layer (rw_page)", i.Kind)
	}
}

// rwPage says whether drivers of this kernel can write single pages without a bio.
var rwPage = sync.OnceValues(func() (bool, error) {
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		return false, fmt.Errorf("kernel type information: %w", err)
	}
	return hasMember(spec, "block_device_operations", "rw_page")
})

func hasMember(spec *btf.Spec, structure, member string) (bool, error) {
	var s *btf.Struct
	if err := spec.TypeByName(structure, &s); err != nil {
		return false, fmt.Errorf("struct %s: %w", structure, err)
	}
	return slices.ContainsFunc(s.Members, func(m btf.Member) bool { return m.Name == member }), nil
}

func (i *Info) refuseStacked(refuse func(code, remedy, detail string, args ...any)) {
	for _, h := range i.Holders {
		what, uuid := h, i.host.attr(h, "dm/uuid")
		if name := i.host.attr(h, "dm/name"); name != "" {
			what = fmt.Sprintf("%s (/dev/mapper/%s)", h, name)
		}
		if strings.HasPrefix(uuid, "mpath-") {
			refuse(CodeMultipath, "tap "+what, "is a path of the multipath device %s: writes take other paths too", what)
			continue
		}
		kind := "a device"
		switch {
		case strings.HasPrefix(uuid, "LVM-"):
			kind = "the LVM volume"
		case i.host.has(h, "md"):
			kind = "the md array"
		}
		refuse(CodeMember, "tap "+what, "is below %s %s", kind, what)
	}
	if i.Mapping != nil && slices.Contains(i.Mapping.Targets, "snapshot-merge") {
		refuse(CodeMerge, "wait until the merge has ended (lvs shows it)", "is being changed by a snapshot merge, which goes past it")
	}
}

// daxPoints are the mount points at which files can be mapped past the block
// layer. The default of a file system on a capable disk is by file: that counts.
func (i *Info) daxPoints() string {
	if !i.dax {
		return ""
	}
	var points []string
	for _, m := range i.Mounts {
		able := slices.Contains([]string{"ext2", "ext4", "xfs", "erofs"}, m.FS) || slices.Contains(m.Options, "dax") || m.option("dax") != ""
		if able && m.option("dax") != "never" {
			points = append(points, m.Point)
		}
	}
	return strings.Join(points, ", ")
}

func (i *Info) inlinePoints() string {
	var points []string
	for _, m := range i.Mounts {
		if slices.Contains(m.Options, "inlinecrypt") {
			points = append(points, m.Point)
		}
	}
	return strings.Join(points, ", ")
}

// cluster says why others may write to the disk too.
func (i *Info) cluster() string {
	shared := []string{"gfs2", "ocfs2"}
	for _, m := range i.Mounts {
		if slices.Contains(shared, m.FS) {
			return fmt.Sprintf("holds the cluster file system %s, mounted at %s", m.FS, m.Point)
		}
	}
	switch {
	case slices.Contains(shared, i.fs):
		return "holds the cluster file system " + i.fs
	case i.clustered:
		return "is an array shared by a cluster"
	}
	return ""
}

// HoldsRefusal is the refusal to tap a disk that stores one of our own folders:
// each write that is stored would be a write to be stored. nil: it holds none.
func HoldsRefusal(i *Info, folders ...string) *health.Condition {
	for _, f := range folders {
		if f != "" && Holds(i, f) {
			return &health.Condition{Code: CodeHoldsOwn, Severity: health.Error, Subject: i.Name,
				Detail: fmt.Sprintf("%s holds %s: each write kept there would be a write to keep", i.Name, f),
				Remedy: "keep state and vault on another disk"}
		}
	}
	return nil
}
