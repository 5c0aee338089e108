// Package dm speaks to device-mapper's control node: tables read, devices
// made, tables loaded, suspended, resumed and removed. No libdevmapper, no
// program of others, no udev: cookies are not used, so udev's own rules for
// device-mapper are told by flags to leave the devices alone.
//
// Source of the interface: include/uapi/linux/dm-ioctl.h of Linux.
package dm

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Errors that callers branch on.
var (
	// ErrNoMapper: the kernel has no device-mapper, or it may not be used.
	ErrNoMapper = errors.New("device-mapper cannot be used here (is the dm_mod module loaded, and is this root?)")
	// ErrAbsent: no mapped device has the name or number.
	ErrAbsent = errors.New("no such mapped device")
	// ErrBusy: the device is open, or a device of this name or UUID exists.
	ErrBusy   = errors.New("mapped device is in use, or its name is taken")
	errAnswer = errors.New("device-mapper's answer makes no sense")
)

const (
	control    = "/dev/mapper/control"
	headerSize = int(unsafe.Sizeof(unix.DmIoctl{}))
	specSize   = int(unsafe.Sizeof(unix.DmTargetSpec{}))
	answerMax  = 4 << 20
	// udevLeaveAlone are the flags for udev's rules, in the upper half of the event number:
	// no rules of device-mapper, of subsystems and of disks, and no other rules (libdevmapper.h).
	udevLeaveAlone = (0x0002 | 0x0004 | 0x0008 | 0x0010) << 16
)

// Target is one line of a mapping table.
type Target struct {
	Start  uint64 `json:"start"`  // 512-byte sectors
	Length uint64 `json:"length"` // 512-byte sectors
	Type   string `json:"type"`
	Params string `json:"params"`
}

// Table is a mapping table, in order of Start.
type Table []Target

// Digest is the same for equal tables only.
func (t Table) Digest() string {
	sum := sha256.New()
	for _, x := range t {
		fmt.Fprintf(sum, "%d %d %s %s\n", x.Start, x.Length, x.Type, x.Params)
	}
	return hex.EncodeToString(sum.Sum(nil)[:16])
}

// Types are the distinct types of target, in order of their first use.
func (t Table) Types() (types []string) {
	seen := map[string]bool{}
	for _, x := range t {
		if !seen[x.Type] {
			seen[x.Type] = true
			types = append(types, x.Type)
		}
	}
	return types
}

// Sectors is the size that the table gives its device, in 512-byte sectors.
func (t Table) Sectors() uint64 {
	if len(t) == 0 {
		return 0
	}
	last := t[len(t)-1]
	return last.Start + last.Length
}

// Info is what device-mapper tells of a device.
type Info struct {
	Name      string
	UUID      string
	Major     uint32
	Minor     uint32
	Open      int // openers, mounts and devices above it
	Event     uint32
	Suspended bool
	ReadOnly  bool
	Live      bool // has a table in use
	Inactive  bool // has a table that waits for the next resume
}

// Node is a path of the device that does not depend on udev's links.
func (i Info) Node() string { return "/dev/dm-" + strconv.Itoa(int(i.Minor)) }

// Control is the open control node. It is safe for concurrent use.
type Control struct{ file *os.File }

// Open opens the control node.
func Open() (*Control, error) {
	f, err := os.OpenFile(control, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoMapper, err)
	}
	return &Control{f}, nil
}

// Close closes the control node.
func (c *Control) Close() error { return c.file.Close() }

// ID names a mapped device: by name, or by number where Name is empty.
type ID struct {
	Name         string
	Major, Minor uint32
}

// Named is the ID of a name.
func Named(name string) ID { return ID{Name: name} }

// Numbered is the ID of a device number.
func Numbered(major, minor uint32) ID { return ID{Major: major, Minor: minor} }

func (id ID) String() string {
	if id.Name != "" {
		return id.Name
	}
	return fmt.Sprintf("%d:%d", id.Major, id.Minor)
}

