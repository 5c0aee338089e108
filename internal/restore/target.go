package restore

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
)

// probeBytes at either end of a device must be zero for it to count as empty:
// every file system, partition table and volume label has something there.
const probeBytes = 1 << 20

// target is what is written to: opened, checked, and held against others.
type target struct {
	path    string
	file    *os.File // a device: opened exclusively; a file: locked
	direct  *os.File // a device without the page cache; nil where that cannot be
	device  bool
	align   int64 // bytes; what direct I/O and zeroing must be aligned to
	created bool  // the file was not there before
	touched bool  // its content has begun to change
	state   *state
}

// openTarget opens the target and applies all checks. A file that is not there
// is made by begin, not here.
func openTarget(view block.Device, path string, o Options) (*target, error) {
	t := &target{path: path}
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		err = t.checkFile(view, nil, o)
	case err != nil:
		return nil, err
	case st.IsDir():
		return nil, fmt.Errorf("%s: %w: name a file in it, or a block device", path, ErrDirectory)
	case st.Mode()&os.ModeDevice != 0 && st.Mode()&os.ModeCharDevice == 0:
		t.device = true
		err = t.openDevice(view, o)
	case st.Mode().IsRegular():
		err = t.checkFile(view, st, o)
	default:
		return nil, fmt.Errorf("%s: %w: it is %s", path, ErrKind, st.Mode().Type())
	}
	if err != nil {
		return nil, errors.Join(err, t.Close())
	}
	return t, nil
}

func (t *target) openDevice(view block.Device, o Options) error {
	real, err := filepath.EvalSymlinks(t.path)
	if err != nil {
		return err
	}
	if err := deviceInUse(real); err != nil {
		return err
	}
	if o.Protected != nil {
		if group, yes := o.Protected(real); yes {
			return fmt.Errorf("%s: %w: group %s; end that with `tidemark unprotect %s` first, or choose another target", t.path, ErrProtected, group, group)
		}
	}
	t.file, err = os.OpenFile(real, os.O_RDWR|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%s: %w: another program or the kernel holds it exclusively; find it with lsblk and fuser, and end it first", t.path, ErrInUse)
	}
	if err != nil {
		return err
	}
	size, err := t.file.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if size < view.Size() {
		return fmt.Errorf("%s: %w: it has %d bytes, the disk to restore has %d; choose a larger one", t.path, ErrTooSmall, size, view.Size())
	}
	align, err := unix.IoctlGetInt(int(t.file.Fd()), unix.BLKSSZGET)
	if err != nil {
		return fmt.Errorf("%s: logical block size: %w", t.path, err)
	}
	t.align = int64(align)
	id, err := deviceIdentity(t.file, size)
	if err != nil {
		return err
	}
	dir := o.StateDir
	if dir == "" {
		dir = "/run/tidemark"
	}
	name := strings.ReplaceAll(strings.TrimPrefix(real, "/dev/"), "/", "!")
	t.state = openState(filepath.Join(dir, "restore-"+name+".state"), header{Source: o.Identity, Target: id, Size: view.Size()})
	if !o.Force && t.state.other {
		return t.notEmpty("it holds an unfinished restore of something else")
	}
	if !o.Force && !t.state.resumes() {
		if err := t.checkEmpty(size); err != nil {
			return err
		}
	}
	// Not every device can: then the page cache is dropped before it is read back.
	t.direct, _ = os.OpenFile(real, os.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	return nil
}

// checkEmpty looks at both ends of the device.
func (t *target) checkEmpty(size int64) error {
	for _, off := range []int64{0, max(0, size-probeBytes)} {
		buf := make([]byte, min(probeBytes, size-off))
		if _, err := t.file.ReadAt(buf, off); err != nil {
			return fmt.Errorf("%s: looking whether it is empty: %w", t.path, err)
		}
		if i := firstNonZero(buf); i >= 0 {
			return t.notEmpty(fmt.Sprintf("there is something at byte %d", off+int64(i)))
		}
	}
	return nil
}

func (t *target) notEmpty(why string) error {
	return fmt.Errorf("%s: %w: %s; if nothing of it is needed, repeat with --force; else choose another target", t.path, ErrNotEmpty, why)
}

// checkFile is for a regular file, and for one yet to be made (st is nil).
func (t *target) checkFile(view block.Device, st os.FileInfo, o Options) error {
	dir, err := filepath.EvalSymlinks(filepath.Dir(t.path))
	if err != nil {
		return fmt.Errorf("%s: its folder: %w", t.path, err)
	}
	if st != nil { // it may itself be a link to somewhere else
		real, err := filepath.EvalSymlinks(t.path)
		if err != nil {
			return err
		}
		dir = filepath.Dir(real)
	}
	if o.Vault != "" && inside(dir, o.Vault) {
		return fmt.Errorf("%s: %w: choose a place outside %s", t.path, ErrVault, o.Vault)
	}
	t.align = 1
	if st != nil {
		if err := t.openFile(st); err != nil {
			return err
		}
	}
	h := header{Source: o.Identity, Target: fileIdentity(st), Size: view.Size()}
	t.state = openState(t.path+".tidemark-restore", h)
	resumes := st != nil && t.state.resumes() && st.Size() == view.Size()
	if !resumes {
		t.state.restart()
	}
	if st != nil && st.Size() > 0 && !o.Force && !resumes {
		why := fmt.Sprintf("it has %d bytes", st.Size())
		if t.state.other {
			why = "it holds an unfinished restore of something else"
		}
		return t.notEmpty(why)
	}
	return t.checkRoom(dir, view, o.Force || resumes)
}

func (t *target) openFile(st os.FileInfo) error {
	var err error
	if t.file, err = os.OpenFile(t.path, os.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		return err
	}
	if err := unix.Flock(int(t.file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("%s: %w: another program has it locked (another restore?); wait for it or end it", t.path, ErrInUse)
	}
	return fileInUse(t.path, st)
}

// checkRoom compares what is to be written with what the file system has left.
func (t *target) checkRoom(dir string, view block.Device, skip bool) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil || skip {
		return err
	}
	free, need := int64(fs.Bavail)*fs.Bsize, int64(0)
	err := eachExtent(view, block.Range{Len: view.Size()}, func(e block.Extent) error {
		if e.State == block.Data {
			need += e.Len
		}
		return nil
	})
	if err == nil && need > free {
		err = fmt.Errorf("%s: %w: up to %d bytes are to be written and %s has %d free; make room, or repeat with --force if much of it is zeroes", t.path, ErrTooSmall, need, dir, free)
	}
	return err
}

// begin makes the target ready for its first write. The state is durable
// before the target changes, so that a partly written one is always known as such.
func (t *target) begin(size int64) error {
	if t.file == nil {
		f, err := os.OpenFile(t.path, os.O_RDWR|os.O_CREATE|unix.O_EXCL|unix.O_CLOEXEC, 0o600)
		if errors.Is(err, os.ErrExist) {
			return fmt.Errorf("%s: %w: it is a symbolic link that leads nowhere, or was made just now by another program; name the file itself", t.path, ErrKind)
		}
		if err != nil {
			return fmt.Errorf("making the target: %w; choose a place that can be written to", err)
		}
		t.file, t.created = f, true
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			return fmt.Errorf("%s: %w: locked by another program just now", t.path, ErrInUse)
		}
	}
	if !t.device {
		st, err := t.file.Stat()
		if err != nil {
			return err
		}
		t.state.header.Target = fileIdentity(st)
	}
	if err := t.state.begin(); err != nil {
		return fmt.Errorf("keeping the state of the restore: %w", err)
	}
	t.touched = true
	if t.device || t.state.resumes() {
		return nil
	}
	if err := t.file.Truncate(0); err != nil { // what was there becomes a hole
		return err
	}
	return t.file.Truncate(size)
}

