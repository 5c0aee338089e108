package snapshot

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/diff"
	"tidemark/internal/sim"
	"tidemark/internal/testkit"
)

// fileDevice is an image file as a device; what was written to it is there after
// the process was killed.
type fileDevice struct {
	*os.File
	size int64
}

func (f fileDevice) Flush() error { return nil }
func (f fileDevice) Size() int64  { return f.size }

func openDevice(t *testing.T, name string) fileDevice {
	t.Helper()
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(4 * mib); err != nil {
		t.Fatal(err)
	}
	return fileDevice{f, 4 * mib}
}

// checkImages: every sector of every image is that of the instant.
func checkImages(t *testing.T, set *Set, what string) {
	t.Helper()
	for _, i := range set.List() {
		id, err := ParseID(i.ID)
		if err != nil {
			t.Fatal(err)
		}
		images, err := set.Images(id)
		if err != nil {
			t.Errorf("%s: %v", what, err)
			continue
		}
		for k, m := range images {
			p := make([]byte, m.Image.Size())
			if _, err := m.Image.ReadAt(p, 0); err != nil {
				t.Errorf("%s: %v", what, err)
				continue
			}
			seqs, err := testkit.Check(p, k, 0)
			if err != nil {
				t.Errorf("%s: %v", what, err)
			}
			if at := slices.IndexFunc(seqs, func(s uint64) bool { return s != 1 }); at >= 0 {
				t.Errorf("%s: sector %d of image %d is of write %d", what, at, k, seqs[at])
			}
		}
	}
}

// TestKilledAgainAndAgain: a process that writes under two snapshots, one of them
// durable, is killed at any moment; the next one finds both whole and goes on.
func TestKilledAgainAndAgain(t *testing.T) {
	if dir := os.Getenv("TIDEMARK_SNAPSHOT_CHILD"); dir != "" {
		child(t, dir)
		return
	}
	dir := t.TempDir()
	memory := dir
	if m, err := os.MkdirTemp("/dev/shm", "tidemark-test-"); err == nil {
		defer os.RemoveAll(m)
		memory = m
	}
	rng := rand.New(rand.NewPCG(uint64(os.Getpid()), 1))
	for range sim.Seeds(8) {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKilledAgainAndAgain$", "-test.timeout=60s")
		cmd.Env = append(os.Environ(), "TIDEMARK_SNAPSHOT_CHILD="+dir, "TIDEMARK_SNAPSHOT_MEMORY="+memory)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		ready := false
		for !ready && lines.Scan() {
			if ready = lines.Text() == "ready"; !ready {
				t.Log(lines.Text())
			}
		}
		if !ready {
			t.Fatalf("the child did not begin: %v", cmd.Wait())
		}
		time.Sleep(time.Duration(rng.IntN(60)) * time.Millisecond) // how far it comes is chance
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
	}
	// At last a stop in order, and another boot.
	r := newRig(t, Config{Dir: filepath.Join(dir, "state"), Memory: memory, BootID: "one"}, openDevice(t, filepath.Join(dir, "0")), openDevice(t, filepath.Join(dir, "1")))
	checkImages(t, r.set, "after the kills")
	if err := r.set.Stop(); err != nil {
		t.Fatal(err)
	}
	memory = filepath.Join(t.TempDir(), "gone with the boot")
	r = newRig(t, Config{Dir: filepath.Join(dir, "state"), Memory: memory, BootID: "two"}, openDevice(t, filepath.Join(dir, "0")), openDevice(t, filepath.Join(dir, "1")))
	if len(r.set.List()) != 2 {
		t.Errorf("%+v", r.set.List())
	}
	checkImages(t, r.set, "after a stop and another boot")
	for _, i := range r.set.List() {
		id, _ := ParseID(i.ID)
		if err := r.set.Destroy(id); err != nil {
			t.Error(err)
		}
	}
}

