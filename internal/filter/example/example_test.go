package example_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/filter/delay"
	"tidemark/internal/filter/example"
	"tidemark/internal/filter/fault"
	"tidemark/internal/filter/log"
	"tidemark/internal/health"
	"tidemark/internal/sim"
	"tidemark/internal/stack"
)

func Example() {
	system := stack.New(stack.Config{}, &health.Set{})
	defer system.Close()
	disk := sim.NewDisk(1 << 20)
	_, _ = disk.WriteAt([]byte("boot"), 0)
	served, _ := system.Add("disk", disk)

	// On the fly, over every device that there is and that comes.
	if err := system.Register("guard", 250, stack.DriverFunc(example.Attach)); err != nil {
		fmt.Println(err)
	}
	_, err := served.WriteAt(make([]byte, 4096), 0)
	fmt.Println(err)
	_, err = served.WriteAt(make([]byte, 4096), 4096)
	fmt.Println(err)

	_ = system.Unregister("guard")
	_, err = served.WriteAt(make([]byte, 4096), 0)
	fmt.Println(err)
	// Output:
	// write 0+4096 of disk: the first sector is guarded: device is read-only
	// <nil>
	// <nil>
}

// TestDeclines: a device without a first sector to guard has no filter, one that cannot be read neither.
func TestDeclines(t *testing.T) {
	set := &health.Set{}
	system := stack.New(stack.Config{}, set)
	defer system.Close()
	if err := system.Register("guard", 250, stack.DriverFunc(example.Attach)); err != nil {
		t.Fatal(err)
	}
	empty, err := system.Add("empty", sim.NewDisk(4096))
	if err != nil || len(empty.Filters()) != 0 || len(set.List()) != 0 {
		t.Errorf("%v, %v, %v", empty.Filters(), set.List(), err)
	}
	bad := sim.NewDisk(4096)
	bad.Fault = func(block.Op, block.Range) error { return sim.ErrInjected }
	if s, err := system.Add("bad", bad); err != nil || len(s.Filters()) != 0 || len(set.List()) != 1 {
		t.Errorf("%v, %v", set.List(), err)
	}
}

// TestDocumented: the text shows this very code, and it is short.
func TestDocumented(t *testing.T) {
	code, err := os.ReadFile("example.go")
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("../../../docs/filters.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), string(code)) {
		t.Error("docs/filters.md does not show example.go as it is")
	}
	if n := strings.Count(string(code), "\n"); n >= 60 {
		t.Errorf("the example has %d lines", n)
	}
}

// TestEveryRequirementHasItsTest: the tests that the text names are there.
func TestEveryRequirementHasItsTest(t *testing.T) {
	text, err := os.ReadFile("../../../docs/filters.md")
	if err != nil {
		t.Fatal(err)
	}
	there := map[string]bool{}
	err = filepath.WalkDir("../../..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		code, err := os.ReadFile(path)
		for _, m := range regexp.MustCompile(`(?m)^func (Test\w+)\(`).FindAllStringSubmatch(string(code), -1) {
			there[m[1]] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile("`(Test\\w+)`").FindAllStringSubmatch(string(text), -1)
	if len(named) < 20 {
		t.Errorf("only %d tests are named", len(named))
	}
	for _, m := range named {
		if !there[m[1]] {
			t.Errorf("there is no %s", m[1])
		}
	}
}

// TestFiltersForTests do what they say, one over the other.
func TestFiltersForTests(t *testing.T) {
	system := stack.New(stack.Config{}, &health.Set{})
	defer system.Close()
	s, err := system.Add("d", sim.NewDisk(1<<20))
	if err != nil {
		t.Fatal(err)
	}
	var lines strings.Builder
	bad := errors.New("bad sector")
	var delayed int
	for i, d := range []stack.Driver{
		fault.Driver(func(r *stack.Request) error {
			if r.Range.Off == 512 {
				return bad
			}
			return nil
		}),
		log.Driver(&lines),
		delay.Driver(func(r *stack.Request) time.Duration { delayed++; return time.Microsecond }),
	} {
		if _, err := s.Attach(fmt.Sprint(i), i, d); err != nil {
			t.Fatal(err)
		}
	}
	p := make([]byte, 512)
	_, e1 := s.WriteFUA(p, 0)
	_, e2 := s.ReadAt(p, 512)
	if e1 != nil || !errors.Is(e2, bad) || delayed != 2 {
		t.Errorf("%v, %v, %d delayed", e1, e2, delayed)
	}
	if want := "d write 0+512 fua ok\nd read 512+512 bad sector\n"; lines.String() != want {
		t.Errorf("log: %q, want %q", lines.String(), want)
	}
}
