package live

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// steady is one protected disk with a writer, and what it held at bookmarks.
type steady struct {
	t       *testing.T
	d       *program.Daemon
	rng     *rand.Rand
	path    string
	backing string // the file of the loop device
	file    *os.File
	buf     []byte
	seq     uint64
	marks   map[string][]byte
}

const (
	steadyDisk = 16 * mib
	writeMax   = 128 << 10
)

// newSteady protects a disk by a daemon that keeps its vault and its state where
// it is told; "" is where it always does.
func newSteady(t *testing.T, rng *rand.Rand, vault, state string, args ...string) *steady {
	disk := testkit.NewDisk(t, steadyDisk)
	testkit.Mkfs(t, disk.Path, "ext4") // its UUID is the disk's
	s := &steady{t: t, rng: rng, path: disk.Path, backing: disk.File, buf: aligned(t, writeMax), marks: map[string][]byte{}}
	s.d = program.New(t)
	if vault != "" {
		s.d.Vault = vault
	}
	if state != "" {
		s.d.Kill()
		s.d.State = state
		s.d.Start()
	}
	s.file = open(t, s.path, unix.O_DIRECT)
	s.write(2 * mib)
	s.d.Protect("g", append(args, s.path)...)
	s.bookmark("before")
	return s
}

// write makes writes of any size until they have n bytes.
func (s *steady) write(n int) {
	s.t.Helper()
	for n > 0 {
		size := (1 + s.rng.IntN(writeMax/testkit.Sector)) * testkit.Sector
		s.writeAt(s.anywhere(size), size)
		n -= size
	}
}

// anywhere is a sector from which size bytes can be written, behind the first
// MiB: that has what the disk is known by.
func (s *steady) anywhere(size int) int64 {
	return (mib + s.rng.Int64N(steadyDisk-mib-int64(size)+1)) / testkit.Sector
}

func (s *steady) writeAt(sector int64, size int) {
	s.t.Helper()
	s.seq++
	testkit.Fill(s.buf[:size], 0, sector*testkit.Sector, s.seq)
	if _, err := s.file.WriteAt(s.buf[:size], sector*testkit.Sector); err != nil {
		s.t.Fatal("a write to a protected disk failed: ", err)
	}
}

// bookmark notes what the disk holds at a bookmark.
func (s *steady) bookmark(name string) {
	s.t.Helper()
	s.d.Run("bookmark", "g", name)
	s.marks[name] = content(s.t, s.path)
}

// recovered waits until all is well again, by itself, and checks the disk, what
// was bookmarked before, and that new points can be had.
func (s *steady) recovered() {
	s.t.Helper()
	s.d.Await("g", "well", func(g *program.Group) bool {
		return g.State == "protected" && g.Mode == "data" && g.Gap() == 0 && g.Captured == g.Durable && len(troubles(g)) == 0
	})
	identical(s.t, s.d, "g")
	s.bookmark("after")
	s.d.Settle("g")
	for name, was := range s.marks {
		same(s.t, "at "+name, was, image(s.t, s.d, "g", "", name))
	}
	s.d.Run("verify", "--vault", s.d.Vault, "g", "--live")
}

// troubles are the conditions that should go by themselves. Each must say what to do.
func troubles(g *program.Group) (codes []string) {
	for _, c := range g.Conditions {
		codes = append(codes, c.Code)
	}
	return codes
}

// raised waits for a condition and looks at its words.
func (s *steady) raised(code string) program.Group {
	s.t.Helper()
	g := s.d.Await("g", "telling "+code, func(g *program.Group) bool { return g.Has(code) })
	for _, c := range g.Conditions {
		if c.Detail == "" || c.Remedy == "" {
			s.t.Errorf("condition %s says %q, and to do %q", c.Code, c.Detail, c.Remedy)
		}
	}
	return g
}

// TestVaultAway: captured data waits while the vault's folder is not there, also
// for a daemon that is started meanwhile; no second vault grows in its place.
func TestVaultAway(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		s := newSteady(t, rng, "", "")
		hidden := s.d.Vault + "-hidden"
		move := func(from, to string) {
			t.Helper()
			if err := os.Rename(from, to); err != nil {
				t.Fatal(err)
			}
		}
		s.d.Settle("g")
		move(s.d.Vault, hidden)
		s.write(2 * mib)
		if g := s.raised("vault-unreachable"); g.Mode != "data" {
			t.Errorf("mode %s with room in the spool", g.Mode)
		}
		s.bookmark("away") // durable on this machine
		s.d.Refused(exitNotAVault, "points", "--vault", s.d.Vault, "g")
		if rng.IntN(2) == 0 {
			s.d.Restart()
			s.write(mib)
			s.raised("offline")
		}
		if _, err := os.Stat(s.d.Vault); err == nil {
			t.Errorf("something was made at %s", s.d.Vault)
		}
		move(hidden, s.d.Vault)
		s.recovered()
		if all := stretches(t, s.d, "g"); len(all) != 1 {
			t.Errorf("stretches %v: ring and spool had room", all)
		}
	})
}

