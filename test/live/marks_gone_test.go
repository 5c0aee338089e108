package live

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"tidemark/internal/loop"
	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// couple is two groups of one disk each, of which the second fails in some way.
type couple struct {
	t      *testing.T
	d      *program.Daemon
	disks  [2]*testkit.Disk
	groups [2]string
}

// newCouple protects both; more arguments are the second group's.
func newCouple(t *testing.T, args ...string) *couple {
	c := &couple{t: t, groups: [2]string{"ga", "gb"}}
	for i := range c.disks {
		c.disks[i] = testkit.NewDisk(t, 8*mib)
		testkit.Mkfs(t, c.disks[i].Path, "ext4") // by which it is known again
	}
	c.d = program.New(t)
	c.d.Protect("ga", "--seal-every", "50ms", c.disks[0].Path)
	c.d.Protect("gb", append(args, "--seal-every", "50ms", c.disks[1].Path)...)
	return c
}

// killAt starts the daemon anew, to be killed at a step of a mark.
func (c *couple) killAt(step string) {
	c.t.Helper()
	c.d.Kill()
	c.d.Steps("kill@" + step)
	c.d.Start()
	for _, g := range c.groups {
		c.d.Await(g, "taken over", online)
	}
}

// offer fails the test unless both groups come to offer just these bookmarks.
func (c *couple) offer(want ...string) {
	c.t.Helper()
	for _, g := range c.groups {
		program.Eventually(c.t, patience, "group "+g+" offers "+strings.Join(want, ", "), func() error {
			var have []string
			for _, p := range c.d.Points(g) {
				if p.Bookmark != "" {
					have = append(have, p.Bookmark)
				}
			}
			if !slices.Equal(have, want) {
				return program.ErrNotYet
			}
			return nil
		})
	}
}

// write puts something new on both disks and gives what they hold then.
func (c *couple) write(seq uint64) (held [2][]byte) {
	c.t.Helper()
	for i, d := range c.disks {
		f, buf := open(c.t, d.Path, unix.O_DIRECT), aligned(c.t, 64<<10)
		testkit.Fill(buf, i, 4*mib, seq)
		if _, err := f.WriteAt(buf, 4*mib); err != nil {
			c.t.Fatal(err)
		}
		f.Close()
		held[i] = content(c.t, d.Path)
	}
	return held
}

// TestMarkOfADiskThatIsGone: the daemon is killed in the middle of a commit over two
// groups, and the disk of one does not come back. Both offer the bookmark all the
// same, as both disks were; when the disk is there again its group goes on.
func TestMarkOfADiskThatIsGone(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		c := newCouple(t)
		step := []string{"intent", "one-verdict"}[rng.IntN(2)]
		c.killAt(step)
		held := c.write(1)
		if _, err := c.d.Verb("bookmark", "ga", "gb", "m"); err == nil {
			t.Fatalf("the daemon was not killed at %s", step)
		}
		c.d.Ended()
		c.write(2)
		if err := loop.Detach(c.disks[1].Path); err != nil {
			t.Fatal(err)
		}
		c.d.Steps()
		c.d.Start()
		c.d.Await("gb", "without its disk", func(g *program.Group) bool { return g.State == "offline" && g.Has("offline") })
		c.d.Await("ga", "taken over", online)
		c.offer("m")
		for i, g := range c.groups {
			same(t, "group "+g+" at the bookmark", held[i], image(t, c.d, g, "", "m"))
			c.d.Run("verify", "--vault", c.d.Vault, g)
		}
		program.Eventually(t, patience, "nothing is noted any more", func() error {
			if files, _ := filepath.Glob(filepath.Join(c.d.State, "marks", "*")); len(files) > 0 {
				return program.ErrNotYet
			}
			return nil
		})
		again, err := loop.Attach(c.disks[1].File, loop.Options{})
		if err != nil {
			t.Fatal(err)
		}
		c.disks[1].Path = again.Path
		again.Close()
		t.Cleanup(func() { _ = loop.Detach(again.Path) })
		c.d.Settle("gb") // it goes on from there
		c.offer("m")
		same(t, "gb, latest", content(t, again.Path), image(t, c.d, "gb", "", "latest"))
	})
}

