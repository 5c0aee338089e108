package serve

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/filter/delay"
	"tidemark/internal/snapshot"
	"tidemark/internal/stack"
	"tidemark/internal/testkit"
)

// childFolder is the environment variable that makes this program a server to be killed.
const childFolder = "TIDEMARK_SERVE_CHILD"

// childMain serves dir/image until it is killed, and does what it is told, a word a line.
func childMain(dir string) (err error) {
	say := func(text string) { fmt.Println(text) }
	env := envIn(dir)
	s, err := Open(context.Background(), env)
	if err != nil {
		return err
	}
	d, err := s.find("data")
	if err != nil {
		if _, err = s.Create(context.Background(), Spec{Name: "data", Backing: filepath.Join(dir, "image"), Front: FrontLoop}); err == nil {
			d, err = s.find("data")
		}
	}
	if err != nil {
		return err
	}
	if d.served == nil {
		return fmt.Errorf("offline: %+v", d.health.List())
	}
	say(d.served.kernel())
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		what, about, _ := strings.Cut(lines.Text(), " ")
		switch what {
		case "snapshot":
			i, err := s.CreateSnapshot(snapshot.Request{Devices: []string{"data"}, Storage: []snapshot.Storage{{Path: about, Limit: 8 * mib}}})
			if err == nil {
				id, _ := snapshot.ParseID(i.ID)
				err = s.TakeSnapshot(context.Background(), id)
			}
			if err != nil {
				return err
			}
			say(s.ImageNode("data", i.ID))
		case "list":
			for _, i := range s.Snapshots() {
				say(i.State + " " + s.ImageNode("data", i.ID))
			}
		case "append": // whose writes hang from now on
			first := sync.OnceFunc(func() { say("held") })
			if _, err := d.stack.Attach("hold", 900, delay.Driver(func(r *stack.Request) time.Duration {
				if r.Op == block.OpRead {
					return 0
				}
				first()
				return time.Hour
			})); err != nil {
				return err
			}
			go func() {
				id, _ := snapshot.ParseID(s.Snapshots()[0].ID)
				say(fmt.Sprint("not held: ", s.AppendStorage(id, snapshot.Storage{Path: about, Limit: 8 * mib})))
			}()
		}
	}
	return io.EOF
}

// child is a server in a process of its own.
type child struct {
	t     *testing.T
	cmd   *exec.Cmd
	in    io.Writer
	lines chan string
}

func startChild(t *testing.T, dir string) *child {
	t.Helper()
	c := &child{t: t, cmd: exec.Command(os.Args[0]), lines: make(chan string, 100)}
	c.cmd.Env = append(os.Environ(), childFolder+"="+dir)
	c.cmd.Stderr = os.Stderr
	in, err := c.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.cmd.StdoutPipe()
	if err == nil {
		err = c.cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	c.in = in
	go func() {
		defer close(c.lines)
		for s := bufio.NewScanner(out); s.Scan(); {
			c.lines <- s.Text()
		}
	}()
	return c
}

func (c *child) tell(text string) {
	c.t.Helper()
	if _, err := io.WriteString(c.in, text+"\n"); err != nil {
		c.t.Fatal(err)
	}
}

func (c *child) line() string {
	c.t.Helper()
	select {
	case l, ok := <-c.lines:
		if !ok {
			c.t.Fatal("the server ended")
		}
		return l
	case <-time.After(time.Minute):
		c.t.Fatal("the server says nothing")
	}
	return ""
}

// kill says whether the process ended.
func (c *child) kill() error {
	_ = c.cmd.Process.Kill()
	ended := make(chan struct{})
	go func() { _ = c.cmd.Wait(); close(ended) }()
	select {
	case <-ended:
		return nil
	case <-time.After(time.Minute):
		return errors.New("it was killed, and is still there")
	}
}

// processesOf are those that have a folder in their environment, but for pid.
func processesOf(dir string, pid int) (left []string) {
	all, _ := filepath.Glob("/proc/[0-9]*/environ") // a pattern without faults
	for _, path := range all {
		if b, err := os.ReadFile(path); err == nil && bytes.Contains(b, []byte(childFolder+"="+dir)) && path != "/proc/"+strconv.Itoa(pid)+"/environ" {
			left = append(left, path)
		}
	}
	return left
}

// TestKilledWhileStorageGrows: difference storage grows on the device itself, which
// holds all writes just then, and the server is killed. It ends at once, with no
// process left behind; the next one serves the device, and the image is what it was.
func TestKilledWhileStorageGrows(t *testing.T) {
	testkit.Need(t, "root", "loop", "fuse", "ext4")
	dir := testkit.Dir(t)
	t.Cleanup(func() { _ = os.RemoveAll(filepath.Join("/dev/shm", stateMark(filepath.Join(dir, "state")))) }) // of a snapshot that nobody ends
	if err := os.WriteFile(filepath.Join(dir, "image"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(dir, "image"), 64*mib); err != nil {
		t.Fatal(err)
	}
	c := startChild(t, dir)
	node := c.line()
	outside(t, "mkfs.ext4", "-q", "-b", "4096", "-E", "lazy_itable_init=0,lazy_journal_init=0", node)
	mnt := t.TempDir()
	outside(t, "mount", node, mnt)
	defer func() { _ = exec.Command("umount", "-l", mnt).Run() }()
	outside(t, "sh", "-c", "echo before > "+mnt+"/file; sync -f "+mnt)
	c.tell("snapshot " + mnt + "/diff")
	c.line()
	outside(t, "sh", "-c", "echo after > "+mnt+"/file; sync -f "+mnt)
	c.tell("append " + mnt + "/more")
	if l := c.line(); l != "held" {
		t.Fatal(l)
	}
	if len(processesOf(dir, c.cmd.Process.Pid)) == 0 {
		t.Error("nobody but the server itself grows the storage")
	}
	if err := c.kill(); err != nil {
		t.Fatalf("%v; to be rid of it: echo 1 into abort of its connection in /sys/fs/fuse/connections", err)
	}
	for end := time.Now().Add(time.Minute); len(processesOf(dir, 0)) > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("left behind: %v", processesOf(dir, 0))
		}
	}
	outside(t, "umount", "-l", mnt)
	c = startChild(t, dir)
	node = c.line()
	c.tell("list")
	state, image, _ := strings.Cut(c.line(), " ")
	if state != "taken" {
		t.Fatalf("the snapshot is %s", state)
	}
	if text := outside(t, "debugfs", "-R", "cat /file", image); !strings.Contains(text, "before") {
		t.Errorf("the image's file holds %q", text)
	}
	outside(t, "mount", node, mnt)
	if b, err := os.ReadFile(mnt + "/file"); err != nil || string(b) != "after\n" {
		t.Errorf("the device's file holds %q, %v", b, err)
	}
	outside(t, "sh", "-c", "echo again > "+mnt+"/file; sync -f "+mnt)
	if text := outside(t, "debugfs", "-R", "cat /file", image); !strings.Contains(text, "before") {
		t.Errorf("later the image's file holds %q", text)
	}
	outside(t, "umount", mnt)
	outside(t, "e2fsck", "-fy", node) // a journal that was cut off was replayed by the mount
	if err := c.kill(); err != nil {
		t.Error(err)
	}
}
