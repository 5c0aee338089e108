package doctor

import (
	"fmt"
	"slices"
	"strings"

	"tidemark/internal/disk"
	"tidemark/internal/health"
	"tidemark/internal/splice"
	"tidemark/internal/tap"
)

// Way is one of the ways in, for one disk.
type Way struct {
	Way        string             `json:"way"` // tap, splice or serve
	Answer     Answer             `json:"answer"`
	Reason     string             `json:"reason,omitempty"`
	Remedy     string             `json:"remedy,omitempty"`
	Conditions []health.Condition `json:"conditions,omitempty"` // every reason against it that lies in the disk
}

// Report is what can be done for one disk.
type Report struct {
	Device *disk.Info `json:"device"`
	Ways   []Way      `json:"ways"`
	Checks []Check    `json:"checks"` // of the machine
}

// Device examines a disk, named in any form that disk.Inspect takes, and the
// machine for it. Errors are those of disk.Inspect.
func Device(spec string) (*Report, error) {
	info, err := disk.Inspect(spec)
	if err != nil {
		return nil, err
	}
	checks := Machine()
	return &Report{Device: info, Checks: checks, Ways: []Way{tapWay(info, checks), spliceWay(info, checks), serveWay(info, checks)}}, nil
}

func tapWay(info *disk.Info, checks []Check) Way {
	w := Way{Way: "tap", Answer: Yes, Conditions: disk.TapRefusals(info)}
	if c := tappedBy(info); c != nil {
		w.Conditions = append(w.Conditions, *c)
	}
	if len(w.Conditions) > 0 {
		first := w.Conditions[0]
		w.Answer, w.Reason, w.Remedy = No, first.Detail, first.Remedy
		if more := len(w.Conditions) - 1; more > 0 {
			w.Reason += fmt.Sprintf(" (and %d more)", more)
		}
		return w
	}
	for _, c := range checks {
		if c.Answer == Yes || !tapNeeds(c.Code) {
			continue
		}
		if c.Code == "tap-payload" && c.Answer == No {
			w.Reason, w.Remedy = "in metadata mode only: "+c.Reason, c.Remedy
			continue
		}
		if w.Answer == Yes || c.Answer == No && w.Answer == CannotTell {
			w.Answer, w.Reason, w.Remedy = c.Answer, c.What+": "+c.Reason, c.Remedy
		}
	}
	return w
}

func tapNeeds(code string) bool {
	return strings.HasPrefix(code, "tap-") || slices.ContainsFunc(tapProbes(), func(p probe) bool { return p.code == code })
}

// CodeTapped is the condition of a disk that has a tap already.
const CodeTapped = "disk-tapped"

// tappedBy looks for a pinned tap on the disk, or on one of its stack.
func tappedBy(info *disk.Info) *health.Condition {
	pins, err := tap.Pinned()
	if err != nil {
		return nil // no BPF file system: nothing is pinned
	}
	for _, p := range pins {
		for _, t := range p.Targets {
			if !onTarget(info, t) {
				continue
			}
			return &health.Condition{Code: CodeTapped, Severity: health.Error, Subject: info.Name,
				Detail: fmt.Sprintf("%s is protected already, or shares its stack with %s, which is: group %s of instance %s", info.Name, t.Name, p.Group, p.Instance),
				Remedy: "tidemark unprotect " + p.Group + "; or, if no daemon knows the group, tidemark doctor --fix"}
		}
	}
	return nil
}

func onTarget(info *disk.Info, t tap.Target) bool {
	other, err := disk.Glance(fmt.Sprintf("%d:%d", t.Whole>>20, t.Whole&0xfffff))
	if err != nil || t.DiskSeq != 0 && other.DiskSeq != t.DiskSeq {
		return false // that disk is gone; its number may have a new owner
	}
	other.Start, other.Size = t.Start, t.Len
	return disk.Related(info, other)
}

// spliceWay needs a table that can be swapped while it is in use, and a front
// whose requests wait while there is no daemon.
func spliceWay(info *disk.Info, checks []Check) Way {
	w := Way{Way: "splice", Answer: No}
	switch {
	case info.Mapping == nil || info.Partition:
		w.Reason, w.Remedy = info.Name+" is no device-mapper device: there is no table to swap", "use the tap, or put the data on an LVM volume"
		return w
	case len(info.Mapping.Targets) == 0:
		w.Answer, w.Reason, w.Remedy = CannotTell, "its table cannot be read", "run as root, with /dev/mapper/control there"
		return w
	}
	if w.Reason, w.Remedy = splice.Unable(info.Mapping.Targets); w.Reason != "" {
		return w
	}
	if !able(checks, "ublk") && !able(checks, "nbd") {
		w.Reason, w.Remedy = "this machine has no front that outlives its server", "modprobe ublk_drv, or nbd"
		return w
	}
	w.Answer = Yes
	return w
}

func able(checks []Check, code string) bool {
	return slices.ContainsFunc(checks, func(c Check) bool { return c.Code == code && c.Answer == Yes })
}

// serveWay needs a disk that nobody uses. Without anything that turns a program
// into a block device there is still the NBD server.
func serveWay(info *disk.Info, checks []Check) Way {
	w := Way{Way: "serve", Answer: Yes}
	if why := inUse(info); why != "" {
		w.Answer, w.Reason = No, "a served device stands in front of a disk that nobody uses, and "+why
		w.Remedy = "use the tap; or take the disk out of use and mount /dev/tidemark/NAME instead (tidemark device create)"
		return w
	}
	switch {
	case able(checks, "ublk"), able(checks, "nbd"):
	case able(checks, "fuse") && able(checks, "loop"):
		w.Reason = "by the loop front only, which cannot outlive the daemon: requests fail while there is none"
		w.Remedy = "modprobe ublk_drv, or nbd"
	default:
		w.Reason, w.Remedy = "to NBD clients only: this machine has neither ublk nor NBD nor FUSE with loop devices", "modprobe ublk_drv, nbd, or fuse and loop"
	}
	return w
}

// inUse says how a disk is used, "" where it is not.
func inUse(info *disk.Info) string {
	switch {
	case len(info.Mounts) > 0:
		return "it is mounted at " + info.Mounts[0].Point
	case len(info.Swap) > 0:
		return "it is swap"
	case len(info.Holders) > 0:
		return "it is below " + info.Holders[0]
	}
	return ""
}