// TestPreparedAndDiskGone: the disk of one group stops being what it was while a
// mark waits for its verdict: nobody can commit it any more, and none offers it.
func TestPreparedAndDiskGone(t *testing.T) {
	c := newCouple(t)
	c.d.Run("bookmark", "--prepare", "ga", "gb", "m")
	if err := os.Truncate(c.disks[1].File, 4*mib); err != nil {
		t.Fatal(err)
	}
	testkit.Run(t, "losetup", "-c", c.disks[1].Path)
	c.d.Await("gb", "offline", func(g *program.Group) bool { return g.State == "offline" })
	c.d.Refused(exitRefused, "bookmark", "--commit", "m")
	c.d.Refused(exitUnreachable, "bookmark", "ga", "gb", "another")
	c.d.Settle("ga")
	c.offer()
	c.d.Run("bookmark", "ga", "m") // it never was
}

// TestMarksAndFullSpool: the spool of one group takes nothing while marks wait for
// their verdicts. None can be prepared then, without anybody waiting for the vault;
// a commit is decided and a revocation done, and both groups offer the same when
// the vault is back.
func TestMarksAndFullSpool(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		c := newCouple(t, "--spool-size", "1M", "--ring-size", "1M", "--segment-size", "256K")
		for _, name := range []string{"kept", "taken-back"} {
			c.d.Run("bookmark", "--prepare", "--timeout", "30m", "ga", "gb", name)
		}
		c.d.Run("bookmark", "--prepare", "--timeout", "2s", "ga", "gb", "too-late")
		held := [2][]byte{content(t, c.disks[0].Path), content(t, c.disks[1].Path)}
		for _, g := range c.groups {
			c.d.Settle(g)
		}
		if err := os.Rename(c.d.Vault, c.d.Vault+".away"); err != nil {
			t.Fatal(err)
		}
		f, buf := open(t, c.disks[1].Path, unix.O_DIRECT), aligned(t, 64<<10)
		c.d.Await("gb", "telling that its spool is full", func(g *program.Group) bool {
			for range 32 {
				at := mib + 65536*rng.Int64N(6*mib/65536)
				testkit.Fill(buf, 1, at, rng.Uint64())
				if _, err := f.WriteAt(buf, at); err != nil {
					t.Fatal(err)
				}
			}
			return g.Has("spool-full")
		})
		_, err := c.d.Verb("bookmark", "ga", "gb", "never")
		refusedAsFull(t, err)
		if text := c.d.Refused(exitUnreachable, "bookmark", "--commit", "kept"); !strings.Contains(text, "is committed") || !strings.Contains(text, "gb") {
			t.Errorf("a commit that one group cannot take yet says %s", text)
		}
		c.d.Run("bookmark", "--commit", "kept") // it is
		c.d.Run("bookmark", "--revoke", "taken-back")
		program.Eventually(t, patience, "the third is revoked by itself", func() error {
			if text := c.d.Run("bookmark", "--pending"); strings.Contains(text, "too-late") {
				return program.ErrNotYet
			}
			return nil
		})
		c.d.Refused(exitRefused, "bookmark", "--commit", "too-late")
		if rng.IntN(2) == 0 { // another daemon knows it from what is noted
			c.d.Kill()
			if err := os.Rename(c.d.Vault+".away", c.d.Vault); err != nil {
				t.Fatal(err)
			}
			c.d.Start()
		} else if err := os.Rename(c.d.Vault+".away", c.d.Vault); err != nil {
			t.Fatal(err)
		}
		c.offer("kept")
		for i, g := range c.groups {
			c.d.Settle(g)
			same(t, "group "+g+" at the bookmark", held[i], image(t, c.d, g, "", "kept"))
		}
		for _, name := range []string{"never", "taken-back", "too-late"} {
			c.d.Run("bookmark", "ga", "gb", name) // they never were
		}
	})
}

// refusedAsFull: a bookmark cannot be put, as the spool is full or, where writes
// were lost meanwhile, as a gap is open.
func refusedAsFull(t *testing.T, err error) {
	t.Helper()
	e, ok := err.(*program.Error)
	if !ok || e.Exit != exitUnreachable && e.Exit != exitInsideGap {
		t.Errorf("a bookmark where nothing can be kept: %v", err)
	}
}