// child serves the devices until it is killed.
func child(t *testing.T, dir string) {
	r := newRig(t, Config{Dir: filepath.Join(dir, "state"), Memory: os.Getenv("TIDEMARK_SNAPSHOT_MEMORY"), BootID: "one"},
		openDevice(t, filepath.Join(dir, "0")), openDevice(t, filepath.Join(dir, "1")))
	if len(r.set.List()) == 0 {
		for i, s := range r.stacks {
			p := make([]byte, 4*mib)
			testkit.Fill(p, i, 0, 1)
			if _, err := s.WriteAt(p, 0); err != nil {
				t.Fatal(err)
			}
		}
		for _, durable := range []bool{false, true} {
			r.taken(t, Request{Devices: []string{"d0", "d1"}, Durable: durable, Chunk: 16 << 10, Low: mib,
				Storage: []Storage{{Path: filepath.Join(dir, fmt.Sprint("diff-", durable)), Limit: 24 * mib}}})
		}
	}
	checkImages(t, r.set, "at the start")
	if t.Failed() {
		return
	}
	for i, s := range r.stacks {
		for w := range uint64(2) {
			go func() {
				rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), w))
				for seq := uint64(2); ; seq++ {
					off := rng.Int64N(4*mib/512-40) * 512
					p := make([]byte, 512*(1+rng.IntN(40)))
					testkit.Fill(p, i, off, seq)
					if _, err := s.WriteAt(p, off); err != nil {
						fmt.Println(err)
						os.Exit(1)
					}
				}
			}()
		}
	}
	fmt.Println("ready")
	time.Sleep(50 * time.Second)
}

// TestPowerLoss: durable snapshots are whole after it, whatever the caches lost;
// others are declared spoiled, by name, and can be destroyed.
func TestPowerLoss(t *testing.T) {
	var durableKept, spoiled int
	for seed := range sim.Seeds(12) {
		rng := rand.New(rand.NewPCG(seed, 9))
		durable := rng.IntN(4) > 0
		disk, store := sim.NewCrashDisk(seed, mib), sim.NewCrashDisk(seed+1000, 3*mib)
		var cut atomic.Bool // for both at once
		disk.Off, store.Off = &cut, &cut
		locate := func(string) (Place, error) { return Place{Device: store}, nil }
		cfg := Config{Dir: t.TempDir(), BootID: "one", Locate: locate}
		if rng.IntN(4) > 0 {
			cfg.Memory = filepath.Join(t.TempDir(), "memory")
		}
		r := newRig(t, cfg, disk)
		p := make([]byte, mib)
		testkit.Fill(p, 0, 0, 1)
		if _, err := r.stacks[0].WriteAt(p, 0); err != nil {
			t.Fatal(err)
		}
		if err := r.stacks[0].Flush(); err != nil {
			t.Fatal(err)
		}
		id, _ := r.taken(t, Request{Devices: []string{"d0"}, Durable: durable, Chunk: 4096 << rng.IntN(3), Storage: []Storage{{Path: "store"}}})
		var stop atomic.Bool
		var load sync.WaitGroup
		var writes atomic.Int64
		for w := range uint64(3) {
			load.Go(func() {
				rng := rand.New(rand.NewPCG(seed, w))
				for seq := uint64(2); !stop.Load(); seq++ {
					off := rng.Int64N(mib/512-20) * 512
					q := make([]byte, 512*(1+rng.IntN(20)))
					testkit.Fill(q, 0, off, seq)
					if _, err := r.stacks[0].WriteAt(q, off); err != nil && !errors.Is(err, sim.ErrCrashed) {
						t.Error(err)
					}
					writes.Add(1)
				}
			})
		}
		for writes.Load() < int64(5+rng.IntN(100)) {
			time.Sleep(100 * time.Microsecond)
		}
		if !durable { // not even when everything happens to be stable is it trusted
			if err := errors.Join(store.Flush(), disk.Flush()); err != nil {
				t.Fatal(err)
			}
		}
		cut.Store(true)
		stop.Store(true)
		load.Wait()
		disk, store = disk.Crash(), store.Crash()
		cfg.BootID = "two"
		if cfg.Memory != "" {
			if err := os.RemoveAll(cfg.Memory); err != nil { // it is in memory indeed
				t.Fatal(err)
			}
		}
		again := newRig(t, cfg, disk)
		info := again.set.List()
		if len(info) != 1 || info[0].ID != FormatID(id) {
			t.Fatalf("seed %d: %+v", seed, info)
		}
		if !durable {
			spoiled++
			if _, err := again.set.Images(id); info[0].State != "spoiled" || !errors.Is(err, diff.ErrSpoiled) {
				t.Errorf("seed %d: %+v, %v", seed, info[0], err)
			}
			if events, err := again.set.Events(id); err != nil || len(events) != 1 || events[0].Kind != diff.Corrupt {
				t.Errorf("seed %d: %+v, %v", seed, events, err)
			}
		} else {
			durableKept++
			checkImages(t, again.set, fmt.Sprint("seed ", seed))
		}
		if err := again.set.Destroy(id); err != nil {
			t.Errorf("seed %d: %v", seed, err)
		}
		if left, _ := os.ReadDir(again.cfg.Dir); len(left) != 0 {
			t.Errorf("seed %d: left behind: %v", seed, left)
		}
	}
	if durableKept == 0 || spoiled == 0 {
		t.Errorf("%d durable, %d not", durableKept, spoiled)
	}
}

