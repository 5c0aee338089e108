package vm

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// outcome is one test of the guest, or a whole package's run.
type outcome struct {
	name     string // its own part of the name
	result   string // pass, fail, skip; empty: it never ended
	elapsed  float64
	output   strings.Builder
	children []*outcome
}

// parse reads what a test binary printed under -test.v=test2json.
func parse(pkg string, printed []byte) (*outcome, error) {
	cmd := exec.Command("go", "tool", "test2json", "-t", "-p", pkg)
	cmd.Stdin = bytes.NewReader(printed)
	events, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("test2json: %w", err)
	}
	all := &outcome{name: pkg}
	tests := map[string]*outcome{"": all}
	for lines := bufio.NewScanner(bytes.NewReader(events)); lines.Scan(); {
		var e struct {
			Action, Test, Output string
			Elapsed              float64
		}
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return nil, fmt.Errorf("%w in %q", err, lines.Text())
		}
		o := find(tests, e.Test)
		switch e.Action {
		case "output":
			o.output.WriteString(e.Output)
		case "pass", "fail", "skip":
			if o.result != "fail" { // of several runs one that failed counts
				o.result, o.elapsed = e.Action, e.Elapsed
			}
		}
	}
	return all, nil
}

// find gives the outcome of a test, made and hung below its parent where it is new.
func find(tests map[string]*outcome, name string) *outcome {
	if o, ok := tests[name]; ok {
		return o
	}
	parent, own := "", name
	if i := strings.LastIndexByte(name, '/'); i >= 0 {
		parent, own = name[:i], name[i+1:]
	}
	o := &outcome{name: own}
	tests[name] = o
	p := find(tests, parent)
	p.children = append(p.children, o)
	return o
}

// report makes the guest's tests subtests of t.
func (o *outcome) report(t *testing.T) {
	for _, c := range o.children {
		t.Run(c.name, func(t *testing.T) {
			c.report(t)
			switch text := strings.TrimSpace(c.output.String()); c.result {
			case "pass":
				t.Logf("%.1f s in the guest", c.elapsed)
				ran(t)
			case "skip":
				t.Skip("in the guest: " + text) // recorded there by testkit.Need
			case "fail":
				t.Error("in the guest:\n" + text)
			default:
				t.Error("it did not end; in the guest:\n" + text)
			}
		})
	}
}

// report makes every job of the guest a subtest, with its tests below it.
func (g *guest) report(t *testing.T, res *results) {
	for _, j := range g.jobs {
		t.Run(j.pkg, func(t *testing.T) {
			printed, err := os.ReadFile(filepath.Join(res.dir, j.out+".out"))
			if err != nil {
				t.Fatal("it was never run: ", res.log())
			}
			all, err := parse(j.pkg, printed)
			if err != nil {
				t.Fatalf("%v in:\n%s", err, printed)
			}
			all.report(t)
			exit, _ := os.ReadFile(filepath.Join(res.dir, j.out+".exit"))
			if code := strings.TrimSpace(string(exit)); code != "0" && !t.Failed() {
				t.Errorf("exit code %q; it printed:\n%s", code, printed)
			}
			if len(all.children) == 0 {
				t.Errorf("no test was run; it printed:\n%s", printed)
			}
		})
	}
	if b, _ := os.ReadFile(filepath.Join(res.dir, "kernel-complaints")); len(b) > 0 {
		t.Errorf("the guest's kernel complained:\n%s\n%s", b, res.tail())
	}
	res.passSkipsOn(t)
}

// ran notes a test that passed in a guest, "suite folder test", in the file that
// TIDEMARK_RAN names: most of them could not run on the host.
func ran(t *testing.T) {
	path := os.Getenv("TIDEMARK_RAN")
	if path == "" {
		return
	}
	guest, rest, _ := strings.Cut(t.Name(), "/")
	at := strings.Index(rest, "/Test")
	if at < 0 {
		return
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := fmt.Fprintf(f, "%s %s %s\n", strings.TrimPrefix(guest, "Test"), rest[:at], rest[at+1:]); err != nil {
		t.Fatal(err)
	}
}

func (r *results) log() string {
	b, _ := os.ReadFile(filepath.Join(r.dir, "log"))
	return string(b) + r.tail()
}

// passSkipsOn adds what was skipped in the guest to the list of the whole run.
func (r *results) passSkipsOn(t *testing.T) {
	skips, _ := os.ReadFile(filepath.Join(r.dir, "skips"))
	path := os.Getenv("TIDEMARK_SKIPS")
	if len(skips) == 0 || path == "" {
		return
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for line := range strings.Lines(string(skips)) {
		if _, err := f.WriteString(strings.TrimSpace(line) + " in " + t.Name() + "\n"); err != nil {
			t.Fatal(err)
		}
	}
}
