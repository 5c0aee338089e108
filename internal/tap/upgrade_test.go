package tap

import (
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync/atomic"
	"testing"

	"github.com/cilium/ebpf/btf"

	"tidemark/internal/testkit"
)

// layout3 is the object of the last build with layout 3.
//
//go:embed testdata/layout3.o
var layout3 []byte

// TestOlderLayout: a tap that an older build pinned is taken over with its ring
// while fio writes, and nothing is lost. One of a build to come is refused.
func TestOlderLayout(t *testing.T) {
	testkit.Need(t, "fio")
	d := testkit.NewDisk(t, 16<<20)
	group := fmt.Sprintf("o%d", os.Getpid())
	t.Cleanup(func() {
		if err := Discard("test", group); err != nil {
			t.Error(err)
		}
	})
	p, err := pinsOf("test", group)
	if err != nil {
		t.Fatal(err)
	}
	target := targetFor(t, d)
	old := &Tap{pins: p, targets: []Target{target}, ringSize: 128 << 20, ident: [16]byte{1}}
	types := btf.NewCache()
	if err := errors.Join(checkKernel(types), mountBPFFS(), old.start(layout3, 3, types)); err != nil {
		t.Fatalf("%+v", err)
	}
	r := newReplica(t, old, d)
	fio := exec.Command("fio", "--name=load", "--filename="+d.Path, "--rw=randwrite", "--bsrange=512-64k", "--blockalign=512",
		"--direct=1", "--ioengine=psync", "--numjobs=2", "--offset_increment=8m", "--io_size=8m", "--size=8m", "--rate_iops=2000", "--thread", "--randrepeat=0")
	ended := make(chan error, 1)
	go func() {
		out, err := fio.CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		ended <- err
	}()
	for atomic.LoadUint64(&old.counts[0].Writes) < 50 { // it has begun
		select {
		case err := <-ended:
			t.Fatal("fio ended: ", err)
		default:
		}
	}
	before := old.Producer()
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	tp, err := Adopt("test", group)
	if err != nil {
		t.Fatalf("%+v", err)
	}
	defer tp.Close()
	if tp.Identity() != old.ident || tp.Producer() < before || tp.meta.Layout != layout {
		t.Errorf("adopted %x at %d with layout %d; it was %x at %d", tp.Identity(), tp.Producer(), tp.meta.Layout, old.ident, before)
	}
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	r.pull(tp)
	if tp.Drops() != 0 {
		t.Errorf("%d drops", tp.Drops())
	}
	r.same(d)
	report(t, tp)

	future := tp.meta
	future.Layout = layout + 1
	if err := p.replaceMeta(future); err != nil {
		t.Fatal(err)
	}
	if _, err := Adopt("test", group); !errors.Is(err, ErrLayout) {
		t.Errorf("a tap of layout %d: %v", future.Layout, err)
	}
}
