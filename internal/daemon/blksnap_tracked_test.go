package daemon

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	abi "tidemark/internal/abi/blksnap"
	"tidemark/internal/block"
	"tidemark/internal/cbt"
	"tidemark/internal/control/blksnap"
	"tidemark/internal/health"
	"tidemark/internal/serve"
	"tidemark/internal/snapshot"
	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// TestTrackedAs: what a program notes together with an image must never let it
// miss a change, whichever of the held images it means.
func TestTrackedAs(t *testing.T) {
	const size = 1 << 20
	m := cbt.New(size)
	held := func(taken ...*cbt.Changes) (out []snapshot.DeviceInfo) {
		for _, c := range taken {
			out = append(out, snapshot.DeviceInfo{Generation: c.Info().Generation.String(), Number: c.Info().Number})
		}
		return out
	}
	is := func(what string, held []snapshot.DeviceInfo, g cbt.Generation, number uint8) {
		t.Helper()
		if gotG, got := trackedAs(m.Info(), held); gotG != g || got != number {
			t.Errorf("%s: %s:%d, want %s:%d", what, gotG, got, g, number)
		}
	}
	g := m.Info().Generation
	is("none was taken", nil, g, 0)
	first := m.Take()
	is("one", held(first), g, 1)
	second := m.Take()
	is("two are held", held(first, second), g, 1)
	is("the older is gone", held(second), g, 2)
	is("none is held", nil, g, 2)

	m.Reset() // as when the daemon is killed
	strange, _ := trackedAs(m.Info(), held(first, second))
	third := m.Take()
	stranger, _ := trackedAs(m.Info(), held(second, third))
	if strange == g || strange == m.Info().Generation || stranger == m.Info().Generation || strange == stranger {
		t.Errorf("images of a generation that has ended may be continued: %s, %s of %s and %s", strange, stranger, g, m.Info().Generation)
	}
	if again, _ := trackedAs(m.Info(), held(third, second)); again != stranger {
		t.Error("asked twice it is another one")
	}
	is("the old ones are gone", held(third), m.Info().Generation, 1)
}

// TestMerged: the same bytes, each once.
func TestMerged(t *testing.T) {
	got := merged([]block.Range{{Off: 8, Len: 4}, {Off: 100, Len: 1}, {Off: 0, Len: 4}, {Off: 9, Len: 1}, {Off: 4, Len: 2}, {Off: 10, Len: 10}, {Off: 8, Len: 4}})
	if want := []block.Range{{Off: 0, Len: 6}, {Off: 8, Len: 12}, {Off: 100, Len: 1}}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if got := merged(nil); len(got) != 0 {
		t.Errorf("of nothing: %v", got)
	}
}

// TestBlksnapSystem: what /dev/blksnap commands, on devices and images that have
// numbers: who is tracked, which number is told while others hold snapshots too,
// what of storage is used, and whose image an overflow ends.
func TestBlksnapSystem(t *testing.T) {
	testkit.Need(t, "root", "loop", "fuse")
	dir := t.TempDir()
	s, err := serve.Open(t.Context(), &serve.Env{StateDir: filepath.Join(dir, "state"), Nodes: filepath.Join(dir, "nodes"), Log: slog.New(slog.DiscardHandler),
		Helper: []string{program.Binary(t), "device-helper"}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	t.Cleanup(func() {
		if err := s.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	var devs []abi.Dev
	var nodes []string
	for _, name := range []string{"a", "b"} {
		image := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 4<<20)); err != nil {
			t.Fatal(err)
		}
		i, err := s.Create(ctx, serve.Spec{Name: name, Backing: image, Front: serve.FrontLoop})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := s.Remove(context.Background(), name); err != nil {
				t.Error(err)
			}
		})
		dev, ok := numberOf(i.Node)
		if !ok {
			t.Fatalf("%s is no block device", i.Node)
		}
		devs, nodes = append(devs, dev), append(nodes, i.Node)
	}
	storage, ok := numberOf(testkit.NewDisk(t, 16<<20).Path)
	if !ok {
		t.Fatal("no storage")
	}
	b := &blksnapSystem{devices: s, health: &health.Set{}, tracked: map[string]bool{}}
	told := 0
	b.OnImages(func() { told++ })
	part := func(off, length int64) []block.Range { return []block.Range{{Off: off, Len: length}} }

	if err := b.MarkDirty(devs[0], part(0, 4096)); !errors.Is(err, blksnap.ErrUntracked) {
		t.Errorf("marking what nobody tracks: %v", err)
	}
	id, err := b.Create(devs)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Destroy(context.Background(), id); err != nil {
			t.Error(err)
		}
	})
	if err := errors.Join(b.MarkDirty(devs[0], part(0, 4096)), b.Append(id, storage, part(0, 68<<10))); err != nil {
		t.Errorf("marking, and less storage than a chunk: %v", err)
	}
	if err := b.Take(ctx, id); !errors.Is(err, blksnap.ErrNoStorage) || told != 0 {
		t.Errorf("taken without storage: %v; told %d times", err, told)
	}
	if err := errors.Join(b.Append(id, storage, part(0, 1<<20)), b.Take(ctx, id)); err != nil {
		t.Fatal(err)
	}
	images, err := b.Images(id)
	if err != nil || len(images) != 2 || images[0].Original != devs[0] || images[1].Original != devs[1] || images[0].Image == images[1].Image || told != 1 {
		t.Fatalf("%+v, %v; told %d times", images, err, told)
	}
	if _, err := b.Create([]abi.Dev{images[0].Image}); !errors.Is(err, blksnap.ErrForeign) || len(b.health.List()) > 0 {
		t.Errorf("a snapshot of an image: %v, %+v", err, b.health.List())
	}
	if err := b.Append(id, images[1].Image, part(0, 1<<20)); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("storage on an image: %v", err)
	}
	if err := b.MarkDirty(images[0].Image, part(8192, 4096)); err != nil {
		t.Errorf("marking by an image: %v", err)
	}

	later, err := b.Create(devs[:1])
	if err == nil {
		err = errors.Join(b.Append(later, storage, part(8<<20, 1<<20)), b.Take(ctx, later))
	}
	if err != nil {
		t.Fatal(err)
	}
	is := func(what string) {
		t.Helper()
		all, err := b.Tracked()
		if err != nil || len(all) != 2 || !all[0].Held || !all[1].Held || all[0].Number != 1 || all[1].Number != 1 {
			t.Errorf("%s: %+v, %v", what, all, err)
		}
	}
	is("two are held")
	if err := b.Destroy(ctx, later); err != nil || told != 3 {
		t.Errorf("%v; told %d times", err, told)
	}
	is("the later one has gone")

	// All of b does not fit: the image of b ends, and the event says so.
	testkit.Run(t, "dd", "if=/dev/zero", "of="+nodes[1], "bs=64k", "count=64", "oflag=direct", "conv=notrunc", "status=none")
	for after := uint64(0); ; {
		e, err := b.Event(ctx, id, after)
		if err != nil {
			t.Fatal(err)
		}
		if after = e.Sequence; e.Code == abi.EventCorrupted {
			if e.Original != devs[1] || e.Errno != syscall.ENOSPC {
				t.Errorf("%+v, want ENOSPC of %v", e, devs[1])
			}
			break
		}
	}
}
