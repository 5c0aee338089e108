package protect

import (
	"math/rand/v2"
	"slices"
	"testing"

	"tidemark/internal/block"
	"tidemark/internal/fill"
)

// TestBoundedGaps: however scattered, a gap has few ranges, they are in order
// and apart, and hold all that was lost or was unknown before where that was joined.
func TestBoundedGaps(t *testing.T) {
	const blockSize, blocks = 4096, 3 << 20
	s := bookmarking()
	s.cfg.Disks = make([]DiskConfig, 2)
	s.engine = fill.New([]fill.Disk{{Size: blocks * blockSize, BlockSize: blockSize}, {Size: blocks * blockSize, BlockSize: blockSize}})
	rng := rand.New(rand.NewPCG(1, 2))
	scattered := func(n int) (out []block.DiskRange) {
		for disk := range 2 {
			for b := rng.Int64N(5); b < blocks && len(out) < (disk+1)*n; b += 2 + rng.Int64N(18) {
				out = append(out, block.DiskRange{Disk: disk, Range: block.Range{Off: b * blockSize, Len: blockSize}})
			}
		}
		return out
	}
	few := scattered(10)
	if have := s.bounded(slices.Clone(few)); !slices.Equal(have, few) {
		t.Error("a small gap was made larger")
	}
	for round := range 4 {
		lost := scattered(300_000)
		gap := s.bounded(slices.Clone(lost))
		if len(gap) > gapRangesAtOnce {
			t.Fatalf("round %d: %d ranges, at most %d may be", round, len(gap), gapRangesAtOnce)
		}
		at := 0
		for _, r := range lost {
			for at < len(gap) && (gap[at].Disk < r.Disk || gap[at].Disk == r.Disk && gap[at].End() < r.End()) {
				at++
			}
			if at == len(gap) || gap[at].Disk != r.Disk || gap[at].Off > r.Off {
				t.Fatalf("round %d: %v is not in the gap", round, r)
			}
		}
		for i := 1; i < len(gap); i++ {
			if a, b := gap[i-1], gap[i]; a.Disk == b.Disk && b.Off <= a.End() {
				t.Fatalf("round %d: %v and %v", round, a, b)
			}
		}
		s.engine.Open(gap, fill.Held)
		if n := s.engine.Pieces(); n > unknownRangeMax+gapRangesAtOnce {
			t.Fatalf("round %d: %d runs are unknown", round, n)
		}
	}
}
