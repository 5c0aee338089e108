package loop

import (
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"tidemark/internal/block"
)

const (
	maxRequest = 1 << 20 // bytes; what the kernel sends or asks for at one time
	inFlight   = 32      // asynchronous requests at one time
)

// Serve answers the kernel on an Export's connection with dev, until the last
// user of the file is gone. It owns conn. It must run in another process than
// the one that attaches and uses the device. Several requests are served at a time.
func Serve(conn *os.File, dev block.Device) error {
	f := &file{RawFileSystem: fuse.NewDefaultRawFileSystem(), dev: dev}
	f.zeroer, _ = dev.(block.Zeroer)
	// go-fuse takes the descriptor and closes it: it gets its own.
	fd, err := unix.FcntlInt(conn.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	if err := conn.Close(); err != nil {
		return err
	}
	s, err := fuse.NewServer(f, fmt.Sprintf("/dev/fd/%d", fd), &fuse.MountOptions{
		MaxWrite: maxRequest, MaxBackground: inFlight, DisableXAttrs: true, DisableReadDirPlus: true,
		MaxInflightRequestBytes: 2 * inFlight * maxRequest, ExtraCapabilities: fuse.CAP_ASYNC_DIO,
		DisableSplice: true,                       // our data is in memory: a pipe costs more than it saves
		Logger:        log.New(io.Discard, "", 0), // what it says ends up as an I/O error at the user
	})
	if err != nil {
		return fmt.Errorf("speaking FUSE: %w", err)
	}
	s.Serve()
	return nil
}

// file is the one file that there is: the root.
type file struct {
	fuse.RawFileSystem
	dev    block.Device
	zeroer block.Zeroer // nil where the device has none
}

func (f *file) String() string { return "tidemark" }

func (f *file) GetAttr(_ <-chan struct{}, _ *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	out.Ino, out.Mode, out.Nlink = fuse.FUSE_ROOT_ID, syscall.S_IFREG|0o600, 1
	out.Size = uint64(f.dev.Size())
	out.Blocks, out.Blksize = out.Size/512, 4096
	out.Uid, out.Gid = uint32(os.Geteuid()), uint32(os.Getegid())
	return fuse.OK
}

// Open asks for no page cache of the file: the loop device above has one.
func (f *file) Open(_ <-chan struct{}, _ *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	out.OpenFlags = fuse.FOPEN_DIRECT_IO | fuse.FOPEN_PARALLEL_DIRECT_WRITES
	return fuse.OK
}

func (f *file) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	off := int64(in.Offset)
	r := block.Range{Off: off, Len: int64(len(buf))}.Intersect(block.Range{Len: f.dev.Size()})
	if r.Empty() {
		return fuse.ReadResultData(nil), fuse.OK
	}
	n, err := f.dev.ReadAt(buf[:r.Len], off)
	if int64(n) < r.Len {
		return nil, status(err)
	}
	return fuse.ReadResultData(buf[:n]), fuse.OK
}

func (f *file) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	if err := block.CheckBounds(block.Range{Off: int64(in.Offset), Len: int64(len(data))}, f.dev.Size()); err != nil {
		return 0, status(err)
	}
	n, err := f.dev.WriteAt(data, int64(in.Offset))
	if err != nil {
		return 0, status(err)
	}
	return uint32(n), fuse.OK
}

func (f *file) Fsync(<-chan struct{}, *fuse.FsyncIn) fuse.Status {
	if err := f.dev.Flush(); err != nil {
		return status(err)
	}
	return fuse.OK
}

// Fallocate is how loop discards and zeroes; it must read as zeroes afterwards, so both are zeroing.
func (f *file) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	const zeroing = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_ZERO_RANGE
	r := block.Range{Off: int64(in.Offset), Len: int64(in.Length)}
	if f.zeroer == nil || in.Mode&zeroing == 0 {
		return fuse.Status(unix.EOPNOTSUPP)
	}
	if err := block.CheckBounds(r, f.dev.Size()); err != nil {
		return status(err)
	}
	if err := f.zeroer.WriteZeroes(r); err != nil {
		return status(err)
	}
	return fuse.OK
}

func (f *file) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	out.Bsize, out.Frsize, out.NameLen = 4096, 4096, 255
	out.Blocks = uint64(f.dev.Size()) / 4096
	return fuse.OK
}

// status is the one translation of errors to errno.
func status(err error) fuse.Status {
	var errno syscall.Errno
	switch {
	case errors.Is(err, block.ErrReadOnly):
		return fuse.EROFS
	case errors.As(err, &errno) && errno != 0:
		return fuse.Status(errno)
	}
	return fuse.EIO // also for none at all: a short read of a device is wrong
}
