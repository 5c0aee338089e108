package diff

import (
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
)

const (
	fiemapSync    = 1
	fiemapHeader  = 32
	fiemapExtent  = 56
	fiemapAtOnce  = 256
	xflagRealtime = 1
	ioctlFiemap   = 0xc020660b
	ioctlXattr    = 0x801c581f // FS_IOC_FSGETXATTR
)

// extentFlags are those that are refused, by name.
var extentFlags = []struct {
	bit  uint32
	name string
}{
	{0x2, "unknown"}, {0x4, "delayed"}, {0x8, "encoded"}, {0x80, "encrypted"}, {0x100, "not aligned"},
	{0x200, "inline"}, {0x400, "in a tail"}, {0x2000, "shared"},
}

const (
	immutableFlag   = 0x10 // FS_IMMUTABLE_FL
	magicExt        = 0xef53
	magicXFS        = 0x58465342
	immutableNeeded = "the file must be made immutable meanwhile, for which the daemon needs CAP_LINUX_IMMUTABLE"
)

// byExtent refuses file systems whose files do not stay where they are.
func byExtent(f *os.File) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("%s: %w", f.Name(), err)
	}
	if st.Type != magicExt && st.Type != magicXFS {
		return fmt.Errorf("%s lies on the snapshotted device, on a file system (%#x) that is neither ext4 nor xfs, and whose files may move: put it on another device: %w", f.Name(), st.Type, ErrRefused)
	}
	if st.Type == magicXFS {
		var attr [28]byte
		if err := ioctl(f, ioctlXattr, unsafe.Pointer(&attr)); err != nil {
			return fmt.Errorf("%s: attributes: %w", f.Name(), err)
		}
		if binary.NativeEndian.Uint32(attr[:])&xflagRealtime != 0 {
			return fmt.Errorf("%s lies on an xfs realtime device: %w", f.Name(), ErrRefused)
		}
	}
	return nil
}

func ioctl(f *os.File, request uintptr, arg unsafe.Pointer) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(arg))
	runtime.KeepAlive(f)
	if errno != 0 {
		return errno
	}
	return nil
}

// immutable sets or takes away the flag that keeps others from moving or freeing the file.
func immutable(f *os.File, on bool) error {
	flags, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil {
		return fmt.Errorf("flags: %w", err)
	}
	want := flags &^ immutableFlag
	if on {
		want |= immutableFlag
	}
	if want == flags {
		return nil
	}
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, want); err != nil {
		return fmt.Errorf("%s: %w", immutableNeeded, err)
	}
	return nil
}

// extentsOf gives where the first size bytes of a file lie on its device.
func extentsOf(f *os.File, size int64) ([]block.Range, error) {
	var out []block.Range
	buf := make([]byte, fiemapHeader+fiemapAtOnce*fiemapExtent)
	ne := binary.NativeEndian
	for at := int64(0); at < size; {
		clear(buf)
		ne.PutUint64(buf[0:], uint64(at))
		ne.PutUint64(buf[8:], uint64(size-at))
		ne.PutUint32(buf[16:], fiemapSync)
		ne.PutUint32(buf[24:], fiemapAtOnce)
		if err := ioctl(f, ioctlFiemap, unsafe.Pointer(&buf[0])); err != nil {
			return nil, fmt.Errorf("extents of %s: %w", f.Name(), err)
		}
		n := int(ne.Uint32(buf[20:]))
		if n == 0 {
			return nil, fmt.Errorf("%s has a hole at %d: %w", f.Name(), at, ErrRefused)
		}
		for i := range n {
			e := buf[fiemapHeader+i*fiemapExtent:]
			r, err := extent(int64(ne.Uint64(e)), int64(ne.Uint64(e[8:])), int64(ne.Uint64(e[16:])), ne.Uint32(e[40:]), at, size)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", f.Name(), err)
			}
			out = append(out, r)
			at += r.Len
			if at >= size {
				break
			}
		}
	}
	return out, nil
}

// extent checks one and cuts it to the part of the file from at up to size.
func extent(logical, physical, length int64, flags uint32, at, size int64) (block.Range, error) {
	for _, bad := range extentFlags {
		if flags&bad.bit != 0 {
			return block.Range{}, fmt.Errorf("its extent at %d is %s: %w", logical, bad.name, ErrRefused)
		}
	}
	if logical > at || logical+length <= at {
		return block.Range{}, fmt.Errorf("it has a hole at %d: %w", at, ErrRefused)
	}
	skip := at - logical
	r := block.Range{Off: physical + skip, Len: min(length-skip, size-at)}
	if r.Off%Align != 0 || r.Len%Align != 0 {
		return block.Range{}, fmt.Errorf("its extent at %d lies at %s, not aligned to %d bytes, as its file system has smaller blocks: name a file on another one: %w", logical, r, Align, ErrRefused)
	}
	return r, nil
}
