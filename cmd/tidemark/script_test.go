package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"tidemark/internal/tap"
	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"tidemark": main})
}

// TestScript runs the command line as anybody may, root or not.
func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{Dir: "testdata/script", Cmds: scriptCommands(t), Setup: ownSocket})
}

// TestLive runs it on disks, with a daemon of each script's own.
func TestLive(t *testing.T) {
	testkit.Need(t, "root", "tap", "loop", "fuse", "ext4")
	bin := filepath.Join(t.TempDir(), "tidemark")
	if err := os.Symlink(program.Binary(t), bin); err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{Dir: "testdata/live", Cmds: scriptCommands(t), Setup: func(env *testscript.Env) error {
		env.Setenv("PATH", filepath.Dir(bin)+":"+env.Getenv("PATH")+":/sbin:/usr/sbin")
		env.Defer(func() { // the script's daemon may still run: its taps go when all have ended
			id, err := os.ReadFile(filepath.Join(env.WorkDir, "state", "instance"))
			if err == nil { // else it never ran
				t.Cleanup(func() { discardTaps(t, strings.TrimSpace(string(id))) })
			}
		})
		return ownSocket(env)
	}})
}

func ownSocket(env *testscript.Env) error {
	env.Setenv("TIDEMARK_SOCKET", filepath.Join(env.WorkDir, "socket"))
	env.Setenv("GORACE", os.Getenv("GORACE")) // test/run.sh has it
	return nil
}

// discardTaps removes what a daemon has pinned.
func discardTaps(t *testing.T, instance string) {
	pins, err := tap.Pinned()
	for _, p := range pins {
		if p.Instance == instance {
			err = errors.Join(err, tap.Discard(p.Instance, p.Group))
		}
	}
	if err != nil {
		t.Error(err)
	}
}

func scriptCommands(t *testing.T) map[string]func(*testscript.TestScript, bool, []string) {
	return map[string]func(*testscript.TestScript, bool, []string){
		"exits":  exits,
		"save":   save,
		"await":  await,
		"mode":   mode,
		"expand": expand,
		"fields": fields,
		"term": func(ts *testscript.TestScript, _ bool, _ []string) { // as systemd ends a service
			for _, c := range ts.BackgroundCmds() {
				ts.Check(c.Process.Signal(syscall.SIGTERM))
			}
		},
		"disk": func(ts *testscript.TestScript, _ bool, args []string) { // disk VARIABLE MIB
			mib, err := strconv.ParseInt(args[1], 10, 64)
			ts.Check(err)
			d := testkit.NewDisk(t, mib<<20)
			ts.Setenv(args[0], d.Path)
			ts.Setenv(args[0]+"_NAME", filepath.Base(d.Path))
		},
	}
}

// exits CODE COMMAND...: the command ends with exactly this code.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	var ended *exec.ExitError
	got := 0
	if errors.As(err, &ended) {
		got = ended.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want || neg {
		ts.Fatalf("%q ended with %d, want %d", args[1:], got, want)
	}
}

// save stdout VARIABLE: what the last command printed, without the end of the line.
func save(ts *testscript.TestScript, _ bool, args []string) {
	ts.Setenv(args[1], strings.TrimSpace(ts.ReadFile(args[0])))
}

// await COMMAND...: the command succeeds in the end; the bound is for machines that are busy.
func await(ts *testscript.TestScript, _ bool, args []string) {
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
		err := ts.Exec(args[0], args[1:]...)
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("%q: %v", args, err)
		}
	}
}

// mode OCTAL FILE: the file's permissions are these.
func mode(ts *testscript.TestScript, _ bool, args []string) {
	st, err := os.Lstat(ts.MkAbs(args[1]))
	ts.Check(err)
	if got := fmt.Sprintf("%04o", st.Mode().Perm()); got != args[0] {
		ts.Fatalf("%s has mode %s, want %s", args[1], got, args[0])
	}
}

// expand VARIABLE COUNT TEXT: the text that many times.
func expand(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	ts.Setenv(args[0], strings.Repeat(args[2], n))
}

// fields PATH NAME...: the JSON on standard output has these fields below PATH
// (.groups.disks; of an array its first element), and no null among them. Others may be added.
func fields(ts *testscript.TestScript, neg bool, args []string) {
	var at any
	ts.Check(json.Unmarshal([]byte(ts.ReadFile("stdout")), &at))
	for _, step := range append(strings.Split(args[0], ".")[1:], "") {
		if list, ok := at.([]any); ok && len(list) > 0 {
			at = list[0]
		}
		if object, ok := at.(map[string]any); ok && step != "" {
			at = object[step]
		}
	}
	object, ok := at.(map[string]any)
	if !ok || neg {
		ts.Fatalf("%s is %v, not an object", args[0], at)
	}
	for _, name := range args[1:] {
		if object[name] == nil {
			ts.Fatalf("%s has no field %s: %v", args[0], name, object)
		}
	}
}

// TestEveryVerbHasExamples: --help shows how each verb is used, with examples of
// that verb, and under which heading it belongs.
func TestEveryVerbHasExamples(t *testing.T) {
	root := newRoot()
	for _, c := range allCommands(root) {
		own := slices.Contains([]string{"help", "completion"}, c.Name()) || c.Parent().Name() == "completion"
		if c.Hidden || own {
			continue
		}
		if !c.HasSubCommands() && !strings.Contains(c.Example, c.CommandPath()) || c.Short == "" {
			t.Errorf("%s: no example of its own, or no summary", c.CommandPath())
		}
		if c.Parent() == root && c.GroupID == "" && c.Name() != "man" {
			t.Errorf("%s: under no heading of --help", c.CommandPath())
		}
	}
}

// TestExitCodesAreDocumented holds the table of docs/operating.md against exitMeanings.
func TestExitCodesAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../../docs/operating.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "\n## Exit codes\n")
	section, _, _ = strings.Cut(section, "\n## ")
	documented := map[int]string{}
	for _, line := range strings.Split(section, "\n") {
		cells := strings.Split(line, "|")
		if len(cells) != 4 {
			continue
		}
		if code, err := strconv.Atoi(strings.TrimSpace(cells[1])); err == nil {
			documented[code] = strings.TrimSpace(cells[2])
		}
	}
	for code, meaning := range exitMeanings {
		if documented[code] != meaning {
			t.Errorf("%d is %q, documented as %q", code, meaning, documented[code])
		}
	}
	for _, code := range byAPI {
		if exitMeanings[code] == "" {
			t.Errorf("%d is used and has no meaning", code)
		}
	}
	if len(documented) != len(exitMeanings) {
		t.Errorf("%d codes are documented, %d exist", len(documented), len(exitMeanings))
	}
}
