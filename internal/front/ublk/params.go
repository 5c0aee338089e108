package ublk

import (
	"math"
	"math/bits"
	"unsafe"

	abi "tidemark/internal/abi/ublk"
	"tidemark/internal/block"
)

// paramsOf tells the kernel what the device is like.
func paramsOf(dev *abilities, maxIO int) abi.Params {
	l := dev.limits
	p := abi.Params{
		Len: uint32(unsafe.Sizeof(abi.Params{})), Types: abi.ParamBasic,
		Attrs:        abi.AttrVolatileCache,
		LogicalShift: shift(l.LogicalBlock), PhysicalShift: shift(l.PhysicalBlock),
		MaxSectors: uint32(maxIO / block.SectorSize), DevSectors: sectors(dev.Size(), l.LogicalBlock),
	}
	p.IOMinShift = max(shift(l.MinIO), p.PhysicalShift)
	p.IOOptShift = max(shift(l.OptIO), p.IOMinShift)
	if l.ReadOnly {
		p.Attrs |= abi.AttrReadOnly
	}
	if l.Rotational {
		p.Attrs |= abi.AttrRotational
	}
	if dev.fua != nil { // else the kernel sends a flush after the write
		p.Attrs |= abi.AttrFUA
	}
	if l.ReadOnly {
		return p
	}
	if dev.discarder != nil && l.Discard > 0 {
		p.MaxDiscardSectors = limit(l.MaxDiscard, l.Discard)
	}
	if dev.zeroer != nil {
		p.MaxZeroesSectors = limit(l.MaxZeroes, l.LogicalBlock)
	}
	if p.MaxDiscardSectors|p.MaxZeroesSectors != 0 {
		p.Types |= abi.ParamDiscard
		p.MaxDiscardSegments = 1
		p.DiscardGranularity = uint32(max(l.Discard, l.LogicalBlock))
	}
	return p
}

// longest is how much one discard or write of zeroes may cover, in bytes: what
// a filter does with it, it must do in bounded time.
const longest = 1 << 30

// limit is a length in sectors, a multiple of unit, the longest where it is not known.
func limit(n, unit int64) uint32 {
	if n <= 0 || n > longest {
		n = longest
	}
	n = max(n-n%unit, unit)
	return uint32(min(n/block.SectorSize, math.MaxUint32))
}

// shift is the logarithm of a power of two, rounded down; 0 of what is not known.
func shift(n int64) uint8 {
	if n <= 0 {
		return 0
	}
	return uint8(bits.Len64(uint64(n)) - 1)
}

// sectors is a size in sectors, whole logical blocks.
func sectors(size, logical int64) uint64 { return uint64((size - size%logical) / block.SectorSize) }
