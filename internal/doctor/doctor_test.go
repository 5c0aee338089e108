package doctor

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"tidemark/internal/disk"
	"tidemark/internal/tap"
	"tidemark/internal/testkit"
)

func TestAskKeepsThreeAnswers(t *testing.T) {
	for _, c := range []struct {
		err  error
		want Answer
	}{{nil, Yes}, {errors.New("absent"), No}, {fmt.Errorf("may not look: %w", errCannotTell), CannotTell}} {
		got := ask(probe{code: "x", remedy: "do", run: func() error { return c.err }})
		if got.Answer != c.want || (got.Remedy == "") != (c.want == Yes) {
			t.Errorf("%v: %+v", c.err, got)
		}
	}
}

func TestWayFromChecks(t *testing.T) {
	info := &disk.Info{Name: "sdx", Size: 1 << 30}
	for _, c := range []struct {
		checks []Check
		want   Answer
		says   string
	}{
		{[]Check{{Code: "btf", Answer: Yes}, {Code: "ublk", Answer: No}}, Yes, ""},
		{[]Check{{Code: "bpffs", Answer: CannotTell, Reason: "r1"}, {Code: "btf", Answer: No, Reason: "r2"}}, No, "r2"},
		{[]Check{{Code: "tap-payload", Answer: No, Reason: "r3"}}, Yes, "metadata mode only: r3"},
		{[]Check{{Code: "tap-trial", Answer: CannotTell, Reason: "r4"}}, CannotTell, "r4"},
	} {
		w := tapWay(info, c.checks)
		if w.Answer != c.want || !strings.Contains(w.Reason, c.says) {
			t.Errorf("%+v: %+v", c.checks, w)
		}
	}
}

func TestDevice(t *testing.T) {
	testkit.Need(t, "tap", "loop")
	d := testkit.NewDisk(t, 16<<20)
	r, err := Device(d.Path)
	if err != nil {
		t.Fatal(err)
	}
	if w := r.Ways[0]; w.Way != "tap" || w.Answer != Yes || w.Reason != "" {
		t.Errorf("%+v\n%+v", w, r.Checks)
	}
	b, err := json.Marshal(r)
	if err != nil || !strings.Contains(string(b), `"ways":[{"way":"tap","answer":"yes"}`) {
		t.Errorf("%s, %v", b, err)
	}
	pins, err := tap.Pinned()
	if err != nil || slices.ContainsFunc(pins, func(p tap.Pin) bool { return p.Instance == trialInstance() }) {
		t.Errorf("the trial left a tap behind: %+v, %v", pins, err)
	}
}

// TestOrphan: a tap without an owner is seen, in the disk's way, and removed on request.
func TestOrphan(t *testing.T) {
	testkit.Need(t, "tap", "loop")
	d := testkit.NewDisk(t, 16<<20)
	info, err := disk.Inspect(d.Path)
	if err != nil {
		t.Fatal(err)
	}
	instance := fmt.Sprintf("orphan%d", os.Getpid())
	tp, err := tap.Start(tap.Config{Instance: instance, Group: "g", RingBytes: 64 << 10, Options: tap.Options{MetadataOnly: true},
		Targets: []tap.Target{{Name: info.Name, Whole: info.WholeDev, Len: info.Size, DiskSeq: info.DiskSeq, BlockSize: 4096}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tap.Discard(instance, "g") })
	if err := tp.Close(); err != nil {
		t.Fatal(err)
	}
	if c := tappedBy(info); c == nil || c.Code != CodeTapped {
		t.Errorf("%+v", c)
	}
	state := t.TempDir()
	places := Places{States: []string{state}}
	fixOf := func() *Fix {
		t.Helper()
		pins, err := Pins(places)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range Fixes(places, pins) {
			if f.Subject == instance+"/g" {
				return &f
			}
		}
		return nil
	}
	fix := fixOf()
	if fix == nil || !strings.Contains(fix.Action, info.Name) {
		t.Fatalf("%+v", fix)
	}
	// A daemon's state that names it makes it owned, also for a fix that was listed before.
	group := filepath.Join(state, "groups", "g")
	if err := errors.Join(os.MkdirAll(group, 0o700), os.WriteFile(filepath.Join(state, "instance"), []byte(instance+"\n"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if f := fixOf(); f != nil {
		t.Errorf("owned, and yet %+v", f)
	}
	if err := fix.Apply(); !errors.Is(err, ErrNotOrphan) {
		t.Errorf("Apply: %v", err)
	}
	// The folder noted beside the pins is looked into, whichever the caller knows of.
	places.States = []string{t.TempDir()}
	if fixOf() == nil {
		t.Error("an unknown folder's tap passes for owned")
	}
	if err := tap.SetOwner(instance, "g", state); err != nil || tap.Owner(instance, "g") != state {
		t.Errorf("%v, %q", err, tap.Owner(instance, "g"))
	}
	if f := fixOf(); f != nil {
		t.Errorf("owned by another folder's daemon, and yet %+v", f)
	}
	if err := os.Remove(group); err != nil {
		t.Fatal(err)
	}
	if err := fix.Apply(); err != nil {
		t.Error(err)
	}
	if fixOf() != nil || tappedBy(info) != nil {
		t.Error("still there")
	}
}

func TestLocks(t *testing.T) {
	state := t.TempDir()
	path := filepath.Join(state, "lock")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	lock := func(want bool) {
		t.Helper()
		got, err := Locks(Places{States: []string{state}})
		if err != nil || len(got) != 1 || got[0].Held != want || want && got[0].PID != os.Getpid() {
			t.Errorf("want held %v: %+v, %v", want, got, err)
		}
	}
	lock(false)
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	lock(true)
}
