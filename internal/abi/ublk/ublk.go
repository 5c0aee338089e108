// Package ublk is the kernel's interface for block devices served from user
// space, as data: linux/ublk_cmd.h. It does no I/O.
package ublk

import "unsafe"

// Numbers of control commands, as kernels up to 6.2 know them; see Encode.
const (
	CmdGetDevInfo        = 0x02
	CmdAddDev            = 0x04
	CmdDelDev            = 0x05
	CmdStartDev          = 0x06
	CmdStopDev           = 0x07
	CmdSetParams         = 0x08
	CmdGetParams         = 0x09
	CmdStartUserRecovery = 0x10
	CmdEndUserRecovery   = 0x11
	CmdGetFeatures       = 0x13 // 6.5, encoded only, as are those below
	CmdDelDevAsync       = 0x14 // 6.9
	CmdUpdateSize        = 0x15 // 6.16: Data is the size in sectors
)

// Numbers of commands for requests, and what they complete with.
const (
	IOFetch          = 0x20
	IOCommitAndFetch = 0x21
	IORegisterBuf    = 0x23 // 6.15, encoded only: Addr is a number of the ring's table
	IOUnregisterBuf  = 0x24

	ResOK    = 0
	ResAbort = -19 // -ENODEV: there is nothing more to fetch
)

// reading are the control commands that are encoded as _IOR; the others are _IOWR.
var reading = map[uint32]bool{CmdGetDevInfo: true, CmdGetParams: true, CmdGetFeatures: true, CmdDelDevAsync: true}

// Encode gives a command's number as an ioctl's, which kernels since 6.3 take
// and later ones may insist on.
func Encode(nr uint32) uint32 {
	const write, read = 1, 2
	dir, size := uint32(read|write), uint32(unsafe.Sizeof(CtrlCmd{}))
	if nr >= IOFetch {
		size = uint32(unsafe.Sizeof(IOCmd{}))
	} else if reading[nr] {
		dir = read
	}
	return dir<<30 | size<<16 | 'u'<<8 | nr
}

// Flags of a device and of a kernel (features).
const (
	FlagZeroCopy            = 1 << 0
	FlagUserRecovery        = 1 << 3
	FlagUserRecoveryReissue = 1 << 4
	FlagIoctlEncode         = 1 << 6
	FlagUserCopy            = 1 << 7
	FlagUpdateSize          = 1 << 10
	FlagRegisterAnywhere    = 1 << 14 // IORegisterBuf may come from any thread and ring (6.17)
)

// States of a device.
const (
	StateDead     = 0 // added, not started, or stopped
	StateLive     = 1
	StateQuiesced = 2 // its server is gone, and requests wait for another
	StateFailIO   = 3
)

// Where requests' descriptors are mapped, and their data is read and written,
// in the character device.
const (
	MaxQueueDepth = 4096
	BufOffset     = 0x80000000
	BufMax        = 1 << TagOffset // bytes of one request
	TagOffset     = 25
	QueueOffset   = TagOffset + 16
)

// DescOffset is where the descriptors of a queue are mapped.
func DescOffset(queue int) int64 {
	const each = MaxQueueDepth * int64(unsafe.Sizeof(Desc{})) // whole pages
	return int64(queue) * each
}

// DataOffset is where the data of a request is read and written (user copy).
func DataOffset(queue, tag int) int64 {
	return BufOffset + int64(queue)<<QueueOffset + int64(tag)<<TagOffset
}

// CtrlCmd is struct ublksrv_ctrl_cmd, the payload of a control command.
type CtrlCmd struct {
	DevID      uint32
	QueueID    uint16 // NoQueue where the command is not for one
	Len        uint16
	Addr       uint64
	Data       uint64
	DevPathLen uint16
	_          uint16
	_          uint32
}

// NoQueue is the QueueID of commands for the whole device.
const NoQueue = 0xffff

// AnyDev is the DevID that lets the kernel choose.
const AnyDev = 0xffffffff

// DevInfo is struct ublksrv_ctrl_dev_info.
type DevInfo struct {
	Queues      uint16
	QueueDepth  uint16
	State       uint16
	_           uint16
	MaxIOBytes  uint32
	DevID       uint32
	ServerPID   int32
	_           uint32
	Flags       uint64
	ServerFlags uint64 // the server's own; the kernel only keeps it
	OwnerUID    uint32
	OwnerGID    uint32
	_           [2]uint64
}

// IOCmd is struct ublksrv_io_cmd, the payload of a command for a request.
type IOCmd struct {
	QueueID uint16
	Tag     uint16
	Result  int32  // bytes or -errno
	Addr    uint64 // of the buffer; 0 with user copy
}

// Desc is struct ublksrv_io_desc, what a request asks for.
type Desc struct {
	OpFlags     uint32
	Sectors     uint32
	StartSector uint64
	Addr        uint64
}

// Op and FUA take OpFlags apart.
func (d *Desc) Op() uint8 { return uint8(d.OpFlags) }
func (d *Desc) FUA() bool { return d.OpFlags&flagFUA != 0 }

const flagFUA = 1 << 13

// Operations of a request.
const (
	OpRead        = 0
	OpWrite       = 1
	OpFlush       = 2
	OpDiscard     = 3
	OpWriteZeroes = 5
)

// Types and attributes of Params.
const (
	ParamBasic   = 1 << 0
	ParamDiscard = 1 << 1
	ParamDevt    = 1 << 2

	AttrReadOnly      = 1 << 0
	AttrRotational    = 1 << 1
	AttrVolatileCache = 1 << 2
	AttrFUA           = 1 << 3
)

// Params is struct ublk_params up to the parts that are used here; the kernel
// goes by Len.
type Params struct {
	Len   uint32
	Types uint32

	Attrs         uint32
	LogicalShift  uint8
	PhysicalShift uint8
	IOOptShift    uint8
	IOMinShift    uint8
	MaxSectors    uint32
	ChunkSectors  uint32
	DevSectors    uint64
	VirtBoundary  uint64

	DiscardAlignment   uint32
	DiscardGranularity uint32 // bytes
	MaxDiscardSectors  uint32
	MaxZeroesSectors   uint32
	MaxDiscardSegments uint16
	_                  uint16

	CharMajor, CharMinor, DiskMajor, DiskMinor uint32
	_                                          uint32
}
