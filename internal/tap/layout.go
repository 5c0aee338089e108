package tap

// The structures of bpf/layout.h. Sizes and offsets are held against the
// object's own BTF by a test.

type state struct {
	Drops        uint64
	VABase       uint64
	VAShift      uint32
	Payload      uint32
	Ends         uint32
	Change       uint32
	PayloadMax   uint64
	RingSize     uint64
	LostRanges   uint64
	InflightFull uint64
	Remapped     uint64
	Only         uint32
	NVMe         uint32
	Admin        uint64
	Reserved     [5]uint64
}

type target struct {
	Start, Length uint64
	Disk, Shift   uint32
	Change, Gap   uint64
}

type whole struct {
	DiskSeq     uint64
	Count       uint32
	BioBased    uint32
	Slot        uint32
	Passthrough uint32
	PassOffset  uint32
	Reserved    uint32
	T           [targetsMax]target
}

type counters struct {
	Traced, Ended, Writes, Bytes, Lost, Failed, Unknown, Foreign, Passthrough, Unreadable, Blind uint64
	Tracked, TrackedEnded, Level, LevelKnown                                                     uint64
	Reserved                                                                                     uint64
}

type flight struct {
	Place, Sector   uint64
	Left            int64
	Bytes, Whole    uint32
	Flags, Reserved uint32
}

const flightDropped = 1

const (
	payloadNo  = 0
	payloadYes = 1
	payloadMap = 2
)

const (
	endsOff   = 0
	endsOn    = 1
	endsDrain = 2
)

type peekArg struct {
	Addr uint64
	Out  [2]uint64
}

type sight struct {
	Page, Task     uint64
	Offset, Length uint32
}
