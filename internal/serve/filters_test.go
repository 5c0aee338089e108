package serve

import (
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
	"tidemark/internal/cbt"
	"tidemark/internal/filter/barrier"
	"tidemark/internal/filter/capture"
	"tidemark/internal/filter/cow"
	"tidemark/internal/filter/track"
	"tidemark/internal/snapshot"
	"tidemark/internal/stack"
)

func names(i Info) (out []string) {
	for _, f := range i.Filters {
		out = append(out, f.Name)
	}
	return out
}

// TestFiltersOnTheFly: filters are put over a device that is in use and taken off
// again, its own and those for trials, and its users see nothing of it.
func TestFiltersOnTheFly(t *testing.T) {
	s := open(t, newEnv(t))
	uri := create(t, s, Spec{Name: "data", Backing: imageFile(t, mib), Front: FrontNBDServer}).Node
	var stop atomic.Bool
	var done atomic.Int64
	var load sync.WaitGroup
	for n := range 3 {
		c := dial(t, uri)
		load.Go(func() {
			defer c.Close()
			for i := 1; !stop.Load(); i++ {
				want := byte(1 + i%250)
				_, e1 := c.do(access{sector: n, write: true, value: want})
				got, e2 := c.do(access{sector: n})
				if err := errors.Join(e1, e2); err != nil || got != want {
					t.Errorf("client %d read %d after writing %d: %v", n, got, want, err)
					return
				}
				done.Add(1)
			}
		})
	}
	for _, name := range []string{track.Name, cow.Name, barrier.Name, delayName} {
		for before := done.Load(); done.Load() < before+10 && !t.Failed(); {
			time.Sleep(100 * time.Microsecond)
		}
		var i Info
		var err error
		if name != delayName {
			if i, err = s.DetachFilter("data", name, true); err != nil || slices.Contains(names(i), name) {
				t.Errorf("%s off: %v, %v", name, names(i), err)
			}
		}
		spec := FilterSpec{Name: name}
		if name == delayName {
			spec.Delay = time.Millisecond
		}
		if i, err = s.AttachFilter("data", spec, false); err != nil || !slices.Contains(names(i), name) {
			t.Errorf("%s on: %v, %v", name, names(i), err)
		}
	}
	if i := s.List()[0]; !slices.Equal(names(i), []string{barrier.Name, cow.Name, track.Name, delayName}) {
		t.Errorf("filters: %v", names(i))
	}
	stop.Store(true)
	load.Wait()
	// What fails is asked for, and stops when it is taken off.
	c := dial(t, uri)
	if _, err := s.AttachFilter("data", FilterSpec{Name: errorName}, false); !errors.Is(err, ErrSpoils) {
		t.Errorf("errors for who has it open: %v, want %v", err, ErrSpoils)
	}
	if _, err := s.AttachFilter("data", FilterSpec{Name: errorName, Range: block.Range{Off: sector, Len: 1}}, true); err != nil {
		t.Fatal(err)
	}
	if _, err := c.do(access{sector: 1, write: true}); err == nil || !strings.Contains(err.Error(), "error 5") {
		t.Errorf("a sector that is to fail: %v", err)
	}
	if _, err := c.do(access{sector: 2}); err != nil {
		t.Errorf("a sector beside it: %v", err)
	}
	if _, err := s.DetachFilter("data", errorName, false); err != nil {
		t.Error(err)
	}
	if _, err := c.do(access{sector: 1}); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	c.Close()
	patient(t, "the client is gone", func() bool { return len(s.InUse()) == 0 })
	if got := s.Conditions(); len(got) > 0 {
		t.Errorf("conditions: %+v", got)
	}
}

