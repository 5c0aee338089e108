package serve

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tidemark/internal/diff"
	"tidemark/internal/snapshot"
	"tidemark/internal/testkit"
)

func snapshotOf(t *testing.T, s *Server, r snapshot.Request) (snapshot.Info, snapshot.ID) {
	t.Helper()
	i, err := s.CreateSnapshot(r)
	if err != nil {
		t.Fatal(err)
	}
	id, err := snapshot.ParseID(i.ID)
	if err != nil {
		t.Fatal(err)
	}
	return i, id
}

// TestSnapshot: images of two devices hold what was there at the instant, also
// after a restart, while the devices are overwritten; they are gone when the
// snapshot is, and nothing is left of it.
func TestSnapshot(t *testing.T) {
	testkit.Need(t, "nbdclients")
	env := newEnv(t)
	s := open(t, env)
	var uris [2]string
	for i, name := range []string{"a", "b"} {
		uris[i] = create(t, s, Spec{Name: name, Backing: imageFile(t, 4*mib), Front: FrontNBDServer}).Node
		qemuIO(t, uris[i], "write -P 0x11 0 4M")
	}
	storage := filepath.Join(t.TempDir(), "diff")
	info, id := snapshotOf(t, s, snapshot.Request{Devices: []string{"a", uris[1]}, Storage: []snapshot.Storage{{Path: storage, Limit: 32 * mib}}})
	if err := s.Remove(t.Context(), "a"); !errors.Is(err, ErrInUse) {
		t.Errorf("a device of a snapshot was removed: %v", err)
	}
	if err := s.TakeSnapshot(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if err := s.TakeSnapshot(t.Context(), id); !errors.Is(err, snapshot.ErrTaken) {
		t.Errorf("taken twice: %v", err)
	}
	check := func(s *Server) {
		t.Helper()
		for i, name := range []string{"a", "b"} {
			node := s.ImageNode(name, info.ID)
			if node == "" {
				t.Fatalf("no image of %s", name)
			}
			qemuIO(t, node, "read -P 0x11 0 4M")
			qemuIO(t, uris[i], "read -P 0x22 1M 64k")
		}
	}
	for _, uri := range uris {
		qemuIO(t, uri, "write -P 0x22 1M 64k", "flush")
	}
	check(s)
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	s = open(t, env)
	check(s)
	if err := s.DestroySnapshot(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if node := s.ImageNode("a", info.ID); node != "" {
		t.Errorf("the image is still at %s", node)
	}
	left, err := filepath.Glob(filepath.Join(s.folder, "*@*"))
	if _, statErr := os.Stat(storage); len(left) > 0 || err != nil || !errors.Is(statErr, os.ErrNotExist) {
		t.Errorf("left behind: %q, storage: %v", left, statErr)
	}
	if s.memory != "" {
		if _, err := os.Stat(s.memory); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left behind: %v", s.memory, err)
		}
	}
}

// TestWrittenBehindSnapshot: a snapshot goes on over a clean restart; not where somebody
// wrote to the backing meanwhile, of which its image kept nothing: that is said, and
// the image answers with errors, not with a mixture.
func TestWrittenBehindSnapshot(t *testing.T) {
	for _, foreign := range []bool{false, true} {
		env := newEnv(t)
		s := open(t, env)
		path := imageFile(t, mib)
		create(t, s, Spec{Name: "data", Backing: path, Front: FrontNBDServer})
		info, id := snapshotOf(t, s, snapshot.Request{Devices: []string{"data"}, Storage: []snapshot.Storage{{Path: filepath.Join(t.TempDir(), "diff"), Limit: 4 * mib}}})
		if err := errors.Join(s.TakeSnapshot(t.Context(), id), s.Stop(t.Context())); err != nil {
			t.Fatal(err)
		}
		if foreign {
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err == nil {
				_, err = f.WriteAt([]byte("x"), 512)
			}
			if err != nil {
				t.Fatal(err)
			}
			f.Close()
		}
		s = open(t, env)
		images, err := s.set.Images(id)
		if err != nil {
			t.Fatal(err)
		}
		if err := images[0].Image.Err(); errors.Is(err, diff.ErrSpoiled) != foreign {
			t.Errorf("written to meanwhile: %v, and the image %s says %v", foreign, info.ID, err)
		}
		if err := s.DestroySnapshot(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
}

// TestSnapshotOverflow: storage that is full spoils the snapshot and is told of;
// the device's writes go on.
func TestSnapshotOverflow(t *testing.T) {
	testkit.Need(t, "nbdclients")
	s := open(t, newEnv(t))
	uri := create(t, s, Spec{Name: "a", Backing: imageFile(t, 16*mib), Front: FrontNBDServer}).Node
	info, id := snapshotOf(t, s, snapshot.Request{Devices: []string{"a"}, Storage: []snapshot.Storage{{Path: filepath.Join(t.TempDir(), "diff"), Limit: 2 * mib}}})
	if err := s.TakeSnapshot(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	qemuIO(t, uri, "write -P 0x33 0 16M", "read -P 0x33 0 16M")
	kinds := map[diff.Kind]bool{}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for after := uint64(0); !kinds[diff.Overflow]; {
		events, err := s.Events(ctx, info.ID, after)
		if err != nil || len(events) == 0 {
			t.Fatalf("no overflow is told of: %v %v", kinds, err)
		}
		for _, e := range events {
			if e.Sequence != after+1 {
				t.Errorf("event %d after %d", e.Sequence, after)
			}
			kinds[e.Kind], after = true, e.Sequence
		}
	}
	now, err := s.Snapshot(id)
	if err != nil || now.Devices[0].Spoiled == "" {
		t.Errorf("the snapshot is %+v (%v), want its image spoiled", now, err)
	}
	if again, err := s.Events(t.Context(), info.ID, 0); err != nil || len(again) < len(kinds) {
		t.Errorf("who asks again gets %d events (%v)", len(again), err)
	}
	if err := s.DestroySnapshot(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Events(t.Context(), info.ID, 0); !errors.Is(err, snapshot.ErrNoSuch) {
		t.Errorf("events of a destroyed snapshot: %v", err)
	}
}

// TestSnapshotOfMounted: the file system of a mounted device is frozen for the
// instant, so that its image is clean; its image can be mounted beside it, and
// destroying the snapshot waits for nobody.
func TestSnapshotOfMounted(t *testing.T) {
	testkit.Need(t, "root", "loop", "fuse", "ext4")
	env := newEnv(t)
	s := open(t, env)
	node := create(t, s, Spec{Name: "data", Backing: imageFile(t, 48*mib), Front: FrontLoop}).Node
	outside(t, "mkfs.ext4", "-q", "-b", "4096", node)
	dir := t.TempDir()
	outside(t, "mount", node, dir)
	defer func() { outside(t, "umount", dir) }()
	outside(t, "sh", "-c", "echo before > "+dir+"/file")
	// On the device itself, by extent.
	info, id := snapshotOf(t, s, snapshot.Request{Devices: []string{node}, Storage: []snapshot.Storage{{Path: filepath.Join(dir, "diff"), Limit: 8 * mib}}})
	defer func() { _ = s.DestroySnapshot(t.Context(), id) }() // it may be gone already
	if err := s.TakeSnapshot(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	outside(t, "sh", "-c", "echo after > "+dir+"/file; sync -f "+dir)
	image := s.ImageNode("data", info.ID)
	if text := outside(t, "e2fsck", "-fn", image); !strings.Contains(text, "clean") && !strings.Contains(text, "files") {
		t.Errorf("the image: %s", text)
	}
	if text := outside(t, "debugfs", "-R", "cat /file", image); !strings.Contains(text, "before") {
		t.Errorf("the image's file holds %q", text)
	}
	if err := s.DestroySnapshot(t.Context(), id); err != nil {
		t.Fatal(err)
	}
}
