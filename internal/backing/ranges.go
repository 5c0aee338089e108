package backing

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
)

// WriteZeroes makes a range zero, and keeps its room allocated where the file
// system can.
func (d *Device) WriteZeroes(r block.Range) error {
	if err := d.check(block.OpZeroes, r); err != nil || r.Empty() {
		return err
	}
	if !d.whole(r) {
		return d.writeZeroes(r, d.WriteAt)
	}
	d.partial.RLock()
	defer d.partial.RUnlock()
	var err error
	if d.kind == isDisk {
		err = d.rangeIoctl(unix.BLKZEROOUT, r)
	} else {
		err = d.zeroFile(r)
	}
	if err != nil {
		return d.failed(block.OpZeroes, r, err)
	}
	return nil
}

// zeroFile takes what the file system has: a range of zeroes, a hole, or zeroes.
func (d *Device) zeroFile(r block.Range) error {
	for _, mode := range []uint32{unix.FALLOC_FL_ZERO_RANGE, unix.FALLOC_FL_PUNCH_HOLE} {
		if mode == unix.FALLOC_FL_ZERO_RANGE && d.noZeroRange.Load() {
			continue
		}
		err := d.control(func(fd int) error { return unix.Fallocate(fd, mode|unix.FALLOC_FL_KEEP_SIZE, r.Off, r.Len) })
		if !errors.Is(err, unix.EOPNOTSUPP) {
			return err
		}
		if mode == unix.FALLOC_FL_ZERO_RANGE {
			d.noZeroRange.Store(true)
		}
	}
	return d.writeZeroes(r, d.file.WriteAt)
}

func (d *Device) writeZeroes(r block.Range, write func(p []byte, off int64) (int, error)) error {
	for off := r.Off; off < r.End(); {
		n, err := write(d.zero[:min(int64(len(d.zero)), r.End()-off)], off)
		if err != nil {
			return err
		}
		off += int64(n)
	}
	return nil
}

// Discard says that the content of a range no longer matters. Parts of blocks
// are left alone. Where Limits say that discards are not offered it gives an
// error that wraps errors.ErrUnsupported.
func (d *Device) Discard(r block.Range) error {
	if err := d.check(block.OpDiscard, r); err != nil {
		return err
	}
	if d.limits.Discard == 0 {
		return fmt.Errorf("discard of %s: %w", d.path, errors.ErrUnsupported)
	}
	if r = r.Inward(d.limits.LogicalBlock); r.Empty() {
		return nil
	}
	d.partial.RLock()
	defer d.partial.RUnlock()
	var err error
	if d.kind == isDisk {
		err = d.rangeIoctl(unix.BLKDISCARD, r)
	} else {
		err = d.control(func(fd int) error {
			return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, r.Off, r.Len)
		})
	}
	if err != nil {
		return d.failed(block.OpDiscard, r, err)
	}
	return nil
}

func (d *Device) rangeIoctl(op uintptr, r block.Range) error {
	span := [2]uint64{uint64(r.Off), uint64(r.Len)}
	return d.control(func(fd int) error {
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), op, uintptr(unsafe.Pointer(&span))); errno != 0 {
			return errno
		}
		return nil
	})
}

const extentsMax = 1024 // in one answer

// Extents finds the holes of a file; a disk is all data.
func (d *Device) Extents(r block.Range) ([]block.Extent, error) {
	if err := d.check(block.OpRead, r); err != nil {
		return nil, err
	}
	if d.kind == isDisk || r.Empty() {
		return []block.Extent{{Range: r, State: block.Data}}, nil
	}
	var out []block.Extent
	for at := r.Off; at < r.End() && len(out) < extentsMax; {
		data, err := d.seek(at, unix.SEEK_DATA, r.End())
		if err != nil {
			return nil, err
		}
		if data > at {
			out = append(out, block.Extent{Range: block.Range{Off: at, Len: data - at}, State: block.Zero})
		}
		if data == r.End() {
			break
		}
		hole, err := d.seek(data, unix.SEEK_HOLE, r.End())
		if err != nil {
			return nil, err
		}
		if hole > data {
			out = append(out, block.Extent{Range: block.Range{Off: data, Len: hole - data}, State: block.Data})
		}
		at = hole
	}
	return out, nil
}

// seek finds the next data or hole from off, end where there is none before it.
func (d *Device) seek(off int64, whence int, end int64) (int64, error) {
	var at int64
	err := d.control(func(fd int) (err error) {
		at, err = unix.Seek(fd, off, whence)
		return err
	})
	switch {
	case errors.Is(err, unix.ENXIO): // nothing but a hole up to the end of the file
		return end, nil
	case errors.Is(err, unix.EINVAL) && whence == unix.SEEK_DATA: // the file system does not know
		return off, nil
	case errors.Is(err, unix.EINVAL):
		return end, nil
	case err != nil:
		return 0, fmt.Errorf("looking for holes of %s at %d: %w", d.path, off, err)
	}
	return min(at, end), nil
}
