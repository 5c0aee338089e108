//go:build guest

package guest

import (
	"bufio"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

const involfltHeaders = "../../../internal/abi/involflt/testdata"

// drainer is a client that runs beside the test; lines are what it prints.
type drainer struct {
	t     *testing.T
	cmd   *exec.Cmd
	lines chan string
	had   []string // what both was given
}

// replicate starts one with pairs of disks and their copies.
func replicate(t *testing.T, client string, pairs ...string) *drainer {
	t.Helper()
	return follow(t, exec.CommandContext(t.Context(), client, append([]string{"replicate"}, pairs...)...))
}

// follow starts a client and gathers its lines.
func follow(t *testing.T, cmd *exec.Cmd) *drainer {
	t.Helper()
	d := &drainer{t: t, cmd: cmd, lines: make(chan string, 100)}
	out, err := d.cmd.StdoutPipe()
	if err == nil {
		err = d.cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(d.lines)
		for s := bufio.NewScanner(out); s.Scan(); {
			d.lines <- s.Text()
		}
	}()
	return d
}

// line waits for the next that begins so; before it there may be what was said already.
func (d *drainer) line(begin, already string, log func() string) string {
	d.t.Helper()
	late := time.After(2 * time.Minute)
	for {
		select {
		case l, ok := <-d.lines:
			if !ok {
				d.t.Fatalf("the client ended: %v\n%s", d.cmd.Wait(), log())
			}
			switch {
			case l == already:
			case strings.HasPrefix(l, begin):
				return l
			default:
				d.t.Errorf("the client says %q, and not %q", l, begin)
			}
		case <-late:
			d.t.Fatalf("the client does not say %q\n%s", begin, log())
		}
	}
}

// kill ends it in the middle of whatever it does.
func (d *drainer) kill() {
	_ = d.cmd.Process.Kill()
	for range d.lines {
	}
	_ = d.cmd.Wait()
}

// TestInvolflt: a client in C walks through every command, right and wrong; one
// outlives the daemon; one that is killed while it waits is let go; nothing is left of
// what was stopped.
func TestInvolflt(t *testing.T) {
	testkit.Need(t, "cuse", "tap", "ext4")
	client, walk := compiled(t, "involflt", involfltHeaders), compiled(t, "involflt_walk", involfltHeaders)
	d := program.New(t, "--compat", "involflt,blksnap", "--compat-vault", filepath.Join(testkit.Dir(t), "vault"))
	other := testkit.NewDisk(t, 16<<20)
	testkit.Run(t, "mkfs.ext4", "-q", other.Path)
	testkit.Mount(t, other.Path)
	walked := testkit.NewDisk(t, 8<<20)
	if out, err := exec.CommandContext(t.Context(), walk, walked.Path, other.Path).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s\n%s", err, out, d.Log())
	}
	if text := d.Run("status"); strings.Contains(text, filepath.Base(walked.Path)) {
		t.Errorf("the group of a disk that was stopped is left: %s", text)
	}

	outlived(t, d, client, walked.Path)
	waiting := exec.Command(client, "wait", walked.Path)
	if err := waiting.Start(); err != nil {
		t.Fatal(err)
	}
	program.Eventually(t, time.Minute, "it waits", func() error { // in the ioctl
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/syscall", waiting.Process.Pid))
		if err == nil && !strings.Contains(string(text), "0x4084fe42") {
			err = errors.New(string(text))
		}
		return err
	})
	if err := waiting.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = waiting.Wait() // would hang if the killed one was not let go
	if code := exitCode(exec.Command(client, "stop", walked.Path).Run()); code != 0 {
		t.Errorf("stop: %d", code)
	}
	if code := exitCode(exec.Command(client, "stop", walked.Path).Run()); code != int(syscall.ENODEV) {
		t.Errorf("stopped twice: %d", code)
	}
	if left, _ := filepath.Glob(filepath.Join(d.State, "involflt", "*", "*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	d.Stop()
	if _, err := os.Lstat("/dev/involflt"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the device is left: %v", err)
	}
}

// outlived has the daemon killed under a client, which says what it met.
func outlived(t *testing.T, d *program.Daemon, client, dev string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), client, "outlive", dev)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	said := bufio.NewScanner(out)
	if !said.Scan() || said.Text() != "ready" {
		t.Fatalf("it says %q: %v\n%s", said.Text(), cmd.Wait(), d.Log())
	}
	d.Restart()
	if _, err := in.Write([]byte("\n")); err != nil {
		t.Error(err)
	}
	for said.Scan() {
		t.Error(said.Text())
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, d.Log())
	}
}

// TestInvolfltReplicates: a client replicates a mounted disk under load, and its
// copy is the disk at every tag, also when it or the daemon was killed in between.
func TestInvolfltReplicates(t *testing.T) {
	testkit.Need(t, "cuse", "tap", "ext4")
	client := compiled(t, "involflt", involfltHeaders)
	source, replica := testkit.NewDisk(t, 16<<20), testkit.NewDisk(t, 16<<20) // let go by the daemon before they are detached
	d := program.New(t, "--compat", "involflt", "--compat-vault", filepath.Join(testkit.Dir(t), "vault"))
	testkit.Run(t, "mkfs.ext4", "-q", source.Path)
	dir := testkit.Mount(t, source.Path)
	stop, wrote := make(chan struct{}), make(chan error, 1)
	go func() { wrote <- churn(dir, stop) }()
	r := replicate(t, client, source.Path, replica.Path)
	last := "" // a tag that was not committed comes again, and the copy is the same then
	r.line("copies", last, d.Log)
	tag := func(how, name string) {
		t.Helper()
		var want string
		program.Eventually(t, time.Minute, "the disk can be tagged", func() error { // not while a gap is open
			out, err := exec.CommandContext(t.Context(), client, how, source.Path, name).CombinedOutput()
			want = strings.TrimSpace(string(out))
			if exitCode(err) == 2 {
				return errors.New(want)
			}
			if err != nil {
				t.Fatalf("%v\n%s\n%s", err, out, d.Log())
			}
			return nil
		})
		if got := r.line("tag", last, d.Log); got != want {
			t.Errorf("the copy at its tag: %s; the disk: %s", got, want)
		}
		last = want
	}
	tag("point", "first")
	r.kill()
	r = replicate(t, client, source.Path, replica.Path)
	r.line("copies", last, d.Log)
	tag("point", "after-a-killed-drainer")
	d.Restart() // under the drainer
	tag("point", "after-a-killed-daemon")

	close(stop)
	if err := <-wrote; err != nil {
		t.Error(err)
	}
	testkit.Run(t, "umount", dir)
	tag("tag", "end")
	for l := range r.lines {
		t.Errorf("the drainer says %q", l)
	}
	if err := r.cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, d.Log())
	}
	openRaw(t, source.Path).same("the copy at the end", openRaw(t, replica.Path).content())
}

// churn writes, rewrites and removes files until it is told to stop.
func churn(dir string, stop <-chan struct{}) error {
	b := make([]byte, 64<<10)
	for i := 0; ; i++ {
		select {
		case <-stop:
			return nil
		case <-time.After(20 * time.Millisecond):
		}
		name := filepath.Join(dir, fmt.Sprint("file", mrand.IntN(50)))
		if mrand.IntN(5) == 0 {
			_ = os.Remove(name)
			continue
		}
		for j := range b {
			b[j] = byte(i + j>>9)
		}
		f, err := os.Create(name)
		if err != nil {
			return err
		}
		_, err = f.Write(b[:1+mrand.IntN(len(b))])
		if mrand.IntN(4) == 0 {
			err = errors.Join(err, f.Sync())
		}
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
}
