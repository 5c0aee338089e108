// Package backing makes a disk, or an image file, a block.Device: what lies at
// the bottom of a served device.
//
// It bypasses the page cache (O_DIRECT): a served device has one of its own
// above, what is written is where a completed write says it is, and the process
// that serves needs no memory of the kernel to write. Requests that lie as the
// disk wants them go straight down; a memory address that does not is bounced
// through a few buffers that exist beforehand; a range that does not cover whole
// blocks is read, changed and written, alone.
//
// A block device is opened for itself alone (O_EXCL), as file systems, LVM and
// md open theirs, so that a disk in use is refused and ours is refused to them. An image file is locked
// against other Tidemarks.
//
// The calls are plain system calls, each on the thread of its caller, and not
// io_uring: handed to a ring that goroutines share, a request takes longer, one
// at a time several times as long (BenchmarkRead). And a thread that is killed in
// a call ends with it, so that no write of a dead server can overtake those of
// its successor; what was handed to a ring may still be on its way.
package backing

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
)

// Errors that callers branch on.
var (
	ErrInUse = errors.New("is in use (mounted, swap, part of an LVM volume group or a RAID, or served already)")
	ErrKind  = errors.New("is neither a block device nor a regular file")
	ErrEmpty = errors.New("holds less than one block")
	// ErrShrunk: the disk or file became smaller under us, or would become so.
	ErrShrunk = errors.New("would become smaller")
)

// Options of Open.
type Options struct {
	ReadOnly bool
	// Shared opens a block device that others may have open too. Nobody must
	// write it but us.
	Shared bool
}

// Device is an open disk or image file. All methods may be called concurrently.
type Device struct {
	path   string
	kind   kind
	file   *os.File
	stable *os.File // the same, O_DSYNC: each write is stable when it returns
	limits block.Limits
	size   atomic.Int64
	shape  shape
	bounce chan []byte
	zero   []byte // zeroes to write
	// partial is held for writing by a write that must read first, and for
	// reading by all others: they must not change what it has read.
	partial sync.RWMutex
	grow    sync.Mutex
	// noZeroRange: the file system has no FALLOC_FL_ZERO_RANGE.
	noZeroRange atomic.Bool
	movesWrites bool // writes may be made of pages that are not ours (Move)
}

type kind uint8

const (
	isDisk kind = iota
	isFile
)

// shape is what the kernel wants of a direct request.
type shape struct {
	offset int64 // of places and lengths, bytes
	memory int64 // of addresses, bytes
}

// Open opens a block device or a regular file. What is held back by an error
// wraps ErrInUse or ErrKind, or is the system's own.
func Open(path string, o Options) (d *Device, err error) {
	d = &Device{path: path}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("%s: %w", path, err), d.Close())
			d = nil
		}
	}()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return d, err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFBLK:
		d.kind = isDisk
	case unix.S_IFREG:
		d.kind = isFile
	default:
		return d, ErrKind
	}
	if err := d.open(o); err != nil {
		return d, err
	}
	if err := d.measure(o); err != nil {
		return d, err
	}
	return d, d.makeBounce()
}

func (d *Device) open(o Options) error {
	flags := os.O_RDWR
	if o.ReadOnly {
		flags = os.O_RDONLY
	}
	excl := 0
	if d.kind == isDisk && !o.Shared {
		excl = unix.O_EXCL
	}
	f, err := openDirect(d.path, flags|excl)
	if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ETXTBSY) {
		return fmt.Errorf("%w: %w", ErrInUse, cause(err))
	}
	if err != nil {
		return cause(err)
	}
	d.file = f
	if d.kind == isFile {
		how := unix.LOCK_EX
		if o.ReadOnly {
			how = unix.LOCK_SH
		}
		if err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB); err != nil {
			return fmt.Errorf("%w: somebody holds a lock on it", ErrInUse)
		}
	}
	if o.ReadOnly {
		return nil
	}
	// By descriptor, so that it is the same file whatever the path leads to by now.
	if d.stable, err = openDirect(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), flags|unix.O_DSYNC); err != nil {
		return fmt.Errorf("opening it for stable writes: %w", cause(err))
	}
	return nil
}

// openDirect opens with O_DIRECT, or without where the file system has none (tmpfs before 6.6).
func openDirect(path string, flags int) (*os.File, error) {
	f, err := os.OpenFile(path, flags|unix.O_CLOEXEC|unix.O_DIRECT, 0)
	if errors.Is(err, unix.EINVAL) {
		return os.OpenFile(path, flags|unix.O_CLOEXEC, 0)
	}
	return f, err
}

// cause strips what os adds: the path is named already.
func cause(err error) error {
	if e, ok := errors.AsType[*os.PathError](err); ok {
		return e.Err
	}
	return err
}

// Close flushes nothing: Flush does.
func (d *Device) Close() error {
	var errs []error
	for _, f := range []*os.File{d.stable, d.file} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(append(errs, d.freeBounce())...)
}

// Path is what Open was given.
func (d *Device) Path() string { return d.path }

// Size is in bytes, whole logical blocks, as it was at Open or the last Grow.
func (d *Device) Size() int64 { return d.size.Load() }

// Limits are those of the disk, or of the file system below the file.
func (d *Device) Limits() block.Limits { return d.limits }

// LogicalBlock and PhysicalBlock are bytes, never 0.
func (d *Device) LogicalBlock() int64  { return d.limits.LogicalBlock }
func (d *Device) PhysicalBlock() int64 { return d.limits.PhysicalBlock }

// Grow takes over a size that the disk or file has got meanwhile. A file gets
// that of size bytes first, where it is not 0. ErrShrunk: it is smaller than it was.
func (d *Device) Grow(size int64) error {
	d.grow.Lock()
	defer d.grow.Unlock()
	now, err := d.actualSize()
	if err != nil {
		return err
	}
	if size != 0 && d.kind == isDisk && size != now {
		return fmt.Errorf("%s has %d bytes: a disk cannot be given %d", d.path, now, size)
	}
	if size < 0 || size != 0 && size < max(now, d.Size()) {
		return fmt.Errorf("%s: %w than %d bytes: %d", d.path, ErrShrunk, max(now, d.Size()), size)
	}
	if size > now {
		if d.limits.ReadOnly {
			return fmt.Errorf("%s: %w", d.path, block.ErrReadOnly)
		}
		if err := d.file.Truncate(size); err != nil {
			return fmt.Errorf("%s: growing to %d bytes: %w", d.path, size, cause(err))
		}
		now = size
	}
	now -= now % d.limits.LogicalBlock
	if now < d.Size() {
		return fmt.Errorf("%s: %w than %d bytes: it has only %d by now", d.path, ErrShrunk, d.Size(), now)
	}
	d.size.Store(now)
	return nil
}
