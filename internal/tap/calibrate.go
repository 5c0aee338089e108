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

// at is the address of a byte of a page, from the page's start or beyond it:
// pages of one bio_vec lie one behind the other.
func (c calibration) at(page uint64, offset uint32) uint64 {
	return page<<c.shift + c.base + uint64(offset)
}

// calibrate finds it by experiment: it writes random patterns from locked
// pages to a scratch disk that lives in memory, sees their struct pages in a
// program, and tries the possible starts of the kernel's direct map until the
// first pattern reads back. A wrong answer would put wrong payloads into
// history, so the answer is then proven on pages that it was not found with, of
// every kind and to the last byte (prove). Nothing of the user's is touched. An
// error means that payloads cannot be captured on this machine.
func calibrate(types *btf.Cache) (calibration, error) {
	stride, err := structPageSize(types)
	if err != nil {
		return calibration{}, err
	}
	lab, err := newLab(types)
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
	return calibration{}, fmt.Errorf("%d experiments failed, the last one so: %w", calibrateTries, err)
}

const (
	calibrateTries = 5
	calibratePages = 8
	frameMask      = 1<<55 - 1 // of an entry of /proc/self/pagemap
)

// try is one experiment. The kernel may move a page while it runs, also a
// locked one: then it fails, and another may succeed.
func (l *lab) try(c *calibration) error {
	memory, err := unix.Mmap(-1, 0, calibratePages*pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE|unix.MAP_POPULATE)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Munmap(memory) }()
	var seen []sighting
	for i := range calibratePages {
		s, err := l.observe(memory[i*pageSize : (i+1)*pageSize])
		if err != nil {
			return err
		}
		seen = append(seen, s)
	}
	if err := l.findBase(c, seen[0]); err != nil {
		return err
	}
	stride := uint64(pageSize) >> c.shift
	for i, s := range seen {
		if s.Page-s.frame*stride != seen[0].Page-seen[0].frame*stride {
			return fmt.Errorf("struct page %d of %d does not lie where its frame number says", i+1, len(seen))
		}
		if err := l.reads(*c, s); err != nil {
			return fmt.Errorf("page %d of %d: %w", i+1, len(seen), err)
		}
	}
	return l.prove(*c)
}

// sighting is a buffer with random content, as the program saw it on its way to the disk.
type sighting struct {
	sight
	buffer []byte
	frame  uint64 // of its first page
}

// observe writes a buffer, of whole pages that are there, to the scratch disk. The frame
// of its first page is looked up before and after: in between it must not have moved.
func (l *lab) observe(buffer []byte) (s sighting, err error) {
	s.buffer = buffer
	if err := unix.Mlock(buffer); err != nil {
		return s, fmt.Errorf("locking memory: %w", err)
	}
	if _, err := rand.Read(buffer); err != nil {
		return s, err
	}
	if s.frame, err = frameOf(buffer); err != nil {
		return s, err
	}
	if err := l.coll.Maps["seen"].Put(uint32(0), sight{}); err != nil {
		return s, err
	}
	if _, err := l.disk.file.WriteAt(buffer, 0); err != nil {
		return s, fmt.Errorf("writing to the scratch disk: %w", err)
	}
	if err := l.coll.Maps["seen"].Lookup(uint32(0), &s.sight); err != nil {
		return s, err
	}
	if s.Page == 0 || s.Length == 0 {
		return s, errors.New("the write to the scratch disk was not seen")
	}
	switch now, err := frameOf(buffer); {
	case err != nil:
		return s, err
	case now != s.frame:
		return s, errors.New("the kernel moved the page")
	}
	return s, nil
}

