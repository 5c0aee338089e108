package live

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// TestGapOpensAtTheDrop: a write that does not fit the ring, between two small
// ones that do, while no daemon runs. No point has the later one without it: the
// gap opens before the first record that knows of the drop, not where the daemon
// comes to look.
func TestGapOpensAtTheDrop(t *testing.T) {
	testkit.Need(t, "root", "tap", "loop")
	disk := testkit.NewDisk(t, 8*mib)
	d := program.New(t)
	d.Protect("g", "--ring-size", "64K", disk.Path)
	before := d.Settle("g").Captured
	d.Kill()
	f, buf := open(t, disk.Path, unix.O_DIRECT), aligned(t, 128<<10)
	write := func(number uint64, at int64, n int) {
		t.Helper()
		testkit.Fill(buf[:n], 0, at, number)
		if _, err := f.WriteAt(buf[:n], at); err != nil {
			t.Fatal(err)
		}
	}
	const first, large, last = 0, mib, 4 * mib
	write(1, first, 4096)
	write(2, large, len(buf)) // more than a quarter of the ring: never fits
	write(3, last, 4096)
	d.Start()
	g := identical(t, d, "g")
	if g.Disks[0].Lost == 0 {
		t.Fatal("the ring held everything: this tested nothing")
	}
	all := stretches(t, d, "g")
	if len(all) != 2 || all[0].last != before+1 {
		t.Fatalf("stretches %v: the first should end at position %d", all, before+1)
	}
	was := image(t, d, "g", "", seq(all[0].last))
	if seqs, err := testkit.Check(was[first:first+4096], 0, first); err != nil || seqs[0] != 1 {
		t.Errorf("the write before the drop is not in the last point before the gap: %v %v", seqs, err)
	}
	if !bytes.Equal(was[last:last+4096], make([]byte, 4096)) {
		t.Error("a point has the write after the drop, and not the one that was dropped")
	}
}

// TestGapIsDurableBeforeItsBitsGo: a write is lost while the spool's disk has no
// room for the record that says so, and the daemon is killed. The next one
// learns of it from the kernel.
func TestGapIsDurableBeforeItsBitsGo(t *testing.T) {
	mnt := tmpfs(t, "4m")
	s := newSteady(t, rand.New(rand.NewPCG(5, 6)), "", filepath.Join(mnt, "state"), "--ring-size", "64K")
	s.d.Settle("g")
	filler := filepath.Join(mnt, "filler")
	if out, err := fillUp(filler); err != nil {
		t.Fatal(out, err)
	}
	s.writeAt(4*mib/testkit.Sector, writeMax) // more than a quarter of the ring: never fits
	s.raised("spool-full")
	s.d.Kill()
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	s.d.Start()
	if g := identical(t, s.d, "g"); g.Disks[0].Lost == 0 {
		t.Error("the ring held everything: this tested nothing")
	}
	s.recovered()
}
