// Package loop makes block devices out of files with the kernel's loop driver,
// without udev, losetup or any other program: it asks loop-control for a free
// device, configures it in one step, and waits for its nodes by itself.
package loop

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Errors that callers branch on.
var (
	// ErrNoLoop: the kernel has no loop driver, or it may not be used.
	ErrNoLoop = errors.New("loop devices cannot be used here (is the loop module loaded, and is this root?)")
	// ErrNotAttached: the device has no backing file.
	ErrNotAttached = errors.New("loop device has no backing file")
	// ErrBusy: somebody still has the device open; it goes when they close it.
	ErrBusy = errors.New("loop device is still open; it is detached when its last user closes it")
)

const (
	control = "/dev/loop-control"
	major   = 7
	tries   = 64 // races for a free device that Attach loses before it gives up
	// nodeWait is how long a device node may take to appear.
	nodeWait = 2 * time.Second
	// detachWait is how long Detach waits for other openers (udev's probes, as a rule).
	detachWait = 2 * time.Second
)

// Options of Attach. The zero value is a writable device over the whole file.
type Options struct {
	ReadOnly  bool
	DirectIO  bool  // no second cache for the backing file; see Info.DirectIO for whether it took
	PartScan  bool  // partitions appear as /dev/loopNpM
	AutoClear bool  // detached by itself when the last opener, Device included, closes it
	Offset    int64 // bytes into the file
	SizeLimit int64 // bytes; 0 is up to the end
	BlockSize int   // logical block size in bytes; 0 is 512
}

func (o Options) flags() uint32 {
	var f uint32
	for _, b := range []struct {
		on   bool
		flag uint32
	}{{o.ReadOnly, unix.LO_FLAGS_READ_ONLY}, {o.DirectIO, unix.LO_FLAGS_DIRECT_IO}, {o.PartScan, unix.LO_FLAGS_PARTSCAN}, {o.AutoClear, unix.LO_FLAGS_AUTOCLEAR}} {
		if b.on {
			f |= b.flag
		}
	}
	return f
}

// Device is an attached loop device, held open until Close or Detach.
type Device struct {
	Path   string // /dev/loopN
	Number int
	file   *os.File
}

// Attach gives a loop device over the file (or block device) at path.
func Attach(path string, o Options) (*Device, error) {
	mode := os.O_RDWR
	if o.ReadOnly {
		mode = os.O_RDONLY
	}
	f, err := os.OpenFile(path, mode|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close() // the loop device holds its own reference
	return AttachFile(f, o)
}

// AttachFile is Attach for a file that is open already; f can be closed afterwards.
func AttachFile(f *os.File, o Options) (*Device, error) {
	ctl, err := os.OpenFile(control, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoLoop, err)
	}
	defer ctl.Close()
	for range tries {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("asking for a free loop device: %w", err)
		}
		d, err := configure(n, f, o)
		if errors.Is(err, unix.EBUSY) { // somebody was faster
			continue
		}
		return d, err
	}
	return nil, fmt.Errorf("no free loop device after %d attempts: others take them as fast as they are offered", tries)
}

// configure binds f to loop device n; EBUSY says that it is bound already.
func configure(n int, f *os.File, o Options) (*Device, error) {
	path := Path(n)
	if err := waitNode(path, n); err != nil {
		return nil, err
	}
	mode := os.O_RDWR
	if o.ReadOnly {
		mode = os.O_RDONLY
	}
	dev, err := os.OpenFile(path, mode|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	cfg := unix.LoopConfig{Fd: uint32(f.Fd()), Size: uint32(o.BlockSize)}
	cfg.Info.Flags = o.flags()
	cfg.Info.Offset, cfg.Info.Sizelimit = uint64(o.Offset), uint64(o.SizeLimit)
	copy(cfg.Info.File_name[:len(cfg.Info.File_name)-1], f.Name())
	if err := unix.IoctlLoopConfigure(int(dev.Fd()), &cfg); err != nil {
		dev.Close()
		return nil, fmt.Errorf("attaching %s to %s: %w", f.Name(), path, err)
	}
	return &Device{Path: path, Number: n, file: dev}, nil
}

// File is the open device. It is closed by Close and Detach.
func (d *Device) File() *os.File { return d.file }

// Close lets go of the device, which stays attached unless it was attached with AutoClear.
func (d *Device) Close() error { return d.file.Close() }

// Detach takes the device from its file. ErrBusy: others have it open; it goes when they close it.
func (d *Device) Detach() error { return detach(d.file, d.Path) }

// Detach takes the device at path from its file. It is fine to detach one that
// has none. ErrBusy: others have it open; it goes when they close it.
func Detach(path string) error {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENXIO) {
			return nil
		}
		return err
	}
	return detach(f, path)
}

func detach(f *os.File, path string) error {
	n, err := Number(path)
	if err != nil {
		f.Close()
		return err
	}
	before := diskSeq(n)
	_, err = unix.IoctlRetInt(int(f.Fd()), unix.LOOP_CLR_FD)
	f.Close() // kernels may clear only at the last close
	if errors.Is(err, unix.ENXIO) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("detaching %s: %w", path, err)
	}
	for deadline := time.Now().Add(detachWait); backing(n) != "" && diskSeq(n) == before; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("%s: %w", path, ErrBusy)
		}
	}
	return nil
}

// Path is the node of loop device n.
func Path(n int) string { return "/dev/loop" + strconv.Itoa(n) }

// Number is the N of /dev/loopN.
func Number(path string) (int, error) {
	n, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(path), "loop"))
	if err != nil || n < 0 || !strings.HasPrefix(filepath.Base(path), "loop") {
		return 0, fmt.Errorf("%s is not a loop device", path)
	}
	return n, nil
}

// waitNode waits for the node of loop device n, and makes it where /dev is not kept by the kernel.
func waitNode(path string, n int) error {
	err := WaitNode(path, nodeWait)
	if err == nil {
		return nil
	}
	if mk := unix.Mknod(path, unix.S_IFBLK|0o600, int(unix.Mkdev(major, uint32(n)))); mk != nil && !errors.Is(mk, unix.EEXIST) {
		return errors.Join(err, fmt.Errorf("making it: %w", mk))
	}
	return nil
}

// WaitNode waits until a node such as /dev/loop3p1 is there and opens. The
// kernel adds nodes of partitions shortly after Attach returns.
func WaitNode(path string, d time.Duration) error {
	for deadline := time.Now().Add(d); ; time.Sleep(2 * time.Millisecond) {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err == nil {
			return unix.Close(fd)
		}
		if !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENXIO) {
			return fmt.Errorf("waiting for %s: %w", path, err)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s did not appear within %v: %w", path, d, err)
		}
	}
}
