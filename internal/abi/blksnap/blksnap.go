// Package blksnap is the control interface of Veeam's blksnap kernel module as
// its clients from 2022 to 2025 speak it: ioctl numbers and structures on a
// 64-bit machine, as testdata/blksnap.h declares them. The directions in the
// numbers are not to be trusted: the structures of most commands are read and written.
package blksnap

import (
	"encoding/binary"
	"fmt"
)

// Commands.
const (
	Version           = 0x40085600
	TrackerRemove     = 0x40085601
	TrackerCollect    = 0x40105602
	ReadMap           = 0x80185603
	MarkDirty         = 0x80185604
	SnapshotCreate    = 0x40205605
	SnapshotDestroy   = 0x80105606
	AppendStorage     = 0x40285607
	SnapshotTake      = 0x80105608
	SnapshotCollect   = 0x40105609
	CollectImages     = 0x4020560a
	SnapshotWaitEvent = 0x5000560b
)

// Codes of events.
const (
	EventLowFreeSpace = 0
	EventCorrupted    = 1
)

// Names, in /dev.
const (
	Control = "blksnap"
	Image   = "blksnap-image" // followed by a number
)

const (
	Sector    = 512 // bytes
	EventData = 4096 - 32
)

// ID is a snapshot's.
type ID [16]byte

// Dev is a block device's number.
type Dev struct{ Major, Minor uint32 }

func (d Dev) String() string { return fmt.Sprintf("%d:%d", d.Major, d.Minor) }

// VersionInfo is the argument of Version.
type VersionInfo struct{ Major, Minor, Revision, Build uint16 }

// Range is in sectors of 512 bytes.
type Range struct{ Offset, Count uint64 }

// TrackerInfo describes the change map of a device.
type TrackerInfo struct {
	Dev        Dev
	BlockSize  uint32 // bytes
	_          uint32
	Capacity   uint64 // of the device, bytes
	Blocks     uint32
	Generation [16]byte
	Number     uint8 // of the newest snapshot; 0: there was none
	_          [3]byte
}

// Collect is the argument of TrackerCollect (TrackerInfo) and SnapshotCollect (ID).
type Collect struct {
	Count uint32
	_     uint32
	Array uint64
}

// ReadMapArg is the argument of ReadMap.
type ReadMapArg struct {
	Dev            Dev
	Offset, Length uint32 // blocks, of a byte each
	Buffer         uint64
}

// MarkDirtyArg is the argument of MarkDirty; Array is of Range.
type MarkDirtyArg struct {
	Dev   Dev
	Count uint32
	_     uint32
	Array uint64
}

// Create is the argument of SnapshotCreate; Array is of Dev.
type Create struct {
	Count uint32
	_     uint32
	Array uint64
	ID    ID // answer
}

// Append is the argument of AppendStorage; Array is of Range.
type Append struct {
	ID    ID
	Dev   Dev
	Count uint32
	_     uint32
	Array uint64
}

// Images is the argument of CollectImages; Array is of ImageInfo.
type Images struct {
	ID    ID
	Count uint32
	_     uint32
	Array uint64
}

// ImageInfo says which device shows the image of which.
type ImageInfo struct{ Original, Image Dev }

// Event is the argument of SnapshotWaitEvent.
type Event struct {
	ID        ID
	TimeoutMs uint32
	Code      uint32 // answer, as all that follows
	Time      int64  // CLOCK_MONOTONIC, nanoseconds
	Data      [EventData]byte
}

// LowFreeSpace is what the data of such an event begins with: how many sectors are wanted.
type LowFreeSpace struct{ Sectors uint64 }

// Corrupted is what the data of such an event begins with. Error is a positive errno.
type Corrupted struct {
	Original Dev
	Error    int32
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
