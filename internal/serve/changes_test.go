package serve

import (
	"os"
	"slices"
	"testing"

	"tidemark/internal/block"
	"tidemark/internal/cbt"
	"tidemark/internal/testkit"
)

// TestMapOverRestarts: a change map goes on over a clean restart, with what changed
// before; not when the daemon was killed, and not when somebody wrote to the backing
// while there was no daemon.
func TestMapOverRestarts(t *testing.T) {
	for _, kind := range []string{"file", "disk"} {
		t.Run(kind, func(t *testing.T) {
			path := ""
			if kind == "disk" {
				testkit.Need(t, "root", "loop")
				path = testkit.NewDisk(t, mib).Path
			} else {
				path = imageFile(t, mib)
			}
			env := newEnv(t)
			s := open(t, env)
			uri := create(t, s, Spec{Name: "data", Backing: path, Front: FrontNBDServer}).Node
			changes := func() *cbt.Map {
				t.Helper()
				m, err := s.Changes("data")
				if err != nil {
					t.Fatal(err)
				}
				return m
			}
			first := changes().Take().Info()
			write := func() {
				t.Helper()
				c := dial(t, uri)
				defer c.Close()
				if _, err := c.do(access{write: true, value: 1, sector: 8}); err != nil {
					t.Fatal(err)
				}
			}
			write()
			stop := func() {
				t.Helper()
				if err := s.Stop(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			for range 2 {
				stop()
				s = open(t, env)
				live, err := changes().Live(first.Generation, first.Number)
				if err != nil {
					t.Fatalf("after a clean restart: %v", err)
				}
				if got := slices.Collect(live.Ranges()); !slices.Equal(got, []block.Range{{Off: 4096, Len: 4096}}) {
					t.Errorf("after a clean restart: %v", got)
				}
			}
			stop()
			f, err := os.OpenFile(path, os.O_WRONLY|os.O_SYNC, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt(make([]byte, 4096), 65536); err != nil {
				t.Fatal(err)
			}
			f.Close()
			s = open(t, env)
			second := changes().Writing().Generation
			if second == first.Generation {
				t.Error("it was written to while there was no daemon, and the generation goes on")
			}
			kept := s.changesFile("data")
			if _, err := os.Stat(kept); err == nil {
				t.Error("the map of before could be found after a crash")
			}
			stop() // its own map is kept, and gone where the next daemon was killed
			s = open(t, env)
			if changes().Writing().Generation != second {
				t.Error("after another clean restart the generation has ended")
			}
			stop()
			if err := os.Remove(kept); err != nil { // as a daemon that was killed leaves it
				t.Fatal(err)
			}
			s = open(t, env)
			if changes().Writing().Generation == second {
				t.Error("the daemon was killed, and the generation goes on")
			}
		})
	}
}

// TestBackingContinues: when a disk is as it was left.
func TestBackingContinues(t *testing.T) {
	now := backingState{id: "i", boot: "b", disk: "7", written: 10, discarded: 2, counted: true}
	fresh := backingState{id: "i", boot: "c", disk: "3", counted: true}
	nameless := backingState{id: "i", boot: "b", written: 10, counted: true}
	file := backingState{id: "i", file: "1 2"}
	for _, c := range []struct {
		what      string
		was, now  backingState
		continues bool
	}{
		{"the same", now, now, true},
		{"without a number", nameless, nameless, true},
		{"written to", backingState{id: "i", boot: "b", disk: "7", written: 9, discarded: 2}, now, false},
		{"discarded", backingState{id: "i", boot: "b", disk: "7", written: 10, discarded: 1}, now, false},
		{"plugged in anew", backingState{id: "i", boot: "b", disk: "6", written: 10, discarded: 2}, now, false},
		{"after a start of the machine", now, fresh, true},
		{"after a start, written to", fresh, now, false},
		{"after a start, discarded", now, backingState{id: "i", boot: "c", disk: "3", discarded: 1, counted: true}, false},
		{"another device's", now, backingState{id: "j", boot: "c", disk: "3", counted: true}, false},
		{"that does not count", now, backingState{id: "i", boot: "b", disk: "7", written: 10, discarded: 2}, false},
		{"a file", file, file, true},
		{"a file that was written to", backingState{id: "i", file: "1 1"}, file, false},
		{"a file that became a disk", file, fresh, false},
		{"a disk that became a file", now, file, false},
	} {
		if got := c.now.continues(c.was.String()); got != c.continues {
			t.Errorf("%s: %v", c.what, got)
		}
	}
	if fresh.continues("i") || now.continues("") {
		t.Error("a text of before says that nothing was written")
	}
}