// finish makes everything durable and forgets the state.
func (t *target) finish() error {
	if err := t.file.Sync(); err != nil {
		return fmt.Errorf("%s: making it durable: %w", t.path, err)
	}
	if t.created {
		if err := syncDir(filepath.Dir(t.path)); err != nil {
			return err
		}
	}
	if t.device {
		// A whole disk may have partitions now. Without partition scanning the kernel says EINVAL: nothing to do then.
		_, _ = unix.IoctlRetInt(int(t.file.Fd()), unix.BLKRRPART)
	}
	return t.state.remove()
}

// abandon leaves nothing that could be taken for a whole restore.
func (t *target) abandon() error {
	err := t.state.remove()
	switch {
	case t.created:
		return errors.Join(err, removeIfThere(t.path))
	case t.device || !t.touched:
		return err
	}
	return errors.Join(err, t.file.Truncate(0))
}

// Close lets go of the target.
func (t *target) Close() error {
	var errs []error
	for _, f := range []*os.File{t.file, t.direct} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	if t.state != nil {
		errs = append(errs, t.state.close())
	}
	return errors.Join(errs...)
}

// inside says whether dir is root or below it; root may be a symbolic link or absent.
func inside(dir, root string) bool {
	real, err := filepath.EvalSymlinks(root)
	if err != nil {
		return false
	}
	dir, err1 := filepath.Abs(dir)
	real, err2 := filepath.Abs(real)
	rel, err := filepath.Rel(real, dir)
	return errors.Join(err, err1, err2) == nil && rel != ".." && !strings.HasPrefix(rel, "../")
}
