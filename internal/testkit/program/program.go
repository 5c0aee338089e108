// Package program runs the real tidemark binary for tests: daemons with a
// state, a socket and a vault of their own, killed and started again at will,
// and the verbs as a user calls them. What a killed test run left behind
// (daemons, taps) is ended before the next begins.
package program

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"tidemark/internal/testkit"
)

// verbMax bounds every verb: one that waits for ever must not take all tests with it.
const verbMax = 3 * time.Minute

// dumpMax bounds how long a process that hangs may take to say where.
const dumpMax = 10 * time.Second

var build = sync.OnceValues(func() (string, error) {
	if bin := os.Getenv("TIDEMARK_BIN"); bin != "" {
		return filepath.Abs(bin)
	}
	root, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", err
	}
	// One place a checkout: the go command's own cache makes the second build quick.
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	bin := filepath.Join(dir, "tidemark", "test-bin", fmt.Sprintf("tidemark-%d", os.Getpid()))
	cmd := exec.Command("go", "build", "-tags", "steps", "-o", bin, "./cmd/tidemark")
	cmd.Dir = filepath.Dir(strings.TrimSpace(string(root)))
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return bin, nil
})

// Binary is the program under test: TIDEMARK_BIN, or built from the source at hand.
func Binary(t testing.TB) string {
	t.Helper()
	bin, err := build()
	if err != nil {
		t.Fatal(err)
	}
	return bin
}

// Daemon is one daemon with everything that belongs to it. It is used by one
// goroutine, but for Verb, Run and Status.
type Daemon struct {
	Dir    string   // holds state, socket, log, vault
	State  string   // the --state folder; may be changed before Start
	Env    []string // of the daemon's own, beyond the test's; may be changed before Start
	Vault  string   // the folder that tests give as --vault
	t      testing.TB
	cmd    *exec.Cmd
	ended  chan struct{}
	bin    string
	extras []string
	steps  string

	awaiting string // what Await waits for
}

// New starts a daemon with more arguments, if any. When the test ends it is
// killed and its taps are removed.
func New(t testing.TB, args ...string) *Daemon {
	t.Helper()
	testkit.Need(t, "root", "tap", "loop")
	return Serving(t, args...)
}

// Serving is New for a daemon that is to tap no disk: it needs no privileges.
func Serving(t testing.TB, args ...string) *Daemon {
	t.Helper()
	sweep.Do(sweepDaemons)
	dir := testkit.Dir(t)
	d := &Daemon{Dir: dir, State: filepath.Join(dir, "state"), Vault: filepath.Join(dir, "vault"), t: t, bin: Binary(t), extras: args}
	t.Cleanup(d.cleanup)
	d.Start()
	return d
}

// Start starts the daemon, also after an earlier one ended, and waits until it answers.
func (d *Daemon) Start() {
	d.t.Helper()
	log, err := os.OpenFile(filepath.Join(d.Dir, "log"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		d.t.Fatal(err)
	}
	defer log.Close()
	if err := d.note(); err != nil {
		d.t.Fatal(err)
	}
	d.cmd = exec.Command(d.bin, append([]string{"daemon", "--state", d.State}, d.extras...)...)
	d.cmd.Env, d.cmd.Stdout, d.cmd.Stderr = append(d.env(), append(d.Env, "TIDEMARK_TEST_STEPS="+d.steps)...), log, log
	if err := d.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(d.Dir, pidFile), []byte(strconv.Itoa(d.cmd.Process.Pid)), 0o600); err != nil {
		d.t.Fatal(err)
	}
	d.ended = make(chan struct{})
	go func(cmd *exec.Cmd, ended chan struct{}) { _ = cmd.Wait(); close(ended) }(d.cmd, d.ended)
	Eventually(d.t, time.Minute, "the daemon answers", func() error {
		select {
		case <-d.ended:
			d.t.Fatalf("the daemon ended: %s", d.Log())
		default:
		}
		_, err := d.Verb("status", "--json")
		return err
	})
}

// Steps has the daemon do something at its steps from its next Start on, as
// cmd/tidemark/steps_on.go tells; none: it goes its way.
func (d *Daemon) Steps(what ...string) {
	d.t.Helper()
	if os.Getenv("TIDEMARK_BIN") != "" && len(what) > 0 {
		testkit.Lack(d.t, "steps", errors.New("TIDEMARK_BIN may name a program that was not built for tests"))
	}
	d.steps = strings.Join(what, ",")
}

// PID is the daemon's process id.
func (d *Daemon) PID() int { return d.cmd.Process.Pid }

// Proc is a file of the daemon's folder in /proc.
func (d *Daemon) Proc(name string) string {
	d.t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", d.PID(), name))
	if err != nil {
		d.t.Fatal(err)
	}
	return string(text)
}

// FlushersOnly fails the test where a thread of the daemon is one that the kernel
// may have wait for writes when memory is short.
func (d *Daemon) FlushersOnly() {
	d.t.Helper()
	const memallocNoIO = 0x80000 // of a task's flags, set by PR_SET_IO_FLUSHER
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", d.PID()))
	if err != nil || len(threads) == 0 {
		d.t.Fatalf("threads: %v, %v", threads, err)
	}
	for _, path := range threads {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // it ended
		}
		_, rest, _ := strings.Cut(string(text), ") ")
		fields := strings.Fields(rest)
		if flags, err := strconv.ParseUint(fields[6], 10, 32); err != nil || flags&memallocNoIO == 0 {
			d.t.Errorf("%s: flags %s (%v): it may wait for its own device", path, fields[6], err)
		}
	}
}