// TestFiltersRefused: what cannot be, or would spoil something, changes nothing.
func TestFiltersRefused(t *testing.T) {
	s := open(t, newEnv(t))
	create(t, s, Spec{Name: "data", Backing: imageFile(t, mib), Front: FrontNBDServer})
	if _, err := s.DetachFilter("data", cow.Name, false); err != nil { // there is no snapshot
		t.Error(err)
	}
	if _, err := s.CreateSnapshot(snapshot.Request{Devices: []string{"data"}, Storage: []snapshot.Storage{{Path: filepath.Join(t.TempDir(), "diff"), Limit: 4 * mib}}}); !errors.Is(err, ErrNoFilter) || !strings.Contains(err.Error(), "--attach cow") {
		t.Errorf("a snapshot without the filter that keeps it: %v", err)
	}
	if _, err := s.AttachFilter("data", FilterSpec{Name: cow.Name}, false); err != nil {
		t.Error(err)
	}
	_, id := snapshotOf(t, s, snapshot.Request{Devices: []string{"data"}, Storage: []snapshot.Storage{{Path: filepath.Join(t.TempDir(), "diff"), Limit: 4 * mib}}})
	before := names(s.List()[0])
	attach := func(spec FilterSpec) func() error {
		return func() error { _, err := s.AttachFilter("data", spec, false); return err }
	}
	detach := func(device, filter string) func() error {
		return func() error { _, err := s.DetachFilter(device, filter, false); return err }
	}
	for what, c := range map[string]struct {
		do   func() error
		want error
	}{
		"is there":         {attach(FilterSpec{Name: track.Name}), ErrInUse},
		"none of ours":     {attach(FilterSpec{Name: "log"}), ErrNoFilter},
		"not protected":    {attach(FilterSpec{Name: capture.Name}), ErrNoFilter},
		"no delay":         {attach(FilterSpec{Name: delayName}), ErrSetting},
		"longer than held": {attach(FilterSpec{Name: delayName, Delay: time.Minute}), ErrSetting},
		"a range of delay": {attach(FilterSpec{Name: delayName, Delay: 1, Range: block.Range{Len: 1}}), ErrSetting},
		"a delay of error": {attach(FilterSpec{Name: errorName, Delay: 1}), ErrSetting},
		"not there":        {detach("data", delayName), ErrNoFilter},
		"no device":        {detach("other", track.Name), ErrNotFound},
		"the map":          {detach("data", track.Name), ErrSpoils},
		"the snapshot":     {detach("data", cow.Name), ErrSpoils},
		"its instant":      {detach("data", barrier.Name), ErrSpoils},
	} {
		if err := c.do(); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", what, err, c.want)
		}
	}
	if now := names(s.List()[0]); !slices.Equal(now, before) {
		t.Errorf("filters were %v and are %v", before, now)
	}
	if err := s.DestroySnapshot(t.Context(), id); err != nil {
		t.Error(err)
	}
}

