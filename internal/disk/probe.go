package disk

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// headSize is how much of a device is looked at for superblocks, in bytes:
// the last that is known begins at 64 KiB.
const headSize = 128 << 10

// head reads the first bytes of a device past its page cache; nil where that
// cannot be done, which leaves the identity weaker but is no error.
func (h Host) head(name string) []byte {
	if !h.live() {
		b, _ := os.ReadFile(h.path("/head/" + name)) // recorded beside the trees
		return b
	}
	return hanging.within(headTime, h.node(name), readHead)
}

// headTime is how long a disk has to answer: one that stands still takes ten
// seconds to turn again.
const headTime = 15 * time.Second

// hanging are the disks that have not answered in time, until they do. Who looks
// for a disk looks at all of them, and must find it beside one that is dead.
var hanging hung

type hung struct{ nodes sync.Map }

func (h *hung) within(limit time.Duration, node string, read func(string) []byte) []byte {
	if _, known := h.nodes.Load(node); known {
		return nil
	}
	got, late := make(chan []byte, 1), make(chan struct{})
	go func() {
		b := read(node)
		got <- b
		select {
		case <-late:
			h.nodes.Delete(node)
		default:
		}
	}()
	select {
	case b := <-got:
		return b
	case <-time.After(limit):
		h.nodes.Store(node, true)
		close(late)
		select {
		case b := <-got: // just now
			h.nodes.Delete(node)
			return b
		default:
			return nil
		}
	}
}

func readHead(node string) []byte {
	fd, err := unix.Open(node, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	buf := aligned(headSize)
	n, err := unix.Pread(fd, buf, 0)
	if err != nil {
		return nil
	}
	return buf[:n]
}

// aligned gives size bytes at a page's start, as O_DIRECT wants them.
func aligned(size int) []byte {
	const page = 4096
	b := make([]byte, size+page)
	skip := int(-uintptr(unsafe.Pointer(&b[0])) & (page - 1))
	return b[skip : skip+size : skip+size]
}

// superblock names the file system that begins a device, and its UUID. Others
// than those that Tidemark treats in some way of their own are "".
func superblock(b []byte) (fs, uuid string) {
	at := func(off, n int) []byte {
		if off+n > len(b) {
			return make([]byte, n)
		}
		return b[off : off+n]
	}
	switch {
	case bytes.Equal(at(1080, 2), []byte{0x53, 0xef}):
		return "ext", formatUUID(at(1024+104, 16))
	case bytes.Equal(at(0, 4), []byte("XFSB")):
		return "xfs", formatUUID(at(32, 16))
	case bytes.Equal(at(64<<10+64, 8), []byte("_BHRfS_M")):
		return "btrfs", formatUUID(at(64<<10+32, 16))
	case binary.BigEndian.Uint32(at(64<<10, 4)) == 0x01161970 && binary.BigEndian.Uint32(at(64<<10+4, 4)) == 1:
		return "gfs2", formatUUID(at(64<<10+256, 16))
	}
	for _, size := range []int{512, 1024, 2048, 4096} {
		if bytes.Equal(at(2*size, 6), []byte("OCFSV2")) {
			return "ocfs2", formatUUID(at(2*size+336, 16))
		}
	}
	return "", ""
}

// formatUUID gives "" for the UUID of zeroes, which names nothing.
func formatUUID(b []byte) string {
	if bytes.Equal(b, make([]byte, 16)) {
		return ""
	}
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[0:4], b[4:6], b[6:8], b[8:10], b[10:16])
}

// formatGUID is formatUUID for the mixed order of bytes that GPT has.
func formatGUID(b []byte) string {
	g := bytes.Clone(b[:16])
	binary.BigEndian.PutUint32(g[0:], binary.LittleEndian.Uint32(b[0:]))
	binary.BigEndian.PutUint16(g[4:], binary.LittleEndian.Uint16(b[4:]))
	binary.BigEndian.PutUint16(g[6:], binary.LittleEndian.Uint16(b[6:]))
	return formatUUID(g)
}

// gptHeader gives the header at the second logical sector, nil where none is.
func gptHeader(head []byte, sector int64) []byte {
	if int64(len(head)) < sector+92 || !bytes.Equal(head[sector:sector+8], []byte("EFI PART")) {
		return nil
	}
	return head[sector : sector+92]
}

// mbrSignature is the number of a DOS partition table, 0 where there is none.
func mbrSignature(head []byte) uint32 {
	if len(head) < 512 || head[510] != 0x55 || head[511] != 0xaa {
		return 0
	}
	return binary.LittleEndian.Uint32(head[440:])
}

// tableUUID is the identity of the partition table that begins a disk.
func tableUUID(head []byte, sector int64) string {
	if g := gptHeader(head, sector); g != nil {
		return formatGUID(g[56:72])
	}
	if s := mbrSignature(head); s != 0 {
		return fmt.Sprintf("%08x", s)
	}
	return ""
}

// partUUIDIn finds a partition's UUID in the table that begins its disk, for
// kernels that do not tell it themselves.
func partUUIDIn(head []byte, sector int64, number int) string {
	g := gptHeader(head, sector)
	if g == nil {
		if s := mbrSignature(head); s != 0 {
			return fmt.Sprintf("%08x-%02x", s, number)
		}
		return ""
	}
	const firstMax = headSize // entries further away are not read
	first, size := binary.LittleEndian.Uint64(g[72:]), int64(binary.LittleEndian.Uint32(g[84:]))
	if first > firstMax || size < 128 || size > 4096 || number < 1 || number > headSize {
		return ""
	}
	at := int64(first)*sector + int64(number-1)*size
	if at+size > int64(len(head)) {
		return ""
	}
	return formatGUID(head[at+16 : at+32])
}

func ioctlUint64(f *os.File, req uintptr) (uint64, error) {
	var v uint64
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), req, uintptr(unsafe.Pointer(&v)))
	if errno != 0 {
		return 0, errno
	}
	return v, nil
}
