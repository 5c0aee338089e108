package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"tidemark/internal/front/nbd"
	"tidemark/internal/sim"
	"tidemark/internal/testkit"
)

// errPower ends a guest as a power cut does.
var errPower = errors.New("the power was cut")

// TestPowerCut comes after the long tests, which go on beside it: the power of a guest is cut under load, by killing its emulator, and its
// disks lose of what was not flushed any part, cut at sectors. What is to be true
// after that is looked at in the guest's next start: test/vm/guest, by the same name.
func TestPowerCut(t *testing.T) {
	t.Parallel()
	testkit.Need(t, "vm")
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	disks := []*powered{{name: "data", Disk: sim.NewCrashDisk(seed, 16<<20)}, {name: "state", Disk: sim.NewCrashDisk(seed+1, 96<<20)},
		{name: "store", Disk: sim.NewCrashDisk(seed+2, 32<<20)}}
	g := &guest{suite: debian612, timeout: 10 * time.Minute,
		jobs: []job{{pkg: "test/vm/guest", run: "^TestPowerCut$", env: "TIDEMARK_POWER=before", timeout: 8 * time.Minute}}}
	m := g.prepare(t)
	for try := 1; ; try++ {
		res, err := g.cut(t, m, disks, "cut")
		if errors.Is(err, errPower) {
			break
		}
		if try == boots || !res.emulated() {
			printed, _ := os.ReadFile(filepath.Join(res.dir, g.jobs[0].out+".out"))
			t.Fatalf("the guest did not come to where its power is cut: %v; it printed:\n%s\n%s", err, printed, res.log())
		}
		for _, d := range disks {
			d.Disk = sim.NewCrashDisk(seed, d.Size())
		}
	}
	g.jobs[0].env = "TIDEMARK_POWER=after"
	var after *results
	for try := 1; try == 1 || try <= boots && !after.has("finished") && after.emulated(); try++ {
		var err error
		if after, err = g.cut(t, m, disks, "cut"); err != nil {
			t.Logf("the second start: %v", err)
		}
	}
	if !after.has("finished") {
		t.Errorf("the guest did not finish: %s", after.log())
	}
	g.report(t, after)
}

// powered is a disk that outlives its guest, under its serial number.
type powered struct {
	*sim.Disk
	name string
}

// cut starts the guest over the disks and cuts their power when it asks for that, with
// a file cut in its results, or when it has ended.
func (g *guest) cut(t *testing.T, m machine, disks []*powered, name string) (*results, error) {
	t.Helper()
	in := func(file string) string { return filepath.Join(m.dir, name, "results", file) }
	for _, old := range []string{"cut", "booted", "finished"} {
		if err := os.Remove(in(old)); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	var around sync.WaitGroup
	defer func() {
		cancel(nil)
		around.Wait() // no request is under way any more, of any disk
		for _, d := range disks {
			d.Disk = d.Crash()
		}
	}()
	g.drives = nil
	for _, d := range disks {
		uri := fmt.Sprintf("nbd+unix:///%s?socket=%s", d.name, filepath.Join(m.dir, d.name+".socket"))
		l, err := nbd.Listen(uri)
		if err != nil {
			t.Fatal(err)
		}
		var s nbd.Server
		if err := s.Add(nbd.Export{Name: d.name, Device: d.Disk, BlockSize: 512}); err != nil {
			t.Fatal(err)
		}
		serving := context.WithoutCancel(ctx) // until the emulator has ended
		serving, end := context.WithCancel(serving)
		around.Go(func() { _ = s.Serve(serving, l) })
		defer end()
		g.drives = append(g.drives, uri)
	}
	around.Go(func() {
		for ctx.Err() == nil {
			if _, err := os.Stat(in("cut")); err == nil {
				cancel(errPower)
			}
			time.Sleep(10 * time.Millisecond)
		}
	})
	return g.run(ctx, t, m, name)
}