// TestNotTakenGoesOn: one that was prepared is there after the process was killed,
// and can be taken then; one that was being made, or cannot go on, leaves nothing.
func TestNotTakenGoesOn(t *testing.T) {
	disk := sim.NewDisk(mib)
	cfg := Config{Dir: t.TempDir(), Memory: t.TempDir()}
	r := newRig(t, cfg, disk)
	path := filepath.Join(t.TempDir(), "diff")
	id, err := r.set.Create(Request{Devices: []string{"d0"}, Storage: []Storage{{Path: path, Limit: 4 * mib}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, clean := range []bool{false, true} {
		if clean {
			if err := r.set.Stop(); err != nil {
				t.Fatal(err)
			}
		}
		r = newRig(t, cfg, disk)
		if l := r.set.List(); len(l) != 1 || l[0].State != "created" || l[0].ID != FormatID(id) {
			t.Fatalf("clean %v: %+v", clean, l)
		}
	}
	fill(t, r.stacks[0], 'o')
	if err := r.set.Take(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	fill(t, r.stacks[0], 'n')
	images, err := r.set.Images(id)
	if err != nil {
		t.Fatal(err)
	}
	wantAll(t, images[0].Image, 'o', "taken after two restarts")
	if err := r.set.Destroy(id); err != nil {
		t.Fatal(err)
	}
	for _, state := range []string{stateMaking, stateCreated} {
		made, err := r.set.Create(Request{Devices: []string{"d0"}, Storage: []Storage{{Path: path, Limit: 4 * mib}}})
		if err != nil {
			t.Fatal(err)
		}
		s, err := r.set.find(made)
		if err == nil {
			err = s.change(func(m *manifest) { m.State = state })
		}
		if err != nil {
			t.Fatal(err)
		}
		without := newRig(t, cfg) // the device is not there
		if _, err := os.Stat(path); !os.IsNotExist(err) || len(without.set.List()) != 0 {
			t.Errorf("%s: %v, %+v", state, err, without.set.List())
		}
	}
}

// TestLostForGood: a snapshot that cannot go on, because one of its devices or its
// storage is not there, is spoiled for good where another device is: that is
// written to past it. Where none is there it goes on later.
func TestLostForGood(t *testing.T) {
	d0, d1, store := sim.NewDisk(mib), sim.NewDisk(mib), sim.NewDisk(4*mib)
	away := false
	cfg := Config{Dir: t.TempDir(), Memory: t.TempDir(), BootID: "one", Locate: func(string) (Place, error) {
		if away {
			return Place{}, os.ErrNotExist
		}
		return Place{Device: store}, nil
	}}
	r := newRig(t, cfg, d0, d1)
	fill(t, r.stacks[0], 'o')
	id, _ := r.taken(t, Request{Devices: []string{"d1", "d0"}, Storage: []Storage{{Path: "store"}}})
	if err := r.set.Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := newRig(t, cfg).set.Images(id); !errors.Is(err, diff.ErrSpoiled) {
		t.Errorf("without any device: %v", err)
	}
	r = newRig(t, cfg, d0, d1)
	images, err := r.set.Images(id)
	if err != nil {
		t.Fatalf("all are back: %v", err)
	}
	wantAll(t, images[1].Image, 'o', "all are back")
	if err := r.set.Stop(); err != nil {
		t.Fatal(err)
	}
	for _, why := range []string{"device", "storage"} {
		r := newRig(t, cfg, d0, d1)
		id, _ := r.taken(t, Request{Devices: []string{"d1", "d0"}, Storage: []Storage{{Path: "store", Ranges: []block.Range{{Off: 2 * mib, Len: mib}}}}})
		if err := r.set.Stop(); err != nil {
			t.Fatal(err)
		}
		away = why == "storage"
		half := newRig(t, cfg, d0)
		if _, err := half.set.Images(id); !errors.Is(err, diff.ErrSpoiled) {
			t.Errorf("%s: %v", why, err)
		}
		fill(t, half.stacks[0], 'n')
		away = false
		r = newRig(t, cfg, d0, d1)
		if _, err := r.set.Images(id); !errors.Is(err, diff.ErrSpoiled) {
			t.Errorf("%s: everything is back, and so is an image of d0 that is none: %v", why, err)
		}
		if err := errors.Join(r.set.Destroy(id), r.set.Stop()); err != nil {
			t.Error(err)
		}
	}
}

// TestAfterStop: every verb is refused, none breaks anything.
func TestAfterStop(t *testing.T) {
	r := newRig(t, Config{}, sim.NewDisk(mib))
	path := filepath.Join(t.TempDir(), "diff")
	id, _ := r.taken(t, Request{Devices: []string{"d0"}, Storage: []Storage{{Path: path, Limit: 4 * mib}}})
	if err := errors.Join(r.set.Stop(), r.set.Stop()); err != nil {
		t.Fatal(err)
	}
	_, images := r.set.Images(id)
	_, created := r.set.Create(Request{Devices: []string{"d0"}, Storage: []Storage{{Path: path + "2", Limit: 4 * mib}}})
	for what, err := range map[string]error{"destroy": r.set.Destroy(id), "take": r.set.Take(t.Context(), id), "append": r.set.Append(id, Storage{Path: path + "3"}),
		"images": images, "create": created} {
		if !errors.Is(err, ErrStopped) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if left, _ := filepath.Glob(path + "?"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestDestroyedMeanwhile: verbs and readers that meet a destroy end with an error
// or as if they had come first; nothing is left.
func TestDestroyedMeanwhile(t *testing.T) {
	dir := t.TempDir()
	r := newRig(t, Config{Memory: t.TempDir()}, sim.NewDisk(mib))
	for round := range 20 {
		path := filepath.Join(dir, fmt.Sprint("diff", round))
		id, err := r.set.Create(Request{Devices: []string{"d0"}, Storage: []Storage{{Path: path, Limit: 2 * mib}}})
		if err != nil {
			t.Fatal(err)
		}
		var all sync.WaitGroup
		for _, do := range []func() error{
			func() error { return r.set.Take(context.Background(), id) },
			func() error { return r.set.Append(id, Storage{Path: path + "more", Limit: mib}) },
			func() error { _, err := r.set.Images(id); return err },
			func() error { return r.set.Destroy(id) },
			func() error { return r.set.Destroy(id) },
		} {
			all.Go(func() {
				if err := do(); err != nil && !errors.Is(err, ErrNoSuch) && !errors.Is(err, ErrNotTaken) {
					t.Error(err)
				}
			})
		}
		fill(t, r.stacks[0], byte(round))
		all.Wait()
		if left, _ := filepath.Glob(path + "*"); len(left) > 0 || len(r.set.List()) > 0 {
			t.Fatalf("left behind: %v %+v", left, r.set.List())
		}
	}
}

// TestSharedStorage: no place holds difference storage twice, and none is laid over a served device.
func TestSharedStorage(t *testing.T) {
	store := sim.NewDisk(8 * mib)
	served := false
	r := newRig(t, Config{Locate: func(string) (Place, error) { return Place{Device: store, Name: "sdx", Served: served}, nil }}, sim.NewDisk(mib))
	first, err := r.set.Create(Request{Devices: []string{"d0"}, Storage: []Storage{{Path: "by-id", Limit: 4 * mib}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range [][]Storage{{{Path: "by-path"}}, {{Path: "x", Ranges: []block.Range{{Off: 3 * mib, Len: 2 * mib}}}},
		{{Path: "x", Ranges: []block.Range{{Off: 4 * mib, Len: mib}}}, {Path: "y", Ranges: []block.Range{{Off: 4 * mib, Len: mib}}}}} {
		if _, err := r.set.Create(Request{Devices: []string{"d0"}, Storage: p}); !errors.Is(err, diff.ErrRefused) {
			t.Errorf("%+v: %v", p, err)
		}
	}
	second, err := r.set.Create(Request{Devices: []string{"d0"}, Storage: []Storage{{Path: "x", Ranges: []block.Range{{Off: 4 * mib, Len: 2 * mib}}}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(r.set.Destroy(first), r.set.Destroy(second)); err != nil {
		t.Fatal(err)
	}
	served = true
	if _, err := r.set.Create(Request{Devices: []string{"d0"}, Storage: []Storage{{Path: "x"}}}); !errors.Is(err, diff.ErrRefused) {
		t.Errorf("a served device: %v", err)
	}
}

var _ block.Device = fileDevice{}

// TestSpoiledStaysSpoiled: what could not be copied is not taken for good by the
// next process, whether this one was killed or the power failed.
func TestSpoiledStaysSpoiled(t *testing.T) {
	for _, durable := range []bool{false, true} {
		disk, store := sim.NewCrashDisk(1, mib), sim.NewCrashDisk(2, mib/2)
		cfg := Config{Dir: t.TempDir(), Memory: t.TempDir(), BootID: "one", Locate: func(string) (Place, error) { return Place{Device: store}, nil }}
		r := newRig(t, cfg, disk)
		id, images := r.taken(t, Request{Devices: []string{"d0"}, Durable: durable, Storage: []Storage{{Path: "store"}}})
		fill(t, r.stacks[0], 'n')
		if err := images[0].Image.Err(); !errors.Is(err, diff.ErrFull) {
			t.Fatal(err)
		}
		after := newRig(t, cfg, disk) // killed
		if durable {
			disk, store = disk.Crash(), store.Crash()
			cfg.BootID = "two"
			after = newRig(t, cfg, disk)
		}
		if _, err := after.set.Images(id); !errors.Is(err, diff.ErrSpoiled) {
			t.Errorf("durable %v: %v", durable, err)
		}
	}
}

// TestBypassed: what is held of a device that was written to past its filters is
// spoiled for good, also where the device was away when that was found out. What is
// held of others is not.
func TestBypassed(t *testing.T) {
	d0, d1, store := sim.NewDisk(mib), sim.NewDisk(mib), sim.NewDisk(8*mib)
	cfg := Config{Dir: t.TempDir(), Memory: t.TempDir(), BootID: "one", Locate: func(string) (Place, error) { return Place{Device: store}, nil }}
	r := newRig(t, cfg, d0, d1)
	past := errors.New("written past")
	var ids []ID
	for i, name := range []string{"d0", "d1"} {
		id, _ := r.taken(t, Request{Devices: []string{name}, Storage: []Storage{{Path: "store", Ranges: []block.Range{{Off: int64(i) * 2 * mib, Len: 2 * mib}}}}})
		ids = append(ids, id)
	}
	spoiled := func(when string, want ...bool) {
		t.Helper()
		for n, id := range ids {
			images, err := r.set.Images(id)
			if err == nil {
				_, err = images[0].Image.ReadAt(make([]byte, 512), 0)
			}
			if errors.Is(err, diff.ErrSpoiled) != want[n] {
				t.Errorf("%s: of d%d: %v", when, n, err)
			}
		}
	}
	restart := func(disks ...block.Device) {
		t.Helper()
		if err := r.set.Stop(); err != nil {
			t.Fatal(err)
		}
		r = newRig(t, cfg, disks...)
	}
	if err := r.set.Bypassed("d1", past); err != nil {
		t.Fatal(err)
	}
	spoiled("while it is held", false, true)
	restart(d0, d1)
	spoiled("after a restart", false, true)
	restart()
	if err := r.set.Bypassed("d0", past); err != nil {
		t.Fatal(err)
	}
	restart(d0, d1)
	spoiled("it was away", true, true)
}

// TestMadeAnew: a prepared snapshot is taken of the device that has the name then.
func TestMadeAnew(t *testing.T) {
	r, other := newRig(t, Config{}, sim.NewDisk(mib)), newRig(t, Config{}, sim.NewDisk(mib))
	fill(t, r.stacks[0], 'o')
	fill(t, other.stacks[0], 'n')
	id, err := r.set.Create(Request{Devices: []string{"d0"}, Storage: []Storage{{Path: filepath.Join(t.TempDir(), "diff"), Limit: 4 * mib}}})
	if err != nil {
		t.Fatal(err)
	}
	r.devices["d0"] = other.devices["d0"]
	if err := r.set.Bypassed("d0", errors.New("written past")); err != nil {
		t.Fatal(err)
	}
	if err := r.set.Take(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	fill(t, other.stacks[0], 'x')
	images, err := r.set.Images(id)
	if err != nil {
		t.Fatal(err)
	}
	wantAll(t, images[0].Image, 'n', "of the device that has the name")
}
