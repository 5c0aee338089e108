package splice

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/dm"
	"tidemark/internal/testkit"
)

func TestRefuse(t *testing.T) {
	for kind, ok := range map[string]bool{"linear": true, "striped": true, "crypt": true, "thin": false, "thin-pool": false, "multipath": false,
		"raid": false, "clone": false, "cache": false, "mirror": false, "snapshot-origin": false, "something-new": false} {
		err := Refuse("x", dm.Table{{Start: 0, Length: 8, Type: "linear"}, {Start: 8, Length: 8, Type: kind}})
		if ok != (err == nil) || !ok && (!errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), kind) || !strings.Contains(err.Error(), ": ")) {
			t.Errorf("%s: %v", kind, err)
		}
	}
	if err := Refuse("x", nil); !errors.Is(err, ErrRefused) {
		t.Error(err)
	}
}

// volume is a mapped device over two disks, as LVM makes them.
func volume(t *testing.T, c *dm.Control, kind string) dm.Info {
	t.Helper()
	const half = 96 << 20
	var devs [2]string
	for i := range devs {
		d := testkit.NewDisk(t, half+1<<20)
		devs[i] = number(t, d.Path)
	}
	table := dm.Table{{Start: 0, Length: half / 512, Type: "linear", Params: devs[0] + " 2048"}, {Start: half / 512, Length: half / 512, Type: "linear", Params: devs[1] + " 2048"}}
	if kind == "striped" {
		table = dm.Table{{Start: 0, Length: 2 * half / 512, Type: "striped", Params: fmt.Sprintf("2 128 %s 0 %s 0", devs[0], devs[1])}}
	}
	return mapped(t, c, fmt.Sprintf("tidemark-test-%d-%s", os.Getpid(), kind), table)
}

// mapped makes a mapped device, removed when the test ends.
func mapped(t *testing.T, c *dm.Control, name string, table dm.Table) dm.Info {
	t.Helper()
	if _, err := c.Create(name, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Remove(dm.Named(name)); err != nil {
			t.Error(err)
		}
	})
	if err := c.Load(dm.Named(name), table, false); err != nil {
		t.Fatal(err)
	}
	info, err := c.Resume(dm.Named(name), true)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := dm.MakeNode(info); err != nil {
		t.Fatal(err)
	}
	return info
}

func number(t *testing.T, path string) string {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
}

func mapper(t *testing.T) *dm.Control {
	t.Helper()
	testkit.Need(t, "root", "loop", "dm")
	c, err := dm.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// upperOf stands for a served device: it passes everything on to the lower one.
func upperOf(t *testing.T, c *dm.Control, s *Splice, lower string) dm.Info {
	t.Helper()
	return mapped(t, c, fmt.Sprintf("tidemark-test-%d-upper", os.Getpid()), dm.Table{{Start: 0, Length: s.Sectors, Type: "linear", Params: number(t, lower) + " 0"}})
}

// TestUnderLoad: in and out again and again under a mounted, busy file system:
// no error, and everything that fio wrote is there.
func TestUnderLoad(t *testing.T) {
	for _, kind := range []string{"linear", "striped"} {
		t.Run(kind, func(t *testing.T) {
			c := mapper(t)
			testkit.Need(t, "ext4", "fio")
			vol := volume(t, c, kind)
			testkit.Mkfs(t, vol.Node(), "ext4")
			dir := testkit.Mount(t, vol.Node())
			before, _, err := c.Table(dm.Numbered(vol.Major, vol.Minor))
			if err != nil {
				t.Fatal(err)
			}
			s, lower, err := Prepare(c, dm.Numbered(vol.Major, vol.Minor))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := s.Remove(c); err != nil {
					t.Error(err)
				}
			})
			upper := upperOf(t, c, s, lower)
			load := exec.CommandContext(t.Context(), "fio", "--name=x", "--directory="+dir, "--size=24M", "--numjobs=2", "--rw=randwrite", "--bs=4k", "--iodepth=8",
				"--ioengine=libaio", "--direct=1", "--verify=crc32c", "--do_verify=1", "--time_based", "--runtime=4", "--error_dump=1")
			out := new(strings.Builder)
			load.Stdout, load.Stderr = out, out
			if err := load.Start(); err != nil {
				t.Fatal(err)
			}
			for range 5 {
				if err := s.In(c, upper.Major, upper.Minor); err != nil {
					t.Fatal(err)
				}
				if err := s.Check(c); err != nil {
					t.Error(err)
				}
				if _, _, err := Prepare(c, dm.Numbered(vol.Major, vol.Minor)); !errors.Is(err, ErrRefused) {
					t.Errorf("spliced twice: %v", err)
				}
				time.Sleep(300 * time.Millisecond)
				if err := s.Out(c, false); err != nil {
					t.Fatal(err)
				}
				if err := s.Check(c); !errors.Is(err, ErrReplaced) {
					t.Errorf("out and still in: %v", err)
				}
			}
			if err := load.Wait(); err != nil || strings.Contains(out.String(), "verify: bad") {
				t.Errorf("%v\n%s", err, out)
			}
			after, _, err := c.Table(dm.Numbered(vol.Major, vol.Minor))
			if err != nil || after.Digest() != before.Digest() {
				t.Errorf("before %+v, after %+v, %v", before, after, err)
			}
			testkit.Unmount(t, dir)
			testkit.Run(t, "e2fsck", "-fn", vol.Node())
		})
	}
}

// TestReplaced: a table that somebody else loads is noticed, and is not undone.
func TestReplaced(t *testing.T) {
	c := mapper(t)
	vol := volume(t, c, "linear")
	id := dm.Numbered(vol.Major, vol.Minor)
	original, _, err := c.Table(id)
	if err != nil {
		t.Fatal(err)
	}
	s, lower, err := Prepare(c, id)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Remove(c) })
	upper := upperOf(t, c, s, lower)
	if err := s.In(c, upper.Major, upper.Minor); err != nil {
		t.Fatal(err)
	}
	shorter := dm.Table{original[0]} // as lvreduce would
	if err := errors.Join(c.Load(id, shorter, false), c.Suspend(id, false)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Resume(id, false); err != nil {
		t.Fatal(err)
	}
	if err := s.Check(c); !errors.Is(err, ErrReplaced) {
		t.Error(err)
	}
	if err := s.Out(c, false); !errors.Is(err, ErrReplaced) {
		t.Error(err)
	}
	if now, info, _ := c.Table(id); now.Digest() != shorter.Digest() || info.Inactive || info.Suspended {
		t.Errorf("%+v, %+v", now, info)
	}
}

// TestTooSmall: an upper device that does not fit changes nothing.
func TestTooSmall(t *testing.T) {
	c := mapper(t)
	vol := volume(t, c, "linear")
	id := dm.Numbered(vol.Major, vol.Minor)
	s, _, err := Prepare(c, id)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Remove(c) })
	small := mapped(t, c, fmt.Sprintf("tidemark-test-%d-small", os.Getpid()), dm.Table{{Start: 0, Length: 8, Type: "zero"}})
	if err := s.In(c, small.Major, small.Minor); err == nil {
		t.Error("a device of 4 KiB was accepted")
	}
	now, info, err := c.Table(id)
	if err != nil || now.Digest() != s.Original || info.Suspended || info.Inactive {
		t.Errorf("%+v, %+v, %v", now, info, err)
	}
}
