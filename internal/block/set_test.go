package block

import (
	"math/rand/v2"
	"testing"
)

// TestSetAgainstBits compares the set with an array of bits over random steps.
func TestSetAgainstBits(t *testing.T) {
	for seed := range uint64(200) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		var s Set
		var bits [64]bool
		for range 60 {
			r := Range{Off: rnd.Int64N(60), Len: rnd.Int64N(12)}
			r.Len = min(r.Len, 64-r.Off)
			on := rnd.IntN(2) == 0
			if on {
				s.Add(r)
			} else {
				s.Remove(r)
			}
			for i := r.Off; i < r.End(); i++ {
				bits[i] = on
			}
			var got [64]bool
			last := int64(-1)
			for _, g := range s.Ranges() {
				if g.Empty() || g.Off <= last {
					t.Fatalf("seed %d: ranges %v", seed, s.Ranges())
				}
				last = g.End()
				for i := g.Off; i < g.End(); i++ {
					got[i] = true
				}
			}
			if got != bits {
				t.Fatalf("seed %d: after %v %v: %v", seed, on, r, s.Ranges())
			}
		}
	}
}
