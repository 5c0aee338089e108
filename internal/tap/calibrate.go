package tap

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"runtime"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"tidemark/bpf"
)

// calibration leads from a struct page's address to the page's own:
// (page << shift) + base.
type calibration struct {
	base  uint64
	shift uint32
}

// calibrate finds it by experiment: it writes a random pattern from a locked
// page to a scratch disk that lives in memory, sees the struct page in a
// program, and tries the possible starts of the kernel's direct map until the
// pattern reads back. Nothing of the user's is touched. An error means that
// payloads cannot be captured on this machine.
func calibrate() (calibration, error) {
	stride, err := structPageSize()
	if err != nil {
		return calibration{}, err
	}
	c := calibration{shift: uint32(bits.TrailingZeros64(pageSize / stride))}
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(bpf.Calibrate))
	if err != nil {
		return c, err
	}
	disk, err := newScratch()
	if err != nil {
		return c, fmt.Errorf("scratch disk: %w", err)
	}
	defer disk.close()
	if err := spec.Variables["scratch_dev"].Set(disk.dev); err != nil {
		return c, err
	}
	coll, err := ebpf.NewCollection(spec)
	if err != nil {
		return c, fmt.Errorf("loading the calibration: %w", err)
	}
	defer coll.Close()
	l, err := link.AttachTracing(link.TracingOptions{Program: coll.Programs["look"]})
	if err != nil {
		return c, err
	}
	defer l.Close()

	page, err := unix.Mmap(-1, 0, pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE|unix.MAP_POPULATE)
	if err != nil {
		return c, err
	}
	defer unix.Munmap(page)
	if err := unix.Mlock(page); err != nil {
		return c, err
	}
	if _, err := rand.Read(page); err != nil {
		return c, err
	}
	pfn, err := frameOf(page)
	if err != nil {
		return c, err
	}
	if _, err := disk.file.WriteAt(page, 0); err != nil {
		return c, err
	}
	var s sight
	if err := coll.Maps["seen"].Lookup(uint32(0), &s); err != nil {
		return c, err
	}
	if s.Page == 0 || s.Offset != 0 {
		return c, errors.New("the write to the scratch disk was not seen")
	}
	const gigabyte, tries = 1 << 30, 1 << 16
	pattern := [2]uint64{binary.LittleEndian.Uint64(page), binary.LittleEndian.Uint64(page[8:])}
	for i, start := 0, s.Task&^(gigabyte-1); i < tries; i, start = i+1, start-gigabyte {
		arg := peekArg{Addr: start + pfn*pageSize}
		ret, err := coll.Programs["peek"].Run(&ebpf.RunOptions{Context: &arg, ContextOut: &arg})
		if err != nil {
			return c, err
		}
		if ret == 0 && arg.Out == pattern {
			c.base = arg.Addr - s.Page<<c.shift
			return c, nil
		}
	}
	runtime.KeepAlive(page)
	return c, errors.New("the pattern was not found in the kernel's direct map")
}

func structPageSize() (uint64, error) {
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		return 0, fmt.Errorf("the kernel's type information: %w", err)
	}
	var page *btf.Struct
	if err := spec.TypeByName("page", &page); err != nil {
		return 0, err
	}
	if page.Size == 0 || page.Size&(page.Size-1) != 0 {
		return 0, fmt.Errorf("struct page has %d bytes: not a power of two", page.Size)
	}
	return uint64(page.Size), nil
}

// frameOf is the page frame number of a locked page.
func frameOf(page []byte) (uint64, error) {
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var e [8]byte
	if _, err := f.ReadAt(e[:], int64(uintptr(unsafe.Pointer(&page[0]))/pageSize*8)); err != nil {
		return 0, err
	}
	pfn := binary.LittleEndian.Uint64(e[:]) & (1<<55 - 1)
	if pfn == 0 {
		return 0, errors.New("page frame numbers are hidden from this process")
	}
	return pfn, nil
}

// scratch is a loop device over memory, for the calibration's one write.
type scratch struct {
	file *os.File
	dev  uint32 // as the kernel has it: major<<20|minor
}

func newScratch() (*scratch, error) {
	memory, err := unix.MemfdCreate("tidemark-scratch", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	defer unix.Close(memory)
	if err := unix.Ftruncate(memory, 1<<20); err != nil {
		return nil, err
	}
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	for range 20 {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, err
		}
		s, err := attachScratch(n, memory)
		if !errors.Is(err, unix.EBUSY) {
			return s, err
		} // somebody else was faster
	}
	return nil, errors.New("no loop device is free")
}

func attachScratch(n, memory int) (*scratch, error) {
	path := fmt.Sprintf("/dev/loop%d", n)
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) { // without udev
		if err := unix.Mknod(path, unix.S_IFBLK|0o600, int(unix.Mkdev(7, uint32(n)))); err != nil && !errors.Is(err, unix.EEXIST) {
			return nil, err
		}
	}
	loop, err := os.OpenFile(path, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer loop.Close()
	cfg := unix.LoopConfig{Fd: uint32(memory)}
	cfg.Info.Flags = unix.LO_FLAGS_AUTOCLEAR
	if err := unix.IoctlLoopConfigure(int(loop.Fd()), &cfg); err != nil {
		return nil, err
	}
	// AUTOCLEAR frees it with the last close: keep the direct descriptor.
	direct, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return &scratch{file: direct, dev: 7<<20 | uint32(n)}, nil
}

func (s *scratch) close() { s.file.Close() }
