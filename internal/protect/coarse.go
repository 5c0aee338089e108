package protect

import (
	"cmp"
	"slices"

	"tidemark/internal/block"
)

// A gap may name more than was lost, at the cost of reading it, but not less. So
// that hours of scattered writes that do not fit the ring, on a disk of many
// terabytes, do not end in gigabytes of ranges, what lies close together is
// joined where there is too much of it.
const (
	gapRangesAtOnce = 1 << 18 // that one look at the gap bits opens
	unknownRangeMax = 1 << 20 // that are unknown together; beyond it those from before are joined too
)

// bounded gives ranges that hold all of the given ones.
func (s *session) bounded(ranges []block.DiskRange) []block.DiskRange {
	if len(ranges)+s.engine.Pieces() > unknownRangeMax {
		for i := range s.cfg.Disks {
			for _, r := range s.engine.Unknown(i) {
				ranges = append(ranges, block.DiskRange{Disk: i, Range: r})
			}
		}
		slices.SortFunc(ranges, func(a, b block.DiskRange) int {
			return cmp.Or(cmp.Compare(a.Disk, b.Disk), cmp.Compare(a.Off, b.Off))
		})
	}
	return coarser(ranges, gapRangesAtOnce)
}

// coarser joins the nearest neighbours of sorted ranges, in place, until there
// are at most so many, or one for each disk.
func coarser(ranges []block.DiskRange, most int) []block.DiskRange {
	for near := int64(64 << 10); len(ranges) > most && near > 0; near *= 2 {
		out := ranges[:0]
		for _, r := range ranges {
			if n := len(out); n > 0 && out[n-1].Disk == r.Disk && r.Off-out[n-1].End() <= near {
				out[n-1].Len = max(out[n-1].End(), r.End()) - out[n-1].Off
				continue
			}
			out = append(out, r)
		}
		ranges = out
	}
	return ranges
}
