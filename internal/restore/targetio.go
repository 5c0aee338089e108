package restore

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// write puts p at off. zero says that p is all zeroes.
func (t *target) write(p []byte, off int64, zero bool) error {
	if !t.device {
		return t.writeSparse(p, off)
	}
	f := t.handle(off, len(p))
	if zero && (off|int64(len(p)))%t.align == 0 {
		r := [2]uint64{uint64(off), uint64(len(p))}
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKZEROOUT, uintptr(unsafe.Pointer(&r))); errno == 0 {
			return nil
		} // a device that cannot is sent the zeroes
	}
	_, err := f.WriteAt(p, off)
	return err
}

// writeSparse leaves whole blocks of zeroes out of a fresh file.
func (t *target) writeSparse(p []byte, off int64) error {
	const grain = 4096
	for from := 0; from < len(p); {
		to := min(from+grain, len(p))
		if firstNonZero(p[from:to]) < 0 {
			from = to
			continue
		}
		for to < len(p) && firstNonZero(p[to:min(to+grain, len(p))]) >= 0 {
			to = min(to+grain, len(p))
		}
		if _, err := t.file.WriteAt(p[from:to], off+int64(from)); err != nil {
			return err
		}
		from = to
	}
	return nil
}

// readBack reads what the disk holds, not what the page cache does.
func (t *target) readBack(p []byte, off int64) error {
	f := t.handle(off, len(p))
	if f == t.file {
		// Best effort by nature: the pages are clean after the flush, so they go.
		_ = unix.Fadvise(int(f.Fd()), off, int64(len(p)), unix.FADV_DONTNEED)
	}
	_, err := f.ReadAt(p, off)
	return err
}

// handle is the file to use for a range: the direct one where its alignment allows.
func (t *target) handle(off int64, n int) *os.File {
	if t.direct != nil && (off|int64(n))%t.align == 0 {
		return t.direct
	}
	return t.file
}

// flush makes what was written stable.
func (t *target) flush() error { return unix.Fdatasync(int(t.file.Fd())) }
