package backing

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
)

// measure finds size, limits and how requests must lie.
func (d *Device) measure(o Options) error {
	var err error
	if d.kind == isDisk {
		err = d.measureDisk()
	} else {
		err = d.measureFile()
	}
	if err != nil {
		return err
	}
	d.movesWrites = d.takesMoving()
	l := &d.limits
	l.ReadOnly = l.ReadOnly || o.ReadOnly
	if l.ReadOnly {
		l.Discard, l.MaxDiscard, l.MaxZeroes = 0, 0, 0
	}
	l.Volatile = true // or not: a flush where there is nothing to flush costs nothing
	l.PhysicalBlock = max(l.PhysicalBlock, l.LogicalBlock)
	size, err := d.actualSize()
	if err != nil {
		return err
	}
	if size -= size % l.LogicalBlock; size == 0 {
		return fmt.Errorf("%w of %d bytes", ErrEmpty, l.LogicalBlock)
	}
	d.size.Store(size)
	return nil
}

func (d *Device) actualSize() (int64, error) {
	if d.kind == isFile {
		st, err := d.file.Stat()
		if err != nil {
			return 0, fmt.Errorf("size of %s: %w", d.path, cause(err))
		}
		return st.Size(), nil
	}
	var n uint64
	if err := d.ioctl(unix.BLKGETSIZE64, unsafe.Pointer(&n)); err != nil {
		return 0, fmt.Errorf("size of %s: %w", d.path, err)
	}
	return int64(n), nil
}

func (d *Device) ioctl(op uintptr, arg unsafe.Pointer) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, d.file.Fd(), op, uintptr(arg))
	if errno != 0 {
		return errno
	}
	return nil
}

func (d *Device) measureDisk() error {
	fd := int(d.file.Fd())
	logical, err := unix.IoctlGetInt(fd, unix.BLKSSZGET)
	if err != nil {
		return fmt.Errorf("logical block size: %w", err)
	}
	get := func(op uint) int64 { // what a kernel does not tell is not known
		n, _ := unix.IoctlGetUint32(fd, op)
		return int64(n)
	}
	readOnly, err := unix.IoctlGetInt(fd, unix.BLKROGET)
	if err != nil {
		return fmt.Errorf("whether it is read-only: %w", err)
	}
	q := queueOf(d.file)
	d.limits = block.Limits{
		LogicalBlock: int64(logical), PhysicalBlock: get(unix.BLKPBSZGET), MinIO: get(unix.BLKIOMIN), OptIO: get(unix.BLKIOOPT),
		ReadOnly: readOnly != 0, Rotational: q("rotational") != 0,
		MaxDiscard: q("discard_max_bytes"), MaxZeroes: q("write_zeroes_max_bytes"),
	}
	if d.limits.MaxDiscard > 0 {
		d.limits.Discard = max(q("discard_granularity"), int64(logical))
	}
	// Kernels that do not say what they want of addresses want that of places.
	d.shape = shape{offset: int64(logical), memory: int64(logical)}
	if align := q("dma_alignment"); align > 0 {
		d.shape.memory = align + 1
	}
	return nil
}

// queueOf reads attributes of a disk's or partition's request queue; 0 where there is none.
func queueOf(f *os.File) func(name string) int64 {
	var st unix.Stat_t
	err := unix.Fstat(int(f.Fd()), &st)
	dir := queueDir(st.Rdev)
	return func(name string) int64 {
		b, e := os.ReadFile(filepath.Join(dir, name))
		if err != nil || e != nil {
			return 0
		}
		n, _ := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
		return n
	}
}

// queueDir is where the attributes of a disk's or partition's queue are.
func queueDir(dev uint64) string {
	dir := fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(dev), unix.Minor(dev))
	if _, err := os.Stat(filepath.Join(dir, "partition")); err == nil {
		if real, err := filepath.EvalSymlinks(dir); err == nil {
			dir = filepath.Dir(real)
		}
	}
	return filepath.Join(dir, "queue")
}

// takesMoving says whether the disk, or the one below the file, takes writes from pages
// that may change meanwhile, as those of a file system do that was told of no other
// need. One with checksums or parity does not. Where no disk is known (btrfs) it is no.
func (d *Device) takesMoving() bool {
	var st unix.Stat_t
	if err := unix.Fstat(int(d.file.Fd()), &st); err != nil {
		return false
	}
	dev := st.Rdev
	if d.kind == isFile {
		dev = st.Dev
	}
	b, err := os.ReadFile(filepath.Join(queueDir(dev), "stable_writes"))
	return err == nil && strings.TrimSpace(string(b)) == "0"
}

// measureFile asks the file system what it wants of direct requests, and where
// it does not say (before 6.1) tries.
func (d *Device) measureFile() error {
	fd := int(d.file.Fd())
	flags, err := unix.FcntlInt(d.file.Fd(), unix.F_GETFL, 0)
	if err != nil {
		return err
	}
	d.shape = shape{offset: 1, memory: 1} // through the page cache anything goes
	if flags&unix.O_DIRECT != 0 {
		var x unix.Statx_t
		err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &x)
		if err == nil && x.Mask&unix.STATX_DIOALIGN != 0 && x.Dio_offset_align > 0 {
			d.shape = shape{offset: int64(x.Dio_offset_align), memory: int64(max(x.Dio_mem_align, 1))}
		} else if d.shape, err = tryShape(fd); err != nil {
			return err
		}
	}
	d.limits = block.Limits{LogicalBlock: max(d.shape.offset, block.SectorSize), PhysicalBlock: 4096, Discard: d.hole()}
	if d.limits.Discard > 0 {
		d.limits.MaxDiscard = 1 << 30
	}
	return nil
}

// tryShape reads with smaller and smaller alignment until it is refused.
func tryShape(fd int) (shape, error) {
	b, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return shape{}, err
	}
	defer unix.Munmap(b)
	for _, n := range []int64{512, 1024, 2048, 4096} {
		if _, err := unix.Pread(fd, b[:n], n); err == nil {
			return shape{offset: n, memory: n}, nil
		} else if !errors.Is(err, unix.EINVAL) {
			return shape{}, fmt.Errorf("reading it: %w", err)
		}
	}
	return shape{}, errors.New("direct reads of 4096 bytes are refused by its file system")
}

// hole is the granularity of holes in the file, 0 where it can have none.
func (d *Device) hole() int64 {
	st, err := d.file.Stat()
	if err != nil {
		return 0
	}
	// Beyond the end there is nothing to lose.
	if err := unix.Fallocate(int(d.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, (st.Size()|4095)+1, 4096); err != nil {
		return 0
	}
	return 4096
}
