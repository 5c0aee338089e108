package disk

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Mapping is what device-mapper does behind a device.
type Mapping struct {
	Name    string   `json:"name"`
	UUID    string   `json:"uuid,omitempty"`
	Targets []string `json:"targets,omitempty"` // distinct types of the live table; none: it could not be read
	Table   string   `json:"table,omitempty"`   // digest of the live table; "" where it could not be read
	Event   uint32   `json:"event"`
}

func (h Host) mapping(whole string, dev uint32) *Mapping {
	m := &Mapping{Name: h.attr(whole, "dm/name"), UUID: h.attr(whole, "dm/uuid")}
	if !h.live() {
		return m
	}
	t, err := readTable(dev)
	if err != nil {
		return m // a kernel without the control node: what sysfs says must do
	}
	m.Targets, m.Table, m.Event = t.targets, t.digest, t.event
	return m
}

type table struct {
	targets []string
	digest  string
	event   uint32
}

const (
	dmHeader    = int(unsafe.Sizeof(unix.DmIoctl{}))
	dmSpec      = int(unsafe.Sizeof(unix.DmTargetSpec{}))
	dmBufferMax = 4 << 20
)

var errTable = errors.New("device-mapper's answer makes no sense")

// readTable asks for the live table of the device with a number.
func readTable(dev uint32) (table, error) {
	f, err := os.OpenFile("/dev/mapper/control", os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return table{}, err
	}
	defer f.Close()
	for size := 64 << 10; size <= dmBufferMax; size *= 4 {
		buf := make([]byte, size)
		req := (*unix.DmIoctl)(unsafe.Pointer(&buf[0]))
		*req = unix.DmIoctl{Version: [3]uint32{4, 0, 0}, Data_size: uint32(size), Data_start: uint32(dmHeader),
			Flags: unix.DM_STATUS_TABLE_FLAG | unix.DM_NOFLUSH_FLAG, Dev: encodeDev(dev)}
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.DM_TABLE_STATUS, uintptr(unsafe.Pointer(req)))
		if errno != 0 {
			return table{}, fmt.Errorf("reading the mapping table: %w", errno)
		}
		if req.Flags&unix.DM_BUFFER_FULL_FLAG != 0 {
			continue
		}
		return parseTable(buf, req)
	}
	return table{}, fmt.Errorf("mapping table of more than %d bytes", dmBufferMax)
}

// encodeDev is the form of a device number in ioctls.
func encodeDev(dev uint32) uint64 {
	major, minor := uint64(dev>>20), uint64(dev&0xfffff)
	return minor&0xff | major<<8 | minor&^0xff<<12
}

func parseTable(buf []byte, req *unix.DmIoctl) (table, error) {
	t := table{event: req.Event_nr}
	sum := sha256.New()
	seen := map[string]bool{}
	data := buf[min(int(req.Data_start), len(buf)):]
	at := 0
	for range req.Target_count {
		if at < 0 || at+dmSpec > len(data) {
			return table{}, errTable
		}
		var spec unix.DmTargetSpec
		copy(unsafe.Slice((*byte)(unsafe.Pointer(&spec)), dmSpec), data[at:])
		params, _, ok := bytes.Cut(data[at+dmSpec:], []byte{0})
		if !ok {
			return table{}, errTable
		}
		kind, _, _ := bytes.Cut(spec.Target_type[:], []byte{0})
		fmt.Fprintf(sum, "%d %d %s %s\n", spec.Sector_start, spec.Length, kind, params)
		if !seen[string(kind)] {
			seen[string(kind)] = true
			t.targets = append(t.targets, string(kind))
		}
		at = int(spec.Next) // from the start of the data
	}
	t.digest = hex.EncodeToString(sum.Sum(nil)[:16])
	return t, nil
}
