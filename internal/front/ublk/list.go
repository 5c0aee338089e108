package ublk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	abi "tidemark/internal/abi/ublk"
	"tidemark/internal/block"
)

func blockName(id uint32) string { return fmt.Sprintf("ublkb%d", id) }
func charName(id uint32) string  { return fmt.Sprintf("ublkc%d", id) }
func blockPath(id uint32) string { return "/dev/" + blockName(id) }
func charPath(id uint32) string  { return "/dev/" + charName(id) }
func classPath(id uint32) string { return classes + "/" + charName(id) }

const classes = "/sys/class/ublk-char"

// Info is a device of this machine, whoever serves it.
type Info struct {
	Number  int
	Path    string
	Size    int64  // bytes
	Token   uint64 // of the Config that it was made with
	PID     int    // its server, which may be gone
	Started bool   // false: it was added and never started, or is stopped
	Waiting bool   // its server is gone, and requests wait for Recover
}

// Probe says why no device can be served here, nil where it can.
func Probe() error {
	c, err := openControl(false)
	if err != nil {
		return err
	}
	return c.Close()
}

// CanResize says whether Resize works here.
func CanResize() bool {
	c, err := openControl(false)
	if err != nil {
		return false
	}
	defer c.Close()
	return c.features&abi.FlagUpdateSize != 0
}

// List gives the ublk devices of this machine, by number.
func List(ctx context.Context) ([]Info, error) {
	entries, err := os.ReadDir(classes)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var all []Info
	for _, e := range entries {
		n, err := strconv.Atoi(strings.TrimPrefix(e.Name(), "ublkc"))
		if err != nil {
			continue
		}
		info, err := Stat(ctx, n)
		if errors.Is(err, ErrNoDevice) { // gone meanwhile
			continue
		}
		if err != nil {
			return all, err
		}
		all = append(all, info)
	}
	slices.SortFunc(all, func(a, b Info) int { return a.Number - b.Number })
	return all, nil
}

// Stat asks for one device. ErrNoDevice where there is none.
func Stat(ctx context.Context, number int) (Info, error) {
	c, err := openControl(false)
	if err != nil {
		return Info{}, err
	}
	defer c.Close()
	id := uint32(number)
	info, err := c.info(ctx, id)
	if err != nil {
		return Info{}, err
	}
	i := Info{Number: number, Path: blockPath(id), Token: info.ServerFlags, PID: int(info.ServerPID),
		Started: info.State != abi.StateDead, Waiting: info.State == abi.StateQuiesced}
	if p, err := c.params(ctx, id); err == nil {
		i.Size = int64(p.DevSectors) * block.SectorSize
	}
	return i, nil
}

// Forget removes a device that nobody serves: requests that wait get errors.
func Forget(ctx context.Context, number int) error {
	c, err := openControl(false)
	if err != nil {
		return err
	}
	defer c.Close()
	id := uint32(number)
	info, err := c.info(ctx, id)
	if err != nil {
		return err
	}
	if pid := int(info.ServerPID); info.State == abi.StateLive && alive(pid) {
		return fmt.Errorf("%s %w (number %d)", blockPath(id), ErrServed, pid)
	}
	if err := c.do(ctx, abi.CmdStopDev, abi.CtrlCmd{DevID: id}, nil); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("stopping %s: %w", blockPath(id), err)
	}
	return c.remove(ctx, id)
}

func alive(pid int) bool { return pid > 0 && !errors.Is(unix.Kill(pid, 0), unix.ESRCH) }

// params asks what the kernel takes a device to be like.
func (c *control) params(ctx context.Context, id uint32) (abi.Params, error) {
	var p abi.Params
	p.Len = uint32(len(bytesOf(&p)))
	if err := c.do(ctx, abi.CmdGetParams, abi.CtrlCmd{DevID: id}, bytesOf(&p)); err != nil {
		if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) {
			err = ErrNoDevice
		}
		return p, fmt.Errorf("asking what ublk device %d is like: %w", id, err)
	}
	return p, nil
}

// removeWait is for how long remove waits for the kernel. What it has not done
// by then it does when the last opener is gone.
const removeWait = 2 * time.Second

// remove deletes a stopped device without waiting for those who have it open.
func (c *control) remove(ctx context.Context, id uint32) error {
	file, err := os.OpenFile(controlPath, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	own := &control{file: file, encoded: c.encoded} // c may be closed before the answer
	answer := make(chan error, 1)
	go func() { // ends after commandWait at the latest
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), commandWait)
		defer cancel()
		answer <- errors.Join(own.delete(ctx, id), own.Close())
	}()
	select {
	case err := <-answer:
		if err != nil {
			return fmt.Errorf("deleting ublk device %d: %w", id, err)
		}
		return nil
	case <-time.After(removeWait):
		return nil
	}
}

// delete asks for the deletion that does not wait, and where the kernel has
// none (before 6.9) for the one that does.
func (c *control) delete(ctx context.Context, id uint32) error {
	var err error = unix.EOPNOTSUPP
	if c.encoded {
		err = c.do(ctx, abi.CmdDelDevAsync, abi.CtrlCmd{DevID: id}, nil)
	}
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTTY) {
		err = c.do(ctx, abi.CmdDelDev, abi.CtrlCmd{DevID: id}, nil)
	}
	if errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}
