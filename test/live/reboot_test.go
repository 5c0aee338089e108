package live

import (
	"math/rand/v2"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"tidemark/internal/loop"
	"tidemark/internal/testkit"
)

// TestReboot: the tap is gone, the disk comes back under another name and was
// written to meanwhile. It is compared with the vault; only what differs is
// copied, and points from before stay.
func TestReboot(t *testing.T) {
	for name, stateToo := range map[string]bool{"state kept": false, "state lost": true} {
		t.Run(name, func(t *testing.T) {
			eachSeed(t, func(t *testing.T, rng *rand.Rand) { reboot(t, rng, stateToo) })
		})
	}
}

func reboot(t *testing.T, rng *rand.Rand, stateToo bool) {
	testkit.Need(t, "root", "loop", "tap", "ext4")
	s := newSteady(t, rng, "", "")
	s.write(2 * mib)
	s.bookmark("old")
	s.d.Settle("g")
	before, copied := stretches(t, s.d, "g"), copiedOf(t, s.d, "g")
	s.d.Kill()
	s.d.LoseTap()
	changed := s.away()
	if stateToo {
		if err := os.RemoveAll(s.d.State); err != nil {
			t.Fatal(err)
		}
	}
	s.d.Start()
	if stateToo {
		s.d.Protect("g", s.path)
	}
	s.recovered()
	after := stretches(t, s.d, "g")
	if len(after) != 2 || after[0] != before[0] {
		t.Errorf("stretches %v, were %v", after, before)
	}
	if n := copiedOf(t, s.d, "g") - copied; n < int64(len(changed)) || n > int64(len(changed))*64<<10 {
		t.Errorf("%d bytes copied for %d changed blocks", n, len(changed))
	}
}

// away changes some blocks of the disk with nobody looking, and brings it back
// as another loop device where the kernel lets us.
func (s *steady) away() (changed []int64) {
	s.t.Helper()
	s.file.Close()
	if err := loop.Detach(s.path); err != nil {
		s.t.Fatal(err)
	}
	testkit.NewDisk(s.t, mib) // takes the number, most likely
	f, err := os.OpenFile(s.backing, os.O_RDWR, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	for range 5 {
		sector := s.anywhere(testkit.Sector)
		s.seq++
		testkit.Fill(s.buf[:testkit.Sector], 0, sector*testkit.Sector, s.seq)
		if _, err := f.WriteAt(s.buf[:testkit.Sector], sector*testkit.Sector); err != nil {
			s.t.Fatal(err)
		}
		changed = append(changed, sector)
	}
	if err := f.Close(); err != nil {
		s.t.Fatal(err)
	}
	s.path = testkit.Reattach(s.t, s.backing)
	s.file = open(s.t, s.path, unix.O_DIRECT)
	return changed
}

// TestTapLost: only the tap's pins are gone, and nothing else changed. Nothing
// is copied, and the daemon says why it looks.
func TestTapLost(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		s := newSteady(t, rng, "", "")
		s.write(mib)
		s.bookmark("old")
		s.d.Settle("g")
		copied := copiedOf(t, s.d, "g")
		s.d.Kill()
		s.d.LoseTap()
		s.d.Start()
		s.recovered()
		if n := copiedOf(t, s.d, "g") - copied; n != 0 {
			t.Errorf("%d bytes copied of a disk that nobody wrote to", n)
		}
		if all := stretches(t, s.d, "g"); len(all) != 2 {
			t.Errorf("stretches %v: who knows what was written without a tap?", all)
		}
	})
}