// TestLostFilter: a filter that failed is put back; the report of its loss goes, a
// snapshot that was prepared before is taken and holds, and the change map claims
// nothing about the time without its filter, also not after a restart.
func TestLostFilter(t *testing.T) {
	env := newEnv(t)
	s := open(t, env)
	uri := create(t, s, Spec{Name: "data", Backing: imageFile(t, mib), Front: FrontNBDServer}).Node
	d, err := s.find("data")
	if err != nil {
		t.Fatal(err)
	}
	write := func(value byte) {
		t.Helper()
		c := dial(t, uri)
		defer c.Close()
		if _, err := c.do(access{write: true, value: value}); err != nil {
			t.Fatal(err)
		}
	}
	info, id := snapshotOf(t, s, snapshot.Request{Devices: []string{"data"}, Storage: []snapshot.Storage{{Path: filepath.Join(t.TempDir(), "diff"), Limit: 4 * mib}}})
	write(1)
	d.part.Cow.Below().Fail(errors.New("torn"))
	if c := s.Conditions(); len(c) != 1 || c[0].Code != "filter-lost" || !strings.Contains(c[0].Remedy, "tidemark device filters data --attach cow") {
		t.Errorf("conditions: %+v", c)
	}
	if err := s.TakeSnapshot(t.Context(), id); !errors.Is(err, ErrNoFilter) {
		t.Errorf("a snapshot without the filter that keeps it: %v", err)
	}
	if _, err := s.AttachFilter("data", FilterSpec{Name: cow.Name}, false); err != nil {
		t.Fatal(err)
	}
	if c := s.Conditions(); len(c) != 0 {
		t.Errorf("conditions: %+v", c)
	}
	if err := s.TakeSnapshot(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	write(2)
	if got, err := dial(t, s.ImageNode("data", info.ID)).do(access{}); err != nil || got != 1 {
		t.Errorf("the image has %d, %v", got, err)
	}
	if err := s.DestroySnapshot(t.Context(), id); err != nil {
		t.Fatal(err)
	}

	m, err := s.Changes("data")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.DetachFilter("data", track.Name, true); err != nil {
		t.Fatal(err)
	}
	unseen := m.Take().Info()
	write(3)
	if _, err := m.Live(unseen.Generation, unseen.Number); !errors.Is(err, cbt.ErrFullCopy) {
		t.Errorf("changes that nobody saw: %v", err)
	}
	if len(bitmaps(m)) > 0 {
		t.Error("NBD clients are shown what nobody saw")
	}
	restart := func() *cbt.Map {
		if err := s.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		s = open(t, env)
		m, err := s.Changes("data")
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	if now := restart().Writing().Generation; now == unseen.Generation {
		t.Error("the generation of before goes on")
	}
	if _, err := s.DetachFilter("data", track.Name, true); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Resize(t.Context(), "data", 2*mib); err != nil {
		t.Fatal(err)
	}
	if _, err := s.AttachFilter("data", FilterSpec{Name: track.Name}, false); err != nil {
		t.Fatal(err)
	}
	if m, err = s.Changes("data"); err != nil {
		t.Fatal(err)
	}
	seen := m.Take().Info()
	write(4)
	if m = restart(); m.Writing().Size != 2*mib {
		t.Errorf("a map of %d bytes", m.Writing().Size)
	}
	live, err := m.Live(seen.Generation, seen.Number)
	if err != nil {
		t.Fatal(err)
	}
	if got := slices.Collect(live.Ranges()); !slices.Equal(got, []block.Range{{Len: 4096}}) {
		t.Errorf("changed since it is back: %v", got)
	}
}

// TestLostCapture: the filter of a protected device that failed is put back; what
// was written meanwhile is known to be unknown. It cannot be taken off by hand.
func TestLostCapture(t *testing.T) {
	s := open(t, newEnv(t))
	create(t, s, Spec{Name: "data", Backing: imageFile(t, mib), Front: FrontNBDServer})
	ring, err := s.StartCapture(Capture{Group: "g", RingBytes: mib, Disks: []capture.Disk{{Name: "data", Size: mib, BlockSize: 4096}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.EndCapture("g"); err != nil {
			t.Error(err)
		}
	})
	if _, err := s.DetachFilter("data", capture.Name, true); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), "unprotect g") {
		t.Errorf("taken off a protected device: %v", err)
	}
	d, err := s.find("data")
	if err != nil {
		t.Fatal(err)
	}
	drops := ring.Drops()
	if err := d.stack.Detach(capture.Name); err != nil {
		t.Fatal(err)
	}
	i, err := s.AttachFilter("data", FilterSpec{Name: capture.Name}, false)
	if err != nil || names(i)[len(i.Filters)-1] != capture.Name {
		t.Errorf("%v, %v", names(i), err)
	}
	if ring.Drops() == drops {
		t.Error("the time without it is no gap")
	}
}

// TestAltitudes: a device's own filters are asked from the lowest up, when it comes
// and when the daemon is started again: what one of them writes passes all below it.
func TestAltitudes(t *testing.T) {
	var part snapshot.Device
	last := max(delayAltitude, errorAltitude)
	for _, f := range append([]filterAt{{capture.Name, capture.Altitude, nil}}, usual(&part)...) {
		if f.altitude <= last || f.altitude%2 != 0 {
			t.Errorf("%s is at %d, above %d", f.name, f.altitude, last)
		}
		last = f.altitude
	}
	env := newEnv(t)
	env.Captures = []Capture{{Group: "g", RingBytes: mib, Disks: []capture.Disk{{Name: "data", Size: mib, BlockSize: 4096}}}}
	s := open(t, env)
	create(t, s, Spec{Name: "data", Backing: imageFile(t, mib), Front: FrontNBDServer})
	if _, err := s.StartCapture(env.Captures[0]); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Stop(t.Context()), s.Close()); err != nil {
		t.Fatal(err)
	}
	// A ring that goes on: its filter is there as soon as the device is laid.
	s = &Server{env: env, fronts: newFronts(env), folder: filepath.Join(env.StateDir, "devices"), devices: map[string]*Device{}, captures: map[string]*capturing{}}
	s.system = stack.New(stack.Config{}, &s.health)
	s.memory = s.memoryFolder()
	s.openRings()
	r, err := s.load("data")
	if err != nil {
		t.Fatal(err)
	}
	d := &Device{spec: r.Spec}
	if err := s.lay(d); err != nil {
		t.Fatal(err)
	}
	if got := d.stack.Filters(); len(got) != 4 || got[3].Name != capture.Name {
		t.Errorf("laid with %v", got)
	}
	s.restCaptures()
	if err := errors.Join(s.dismantle(d), s.system.Close(), s.Close()); err != nil {
		t.Error(err)
	}
	for _, path := range s.rings() {
		os.Remove(path)
	}
	if s.memory != "" {
		os.Remove(filepath.Join(s.memory, "rings"))
		os.Remove(s.memory)
	}
}
