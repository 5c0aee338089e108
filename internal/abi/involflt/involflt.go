// Package involflt is the control interface of Azure Site Recovery's disk filter
// driver for Linux, as its clients on 64-bit machines speak it: ioctl numbers,
// structures, the stream of changes (stream.go) and the records of tags (tags.go).
// testdata/involflt.h declares the same in C.
//
// The numbers are not to be trusted: START_FILTERING_DEVICE_V2 says 4384 bytes
// and reads 4640, GET_DIRTY_BLOCKS_TRANS says 128 and writes 8176, the commands
// that freeze say "write" and are answered in place, three say nothing at all.
package involflt

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// Commands.
const (
	StopFiltering      = 0x4080fe00
	ProcessStart       = 0x4004fe02
	ServiceStart       = 0x4004fe03 // SERVICE_SHUTDOWN_NOTIFY: the service runs until the descriptor is closed
	GetDirtyBlocks     = 0xc080fe04 // the old number of the next but two, with the same structure
	CommitDirtyBlocks  = 0x4090fe05
	WaitForBlocksOld   = 0x4084fe08 // finds the disk by its name
	ClearDifferentials = 0x4080fe09
	UnstackAll         = 0x0000fe0b
	WakeupAllThreads   = 0x0000fe0e
	NotifyThreshold    = 0xc084fe0f
	ResyncStart        = 0xc090fe11
	ResyncEnd          = 0xc090fe12
	DriverVersion      = 0xc010fe13
	GlobalStats        = 0x0000fe19
	VolumeStats        = 0x0000fe1a
	ProtectedVolumes   = 0x0000fe1b
	StartFiltering     = 0x5120fe1f
	AdditionalStats    = 0xc098fe2b
	FreezeVolume       = 0x4038fe31
	TagVolume          = 0xc048fe32
	ThawVolume         = 0x4038fe33
	BarrierTag         = 0xc048fe34 // IOBARRIER_TAG_VOLUME
	CreateBarrier      = 0xc02cfe35
	RemoveBarrier      = 0xc028fe36
	TagCommit          = 0xc028fe37
	WaitForBlocks      = 0x4084fe42
	GetDirtyBlocksV2   = 0xdff0fe48
)

// Device is the control device's name, in /dev.
const Device = "involflt"

// HostVolume is the only kind of device that can be filtered.
const HostVolume = 2

// Flags of a DirtyBlock. None of DataFile, Stream and Empty: its arrays count, or it is a tag's.
const (
	FlagSplitStart = 0x00000001
	FlagSplitPart  = 0x00000002
	FlagSplitEnd   = 0x00000004
	FlagDataFile   = 0x00000008 // the changes are in a file; Tags holds its name
	FlagStream     = 0x00000010 // the changes are mapped into the caller
	FlagEmpty      = 0x00000020 // there is nothing
	FlagResync     = 0x80000000
)

// Write-order states. Only in OrderData blocks come in the order of the writes.
const (
	OrderUnknown  = 0
	OrderBitmap   = 1
	OrderMetadata = 2
	OrderData     = 3
)

// Flags and status of a VolumeInfo; flags of a TagInfo; verdicts of a TagVerdict.
const (
	DrainBarrier = 1 // this volume's tag waits for its verdict

	StatusFailed       = 1 // freeze, thaw
	StatusNotAccepted  = 1 // tags; bits
	StatusNotProtected = 2
	StatusNotInOrder   = 4

	AllVolumes = 4 // of TagInfo: all that are filtered, under a barrier

	Revoke = 0
	Commit = 1
)

// ResetResync is the flag of a Transaction that acknowledges a resync.
const ResetResync = 1

// PartialTags is what tag commands return when some volumes got their tag.
const PartialTags = 1

// Bounds.
const (
	ChangesMax    = 204   // in a DirtyBlock's arrays
	FileNameMax   = 0x6fe // bytes, without the NUL that follows
	TagRecordsMax = 3520  // bytes of records in a DirtyBlock
	TagMax        = 256   // bytes of one tag
	BarrierMax    = 300   // ms
	TimeoutMax    = 60000 // ms: freezes and verdicts
	NotifyBytes   = 4 << 20
	NotifyChanges = 170
	ListReserve   = 40960 // bytes that a list that is too short should grow by beyond what is needed
	StatsBytes    = 4096
)

// Name is a device's path or persistent name, with a NUL behind it.
type Name [128]byte

// LongName is one where there is more room.
type LongName [256]byte

// GUID is of a consistency point: 36 characters as a rule, any bytes at all.
type GUID [36]byte

// DeviceInfo is the argument of StartFiltering.
type DeviceInfo struct {
	Type       uint32
	Device     LongName
	MountPoint [4096]byte
	_          uint32
	Blocks     uint64
	BlockSize  uint32
	_          uint32
	Flags      uint64
	Persistent LongName
}

