package live

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"tidemark/internal/stream"
	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
	"tidemark/internal/vault"
)

// TestKilledAtAnyInstant: kill -9 at random instants under load loses nothing
// and copies nothing again while the ring has room: there is one stretch, and
// the history has no gap and no fill but those of the first copy.
func TestKilledAtAnyInstant(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		o := newOrder(t, rng, 8<<10, "--seal-every", "20ms", "--segment-size", "256K")
		began := o.d.Group("g").Since
		copied := fillsOf(t, o.d, "g")
		o.write(func() {
			for range 5 {
				o.counted(rng.Uint64N(400))
				o.d.Kill()
				o.counted(rng.Uint64N(30))
				o.d.Start()
				if rng.IntN(2) == 0 { // killed again while it takes the tap over, or later
					o.counted(rng.Uint64N(60))
					o.d.Restart()
				}
			}
			o.d.Stop()
			if len(pinned(t, o.d, "g")) == 0 {
				t.Error("a clean stop took the tap away")
			}
			o.counted(200)
			o.d.Start()
		})
		g := identical(t, o.d, "g")
		if g.Since != began || g.Disks[0].Lost+g.Disks[1].Lost+g.Disks[0].Failed+g.Disks[1].Failed > 0 {
			t.Errorf("consistent since %d, was %d; %+v", g.Since, began, g.Disks)
		}
		if n := fillsOf(t, o.d, "g"); n != copied {
			t.Errorf("%d bytes of fills, %d after the first copy: something was copied again", n, copied)
		}
		if n := o.obeys("latest"); n != o.c.n.Load() {
			t.Errorf("latest has number %d, the disks have %d", n, o.c.n.Load())
		}
		o.everywhere()
		if all := stretches(t, o.d, "g"); len(all) != 1 {
			t.Errorf("stretches %v, want one", all)
		}
	})
}

// TestStoppedCleanly: what is written while no daemon runs is in the history of the next.
func TestStoppedCleanly(t *testing.T) {
	disk := testkit.NewDisk(t, 8*mib)
	d := program.New(t)
	d.Protect("g", disk.Path)
	d.Stop()
	f, buf := open(t, disk.Path, unix.O_DIRECT), aligned(t, 64<<10)
	testkit.Fill(buf, 0, mib, 1)
	if _, err := f.WriteAt(buf, mib); err != nil {
		t.Fatal(err)
	}
	d.Start()
	d.Await("g", "taken over", online)
	d.Run("bookmark", "g", "here")
	testkit.Fill(buf, 0, mib, 2)
	if _, err := f.WriteAt(buf, mib); err != nil {
		t.Fatal(err)
	}
	g := identical(t, d, "g")
	if seqs, err := testkit.Check(image(t, d, "g", "", "here")[mib:mib+len(buf)], 0, mib); err != nil || seqs[0] != 1 {
		t.Errorf("at the bookmark: %v %v", seqs[:min(1, len(seqs))], err)
	}
	if g.Since != 1 {
		t.Errorf("consistent since %d: the first stretch did not go on", g.Since)
	}
}

// TestUnprotect: everything is drained, then every trace goes; the vault stays.
func TestUnprotect(t *testing.T) {
	disk := testkit.NewDisk(t, 8*mib)
	d := program.New(t)
	d.Protect("g", "--seal-every", "1m", disk.Path) // nothing is sealed by itself
	f, buf := open(t, disk.Path, unix.O_DIRECT), aligned(t, 64<<10)
	for i := range 20 {
		testkit.Fill(buf, 0, int64(i)*mib/4, uint64(i+1))
		if _, err := f.WriteAt(buf, int64(i)*mib/4); err != nil {
			t.Fatal(err)
		}
	}
	d.Run("unprotect", "g")
	if left := pinned(t, d, "g"); len(left) > 0 {
		t.Errorf("pins stay: %v", left)
	}
	if left, _ := filepath.Glob(filepath.Join(d.State, "groups", "*")); len(left) > 0 {
		t.Errorf("the state folder still has %v", left)
	}
	if len(d.Status().Groups) > 0 {
		t.Error("status still has the group")
	}
	same(t, "latest", content(t, disk.Path), image(t, d, "g", "", "latest"))
	d.Restart()
	if len(d.Status().Groups) > 0 {
		t.Error("the group is back after a restart")
	}
	// The disk is free: protected again, the history goes on and only what differs is copied.
	before := stretches(t, d, "g")
	testkit.Fill(buf, 0, 0, 99)
	if _, err := f.WriteAt(buf, 0); err != nil {
		t.Fatal(err)
	}
	d.Protect("g", disk.Path)
	identical(t, d, "g")
	after := stretches(t, d, "g")
	if len(after) != 2 || after[0] != before[0] {
		t.Errorf("stretches %v, were %v", after, before)
	}
}

func online(g *program.Group) bool { return g.State != "offline" }

// fillsOf counts the bytes of all fills that the history of a group has.
func fillsOf(t testing.TB, d *program.Daemon, group string) (n int64) {
	t.Helper()
	eachRecord(t, d, group, func(r *stream.Record) {
		if r.Kind == stream.KindFill {
			n += r.Range.Len
		}
	})
	return n
}

// copiedOf counts the bytes of those that carry data from the disk.
func copiedOf(t testing.TB, d *program.Daemon, group string) (n int64) {
	t.Helper()
	eachRecord(t, d, group, func(r *stream.Record) {
		if r.Kind == stream.KindFill && r.Fill == stream.FillData {
			n += r.Range.Len
		}
	})
	return n
}

// eachRecord goes through all that a vault has of a group, in its order.
func eachRecord(t testing.TB, d *program.Daemon, group string, do func(*stream.Record)) {
	t.Helper()
	v, err := vault.Open(t.Context(), d.Vault)
	if err != nil {
		t.Fatal(err)
	}
	refs, err := v.Segments(t.Context(), group)
	if err != nil {
		t.Fatal(err)
	}
	for _, ref := range refs {
		o, err := v.OpenSegment(t.Context(), group, ref)
		if err != nil {
			t.Fatal(err)
		}
		err = o.Records(func(r *stream.Record) error { do(r); return nil })
		if err := errors.Join(err, o.Close()); err != nil {
			t.Fatal(err)
		}
	}
}

// vaultFiles are all files of a vault.
func vaultFiles(t testing.TB, d *program.Daemon) (files []string) {
	t.Helper()
	err := filepath.WalkDir(d.Vault, func(path string, e os.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			files = append(files, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}
