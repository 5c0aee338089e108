//go:build guest

package guest

import (
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// TestInvolfltServed: a served disk and a tapped one behind /dev/involflt. A
// writer writes each number to the one and then to the other: at each tag their
// copies are at one instant. A barrier holds the served disk's writes until it is removed or its
// time is over; a tag without a verdict is gone with the daemon.
func TestInvolfltServed(t *testing.T) {
	testkit.Need(t, "cuse", "tap")
	fronts()
	client := compiled(t, "involflt", involfltHeaders)
	d := program.New(t, "--compat", "involflt", "--compat-vault", filepath.Join(testkit.Dir(t), "vault"))
	dev := served(t, d, "first", "auto", servedSize)
	tapped := testkit.NewDisk(t, servedSize)
	copies := []*testkit.Disk{testkit.NewDisk(t, servedSize), testkit.NewDisk(t, servedSize)}
	disks := []*raw{openRaw(t, dev), openRaw(t, tapped.Path)}
	r := replicate(t, client, dev, copies[0].Path, tapped.Path, copies[1].Path)
	r.both("copies", dev, tapped.Path, d.Log)
	ended := counted(t, disks, seed(t))

	last := uint64(0)
	tag := func(how, name string) (numbers [2]uint64, said string) {
		t.Helper()
		program.Eventually(t, 2*time.Minute, "the disks are tagged", func() error { // not while a gap is open, or in too little time
			out, err := exec.CommandContext(t.Context(), client, how, dev, name).CombinedOutput()
			said = strings.TrimSpace(string(out))
			if exitCode(err) == 2 {
				return errors.New(said)
			}
			if err != nil {
				t.Fatalf("%v\n%s\n%s", err, out, d.Log())
			}
			return nil
		})
		if how == "lapse" || how == "prepare" {
			return numbers, said
		}
		for i, line := range r.both("tag "+name, dev, tapped.Path, d.Log) {
			n, err := strconv.ParseUint(strings.Fields(line)[3], 10, 64)
			if err != nil {
				t.Fatalf("%s: %v", line, err)
			}
			numbers[i] = n
		}
		if a, b := numbers[0], numbers[1]; a != b && a != b+1 || a < last {
			t.Errorf("at %s the served disk has write %d and the tapped one %d, which came after it; before %d", name, a, b, last)
		}
		last = numbers[0]
		return numbers, said
	}
	goesOn := func() {
		t.Helper()
		now := counter(disks[0].content())
		program.Eventually(t, time.Minute, "writes go on", func() error {
			if counter(disks[0].content()) == now {
				return fmt.Errorf("write %d is the last", now)
			}
			return nil
		})
	}
	tag("tag", "one")
	if numbers, said := tag("barrier", "held"); said != fmt.Sprintf("tag held %s %d", dev, numbers[0]) {
		t.Errorf("%q: the copy has write %d", said, numbers[0])
	}
	goesOn()
	tag("lapse", "")
	goesOn()
	tag("prepare", "lost")
	d.Restart()
	tag("tag", "two")
	tag("barrier", "held-again")
	ended()
	tag("tag", "end")
	for l := range r.lines {
		t.Errorf("the drainer says %q", l)
	}
	if err := r.cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, d.Log())
	}
	for i, c := range copies {
		disks[i].same("the copy at the end", openRaw(t, c.Path).content())
		disks[i].file.Close()
		if code := exitCode(exec.Command(client, "stop", []string{dev, tapped.Path}[i]).Run()); code != 0 {
			t.Errorf("stop: %d", code)
		}
	}
	d.Run("device", "rm", "first")
}

// both waits for a line that begins so for each of two disks; what was said before may come again.
func (d *drainer) both(begin, first, second string, log func() string) (lines [2]string) {
	d.t.Helper()
	for lines[0] == "" || lines[1] == "" {
		select {
		case l, ok := <-d.lines:
			if !ok {
				d.t.Fatalf("the drainer ended: %v\n%s", d.cmd.Wait(), log())
			}
			i := slices.Index([]string{first, second}, strings.Fields(l + " ? ? ?")[len(strings.Fields(begin))])
			switch {
			case i >= 0 && strings.HasPrefix(l, begin+" ") && (lines[i] == "" || lines[i] == l):
				lines[i] = l
				d.had = append(d.had, l)
			case !slices.Contains(d.had, l):
				d.t.Fatalf("the drainer says %q, and not %q", l, begin)
			}
		case <-time.After(2 * time.Minute):
			d.t.Fatalf("the drainer does not say %q of both\n%s", begin, log())
		}
	}
	return lines
}
