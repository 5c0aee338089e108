package snapshot

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/diff"
	"tidemark/internal/sim"
)

// onDevice is a file system on d0, as far as difference storage sees one: paths
// are located and files looked at only while it is open.
type onDevice struct {
	t     *testing.T
	rig   *rig
	mu    sync.Mutex
	open  bool
	files map[string][]block.Range
	next  int64
	hang  chan struct{} // growth waits for it; nil: it does not
	calls int

	frozen bool // by the test
}

func newOnDevice(t *testing.T) *onDevice {
	return &onDevice{t: t, open: true, files: map[string][]block.Range{}, next: 4 * mib}
}

func (o *onDevice) config(cfg Config) Config {
	cfg.Locate = func(string) (Place, error) {
		if !o.open {
			o.t.Error("a path on a device was touched before the device is served")
		}
		return Place{Device: o.rig.devices["d0"].Cow.Below(), File: true, On: "d0"}, nil
	}
	cfg.Files = o.do
	return cfg
}

func (o *onDevice) do(t diff.Task) (diff.Done, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.calls++
	if !o.open {
		o.t.Errorf("%s %s before the device is served", t.Do, t.Path)
	}
	have, ok := o.files[t.Path]
	if !ok && t.Do != diff.MakeFile {
		return diff.Done{}, os.ErrNotExist
	}
	known := 0
	for _, r := range t.Extents {
		known += int(r.Len)
	}
	switch t.Do {
	case diff.MakeFile:
		o.files[t.Path] = nil
	case diff.GrowFile:
		if o.frozen {
			o.t.Error("a file grows in a frozen file system")
		}
		if hang := o.hang; hang != nil {
			o.mu.Unlock()
			<-hang
			o.mu.Lock()
		}
		r := block.Range{Off: o.next, Len: t.Size - int64(known)}
		o.next += r.Len + diff.Align
		o.files[t.Path] = append(slices.Clone(t.Extents), r)
	case diff.CheckFile:
		if !slices.Equal(have[:min(len(have), len(t.Extents))], t.Extents) {
			return diff.Done{}, diff.ErrCorrupt
		}
	case diff.RemoveFile:
		delete(o.files, t.Path)
	}
	return diff.Done{Inode: 12, Made: true, Extents: slices.Clone(o.files[t.Path])}, nil
}

// move has a file lie elsewhere.
func (o *onDevice) move(by int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.files["file"][0].Off += by
}

// start is a daemon that starts: nothing on the device can be touched before Settle.
func (o *onDevice) start(cfg Config, disk block.Device) *rig {
	o.t.Helper()
	o.open = false
	o.rig = newRig(o.t, o.config(cfg), disk)
	o.open = true
	return o.rig
}

// TestOnTheDeviceGoesOn: snapshots whose storage lies in a file, and in ranges, of
// the snapshotted device go on after the process was killed, and nothing on that
// device is touched before it is served again.
func TestOnTheDeviceGoesOn(t *testing.T) {
	disk := sim.NewDisk(16 * mib)
	cfg := Config{Dir: t.TempDir(), Memory: t.TempDir(), BootID: "one"}
	o := newOnDevice(t)
	o.rig = newRig(t, o.config(cfg), disk)
	first := make([]byte, 2*mib)
	for i := range first {
		first[i] = 'o'
	}
	if _, err := o.rig.stacks[0].WriteAt(first, 0); err != nil {
		t.Fatal(err)
	}
	id, _ := o.rig.taken(t, Request{Devices: []string{"d0"}, Storage: []Storage{{Path: "file", Limit: 8 * mib}}})
	check := func(r *rig, what string) {
		t.Helper()
		images, err := r.set.Images(id)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		got := make([]byte, len(first))
		if _, err := images[0].Image.ReadAt(got, 0); err != nil || !slices.Equal(got, first) {
			t.Errorf("%s: the image differs, %v", what, err)
		}
	}
	for i := range int64(3) {
		if _, err := o.rig.stacks[0].WriteAt(slices.Repeat([]byte{'n'}, mib/2), i*mib/2); err != nil {
			t.Fatal(err)
		}
		check(o.rig, "before a kill")
		o.start(cfg, disk)
		check(o.rig, "after a kill")
		o.rig.set.Settle()
		check(o.rig, "settled")
	}
	if o.calls < 5 {
		t.Errorf("the file was not looked at: %d calls", o.calls)
	}
	// Moved by force: what is stored there is somebody else's by now.
	o.move(diff.Align)
	o.start(cfg, disk)
	check(o.rig, "not looked at yet")
	o.rig.set.Settle()
	if _, err := o.rig.set.Images(id); !errors.Is(err, diff.ErrSpoiled) {
		t.Errorf("its file is elsewhere, and the snapshot: %v", err)
	}
	if err := o.rig.set.Destroy(id); err != nil {
		t.Error(err)
	}
	if len(o.files) > 0 {
		t.Errorf("left behind: %v", o.files)
	}
}