// findBase tries the 1 GiB-aligned addresses below one that is known to be in the direct map.
func (l *lab) findBase(c *calibration, s sighting) error {
	const gigabyte, tries = 1 << 30, 1 << 16
	if s.Offset != 0 || s.Length != pageSize {
		return fmt.Errorf("a write of one page was seen as %d bytes at %d", s.Length, s.Offset)
	}
	pattern := [2]uint64{binary.LittleEndian.Uint64(s.buffer), binary.LittleEndian.Uint64(s.buffer[8:])}
	for i, start := 0, s.Task&^(gigabyte-1); i < tries; i, start = i+1, start-gigabyte {
		at := start + s.frame*pageSize
		got, ok, err := l.peek(at)
		if err != nil {
			return err
		}
		if ok && got == pattern {
			c.base = at - s.Page<<c.shift
			return nil
		}
	}
	return errors.New("the pattern was not found in the kernel's direct map")
}

// reads compares what lies at a sighting's struct page with its buffer, all of its first bio_vec.
func (l *lab) reads(c calibration, s sighting) error {
	for done := uint32(0); done < s.Length; done += pageSize {
		got, err := l.fetch(c.at(s.Page, s.Offset+done))
		if err != nil {
			return err
		}
		if want := s.buffer[done:min(done+pageSize, s.Length)]; !bytes.Equal(got[:len(want)], want) {
			return fmt.Errorf("%d bytes at %d of struct page %#x do not read back", len(want), s.Offset+done, s.Page)
		}
	}
	return nil
}

// prove writes from memory of every kind that writes come from, and has all of
// it read back by struct page alone: pages far apart, huge pages (whose bio_vecs
// span many pages), pages of a file.
func (l *lab) prove(c calibration) error {
	file, err := unix.MemfdCreate("tidemark-proof", unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(file)
	if err := unix.Ftruncate(file, proofBytes); err != nil {
		return err
	}
	for _, kind := range []struct {
		name         string
		fd, flags    int
		huge         bool
		step, length int
	}{
		{"anonymous", -1, unix.MAP_ANON | unix.MAP_PRIVATE, false, 64 << 10, pageSize},
		{"huge", -1, unix.MAP_ANON | unix.MAP_PRIVATE, true, 1<<20 - 4*pageSize, 64 << 10},
		{"file", file, unix.MAP_SHARED, false, 128 << 10, 2 * pageSize},
	} {
		memory, err := unix.Mmap(kind.fd, 0, proofBytes, unix.PROT_READ|unix.PROT_WRITE, kind.flags)
		if err != nil {
			return err
		}
		if kind.huge {
			_ = unix.Madvise(memory, unix.MADV_HUGEPAGE) // a wish
		}
		err = nil
		for off := 0; off+kind.length <= len(memory) && err == nil; off += kind.step {
			var s sighting
			if s, err = l.observe(memory[off : off+kind.length]); err == nil {
				err = l.reads(c, s)
			}
		}
		if err := errors.Join(err, unix.Munmap(memory)); err != nil {
			return fmt.Errorf("proof with %s memory: %w", kind.name, err)
		}
	}
	return nil
}

const proofBytes = 4 << 20

// lab is where the experiment takes place: a scratch disk, a program that looks
// at what is written to it, one that reads the kernel's memory.
type lab struct {
	disk *scratch
	coll *ebpf.Collection
	link link.Link
}

func newLab(types *btf.Cache) (_ *lab, err error) {
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
	if l.coll, err = ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{Cache: types}); err != nil {
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

// fetch reads a page of the kernel's memory.
func (l *lab) fetch(addr uint64) ([]byte, error) {
	arg := peekArg{Addr: addr}
	ret, err := l.coll.Programs["fetch"].Run(&ebpf.RunOptions{Context: &arg, ContextOut: &arg})
	if err != nil {
		return nil, err
	}
	if ret != 0 {
		return nil, fmt.Errorf("nothing is mapped at %#x", addr)
	}
	return l.coll.Maps["fetched"].LookupBytes(uint32(0))
}

func structPageSize(types *btf.Cache) (uint64, error) {
	spec, err := types.Kernel()
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
	pfn := binary.LittleEndian.Uint64(e[:]) & frameMask
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
