package serve

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"tidemark/internal/stack"
	"tidemark/internal/testkit"
)

// patient waits for something that a busy machine may do late.
func patient(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waiting in vain: %s", what)
		}
	}
}

// order notes which filters were asked and told, in order.
type order struct {
	mu    sync.Mutex
	lines []string
}

func (o *order) add(line string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.lines = append(o.lines, line)
}

func (o *order) is(want ...string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Equal(o.lines, want)
}

type told struct {
	*order
	name string
}

func (told) Handle(r *stack.Request, next stack.Next) error { return next.Do(r) }
func (told) Spoil(error) string                             { return "nothing" }
func (f told) Detach(why stack.Reason)                      { f.add(f.name + " " + string(why)) }

// TestUevents: disks that come and go are told by the kernel, and registered filters
// hear of it: one that comes is offered to them, the lowest first, before the
// device is shown; one that is gone is told to them from the lowest up.
func TestUevents(t *testing.T) {
	testkit.Need(t, "root", "loop")
	env := newEnv(t)
	env.Look = time.Hour // nobody looks without being told
	s := open(t, env)
	image := imageFile(t, mib)
	create(t, s, Spec{Name: "data", Backing: image, Front: FrontNBDServer})
	if err := errors.Join(s.Stop(t.Context()), os.Rename(image, image+".away")); err != nil {
		t.Fatal(err)
	}
	s = open(t, env)
	o := &order{}
	for _, f := range []struct {
		name     string
		altitude int
	}{{"high", 501}, {"low", 1}} {
		if err := s.system.Register(f.name, f.altitude, stack.DriverFunc(func(*stack.Below) (stack.Filter, error) {
			o.add("asked " + f.name)
			return told{o, f.name}, nil
		})); err != nil {
			t.Fatal(err)
		}
	}
	if i := s.List()[0]; i.Node != "" {
		t.Fatalf("it is there without its backing: %+v", i)
	}
	if err := os.Rename(image+".away", image); err != nil {
		t.Fatal(err)
	}
	loop := testkit.NewDisk(t, mib)
	uevent := func(action string) {
		t.Helper()
		if err := os.WriteFile("/sys/class/block/"+filepath.Base(loop.Path)+"/uevent", []byte(action), 0o200); err != nil {
			t.Fatal(err)
		}
	}
	patient(t, "the device is there again", func() bool {
		uevent("add") // again and again: on a busy machine nobody may listen yet
		return s.List()[0].Node != ""
	})
	if !o.is("asked low", "asked high") {
		t.Errorf("filters: %q", o.lines)
	}

	// Its disk is another by now, and the kernel tells that one went.
	d, err := s.find("data")
	if err != nil {
		t.Fatal(err)
	}
	s.changes.Lock()
	d.disk = incarnation{name: filepath.Base(loop.Path), seq: "of before"}
	s.changes.Unlock()
	patient(t, "the filters are told", func() bool {
		uevent("remove")
		return o.is("asked low", "asked high", "low surprise", "high surprise")
	})
	patient(t, "users are told", func() bool {
		c := s.List()[0].Conditions
		return len(c) == 1 && c[0].Code == "backing-gone"
	})
	uevent("add") // for whoever else listens
}
