package ublk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	abi "tidemark/internal/abi/ublk"
	"tidemark/internal/uring"
)

const controlPath = "/dev/ublk-control"

// control is the driver's control device.
type control struct {
	file     *os.File
	encoded  bool   // commands are encoded as ioctls
	features uint64 // 0: the kernel cannot say
}

// openControl opens the control device and finds out how it wants commands.
func openControl(plain bool) (*control, error) {
	f, err := os.OpenFile(controlPath, os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: there is no %s (modprobe ublk_drv; Debian's kernels have it from 6.12 on)", ErrUnavailable, controlPath)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	if err := uring.Probe(uring.OpURingCmd); err != nil {
		f.Close()
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	c := &control{file: f, encoded: true}
	if plain {
		c.encoded = false
		return c, nil
	}
	b := make([]byte, 8)
	switch err := c.do(context.Background(), abi.CmdGetFeatures, abi.CtrlCmd{DevID: abi.AnyDev}, b); {
	case err == nil:
		c.features = *(*uint64)(unsafe.Pointer(&b[0]))
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOTTY), errors.Is(err, unix.ENODEV):
		c.encoded = false // before 6.5: the plain numbers, which all kernels of that age know
	default:
		f.Close()
		return nil, fmt.Errorf("%w: asking for its features: %w", ErrUnavailable, err)
	}
	return c, nil
}

func (c *control) Close() error { return c.file.Close() }

// do gives a command with its buffer and waits for the answer until ctx ends,
// for commandWait at most where it has no end. It has a ring of its own: commands
// are rare, and one that hangs is left behind with it.
func (c *control) do(ctx context.Context, nr uint32, cmd abi.CtrlCmd, buf []byte) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	ring, err := uring.New(uring.Config{Entries: 2, Big: true})
	if err != nil {
		return err
	}
	mem, err := uring.Memory(4096)
	if err != nil {
		return errors.Join(err, ring.Close())
	}
	if buf != nil {
		copy(mem, buf)
		cmd.Addr, cmd.Len = uint64(uintptr(unsafe.Pointer(&mem[0]))), uint16(len(buf))
	}
	cmd.QueueID = abi.NoQueue
	op := nr
	if c.encoded {
		op = abi.Encode(nr)
	}
	*(*abi.CtrlCmd)(ring.Next().Cmd(int(c.file.Fd()), op, 1)) = cmd
	res, err := await(ctx, ring)
	if err != nil {
		return errors.Join(err, ring.Close()) // mem is left to the kernel, which may still answer
	}
	copy(buf, mem)
	if err := errors.Join(uring.Free(mem), ring.Close()); err != nil {
		return err
	}
	if res < 0 {
		return unix.Errno(-res)
	}
	return nil
}

// await waits for the one completion of a ring.
func await(ctx context.Context, ring *uring.Ring) (int32, error) {
	if _, bounded := ctx.Deadline(); !bounded {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, commandWait)
		defer cancel()
	}
	for {
		err := ring.SubmitFor(1, 50*time.Millisecond)
		if c, ok := ring.Reap(); ok {
			return c.Res, nil
		}
		if err != nil && !errors.Is(err, uring.ErrTimeout) {
			return 0, err
		}
		if ctx.Err() != nil {
			return 0, fmt.Errorf("the ublk driver does not answer: %w", context.Cause(ctx))
		}
	}
}

// info asks for a device. ErrNoDevice where there is none.
func (c *control) info(ctx context.Context, id uint32) (abi.DevInfo, error) {
	var info abi.DevInfo
	err := c.do(ctx, abi.CmdGetDevInfo, abi.CtrlCmd{DevID: id}, bytesOf(&info))
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) {
		return info, fmt.Errorf("%d: %w", id, ErrNoDevice)
	}
	if err != nil {
		return info, fmt.Errorf("asking for ublk device %d: %w", id, err)
	}
	if _, err := os.Stat(classPath(id)); info.State == abi.StateDead && errors.Is(err, os.ErrNotExist) {
		return info, fmt.Errorf("%d: %w: it is removed, and goes with its last opener", id, ErrNoDevice)
	}
	return info, nil
}

// bytesOf is a kernel structure as bytes.
func bytesOf[T abi.DevInfo | abi.Params](v *T) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(v)), unsafe.Sizeof(*v))
}