// request fills in the head of an ioctl's buffer.
func request(buf []byte, id ID, flags uint32) (*unix.DmIoctl, error) {
	req := (*unix.DmIoctl)(unsafe.Pointer(&buf[0]))
	*req = unix.DmIoctl{Version: [3]uint32{4, 0, 0}, Data_size: uint32(len(buf)), Data_start: uint32(headerSize), Flags: flags}
	if id.Name == "" {
		req.Dev = unix.Mkdev(id.Major, id.Minor)
		return req, nil
	}
	if len(id.Name) >= len(req.Name) {
		return nil, fmt.Errorf("%q is too long for a mapped device: at most %d bytes", id.Name, len(req.Name)-1)
	}
	copy(req.Name[:], id.Name)
	return req, nil
}

func (c *Control) call(op uintptr, req *unix.DmIoctl) error {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, c.file.Fd(), op, uintptr(unsafe.Pointer(req)))
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
			continue
		case unix.ENXIO:
			return fmt.Errorf("%w: %w", ErrAbsent, errno)
		case unix.EBUSY:
			return fmt.Errorf("%w: %w", ErrBusy, errno)
		}
		return errno
	}
}

// simple is an ioctl without data.
func (c *Control) simple(op uintptr, what string, id ID, set func(*unix.DmIoctl)) (Info, error) {
	buf := make([]byte, headerSize)
	req, err := request(buf, id, 0)
	if err != nil {
		return Info{}, err
	}
	if set != nil {
		set(req)
	}
	if err := c.call(op, req); err != nil {
		return Info{}, fmt.Errorf("%s %s: %w", what, id, err)
	}
	return infoOf(req), nil
}

func infoOf(req *unix.DmIoctl) Info {
	return Info{
		Name: text(req.Name[:]), UUID: text(req.Uuid[:]), Open: int(req.Open_count), Event: req.Event_nr,
		Major: unix.Major(req.Dev), Minor: unix.Minor(req.Dev),
		Suspended: req.Flags&unix.DM_SUSPEND_FLAG != 0, ReadOnly: req.Flags&unix.DM_READONLY_FLAG != 0,
		Live: req.Flags&unix.DM_ACTIVE_PRESENT_FLAG != 0, Inactive: req.Flags&unix.DM_INACTIVE_PRESENT_FLAG != 0,
	}
}

func text[T byte | int8](b []T) string {
	var s strings.Builder
	for _, c := range b {
		if c == 0 {
			break
		}
		s.WriteByte(byte(c))
	}
	return s.String()
}

// Info asks for a device.
func (c *Control) Info(id ID) (Info, error) {
	return c.simple(unix.DM_DEV_STATUS, "looking at mapped device", id, nil)
}

// Table reads the table in use, with the device as it was then.
func (c *Control) Table(id ID) (Table, Info, error) {
	for size := 64 << 10; size <= answerMax; size *= 4 {
		buf := make([]byte, size)
		req, err := request(buf, id, unix.DM_STATUS_TABLE_FLAG|unix.DM_NOFLUSH_FLAG)
		if err != nil {
			return nil, Info{}, err
		}
		if err := c.call(unix.DM_TABLE_STATUS, req); err != nil {
			return nil, Info{}, fmt.Errorf("reading the table of mapped device %s: %w", id, err)
		}
		if req.Flags&unix.DM_BUFFER_FULL_FLAG != 0 {
			continue
		}
		t, err := parse(buf[min(int(req.Data_start), len(buf)):], int(req.Target_count))
		return t, infoOf(req), err
	}
	return nil, Info{}, fmt.Errorf("the table of mapped device %s has more than %d bytes", id, answerMax)
}

func parse(data []byte, count int) (Table, error) {
	var t Table
	at := 0
	for range count {
		if at < 0 || at+specSize > len(data) {
			return nil, errAnswer
		}
		var spec unix.DmTargetSpec
		copy(unsafe.Slice((*byte)(unsafe.Pointer(&spec)), specSize), data[at:])
		params, _, ok := bytes.Cut(data[at+specSize:], []byte{0})
		if !ok {
			return nil, errAnswer
		}
		t = append(t, Target{Start: spec.Sector_start, Length: spec.Length, Type: text(spec.Target_type[:]), Params: strings.TrimRight(string(params), " ")})
		at = int(spec.Next) // from the start of the data
	}
	return t, nil
}