// TestOnTheDeviceGivenBack: what a killed process left of snapshots that nobody
// has is given back when the device is served, and what cannot be, later.
func TestOnTheDeviceGivenBack(t *testing.T) {
	disk := sim.NewDisk(16 * mib)
	cfg := Config{Dir: t.TempDir(), BootID: "one"}
	var told error
	cfg.Trouble = func(_ string, err error) { told = err }
	o := newOnDevice(t)
	o.rig = newRig(t, o.config(cfg), disk)
	for _, state := range []string{stateMaking, stateDestroyed} {
		id, err := o.rig.set.Create(Request{Devices: []string{"d0"}, Storage: []Storage{{Path: "file", Limit: 2 * mib}}})
		if err != nil {
			t.Fatal(err)
		}
		s, err := o.rig.set.find(id)
		if err == nil {
			err = s.change(func(m *manifest) { m.State = state })
		}
		if err != nil {
			t.Fatal(err)
		}
		// The device is not there: nothing can be given back, and nothing is forgotten.
		away := newRig(t, o.config(cfg))
		away.set.Settle()
		if told == nil || len(o.files) != 1 {
			t.Errorf("%s: without the device: %v, files %v", state, told, o.files)
		}
		o.start(cfg, disk)
		if len(o.rig.set.List()) != 0 {
			t.Errorf("%s: %+v", state, o.rig.set.List())
		}
		told = nil
		o.rig.set.Settle()
		left, _ := filepath.Glob(filepath.Join(cfg.Dir, "*"))
		if told != nil || len(left) > 0 || len(o.files) > 0 {
			t.Errorf("%s: %v, left %v, files %v", state, told, left, o.files)
		}
		told = nil
	}
}

// TestUnmounted: a snapshot whose file is not to be found is destroyed all the
// same, and it is told that the file stays where it was.
func TestUnmounted(t *testing.T) {
	o := newOnDevice(t)
	var told error
	o.rig = newRig(t, o.config(Config{Dir: t.TempDir(), Trouble: func(_ string, err error) { told = err }}), sim.NewDisk(16*mib))
	id, _ := o.rig.taken(t, Request{Devices: []string{"d0"}, Storage: []Storage{{Path: "file", Limit: 2 * mib}}})
	delete(o.files, "file")
	if err := o.rig.set.Destroy(id); err != nil || told == nil || !strings.Contains(told.Error(), "file is not to be found") {
		t.Errorf("%v, told %v", err, told)
	}
	if left, _ := os.ReadDir(o.rig.cfg.Dir); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestGrowthHangs: while a file waits for its own device, writers go on, the
// snapshot is listed, and destroying it waits for nobody.
func TestGrowthHangs(t *testing.T) {
	disk := sim.NewDisk(256 * mib)
	o := newOnDevice(t)
	o.next = 128 * mib
	o.rig = newRig(t, o.config(Config{Dir: t.TempDir()}), disk)
	id, images := o.rig.taken(t, Request{Devices: []string{"d0"}, Low: mib, Storage: []Storage{{Path: "file", Limit: 100 * mib}}})
	o.mu.Lock()
	hang := make(chan struct{})
	o.hang = hang
	o.mu.Unlock()
	s, err := o.rig.set.find(id)
	if err != nil {
		t.Fatal(err)
	}
	capacity := s.storage.Stats().Capacity
	for at := int64(0); at < 2*capacity && at < 100*mib; at += chunkDefault { // up to the end of what there is, and beyond
		if _, err := o.rig.stacks[0].WriteAt([]byte("n"), at); err != nil {
			t.Fatal(err)
		}
	}
	if l := o.rig.set.List(); len(l) != 1 || l[0].Room == 0 {
		t.Errorf("%+v", l)
	}
	if err := images[0].Image.Err(); !errors.Is(err, diff.ErrFull) {
		t.Errorf("growth hangs, and the image: %v", err)
	}
	o.rig.set.cfg.Patience = 10 * time.Millisecond
	if err := o.rig.set.Destroy(id); err != nil {
		t.Error(err)
	}
	close(hang)
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) { // behind the caller's back
		o.mu.Lock()
		left := len(o.files)
		o.mu.Unlock()
		if left == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("left behind: %v", o.files)
		}
	}
}

