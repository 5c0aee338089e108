package backing

import (
	"errors"
	"fmt"
	"io"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
)

const (
	bounceSize  = 256 << 10 // bytes of one bounce buffer
	bounceCount = 8         // as many requests at a time that need one; others wait
)

// makeBounce sets memory aside that suits every disk.
func (d *Device) makeBounce() error {
	d.bounce = make(chan []byte, bounceCount)
	for range bounceCount {
		b, err := unix.Mmap(-1, 0, bounceSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
		if err != nil {
			return fmt.Errorf("memory for unaligned requests: %w", err)
		}
		d.bounce <- b
	}
	var err error
	d.zero, err = unix.Mmap(-1, 0, bounceSize, unix.PROT_READ, unix.MAP_ANON|unix.MAP_PRIVATE)
	return err
}

func (d *Device) freeBounce() error {
	var errs []error
	for len(d.bounce) > 0 {
		errs = append(errs, unix.Munmap(<-d.bounce))
	}
	if d.zero != nil {
		errs = append(errs, unix.Munmap(d.zero))
	}
	return errors.Join(errs...)
}

// fits says whether a request can go to the disk as it is.
func (d *Device) fits(p []byte, off int64) bool {
	return (off|int64(len(p)))&(d.shape.offset-1) == 0 && uintptr(unsafe.Pointer(unsafe.SliceData(p)))&uintptr(d.shape.memory-1) == 0
}

func (d *Device) check(op block.Op, r block.Range) error {
	if err := block.CheckBounds(r, d.Size()); err != nil {
		return fmt.Errorf("%s of %s: %w", op, d.path, err)
	}
	if op != block.OpRead && d.limits.ReadOnly {
		return fmt.Errorf("%s of %s: %w", op, d.path, block.ErrReadOnly)
	}
	return nil
}

// failed names what failed. The end of a file where its size says there is
// more is no io.EOF: somebody cut it off.
func (d *Device) failed(op block.Op, r block.Range, err error) error {
	if errors.Is(err, io.EOF) {
		err = fmt.Errorf("it became shorter: %w", unix.EIO)
	}
	return fmt.Errorf("%s of %s at %s: %w", op, d.path, r, cause(err))
}

// ReadAt reads len(p) bytes.
func (d *Device) ReadAt(p []byte, off int64) (int, error) {
	r := block.Range{Off: off, Len: int64(len(p))}
	if err := d.check(block.OpRead, r); err != nil {
		return 0, err
	}
	var n int
	var err error
	if d.fits(p, off) {
		n, err = d.file.ReadAt(p, off)
	} else {
		n, err = d.readBounced(p, off)
	}
	if err != nil {
		return n, d.failed(block.OpRead, r, err)
	}
	return n, nil
}

// WriteAt writes len(p) bytes, stable after Flush.
func (d *Device) WriteAt(p []byte, off int64) (int, error) { return d.write(d.file, p, off) }

// WriteFUA writes len(p) bytes, stable when it returns.
func (d *Device) WriteFUA(p []byte, off int64) (int, error) { return d.write(d.stable, p, off) }

func (d *Device) write(f *os.File, p []byte, off int64) (int, error) {
	r := block.Range{Off: off, Len: int64(len(p))}
	if err := d.check(block.OpWrite, r); err != nil {
		return 0, err
	}
	if !d.whole(r) {
		d.partial.Lock()
		defer d.partial.Unlock()
	} else {
		d.partial.RLock()
		defer d.partial.RUnlock()
	}
	var n int
	var err error
	if d.fits(p, off) {
		n, err = f.WriteAt(p, off)
	} else {
		n, err = d.writeBounced(f, p, off)
	}
	if err != nil {
		return n, d.failed(block.OpWrite, r, err)
	}
	return n, nil
}

// Move reads or writes whole blocks without the data passing through this
// process, where the kernel can do that, and else by way of it. A write is moved only
// to where its pages may change meanwhile.
func (d *Device) Move(op block.Op, r block.Range, fua bool, l block.Load) error {
	if err := d.check(op, r); err != nil {
		return err
	}
	if d.whole(r) && (op == block.OpRead || d.movesWrites) && d.carry(op, r, fua, l) == nil {
		return nil
	}
	p, err := l.Data() // what is wrong, if it is, is found once more
	switch {
	case err != nil:
	case op == block.OpRead:
		_, err = d.ReadAt(p, r.Off)
	case fua:
		_, err = d.WriteFUA(p, r.Off)
	default:
		_, err = d.WriteAt(p, r.Off)
	}
	return err
}

func (d *Device) carry(op block.Op, r block.Range, fua bool, l block.Load) error {
	f := d.file
	if op != block.OpRead {
		d.partial.RLock()
		defer d.partial.RUnlock()
		if fua {
			f = d.stable
		}
	}
	return control(f, func(fd int) error { return l.Carry(fd, r.Off) })
}

// whole says whether a range covers whole blocks.
func (d *Device) whole(r block.Range) bool { return (r.Off|r.Len)&(d.shape.offset-1) == 0 }

// readBounced reads piece by piece what can lie anyhow.
func (d *Device) readBounced(p []byte, off int64) (done int, err error) {
	b := <-d.bounce
	defer func() { d.bounce <- b }()
	for done < len(p) {
		at := off + int64(done)
		skip := int(at & (d.shape.offset - 1))
		n := min(len(p)-done, len(b)-skip)
		blocks := block.Range{Off: at, Len: int64(n)}.Outward(d.shape.offset)
		if _, err := d.file.ReadAt(b[:blocks.Len], blocks.Off); err != nil {
			return done, err
		}
		done += copy(p[done:], b[skip:skip+n])
	}
	return done, nil
}

// writeBounced writes piece by piece; of blocks that p covers in part the rest
// is read first. Then the caller holds partial.
func (d *Device) writeBounced(f *os.File, p []byte, off int64) (done int, err error) {
	b := <-d.bounce
	defer func() { d.bounce <- b }()
	for done < len(p) {
		at := off + int64(done)
		skip := int(at & (d.shape.offset - 1))
		n := min(len(p)-done, len(b)-skip)
		piece := block.Range{Off: at, Len: int64(n)}
		blocks := piece.Outward(d.shape.offset)
		if piece != blocks {
			if _, err := d.file.ReadAt(b[:blocks.Len], blocks.Off); err != nil {
				return done, err
			}
		}
		copy(b[skip:], p[done:done+n])
		if _, err := f.WriteAt(b[:blocks.Len], blocks.Off); err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// Flush makes stable what was written.
func (d *Device) Flush() error {
	if d.limits.ReadOnly {
		return nil
	}
	if err := d.control(unix.Fdatasync); err != nil {
		return fmt.Errorf("flush of %s: %w", d.path, err)
	}
	return nil
}

// control calls f with the descriptor, again where it was interrupted.
func (d *Device) control(f func(fd int) error) error { return control(d.file, f) }

func control(file *os.File, f func(fd int) error) error {
	c, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := c.Control(func(fd uintptr) {
		for failed = f(int(fd)); errors.Is(failed, unix.EINTR); {
			failed = f(int(fd))
		}
	}); err != nil {
		return err
	}
	return failed
}
