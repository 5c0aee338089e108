package tap

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"os"
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

// calibrate finds it by experiment: it writes random patterns from locked
// pages to a scratch disk that lives in memory, sees their struct pages in a
// program, and tries the possible starts of the kernel's direct map until the
// first pattern reads back. The others, found by their struct pages alone, must
// then read back as well: a wrong answer would put wrong payloads into history.
// Nothing of the user's is touched. An error means that payloads cannot be
// captured on this machine.
func calibrate() (calibration, error) {
	stride, err := structPageSize()
	if err != nil {
		return calibration{}, err
	}
	lab, err := newLab()
	if err != nil {
		return calibration{}, err
	}
	defer lab.close()
	c := calibration{shift: uint32(bits.TrailingZeros64(pageSize / stride))}
	for range calibrateTries {
		if err = lab.try(&c); err == nil {
			return c, nil
		}
	}
	return calibration{}, err
}

const (
	calibrateTries = 5
	calibratePages = 8
)

// try is one experiment. The kernel may move a page while it runs, also a
// locked one: then it fails, and another may succeed.
func (l *lab) try(c *calibration) error {
	var proofs []proof
	for range calibratePages {
		p, err := l.observe()
		if err != nil {
			return err
		}
		defer p.free()
		proofs = append(proofs, p)
	}
	if err := l.findBase(c, proofs[0]); err != nil {
		return err
	}
	for i, p := range proofs {
		got, ok, err := l.peek(p.sight.Page<<c.shift + c.base)
		if err != nil {
			return err
		}
		if !ok || got != p.pattern {
			return fmt.Errorf("page %d of %d does not read back through its struct page", i+1, len(proofs))
		}
	}
	return nil
}

// proof is a page with a random pattern that the program has seen on its way to the disk.
type proof struct {
	page    []byte
	pattern [2]uint64
	pfn     uint64
	sight   sight
}

func (p proof) free() { _ = unix.Munmap(p.page) }

// observe writes one page to the scratch disk.
func (l *lab) observe() (p proof, err error) {
	p.page, err = unix.Mmap(-1, 0, pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE|unix.MAP_POPULATE)
	if err != nil {
		return p, err
	}
	defer func() {
		if err != nil {
			p.free()
		}
	}()
	if err := unix.Mlock(p.page); err != nil {
		return p, err
	}
	if _, err := rand.Read(p.page); err != nil {
		return p, err
	}
	p.pattern = [2]uint64{binary.LittleEndian.Uint64(p.page), binary.LittleEndian.Uint64(p.page[8:])}
	if p.pfn, err = frameOf(p.page); err != nil {
		return p, err
	}
	if err := l.coll.Maps["seen"].Put(uint32(0), sight{}); err != nil {
		return p, err
	}
	if _, err := l.disk.file.WriteAt(p.page, 0); err != nil {
		return p, err
	}
	if err := l.coll.Maps["seen"].Lookup(uint32(0), &p.sight); err != nil {
		return p, err
	}
	if p.sight.Page == 0 || p.sight.Offset != 0 {
		return p, errors.New("the write to the scratch disk was not seen")
	}
	if now, err := frameOf(p.page); err != nil || now != p.pfn {
		return p, errors.Join(err, errors.New("the kernel moved the page"))
	}
	return p, nil
}

// findBase tries the 1 GiB-aligned addresses below one that is known to be in the direct map.
func (l *lab) findBase(c *calibration, p proof) error {
	const gigabyte, tries = 1 << 30, 1 << 16
	for i, start := 0, p.sight.Task&^(gigabyte-1); i < tries; i, start = i+1, start-gigabyte {
		at := start + p.pfn*pageSize
		got, ok, err := l.peek(at)
		if err != nil {
			return err
		}
		if ok && got == p.pattern {
			c.base = at - p.sight.Page<<c.shift
			return nil
		}
	}
	return errors.New("the pattern was not found in the kernel's direct map")
}

// lab is where the experiment takes place: a scratch disk, a program that looks
// at what is written to it, one that reads the kernel's memory.
type lab struct {
	disk *scratch
	coll *ebpf.Collection
	link link.Link
}

func newLab() (_ *lab, err error) {
	l := &lab{}
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(bpf.Calibrate))
	if err != nil {
		return nil, err
	}
	if l.disk, err = newScratch(); err != nil {
		return nil, fmt.Errorf("scratch disk: %w", err)
	}
	if err := spec.Variables["scratch_dev"].Set(l.disk.dev); err != nil {
		return nil, err
	}
	if l.coll, err = ebpf.NewCollection(spec); err != nil {
		return nil, fmt.Errorf("loading the calibration: %w", err)
	}
	l.link, err = link.AttachTracing(link.TracingOptions{Program: l.coll.Programs["look"]})
	return l, err
}

func (l *lab) close() {
	if l.link != nil {
		l.link.Close()
	}
	if l.coll != nil {
		l.coll.Close()
	}
	if l.disk != nil {
		l.disk.close()
	}
}

// peek reads 16 bytes of the kernel's memory; not ok: nothing is mapped there.
func (l *lab) peek(addr uint64) (v [2]uint64, ok bool, err error) {
	arg := peekArg{Addr: addr}
	ret, err := l.coll.Programs["peek"].Run(&ebpf.RunOptions{Context: &arg, ContextOut: &arg})
	return arg.Out, ret == 0, err
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