// TestVaultUnmounted: an empty mount point is no vault, and is left empty.
func TestVaultUnmounted(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		mnt := tmpfs(t, "64m")
		s := newSteady(t, rng, filepath.Join(mnt, "vault"), "")
		s.d.Settle("g")
		over := t.TempDir()
		testkit.Run(t, "mount", "--bind", over, mnt)
		t.Cleanup(func() { _ = unix.Unmount(mnt, unix.MNT_DETACH) })
		s.write(mib)
		s.raised("vault-unreachable")
		if left, _ := os.ReadDir(over); len(left) > 0 {
			t.Errorf("%s was written into what lay over the vault", left[0].Name())
		}
		if err := unix.Unmount(mnt, 0); err != nil {
			t.Fatal(err)
		}
		s.recovered()
		if all := stretches(t, s.d, "g"); len(all) != 1 {
			t.Errorf("stretches %v: the spool had room", all)
		}
	})
}

// TestSpoolFull: with the vault away and spool and ring full only changed blocks
// are known. All of it is made good when the vault is back.
func TestSpoolFull(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		s := newSteady(t, rng, "", "", "--spool-size", "1M", "--ring-size", "1M", "--segment-size", "256K", "--seal-every", "50ms")
		s.d.Settle("g")
		hidden := s.d.Vault + "-hidden"
		if err := os.Rename(s.d.Vault, hidden); err != nil {
			t.Fatal(err)
		}
		s.write(6 * mib)
		s.raised("spool-full")
		s.overflow()
		if rng.IntN(2) == 0 { // a new daemon must not forget any of it
			s.d.Restart()
			s.write(mib)
		}
		if err := os.Rename(hidden, s.d.Vault); err != nil {
			t.Fatal(err)
		}
		s.recovered()
		if all := stretches(t, s.d, "g"); len(all) != 2 {
			t.Errorf("stretches %v, want one from before and one from after", all)
		}
	})
}

// overflow writes until the ring has no room even for the ranges of what is
// lost. Then no bookmark can be put, and that is said.
func (s *steady) overflow() {
	s.t.Helper()
	s.d.Await("g", "in bitmap mode", func(g *program.Group) bool {
		for range 2000 {
			s.writeAt(s.anywhere(testkit.Sector), testkit.Sector)
		}
		return g.Mode == "bitmap" && g.State == "degraded" && g.Since == 0 && g.Gap() > 0
	})
	_, err := s.d.Verb("bookmark", "g", "never")
	if e := (*program.Error)(nil); !errors.As(err, &e) || e.Exit != exitUnreachable && e.Exit != exitInsideGap {
		s.t.Errorf("a bookmark where nothing can be kept: %v", err)
	}
}

// TestVaultFull: a vault's disk without room is a vault that takes nothing.
func TestVaultFull(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		mnt := tmpfs(t, "6m")
		s := newSteady(t, rng, filepath.Join(mnt, "vault"), "", "--segment-size", "1M")
		s.write(8 * mib)
		s.raised("vault-unreachable")
		s.bookmark("full")
		testkit.Run(t, "mount", "-o", "remount,size=128m", mnt)
		s.recovered()
		if all := stretches(t, s.d, "g"); len(all) != 1 {
			t.Errorf("stretches %v: the spool had room", all)
		}
	})
}

// TestStateFull: the spool's disk has no room. The ring holds on as long as it can.
func TestStateFull(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		mnt := tmpfs(t, "4m")
		s := newSteady(t, rng, "", filepath.Join(mnt, "state"), "--ring-size", "1M", "--segment-size", "256K")
		s.d.Settle("g")
		filler := filepath.Join(mnt, "filler")
		if out, err := fillUp(filler); err != nil {
			t.Fatal(out, err)
		}
		s.write(6 * mib)
		s.raised("spool-full")
		s.overflow()
		if err := os.Remove(filler); err != nil {
			t.Fatal(err)
		}
		s.recovered()
	})
}

// fillUp leaves no room on a file system.
func fillUp(path string) (int64, error) {
	f, err := os.Create(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var n int64
	for _, size := range []int{64 << 10, 4 << 10} {
		for block := make([]byte, size); ; {
			m, err := f.Write(block)
			if n += int64(m); err != nil {
				break // full, for pieces of this size
			}
		}
	}
	return n, nil
}

// TestRingOfFewPages: a ring that holds next to nothing. Much is lost, by name,
// and all of it is made good.
func TestRingOfFewPages(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		s := newSteady(t, rng, "", "", "--ring-size", "64K")
		for round := range 3 {
			s.write(4 * mib)
			s.d.Await("g", "in another mode", func(g *program.Group) bool {
				s.write(256 << 10)
				return g.Mode != "data" && g.State == "degraded" && g.Since == 0
			})
			s.d.Settle("g")
			s.d.Run("bookmark", "g", fmt.Sprint("round-", round))
			s.marks[fmt.Sprint("round-", round)] = content(t, s.path)
		}
		s.recovered()
		if all := stretches(t, s.d, "g"); len(all) < 3 {
			t.Errorf("stretches %v: the ring held everything", all)
		}
	})
}
