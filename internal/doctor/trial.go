package doctor

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"tidemark/internal/disk"
	"tidemark/internal/loop"
	"tidemark/internal/tap"
)

// trialGroup names the pins of a trial; left behind by one that was killed,
// they are found like any others.
const trialGroup = "trial"

func trialInstance() string { return fmt.Sprintf("doctor-%d", os.Getpid()) }

const (
	trialSize = 1 << 20   // bytes of the scratch disk
	trialRing = 256 << 10 // bytes
)

// trialChecks put a tap on a loop device over memory, to see whether programs
// load and attach, and whether they find the data of a page.
func trialChecks(able bool) []Check {
	attach := Check{Code: "tap-trial", What: "the tap works on a scratch disk", Answer: CannotTell, Reason: "not tried, for want of the above"}
	payload := Check{Code: "tap-payload", What: "the tap finds the data of writes", Answer: CannotTell, Reason: attach.Reason}
	if !able {
		return []Check{attach, payload}
	}
	found, err := trial()
	switch {
	case errors.Is(err, errCannotTell):
		attach.Reason, attach.Remedy = err.Error(), "modprobe loop"
		payload.Reason = "not tried"
	case err != nil:
		attach.Answer, attach.Reason, attach.Remedy = No, err.Error(), "report this with the kernel's version: what it needs is there"
		payload.Reason = "the tap did not start"
	case !found:
		attach.Answer, attach.Reason = Yes, ""
		payload.Answer, payload.Reason = No, "calibration found no page's address"
		payload.Remedy = "disks can be protected in metadata mode only; report this with the kernel's version"
	default:
		attach.Answer, attach.Reason = Yes, ""
		payload.Answer, payload.Reason = Yes, ""
	}
	return []Check{attach, payload}
}

func trial() (payload bool, err error) {
	dev, err := scratch()
	if err != nil {
		return false, fmt.Errorf("a scratch disk: %w: %w", err, errCannotTell)
	}
	defer func() { err = errors.Join(err, dev.Detach()) }()
	info, err := disk.Glance(dev.Path)
	if err != nil {
		return false, err
	}
	t, err := tap.Start(tap.Config{Instance: trialInstance(), Group: trialGroup, RingBytes: trialRing, Targets: []tap.Target{{
		Name: info.Name, Whole: info.WholeDev, Len: info.Size, DiskSeq: info.DiskSeq, BlockSize: 4096}}})
	if err != nil {
		return false, err
	}
	payload = t.PayloadCaptured()
	return payload, t.Remove()
}

// scratch is a loop device over memory that goes with this process.
func scratch() (*loop.Device, error) {
	fd, err := unix.MemfdCreate("tidemark-doctor", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "tidemark-doctor")
	defer f.Close()
	if err := f.Truncate(trialSize); err != nil {
		return nil, err
	}
	return loop.AttachFile(f, loop.Options{AutoClear: true})
}
