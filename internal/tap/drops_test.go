package tap

import (
	"fmt"
	"sync/atomic"
	"testing"

	"tidemark/internal/block"
	"tidemark/internal/testkit"
)

// TestUnreadable: a payload that cannot be read, by whichever way it would be
// copied, is a drop with its range and its gap bits, and never a record with
// other bytes.
func TestUnreadable(t *testing.T) {
	d := testkit.NewDisk(t, 16<<20)
	tp := start(t, 4<<20, Options{}, d)
	f, buf := direct(t, d.Path), pages(t, 64<<10)
	atomic.StoreUint64(&tp.state.VABase, 1<<62) // nothing is mapped there
	var want []block.Range
	for i, n := range []int64{4096, 512, 8192, 5 * 512, 64 << 10} {
		r := block.Range{Off: int64(i) << 20, Len: n}
		if _, err := f.WriteAt(buf[:n], r.Off); err != nil {
			t.Fatal(err)
		}
		want = append(want, r)
	}
	dropped(t, tp, want)
	if c, err := tp.Counters(); err != nil || c.Disks[0].Unreadable != uint64(len(want)) {
		t.Errorf("counters %+v, %v", c, err)
	}
}

// TestTooLarge: a bio beyond a quarter of the ring is a drop, as a whole, and
// the next that fits is a record again.
func TestTooLarge(t *testing.T) {
	d := testkit.NewDisk(t, 16<<20)
	tp := start(t, 128<<10, Options{}, d)
	f, buf := direct(t, d.Path), pages(t, 64<<10)
	for _, r := range []block.Range{{Off: 1 << 20, Len: 64 << 10}, {Off: 2 << 20, Len: 32 << 10}} {
		if _, err := f.WriteAt(buf[:r.Len], r.Off); err != nil {
			t.Fatal(err)
		}
	}
	dropped(t, tp, []block.Range{{Off: 1 << 20, Len: 64 << 10}})
	var kept []block.Range
	if _, err := tp.Read(tp.Consumer(), func(r *Record) error {
		if r.Kind == Write {
			kept = append(kept, r.Range)
			if r.Drops != 1 {
				t.Errorf("the record after the drop counts %d", r.Drops)
			}
		}
		return nil
	}); err != nil || len(kept) != 1 || kept[0] != (block.Range{Off: 2 << 20, Len: 32 << 10}) {
		t.Errorf("kept %v, %v", kept, err)
	}
}

// dropped fails the test where the drops are not exactly these writes: by count,
// by the ranges in the ring and by gap bits.
func dropped(t *testing.T, tp *Tap, want []block.Range) {
	t.Helper()
	var lost, gap, blocks block.Set
	for _, r := range want {
		blocks.Add(r.Outward(4096))
	}
	if _, err := tp.Read(tp.Consumer(), func(r *Record) error {
		if r.Kind == Lost {
			lost.Add(r.Range.Outward(4096))
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	peek, err := tp.PeekGaps()
	if err != nil || peek.Drops != uint64(len(want)) {
		t.Errorf("%d drops of %d, %v", peek.Drops, len(want), err)
	}
	for _, g := range peek.Ranges {
		gap.Add(g.Range)
	}
	for what, have := range map[string]*block.Set{"in the ring": &lost, "as gap bits": &gap} {
		if fmt.Sprint(have.Ranges()) != fmt.Sprint(blocks.Ranges()) {
			t.Errorf("lost ranges %s: %v, want %v", what, have.Ranges(), blocks.Ranges())
		}
	}
	if !tp.Ends() {
		t.Error("bios in flight are not tracked")
	}
}
