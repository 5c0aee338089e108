package snapshot

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/diff"
	"tidemark/internal/filter/cow"
	"tidemark/internal/sim"
	"tidemark/internal/testkit"
)

const mib = 1 << 20

// TestLife: from create to destroy, with what every verb refuses, and nothing left behind.
func TestLife(t *testing.T) {
	testkit.NoLeaks(t)
	r := newRig(t, Config{}, sim.NewDisk(mib), sim.NewDisk(mib))
	path := filepath.Join(t.TempDir(), "diff")
	for what, q := range map[string]Request{
		"no device":       {},
		"an unknown one":  {Devices: []string{"d0", "sda"}},
		"one twice":       {Devices: []string{"d0", "d0"}},
		"a bad chunk":     {Devices: []string{"d0"}, Chunk: 5000, Storage: []Storage{{Path: path}}},
		"a bad path":      {Devices: []string{"d0"}, Storage: []Storage{{Path: "/does/not/exist/diff"}}},
		"a limit too low": {Devices: []string{"d0"}, Storage: []Storage{{Path: path, Limit: 4096}}},
	} {
		if _, err := r.set.Create(q); err == nil {
			t.Errorf("%s: created", what)
		}
	}
	if left, _ := os.ReadDir(r.cfg.Dir); len(left) != 0 || len(r.set.List()) != 0 {
		t.Errorf("refused verbs left %v, %v", left, r.set.List())
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("a refused verb left its file: %v", err)
	}
	id, err := r.set.Create(Request{Devices: []string{"d1", "d0"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.set.Images(id); !errors.Is(err, ErrNotTaken) {
		t.Errorf("images before take: %v", err)
	}
	if err := r.set.Take(t.Context(), id); !errors.Is(err, ErrNoStorage) {
		t.Errorf("take without storage: %v", err)
	}
	if err := r.set.Append(id, Storage{Path: path, Limit: 8 * mib}); err != nil {
		t.Fatal(err)
	}
	fill(t, r.stacks[0], 'o')
	fill(t, r.stacks[1], 'p')
	if err := r.set.Take(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if err := r.set.Take(t.Context(), id); !errors.Is(err, ErrTaken) {
		t.Errorf("taken twice: %v", err)
	}
	fill(t, r.stacks[0], 'x')
	images, err := r.set.Images(id)
	if err != nil || len(images) != 2 || images[0].Device != "d1" || images[1].Device != "d0" {
		t.Fatalf("%+v, %v", images, err)
	}
	wantAll(t, images[0].Image, 'p', "d1")
	wantAll(t, images[1].Image, 'o', "d0")
	info := r.set.List()
	if len(info) != 1 || info[0].State != "taken" || info[0].Used != mib || info[0].Devices[1].Number != 1 || info[0].Capacity+info[0].Room > 8*mib {
		t.Errorf("%+v", info)
	}
	waiting := make(chan error)
	go func() {
		for {
			if _, err := r.set.Wait(t.Context(), id); err != nil {
				waiting <- err
				return
			}
		}
	}()
	if err := r.set.Destroy(id); err != nil {
		t.Fatal(err)
	}
	if err := <-waiting; !errors.Is(err, ErrNoSuch) {
		t.Errorf("who waits for an event: %v", err)
	}
	for what, err := range map[string]error{"destroy": r.set.Destroy(id), "take": r.set.Take(t.Context(), id), "append": r.set.Append(id, Storage{Path: path})} {
		if !errors.Is(err, ErrNoSuch) {
			t.Errorf("%s of a destroyed one: %v", what, err)
		}
	}
	if _, err := images[0].Image.ReadAt(make([]byte, 1), 0); !errors.Is(err, cow.ErrClosed) {
		t.Errorf("its image: %v", err)
	}
	if left, _ := os.ReadDir(r.cfg.Dir); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("its file is still there: %v", err)
	}
}

// TestOneInstant: each writer writes a number to one device and then to the other;
// no image of the second has what that of the first lacks, however many snapshots
// there are, and images do not change.
func TestOneInstant(t *testing.T) {
	testkit.NoLeaks(t)
	r := newRig(t, Config{}, sim.NewDisk(mib), sim.NewDisk(mib))
	var stop atomic.Bool
	var load sync.WaitGroup
	const writers = 4
	for w := range int64(writers) {
		load.Go(func() {
			for n := byte(1); !stop.Load(); n++ {
				for _, s := range r.stacks {
					if _, err := s.WriteAt([]byte{n}, w*70000); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	read := func(images []ImageOf) (out [2][writers]byte) {
		for i, m := range images {
			for w := range int64(writers) {
				if _, err := m.Image.ReadAt(out[i][w:w+1], w*70000); err != nil {
					t.Error(err)
				}
			}
		}
		return out
	}
	type held struct {
		id     ID
		images []ImageOf
		was    [2][writers]byte
	}
	var live []held
	for i := range 8 {
		id, images := r.taken(t, Request{Devices: []string{"d0", "d1"}, Chunk: 4096 << (i % 4), Storage: []Storage{{Path: filepath.Join(t.TempDir(), "diff"), Limit: 4 * mib}}})
		was := read(images)
		for w := range writers {
			if d := was[0][w] - was[1][w]; d > 1 {
				t.Errorf("writer %d: %d on the first, %d on the second", w, was[0][w], was[1][w])
			}
		}
		live = append(live, held{id, images, was})
		for _, h := range live {
			if now := read(h.images); now != h.was {
				t.Errorf("an image changed: %v, was %v", now, h.was)
			}
		}
		if len(live) == 3 {
			if err := r.set.Destroy(live[i%3].id); err != nil {
				t.Error(err)
			}
			live = slices.Delete(live, i%3, i%3+1)
		}
	}
	stop.Store(true)
	load.Wait()
	for _, h := range live {
		if err := r.set.Destroy(h.id); err != nil {
			t.Error(err)
		}
	}
}

// TestWaitsForEveryDevice: a write that is under way on any of the devices ends
// before the instant, and is in the image; one that comes later is not.
func TestWaitsForEveryDevice(t *testing.T) {
	for slow := range 2 {
		disks := []*sim.Disk{sim.NewDisk(mib), sim.NewDisk(mib)}
		r := newRig(t, Config{}, disks[0], disks[1])
		id, err := r.set.Create(Request{Devices: []string{"d0", "d1"}, Storage: []Storage{{Path: filepath.Join(t.TempDir(), "diff"), Limit: 8 * mib}}})
		if err != nil {
			t.Fatal(err)
		}
		under, let := make(chan struct{}), make(chan struct{})
		first := sync.OnceFunc(func() { close(under); <-let })
		disks[slow].Fault = func(op block.Op, _ block.Range) error {
			if op == block.OpWrite {
				first()
			}
			return nil
		}
		var writes sync.WaitGroup
		write := func(b byte) {
			writes.Go(func() {
				if _, err := r.stacks[slow].WriteAt([]byte{b}, 4096); err != nil {
					t.Error(err)
				}
			})
		}
		write('x')
		<-under
		taken := make(chan error, 1)
		go func() { taken <- r.set.Take(t.Context(), id) }()
		select {
		case err := <-taken:
			t.Errorf("device %d has a write under way, and the snapshot is taken: %v", slow, err)
			taken <- err
		case <-time.After(50 * time.Millisecond):
		}
		close(let)
		if err := <-taken; err != nil {
			t.Fatal(err)
		}
		writes.Wait()
		write('y')
		writes.Wait()
		images, err := r.set.Images(id)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 1)
		if _, err := images[slow].Image.ReadAt(got, 4096); err != nil || got[0] != 'x' {
			t.Errorf("device %d: the image holds %q, %v", slow, got, err)
		}
		if err := r.set.Destroy(id); err != nil {
			t.Error(err)
		}
	}
}

// TestStorageOnTheDeviceItself: ranges of the snapshotted device, seen from below
// the snapshot; nothing deadlocks and the image is right.
func TestStorageOnTheDeviceItself(t *testing.T) {
	var r *rig
	locate := func(path string) (Place, error) { return Place{Device: r.devices[path].Cow.Below()}, nil }
	r = newRig(t, Config{Locate: locate}, sim.NewDisk(4*mib))
	p := slices.Repeat([]byte{'o'}, mib)
	if _, err := r.stacks[0].WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
	id, images := r.taken(t, Request{Devices: []string{"d0"}, Storage: []Storage{{Path: "d0", Ranges: []block.Range{{Off: 3 * mib, Len: mib}, {Off: 2 * mib, Len: mib / 2}}}}})
	if _, err := r.stacks[0].WriteAt(slices.Repeat([]byte{'n'}, mib), 0); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, mib)
	if _, err := images[0].Image.ReadAt(got, 0); err != nil || !slices.Equal(got, p) {
		t.Errorf("the image differs, %v", err)
	}
	if err := r.set.Destroy(id); err != nil {
		t.Error(err)
	}
}

// TestEvents: low space in time, then overflow and the spoiled image, by name; the
// origin's writes all end well. Room that is given at the event prevents it.
func TestEvents(t *testing.T) {
	for _, help := range []bool{false, true} {
		r := newRig(t, Config{}, sim.NewDisk(4*mib))
		fill(t, r.stacks[0], 'o')
		dir := t.TempDir()
		id, images := r.taken(t, Request{Devices: []string{"d0"}, Storage: []Storage{{Path: filepath.Join(dir, "a"), Limit: 2 * mib}}, Low: mib / 2})
		var seen []diff.Kind
		for at := int64(0); at < 4*mib; at += chunkDefault {
			if _, err := r.stacks[0].WriteAt([]byte("n"), at); err != nil {
				t.Fatal(err)
			}
			events, err := r.set.Events(id)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range events {
				if seen = append(seen, e.Kind); e.Kind == diff.LowSpace {
					if left := 2*mib - at; left < mib/4 || left > mib || e.Bytes <= 0 {
						t.Errorf("low space with about %d left: %+v", left, e)
					}
					if help {
						if err := r.set.Append(id, Storage{Path: filepath.Join(dir, "b"), Limit: 4 * mib}); err != nil {
							t.Fatal(err)
						}
					}
				}
				if e.Kind == diff.Corrupt && (e.Device != "d0" || e.Error == "") {
					t.Errorf("%+v", e)
				}
			}
		}
		want := []diff.Kind{diff.LowSpace, diff.Overflow, diff.Corrupt}
		if help {
			want = want[:1]
			wantAll(t, images[0].Image, 'o', "with more room")
		} else if err := images[0].Image.Err(); !errors.Is(err, diff.ErrFull) {
			t.Errorf("the image: %v", err)
		}
		if !slices.Equal(seen, want) {
			t.Errorf("help %v: %v", help, seen)
		}
		if err := r.set.Destroy(id); err != nil {
			t.Error(err)
		}
	}
}

// TestFreeze: file systems are frozen before and thawed after; what fails leaves
// the snapshot as it was, and nothing held.
func TestFreeze(t *testing.T) {
	var calls []string
	var refuse, unthawed error
	freeze := func(_ context.Context, devices []string) (func() error, int, error) {
		calls = append(calls, "freeze "+strings.Join(devices, " "))
		return func() error { calls = append(calls, "thaw"); return unthawed }, 1, refuse
	}
	r := newRig(t, Config{Freeze: freeze}, sim.NewDisk(mib), sim.NewDisk(mib))
	id, err := r.set.Create(Request{Devices: []string{"d0", "d1"}, Storage: []Storage{{Path: filepath.Join(t.TempDir(), "diff"), Limit: 4 * mib}}})
	if err != nil {
		t.Fatal(err)
	}
	refuse = errors.New("busy")
	if err := r.set.Take(t.Context(), id); !errors.Is(err, refuse) || !slices.Equal(calls, []string{"freeze d0 d1"}) {
		t.Errorf("%v, %v", err, calls)
	}
	refuse, unthawed = nil, errors.New("it was thawed by somebody else")
	if err := r.set.Take(t.Context(), id); !errors.Is(err, unthawed) {
		t.Errorf("%v, %v", err, calls)
	}
	unthawed, calls = nil, nil
	fill(t, r.stacks[0], 'o')
	if err := r.set.Take(t.Context(), id); err != nil || !slices.Equal(calls, []string{"freeze d0 d1", "thaw"}) {
		t.Errorf("%v, %v", err, calls)
	}
	fill(t, r.stacks[0], 'n')
	images, err := r.set.Images(id)
	if err != nil {
		t.Fatal(err)
	}
	wantAll(t, images[0].Image, 'o', "after two takes that failed")
	if err := r.set.Destroy(id); err != nil {
		t.Error(err)
	}
}

// TestDestroyUnderReaders: readers in the middle get errors, and destroy ends.
func TestDestroyUnderReaders(t *testing.T) {
	testkit.NoLeaks(t)
	r := newRig(t, Config{}, sim.NewDisk(mib))
	for range 10 {
		id, images := r.taken(t, Request{Devices: []string{"d0"}, Chunk: 4096, Storage: []Storage{{Path: filepath.Join(t.TempDir(), "diff"), Limit: 4 * mib}}})
		var readers sync.WaitGroup
		for range 3 {
			readers.Go(func() {
				p := make([]byte, 70000)
				for off := int64(0); ; off = (off + 50000) % (mib - 70000) {
					_, err := images[0].Image.ReadAt(p, off)
					if err == nil {
						_, err = images[0].Image.WriteAt(p[:100], off)
					}
					if err != nil {
						if !errors.Is(err, cow.ErrClosed) {
							t.Error(err)
						}
						return
					}
				}
			})
		}
		if _, err := r.stacks[0].WriteAt(make([]byte, 300000), 0); err != nil {
			t.Error(err)
		}
		if err := r.set.Destroy(id); err != nil {
			t.Error(err)
		}
		readers.Wait()
	}
}

// TestChangeMap: its table is that of the instant, and what is written to an image
// shows in it.
func TestChangeMap(t *testing.T) {
	r := newRig(t, Config{}, sim.NewDisk(mib))
	q := func() Request {
		return Request{Devices: []string{"d0"}, Storage: []Storage{{Path: filepath.Join(t.TempDir(), "diff"), Limit: 4 * mib}}}
	}
	first, _ := r.taken(t, q())
	if _, err := r.stacks[0].WriteAt([]byte("x"), 40960); err != nil {
		t.Fatal(err)
	}
	second, images := r.taken(t, q())
	if _, err := r.stacks[0].WriteAt([]byte("x"), 81920); err != nil { // after the instant
		t.Fatal(err)
	}
	if _, err := images[0].Image.WriteAt([]byte("x"), 8192); err != nil {
		t.Fatal(err)
	}
	g := images[0].Changes.Info().Generation
	since, err := images[0].Changes.Since(g, 1)
	if err != nil || !slices.Equal(slices.Collect(since.Ranges()), []block.Range{{Off: 8192, Len: 4096}, {Off: 40960, Len: 4096}}) {
		t.Errorf("%v, %v", slices.Collect(since.Ranges()), err)
	}
	if err := errors.Join(r.set.Destroy(first), r.set.Destroy(second)); err != nil {
		t.Error(err)
	}
}
