package tap

import (
	"errors"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf/btf"

	"tidemark/internal/testkit"
)

// TestCalibration: found twice, the answer is the same, and a wrong one is not believed.
func TestCalibration(t *testing.T) {
	testkit.Need(t, "root", "loop", "tap")
	types := btf.NewCache()
	c, err := calibrate(types)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := calibrate(types); err != nil || again != c {
		t.Errorf("%+v, then %+v, %v", c, again, err)
	}
	l, err := newLab(types)
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	if err := l.prove(c); err != nil {
		t.Errorf("the right answer: %v", err)
	}
	for name, wrong := range map[string]calibration{
		"a page off":     {c.base + pageSize, c.shift},
		"a gigabyte off": {c.base - 1<<30, c.shift},
		"a byte off":     {c.base + 1, c.shift},
		"smaller pages":  {c.base, c.shift - 1},
		"nowhere":        {0, c.shift},
	} {
		if l.prove(wrong) == nil {
			t.Errorf("%s: believed", name)
		}
	}
}

// TestDistrust: payloads that were found wrong are not captured any more, and a
// tap that is taken over calibrates itself anew.
func TestDistrust(t *testing.T) {
	d := testkit.NewDisk(t, 1<<20)
	tp := start(t, 1<<20, Options{}, d)
	if !tp.PayloadCaptured() || tp.WhyNoPayload() != nil {
		t.Fatalf("not captured: %v", tp.WhyNoPayload())
	}
	why := errors.New("wrong")
	tp.Distrust(why)
	if tp.PayloadCaptured() || tp.WhyNoPayload() != why {
		t.Fatalf("still captured; %v", tp.WhyNoPayload())
	}
	f, buf := direct(t, d.Path), pages(t, 4096)
	if _, err := f.WriteAt(buf, 0); err != nil {
		t.Fatal(err)
	}
	if tp.Drops() != 1 {
		t.Errorf("%d drops: want the one write", tp.Drops())
	}
	p := tp.pins
	if err := tp.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := Adopt("test", filepath.Base(p.dir))
	if err != nil {
		t.Fatal(err)
	}
	*tp = *again
	if !tp.PayloadCaptured() || tp.WhyNoPayload() != nil {
		t.Errorf("not captured after it was taken over: %v", tp.WhyNoPayload())
	}
}

// TestMetadataOnlyIsKept by a tap that is taken over.
func TestMetadataOnlyIsKept(t *testing.T) {
	tp := start(t, 1<<20, Options{MetadataOnly: true}, testkit.NewDisk(t, 1<<20))
	p := tp.pins
	if err := tp.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := Adopt("test", filepath.Base(p.dir))
	if err != nil {
		t.Fatal(err)
	}
	*tp = *again
	if tp.PayloadCaptured() || !errors.Is(tp.WhyNoPayload(), ErrMetadataOnly) {
		t.Errorf("captured: %v, %v", tp.PayloadCaptured(), tp.WhyNoPayload())
	}
}
