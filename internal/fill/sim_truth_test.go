package fill

import (
	"fmt"

	"tidemark/internal/block"
	"tidemark/internal/stream"
)

// unknownOf gives what a stream leaves unknown: its gaps minus the fills that
// came later; open: no settled mark came after the last gap.
func unknownOf(records []entry, disks []Disk) (out []block.DiskRange, open bool) {
	unknown := make([][]bool, len(disks))
	for i, d := range disks {
		unknown[i] = make([]bool, d.Size)
	}
	for _, r := range records {
		switch r.kind {
		case stream.KindGap:
			open = true
			for _, g := range r.ranges {
				for s := g.Off; s < min(g.End(), disks[g.Disk].Size); s++ {
					unknown[g.Disk][s] = true
				}
			}
		case stream.KindFill:
			for s := r.off; s < r.end; s++ {
				unknown[r.disk][s] = false
			}
		case stream.KindSettled:
			open = false
		}
	}
	for i := range unknown {
		for s, u := range unknown[i] {
			if u {
				out = append(out, block.DiskRange{Disk: i, Range: block.Range{Off: int64(s), Len: 1}})
			}
		}
	}
	return out, open
}

// contentAt evaluates a stream at a point, to the letter of package stream.
func contentAt(records []entry, disks []Disk, at stream.Position) [][]int {
	content := make([][]int, len(disks))
	newest := make([][]stream.Position, len(disks))
	isFill := make([][]bool, len(disks))
	for i, d := range disks {
		content[i], newest[i], isFill[i] = make([]int, d.Size), make([]stream.Position, d.Size), make([]bool, d.Size)
	}
	for _, r := range records {
		if r.position > at {
			continue
		}
		switch {
		case r.kind == stream.KindWrite:
			b := r.b
			for s := b.off; s < b.off+b.n; s++ {
				if r.position > newest[b.disk][s] {
					content[b.disk][s], newest[b.disk][s], isFill[b.disk][s] = b.id, r.position, false
				}
			}
		case r.kind == stream.KindFill && r.fill == stream.FillData:
			for s := r.off; s < r.end; s++ {
				if r.position >= newest[r.disk][s] {
					content[r.disk][s], newest[r.disk][s], isFill[r.disk][s] = r.data[s-r.off], r.position, true
				}
			}
		}
	}
	return content
}

type stretch struct{ first, last stream.Position }

func stretches(records []entry, newest stream.Position) []stretch {
	var out []stretch
	inside := false
	for _, r := range records {
		switch r.kind {
		case stream.KindSettled:
			if inside {
				panic("settled twice")
			}
			out, inside = append(out, stretch{r.position, newest}), true
		case stream.KindGap:
			if inside {
				out[len(out)-1].last, inside = r.position-1, false
			}
		}
	}
	return out
}

// checkStream returns what is wrong with the points that a stream offers.
func (k *kernel) checkStream(records []entry, newest stream.Position) error {
	for _, st := range stretches(records, newest) {
		k.met.Stretches++
		for at := st.first; at <= st.last; at++ {
			k.met.Points++
			if err := k.checkPoint(records, at); err != nil {
				return fmt.Errorf("point %d of stretch %d to %d: %w", at, st.first, st.last, err)
			}
		}
		if err := k.checkKnown(records, st); err != nil {
			return err
		}
	}
	return nil
}

// checkKnown: no gap that opened before the stretch may end inside it.
func (k *kernel) checkKnown(records []entry, st stretch) error {
	var kept []entry
	for _, r := range records {
		if r.kind == stream.KindGap && r.position > st.last {
			break
		}
		if r.kind == stream.KindGap || r.kind == stream.KindFill && r.validFrom <= st.first {
			kept = append(kept, r)
		}
	}
	if unknown, _ := unknownOf(kept, k.disks); len(unknown) > 0 {
		return fmt.Errorf("stretch %d to %d begins with %v unknown", st.first, st.last, unknown)
	}
	return nil
}

// checkPoint looks for an instant whose power cut could have left the content
// of the point: one that lies between the queueing of the point's own record
// and of the next; at which everything that is in had been queued, and nothing
// that is not in had ended.
func (k *kernel) checkPoint(records []entry, at stream.Position) error {
	if k.overlap {
		return nil // what the disk then holds is the disk's affair
	}
	lo, hi := 0, k.now
	why := [2]string{"the beginning", "now"}
	for _, r := range records {
		if r.kind != stream.KindWrite {
			continue
		}
		if r.position <= at && r.b.q0 > lo {
			lo, why[0] = r.b.q0, fmt.Sprintf("record %d queued", r.position)
		}
		if r.position > at && r.b.q1 < hi {
			hi, why[1] = r.b.q1, fmt.Sprintf("record %d issued", r.position)
		}
	}
	content := contentAt(records, k.disks, at)
	for d := range content {
		for s, v := range content[d] {
			from, to, ok := k.instants(d, s, v)
			if !ok {
				return fmt.Errorf("disk %d sector %d holds %d, which was never written there", d, s, v)
			}
			if from > lo {
				lo, why[0] = from, fmt.Sprintf("disk %d sector %d has %d", d, s, v)
			}
			if to < hi {
				hi, why[1] = to, fmt.Sprintf("disk %d sector %d has %d only", d, s, v)
			}
		}
	}
	if lo > hi {
		return fmt.Errorf("no instant could have left it: not before %d (%s), not after %d (%s)", lo, why[0], hi, why[1])
	}
	return nil
}

// instants: between when a power cut could have left v in a sector.
func (k *kernel) instants(disk, sector, v int) (from, to int, ok bool) {
	to, ok = never, v == 0
	for _, b := range k.history[disk][sector] {
		applied := b.applied[sector-b.off]
		if b.id == v {
			from, to, ok = b.q0, never, true
			if !applied {
				to = b.done // it failed: gone when the submitter learnt of it
			}
			continue
		}
		if ok && applied {
			to = min(to, b.done)
		}
	}
	return from, to, ok
}