// Ended waits until the daemon has ended by itself.
func (d *Daemon) Ended() {
	d.t.Helper()
	select {
	case <-d.ended:
	case <-time.After(time.Minute):
		d.t.Fatalf("the daemon does not end: %s", d.Log())
	}
}

// Kill ends the daemon with kill -9.
func (d *Daemon) Kill() {
	_ = d.cmd.Process.Kill()
	<-d.ended
}

// Stop ends the daemon as systemd does.
func (d *Daemon) Stop() {
	d.t.Helper()
	_ = d.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-d.ended:
	case <-time.After(time.Minute):
		d.t.Errorf("the daemon does not end: %s", d.Log())
		d.Kill()
	}
}

// LoseTap removes the taps of a killed daemon, as a reboot does.
func (d *Daemon) LoseTap() {
	d.t.Helper()
	if err := removePins(d.State); err != nil {
		d.t.Fatal(err)
	}
}

// LoseRings removes what a killed daemon captured of served devices and did not
// store, as a reboot does.
func (d *Daemon) LoseRings() {
	d.t.Helper()
	if err := os.RemoveAll(filepath.Join(memory(d.State), "rings")); err != nil {
		d.t.Fatal(err)
	}
}

// Restart is Kill and Start.
func (d *Daemon) Restart() {
	d.t.Helper()
	d.Kill()
	d.Start()
}

func (d *Daemon) env() []string {
	return append(os.Environ(), "TIDEMARK_SOCKET="+filepath.Join(d.Dir, "socket"))
}

// Log is the end of what the daemons said.
func (d *Daemon) Log() string {
	b, _ := os.ReadFile(filepath.Join(d.Dir, "log"))
	lines := strings.Split(string(b), "\n")
	return strings.Join(lines[max(0, len(lines)-60):], "\n")
}

// dump has the daemon say what each of its goroutines does, which ends it.
func (d *Daemon) dump() string {
	path := filepath.Join(d.Dir, "log")
	st, err := os.Stat(path)
	if err != nil {
		return err.Error()
	}
	_ = d.cmd.Process.Signal(syscall.SIGQUIT)
	select {
	case <-d.ended:
	case <-time.After(dumpMax):
	}
	b, _ := os.ReadFile(path)
	return string(b[min(int(st.Size()), len(b)):])
}

// Verb runs one verb and gives its standard output; the error is an *Error.
func (d *Daemon) Verb(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), verbMax)
	defer cancel()
	cmd := exec.CommandContext(ctx, d.bin, args...)
	cmd.Env = d.env()
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGQUIT) } // it tells what it waits for
	cmd.WaitDelay = dumpMax
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		e := &Error{Args: args, Exit: -1, Text: string(out) + stderr.String(), Cause: errors.Join(err, ctx.Err())}
		if cmd.ProcessState != nil {
			e.Exit = cmd.ProcessState.ExitCode()
		}
		if ctx.Err() != nil {
			e.Text += "\nthe daemon:\n" + d.dump()
		}
		return string(out), e
	}
	return string(out), nil
}

// Background starts a verb and does not wait for it. It is killed when the test ends.
func (d *Daemon) Background(args ...string) *exec.Cmd {
	d.t.Helper()
	cmd := exec.Command(d.bin, args...)
	cmd.Env = d.env()
	if err := cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { _ = cmd.Process.Kill() })
	return cmd
}

// Error is a verb that failed.
type Error struct {
	Args  []string
	Exit  int    // -1 where it was killed
	Text  string // all that it said
	Cause error
}

func (e *Error) Error() string {
	return fmt.Sprintf("tidemark %s: %v\n%s", strings.Join(e.Args, " "), e.Cause, e.Text)
}

// Run is a verb that must succeed.
func (d *Daemon) Run(args ...string) string {
	d.t.Helper()
	out, err := d.Verb(args...)
	if err != nil {
		d.t.Fatal(err)
	}
	return out
}

// Refused is a verb that must fail with an exit code; it gives what the verb said.
func (d *Daemon) Refused(exit int, args ...string) string {
	d.t.Helper()
	_, err := d.Verb(args...)
	e := (*Error)(nil)
	if !errors.As(err, &e) || e.Exit != exit {
		d.t.Fatalf("tidemark %s: want exit %d, have %v", strings.Join(args, " "), exit, err)
	}
	return e.Text
}

// Protect puts disks into a group and waits until it is durable in the vault.
func (d *Daemon) Protect(group string, args ...string) {
	d.t.Helper()
	d.Run(append([]string{"protect", "--wait", "--vault", d.Vault, "--name", group}, args...)...)
}

// Points is what `points --json` lists of a group.
func (d *Daemon) Points(group string) []Point {
	d.t.Helper()
	var all []Point
	text := d.Run("points", "--vault", d.Vault, group, "--json")
	if err := json.Unmarshal([]byte(text), &all); err != nil {
		d.t.Fatalf("%v in %s", err, text)
	}
	return all
}

// Point is one point as `points --json` tells it.
type Point struct {
	Position    uint64 `json:"position"`
	Time        string `json:"time"`
	Bookmark    string `json:"bookmark"`
	Consistency string `json:"consistency"`
	Stretch     int    `json:"stretch"`
}

// Restored is a file with a disk of a group as it was at a point. It goes when the test ends.
func (d *Daemon) Restored(group, disk, at string) string {
	d.t.Helper()
	f, err := os.CreateTemp(d.Dir, "restored-")
	if err != nil {
		d.t.Fatal(err)
	}
	f.Close()
	args := []string{"restore", "--vault", d.Vault, group, "--at", at, "--to", f.Name()}
	if disk != "" {
		args = append(args, "--disk", disk)
	}
	d.Run(args...)
	return f.Name()
}