// TestRangesApart: ranges of a served device hold difference storage once, be it
// as ranges or as the extents of a file; after a restart they are found again.
func TestRangesApart(t *testing.T) {
	disk := sim.NewDisk(16 * mib)
	cfg := Config{Dir: t.TempDir(), Memory: t.TempDir(), BootID: "one"}
	o := newOnDevice(t)
	o.next = 8 * mib
	cfg = o.config(cfg)
	locate := cfg.Locate
	cfg.Locate = func(path string) (Place, error) {
		p, err := locate(path)
		if path == "/dev/d0" {
			p.File, p.Served = false, true
		}
		return p, err
	}
	o.rig = newRig(t, cfg, disk)
	fill(t, o.rig.stacks[0], 'o')
	ranges := func(off int64) []Storage {
		return []Storage{{Path: "/dev/d0", Ranges: []block.Range{{Off: off, Len: 2 * mib}}}}
	}
	id, _ := o.rig.taken(t, Request{Devices: []string{"d0"}, Storage: append(ranges(2*mib), Storage{Path: "file", Limit: 2 * mib})})
	for _, off := range []int64{mib, 3 * mib, 9 * mib} {
		if _, err := o.rig.set.Create(Request{Devices: []string{"d0"}, Storage: ranges(off)}); !errors.Is(err, diff.ErrRefused) {
			t.Errorf("ranges at %d: %v", off, err)
		}
	}
	o.open = false
	o.rig = newRig(t, cfg, disk)
	images, err := o.rig.set.Images(id)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := o.rig.stacks[0].WriteAt([]byte("n"), 0); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 1)
	if _, err := images[0].Image.ReadAt(got, 0); err != nil || got[0] != 'o' {
		t.Errorf("%q, %v", got, err)
	}
	o.open = true
	if err := o.rig.set.Destroy(id); err != nil {
		t.Error(err)
	}
}

// TestTakeAndFiles: nothing grows while file systems are frozen, though room runs
// out just then; it does afterwards. A file that lies elsewhere by now is found
// before the instant, and the snapshot stays what it was.
func TestTakeAndFiles(t *testing.T) {
	o := newOnDevice(t)
	o.next = 64 * mib
	var s *Snapshot
	var held []diff.Slot
	freeze := func(context.Context, []string) (func() error, int, error) {
		o.mu.Lock()
		o.frozen = true
		o.mu.Unlock()
		for s.storage.Stats().Capacity-s.storage.Stats().Used > s.man.Low { // from here on it wants to grow
			slot, err := s.storage.TryReserve()
			if err != nil {
				t.Error(err)
				break
			}
			held = append(held, slot)
		}
		time.Sleep(20 * time.Millisecond) // it would by now
		return func() error {
			o.mu.Lock()
			defer o.mu.Unlock()
			o.frozen = false
			return nil
		}, 1, nil
	}
	o.rig = newRig(t, o.config(Config{Dir: t.TempDir(), Freeze: freeze}), sim.NewDisk(256*mib))
	id, err := o.rig.set.Create(Request{Devices: []string{"d0"}, Low: 16 * mib, Storage: []Storage{{Path: "file", Limit: 128 * mib}}})
	if err == nil {
		s, err = o.rig.set.find(id)
	}
	if err != nil {
		t.Fatal(err)
	}
	before := s.storage.Stats().Capacity
	o.move(diff.Align)
	if err := o.rig.set.Take(t.Context(), id); !errors.Is(err, diff.ErrCorrupt) || len(held) > 0 || o.rig.set.List()[0].State != stateCreated {
		t.Errorf("a file that moved: %v, %+v", err, o.rig.set.List())
	}
	o.move(-diff.Align)
	if err := o.rig.set.Take(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(time.Minute); s.storage.Stats().Capacity == before; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it does not grow after the freeze")
		}
	}
	for _, slot := range held {
		s.storage.Release(slot)
	}
	if err := o.rig.set.Destroy(id); err != nil {
		t.Error(err)
	}
}
