package dm

import (
	"errors"
	"fmt"
	"os"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"tidemark/internal/testkit"
)

func answer(params string, next uint32) []byte {
	buf := make([]byte, 2*specSize+64)
	for i, at := range []int{0, int(next)} {
		if at+specSize+8 > len(buf) {
			break
		}
		spec := unix.DmTargetSpec{Sector_start: uint64(i) * 8, Length: 8, Next: next}
		copy(spec.Target_type[:], "linear")
		copy(buf[at:], unsafe.Slice((*byte)(unsafe.Pointer(&spec)), specSize))
		copy(buf[at+specSize:], params)
	}
	return buf
}

func TestParse(t *testing.T) {
	a, err := parse(answer("8:0 0", uint32(specSize)+8), 2)
	if err != nil || len(a) != 2 || len(a.Types()) != 1 || a.Types()[0] != "linear" || a.Sectors() != 16 {
		t.Fatalf("%+v, %v", a, err)
	}
	if b, _ := parse(answer("8:0 1", uint32(specSize)+8), 2); b.Digest() == a.Digest() {
		t.Error("another table, the same digest")
	}
	if _, err := parse(answer("8:0 0", 1<<31), 2); err == nil {
		t.Error("a target beyond the answer was accepted")
	}
}

// FuzzParse: whatever the answer, reading it ends well.
func FuzzParse(f *testing.F) {
	f.Add(answer("8:0 0", uint32(specSize)+8), 2)
	f.Fuzz(func(t *testing.T, b []byte, count int) {
		if count > 1000 {
			return
		}
		if table, err := parse(b, count); err == nil && len(table) != max(0, count) {
			t.Errorf("%d of %d targets", len(table), count)
		}
	})
}

func TestErrors(t *testing.T) {
	if _, err := request(make([]byte, headerSize), Named(string(make([]byte, 200))), 0); err == nil {
		t.Error("a name of 200 bytes was accepted")
	}
	testkit.Need(t, "dm")
	c, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Info(Named("tidemark-none")); !errors.Is(err, ErrAbsent) {
		t.Error(err)
	}
	if _, _, err := c.Table(Numbered(253, 1<<19)); !errors.Is(err, ErrAbsent) {
		t.Error(err)
	}
}

// TestLife: a device is made, looked at, given another table while open, and removed.
func TestLife(t *testing.T) {
	testkit.Need(t, "dm")
	c, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	name := fmt.Sprintf("tidemark-test-%d", os.Getpid())
	if _, err := c.Create(name, "TIDEMARK-"+name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = c.Resume(Named(name), true); _ = c.Remove(Named(name)) })
	if _, err := c.Create(name, ""); !errors.Is(err, ErrBusy) {
		t.Errorf("made twice: %v", err)
	}
	zero := Table{{0, 1024, "zero", ""}, {1024, 1024, "error", ""}}
	if err := c.Load(Named(name), zero, false); err != nil {
		t.Fatal(err)
	}
	info, err := c.Resume(Named(name), true)
	if err != nil || !info.Live || info.UUID != "TIDEMARK-"+name {
		t.Fatalf("%+v, %v", info, err)
	}
	node, err := MakeNode(info)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(node)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Remove(Named(name)); !errors.Is(err, ErrBusy) {
		t.Errorf("removed while open: %v", err)
	}
	got, by, err := c.Table(Numbered(info.Major, info.Minor))
	if err != nil || got.Digest() != zero.Digest() || by.Name != name || by.Open != 1 {
		t.Errorf("%+v, %+v, %v", got, by, err)
	}
	if err := errors.Join(c.Load(Named(name), zero[:1], false), c.Suspend(Named(name), false)); err != nil {
		t.Fatal(err)
	}
	if i, err := c.Info(Named(name)); err != nil || !i.Suspended || !i.Inactive {
		t.Errorf("%+v, %v", i, err)
	}
	if _, err := c.Resume(Named(name), true); err != nil {
		t.Fatal(err)
	}
	if got, _, _ := c.Table(Named(name)); len(got) != 1 || got.Sectors() != 1024 {
		t.Errorf("%+v", got)
	}
	f.Close()
	if err := c.Remove(Named(name)); err != nil {
		t.Error(err)
	}
}