// DirtyBlock is the argument of GetDirtyBlocks.
type DirtyBlock struct {
	Transaction     uint64
	ChangeBytes     uint64
	Changes         uint32
	ChangesPending  uint32
	BytesPending    uint64
	Flags           uint32
	Split           uint32 // number of this part of a change that takes several blocks, from 1 on
	BufferSize      uint32
	BuffersMax      uint16
	Buffers         uint16
	StreamBytes     uint32
	_               uint32
	BufferArray     uint64
	BufferArraySize uint32
	_               uint32
	ResyncCount     uint64
	ResyncText      [128]byte
	ResyncCode      uint64
	ResyncTime      uint64
	PrevSequence    uint64 // end of the block that was committed last
	PrevTime        uint64
	PrevSplit       uint32
	WriteOrder      uint32
	_               [264]byte
	Tags            [3584]byte
	Offsets         [ChangesMax]uint64
	Lengths         [ChangesMax]uint32
	TimeDeltas      [ChangesMax]uint32
	SequenceDeltas  [ChangesMax]uint32
}

// Transaction is the argument of CommitDirtyBlocks.
type Transaction struct {
	Device Name
	ID     uint64
	Flags  uint32
	_      uint32
}

// Wait is the argument of WaitForBlocks and WaitForBlocksOld.
type Wait struct {
	Device  Name
	Seconds int32
}

// Threshold is the argument of NotifyThreshold.
type Threshold struct {
	Device Name
	Bytes  uint32
}

// VolumeInfo is one volume of a Freeze, a Thaw or a TagInfo.
type VolumeInfo struct {
	Flags  uint32
	Status uint32
	Device LongName
}

// Freeze is the argument of FreezeVolume; Array is of VolumeInfo.
type Freeze struct {
	Volumes int32
	Timeout int32 // ms, whatever the header says
	Array   uint64
	GUID    GUID
	_       uint32
}

// Thaw is the argument of ThawVolume.
type Thaw struct {
	Volumes int32
	_       uint32
	Array   uint64
	GUID    GUID
	_       uint32
}

// Tag is one tag of a TagInfo.
type Tag struct {
	Length uint16
	Data   [TagMax]byte
}

// TagInfo is the argument of TagVolume and BarrierTag.
type TagInfo struct {
	Flags    uint32
	Volumes  int32
	Tags     int32
	Timeout  int32 // ms
	GUID     GUID
	_        uint32
	Array    uint64 // of VolumeInfo
	TagArray uint64 // of Tag
}

// Barrier is the argument of CreateBarrier.
type Barrier struct {
	GUID    GUID
	Timeout int32 // ms
	Flags   uint32
}

// BarrierEnd is the argument of RemoveBarrier.
type BarrierEnd struct {
	GUID  GUID
	Flags uint32
}

// TagVerdict is the argument of TagCommit.
type TagVerdict struct {
	GUID    GUID
	Verdict uint32
}

// Stats is the argument of VolumeStats.
type Stats struct {
	Device Name
	Buffer uint64
	Length uint32
	_      uint32
}

// Additional is the argument of AdditionalStats. Times are 100 ns since 1970.
type Additional struct {
	Device  Name
	Pending uint64 // bytes
	Oldest  uint64 // of what is pending
	Now     uint64
}

// List is the argument of ProtectedVolumes.
type List struct {
	Buffer uint64
	Length uint32
	_      uint32
}

// Resync is the argument of ResyncStart and ResyncEnd.
type Resync struct {
	Device   Name
	Time     uint64
	Sequence uint64
}

// Version is the argument of DriverVersion.
type Version struct{ Driver, Product [4]uint16 }

// String is what stands before the NUL; false: there is none.
func (n Name) String() (string, bool) { return text(n[:]) }

// String is what stands before the NUL; false: there is none.
func (n LongName) String() (string, bool) { return text(n[:]) }

func text(b []byte) (string, bool) {
	before, _, ok := bytes.Cut(b, []byte{0})
	return string(before), ok
}

// Size is how many bytes a structure of this package takes.
func Size(v any) int { return binary.Size(v) }

// Bytes encodes one, or a slice of them.
func Bytes(v any) []byte {
	b, err := binary.Append(nil, binary.NativeEndian, v)
	if err != nil {
		panic(err) // not one of this package
	}
	return b
}

// Decode fills one, or a slice of them, from as many bytes as Size says.
func Decode(b []byte, v any) error {
	if n := binary.Size(v); len(b) != n {
		return fmt.Errorf("%d bytes, not %d", len(b), n)
	}
	_, err := binary.Decode(b, binary.NativeEndian, v)
	return err
}
