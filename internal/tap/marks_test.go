package tap

import (
	"fmt"
	mrand "math/rand/v2"
	"os"
	"testing"

	"tidemark/internal/block"
	"tidemark/internal/testkit"
)

// TestMarksExactly: where the ring has no room every write is lost, so gap bits
// and change map are exactly the blocks that were touched: by writes, discards
// and zeroes of all sizes, on three ranges of one disk, two of which touch.
func TestMarksExactly(t *testing.T) {
	const mib = 1 << 20
	d := testkit.NewDisk(t, 48*mib)
	base := targetFor(t, d)
	var targets []Target
	for i, part := range []block.Range{{Off: mib, Len: 16*mib + 512}, {Off: 17*mib + 512, Len: 7 * mib}, {Off: 30 * mib, Len: 18 * mib}} {
		p := base
		p.Name, p.Start, p.Len, p.BlockSize = fmt.Sprint(i), part.Off, part.Len, 512<<(i*2)
		targets = append(targets, p)
	}
	tp := startTargets(t, 1<<20, Options{}, targets...)
	tp.state.RingSize = 0 // as the programs see it
	f, buf := direct(t, d.Path), pages(t, mib)
	var wanted [3]block.Set
	for i := range fewer(150) {
		n := int64(512) * (1 + mrand.Int64N(1<<mrand.IntN(12)))
		r := block.Range{Off: mrand.Int64N((d.Size-n)/512) * 512, Len: n}
		switch i % 4 {
		case 0:
			testkit.Run(t, "blkdiscard", "-f", "-o", fmt.Sprint(r.Off), "-l", fmt.Sprint(r.Len), d.Path)
		case 1:
			testkit.Run(t, "blkdiscard", "-f", "-z", "-o", fmt.Sprint(r.Off), "-l", fmt.Sprint(r.Len), d.Path)
		default:
			r.Len = min(r.Len, mib)
			if _, err := f.WriteAt(buf[:r.Len], r.Off); err != nil {
				t.Fatal(err)
			}
		}
		for j, p := range targets {
			on := r.Intersect(block.Range{Off: p.Start, Len: p.Len})
			if !on.Empty() {
				on.Off -= p.Start
				wanted[j].Add(on.Outward(p.BlockSize))
			}
		}
	}
	peek, err := tp.PeekGaps()
	if err != nil {
		t.Fatal(err)
	}
	var got [3]block.Set
	for _, g := range peek.Ranges {
		got[g.Disk].Add(g.Range.Outward(targets[g.Disk].BlockSize))
	}
	for j := range targets {
		if a, b := fmt.Sprint(got[j].Ranges()), fmt.Sprint(wanted[j].Ranges()); a != b {
			t.Errorf("gap of %d:\n got  %s\n want %s", j, a, b)
		}
		var changed block.Set
		numbers, size := tp.ChangeMap(j)
		for i, n := range numbers {
			if n != 0 {
				changed.Add(block.Range{Off: int64(i) * size, Len: size})
			}
		}
		if a, b := fmt.Sprint(changed.Ranges()), fmt.Sprint(wanted[j].Ranges()); a != b {
			t.Errorf("change map of %d:\n got  %s\n want %s", j, a, b)
		}
	}
}

// TestPartition: writes to a partition come in bytes of the partition, those
// beside it do not come, and one that crosses its border is lost for its part.
func TestPartition(t *testing.T) {
	const mib = 1 << 20
	d := testkit.NewDisk(t, 8*mib)
	testkit.OnePartition(t, d)
	p := targetFor(t, d)
	p.Start, p.Len = mib, 7*mib
	tp := startTargets(t, 1<<20, Options{}, p)
	buf := pages(t, 8192)
	if _, err := direct(t, d.Path+"p1").WriteAt(buf, 12288); err != nil {
		t.Fatal(err)
	}
	whole := direct(t, d.Path)
	for _, off := range []int64{8192, 2 * mib, mib - 4096} { // before, within, across
		if _, err := whole.WriteAt(buf, off); err != nil {
			t.Fatal(err)
		}
	}
	var seen []string
	if _, err := tp.Read(tp.Consumer(), func(r *Record) error {
		seen = append(seen, fmt.Sprint(r.Kind, " ", r.Range))
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprint(seen), "[1 12288+8192 1 1048576+8192]"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	peek, err := tp.PeekGaps()
	if err != nil || len(peek.Ranges) != 1 || peek.Ranges[0].Range != (block.Range{Len: 4096}) || peek.Drops != 1 {
		t.Errorf("peek %+v, %v", peek, err)
	}
	c, err := tp.Counters()
	if err != nil || c.Disks[0].Traced != 4*8192 || c.Disks[0].Bytes != 2*8192 {
		t.Errorf("counters %+v, %v", c, err)
	}
}

// TestStartRefuses what is not a tap, and leaves nothing behind.
func TestStartRefuses(t *testing.T) {
	good := Target{Name: "a", Whole: 1, Len: 1 << 20, BlockSize: 4096}
	with := func(change func(*Target)) []Target {
		b := good
		b.Name, b.Start = "b", 1<<20
		change(&b)
		return []Target{good, b}
	}
	for name, c := range map[string]Config{
		"path":      {Instance: "..", Group: "g", RingBytes: 1 << 20, Targets: []Target{good}},
		"slash":     {Instance: "i", Group: "a/b", RingBytes: 1 << 20, Targets: []Target{good}},
		"empty":     {Instance: "i", Group: "", RingBytes: 1 << 20, Targets: []Target{good}},
		"ring":      {Instance: "i", Group: "g", RingBytes: 100_000, Targets: []Target{good}},
		"no disks":  {Instance: "i", Group: "g", RingBytes: 1 << 20},
		"overlap":   {Instance: "i", Group: "g", RingBytes: 1 << 20, Targets: with(func(t *Target) { t.Start = 4096 })},
		"odd start": {Instance: "i", Group: "g", RingBytes: 1 << 20, Targets: with(func(t *Target) { t.Start++ })},
		"block":     {Instance: "i", Group: "g", RingBytes: 1 << 20, Targets: with(func(t *Target) { t.BlockSize = 3000 })},
		"huge":      {Instance: "i", Group: "g", RingBytes: 1 << 20, Targets: with(func(t *Target) { t.Start = 1<<63 - 512 })},
		"two disks": {Instance: "i", Group: "g", RingBytes: 1 << 20, Targets: with(func(t *Target) { t.DiskSeq = 7 })},
	} {
		tp, err := Start(c)
		if tp != nil || err == nil {
			t.Errorf("%s: taken", name)
			continue
		}
		if _, err := os.Stat(bpffs + "/tidemark/i"); err == nil {
			t.Errorf("%s: something was left behind", name)
		}
	}
}
