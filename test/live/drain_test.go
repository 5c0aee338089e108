package live

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"tidemark/client"
	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// replicator is the example program of the client package, killed and started again at will.
type replicator struct {
	t    *testing.T
	d    *program.Daemon
	bin  string
	args []string
	out  bytes.Buffer
	cmd  *exec.Cmd
}

// replicate starts the example over a disk of a group. At each bookmark it keeps
// the copy in a file named after it.
func replicate(t *testing.T, d *program.Daemon, group, disk, to string) *replicator {
	t.Helper()
	r := &replicator{t: t, d: d, bin: filepath.Join(d.Dir, "example")}
	if out, err := exec.Command("go", "build", "-o", r.bin, "tidemark/client/example").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	hook := filepath.Join(d.Dir, "keep")
	if err := os.WriteFile(hook, []byte("#!/bin/sh\nexec cp --sparse=always \"$2\" \""+d.Dir+"/at-$1\"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	r.args = []string{"-group", group, "-disk", disk, "-to", to, "-on-bookmark", hook}
	t.Cleanup(func() { r.kill() })
	r.start()
	return r
}

func (r *replicator) start() {
	r.t.Helper()
	r.cmd = exec.Command(r.bin, r.args...)
	r.cmd.Env = append(os.Environ(), "TIDEMARK_SOCKET="+filepath.Join(r.d.Dir, "socket"))
	r.cmd.Stdout, r.cmd.Stderr = &r.out, &r.out
	if err := r.cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
}

func (r *replicator) kill() {
	_ = r.cmd.Process.Kill()
	_ = r.cmd.Wait()
}

// TestReplica: the example program keeps a copy of a disk under load. Daemon and
// program are killed again and again, and the tap is lost once; the copy at each bookmark is what restore
// gives for it, and at the end it is the disk.
func TestReplica(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		disk := testkit.NewDisk(t, 16*mib)
		d := program.New(t)
		d.Protect("g", "--seal-every", "50ms", disk.Path)
		name := d.Group("g").Disks[0].Name
		target := filepath.Join(d.Dir, "copy")
		r := replicate(t, d, "g", name, target)

		stop := make(chan struct{})
		var load sync.WaitGroup
		f, buf, own := open(t, disk.Path, unix.O_DIRECT), aligned(t, 64<<10), fork(rng)
		load.Go(func() {
			for n := uint64(1); ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				size := 4096 * (1 + own.Int64N(16))
				off := 4096 * own.Int64N((16*mib-size)/4096)
				testkit.Fill(buf[:size], 0, off, n)
				if _, err := f.WriteAt(buf[:size], off); err != nil {
					t.Error(err)
					return
				}
				if n%64 == 0 {
					unix.Nanosleep(&unix.Timespec{Nsec: 5e6}, nil)
				}
			}
		})
		var marks []string
		lost := rng.IntN(5)
		for i := range 6 {
			d.Await("g", "consistent", func(g *program.Group) bool { return g.Since > 0 })
			mark := fmt.Sprint("mark", i)
			d.Run("bookmark", "g", mark)
			marks = append(marks, mark)
			switch k := rng.IntN(3); {
			case i == lost: // as a reboot does: a gap, and a fill with what differs
				d.Kill()
				d.LoseTap()
				d.Start()
			case k == 0:
				r.kill()
				r.start()
			case k == 1:
				d.Restart()
			default:
				r.kill()
				d.Restart()
				r.start()
			}
		}
		close(stop)
		load.Wait()
		d.Settle("g")
		d.Run("bookmark", "g", "last")
		d.Settle("g")
		drained(t, d, "g", "copy", func() string { r.kill(); return r.out.String() })
		r.kill()

		for _, mark := range append(marks, "last") {
			kept, err := os.ReadFile(filepath.Join(d.Dir, "at-"+mark))
			if err != nil {
				t.Fatalf("%v; the example said:\n%s", err, r.out.String())
			}
			same(t, "the copy at bookmark "+mark, image(t, d, "g", "", mark), kept)
		}
		have, err := os.ReadFile(target)
		if err != nil {
			t.Fatal(err)
		}
		same(t, "the copy at the end", content(t, disk.Path), have)
	})
}

// consumer is one as `drain ls --json` tells it.
type consumer struct {
	Name      string
	Committed uint64
	Position  uint64
	Behind    uint64
	NeedsFill bool `json:"needs_fill"`
	Cleared   bool
	Pending   *int64 `json:"pending_bytes"`
}

// pending is -1 where it is not known.
func (c consumer) pending() int64 {
	if c.Pending == nil {
		return -1
	}
	return *c.Pending
}

func consumerOf(t *testing.T, d *program.Daemon, group, name string) consumer {
	t.Helper()
	var all []consumer
	text := d.Run("drain", "ls", group, "--json")
	if err := json.Unmarshal([]byte(text), &all); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	for _, c := range all {
		if c.Name == name {
			return c
		}
	}
	t.Fatalf("no consumer %s in %s", name, text)
	return consumer{}
}

// drained waits until a consumer has committed everything.
func drained(t *testing.T, d *program.Daemon, group, name string, said func() string) {
	t.Helper()
	defer func() {
		if t.Failed() {
			t.Logf("the consumer said:\n%s", said())
		}
	}()
	program.Eventually(t, patience, "consumer "+name+" has everything", func() error {
		if c := consumerOf(t, d, group, name); c.Behind > 0 || c.NeedsFill {
			return fmt.Errorf("it is %+v", c)
		}
		return nil
	})
}

// TestDrainByHand: the verbs as a script uses them: the same batch until it is
// committed, also after kill -9; wrong commits; clear; what is refused.
func TestDrainByHand(t *testing.T) {
	disk := testkit.NewDisk(t, 8*mib)
	d := program.New(t)
	d.Protect("g", "--seal-every", "50ms", disk.Path)
	file := func(n int) string { return filepath.Join(d.Dir, fmt.Sprint("batch", n)) }
	d.Refused(4, "drain", "commit", "g", "c", "1")
	d.Refused(4, "drain", "next", "g", "c", "--after", "3", "--to", file(1))
	d.Refused(4, "drain", "next", "g", "c", "--to", filepath.Join(d.Dir, "none", "batch"))
	d.Refused(2, "drain", "next", "g", "c", "--to", d.Dir)
	d.Refused(2, "drain", "next", "g", "c", "--wait", "-1s", "--to", file(1))
	d.Refused(2, "drain", "next", "g", "c", "--to", "-", "--json")
	for _, verb := range []string{"next", "rm", "clear"} { // a name of dots is no way to the group
		d.Refused(map[string]int{"next": 2, "rm": 4, "clear": 4}[verb], "drain", verb, "g", "..")
	}
	if text := d.Run("drain", "ls", "g", "--json"); text != "[]\n" {
		t.Errorf("what was refused made a consumer: %s", text)
	}
	d.Run("drain", "next", "g", "c", "--to", file(1))
	d.Run("drain", "next", "g", "c", "--to", file(2))
	equal(t, file(1), file(2))
	if text := d.Refused(13, "drain", "commit", "g", "c", "7"); !strings.Contains(text, "batch 7") || !strings.Contains(text, "1 to 1") {
		t.Errorf("a wrong commit says %s", text)
	}
	d.Run("drain", "commit", "g", "c", "1")
	d.Refused(12, "drain", "next", "g", "c")
	d.Refused(12, "drain", "wait", "g", "c", "--timeout", "10ms")
	waits, ended := d.Background("drain", "wait", "g", "c", "--timeout", "2m"), make(chan error)
	go func() { ended <- waits.Wait() }()
	program.Eventually(t, patience, "it is woken", func() error {
		d.Run("drain", "wait", "g", "--wake")
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("a wait that is woken ends with %v", err)
			}
			return nil
		default:
			return program.ErrNotYet
		}
	})

	f, buf := open(t, disk.Path, unix.O_DIRECT), aligned(t, 64<<10)
	testkit.Fill(buf, 0, mib, 1)
	if _, err := f.WriteAt(buf, mib); err != nil {
		t.Fatal(err)
	}
	d.Run("bookmark", "g", "here")
	d.Run("drain", "wait", "g", "c", "--timeout", "1m")
	program.Eventually(t, patience, "what is pending is counted", func() error {
		if c := consumerOf(t, d, "g", "c"); c.pending() != int64(len(buf)) {
			return fmt.Errorf("%d bytes are pending", c.pending())
		}
		return nil
	})
	d.Run("drain", "next", "g", "c", "--to", file(2))
	d.Run("drain", "next", "g", "c", "--after", "2", "--wait", "1m", "--to", file(3))
	d.Restart()
	d.Await("g", "online", online)
	d.Run("drain", "next", "g", "c", "--to", file(4))
	equal(t, file(2), file(4))
	d.Run("drain", "commit", "g", "c", "3") // it was given by the daemon before
	if c := consumerOf(t, d, "g", "c"); c.Committed != 3 || c.Behind != 0 {
		t.Errorf("with all committed: %+v", c)
	}

	testkit.Fill(buf, 0, mib, 2)
	if _, err := f.WriteAt(buf, mib); err != nil {
		t.Fatal(err)
	}
	d.Run("drain", "wait", "g", "c", "--timeout", "1m")
	d.Refused(5, "unprotect", "g")
	d.Refused(5, "drain", "rm", "g", "c")
	d.Run("drain", "clear", "g", "c")
	if c := consumerOf(t, d, "g", "c"); !c.NeedsFill || !c.Cleared || c.pending() != -1 {
		t.Errorf("cleared: %+v", c)
	}
	if g := d.Group("g"); !g.Has("consumer-needs-fill") {
		t.Errorf("status does not say that the consumer needs a fill: %+v", g.Conditions)
	}
	text := d.Run("drain", "next", "g", "c", "--json", "--to", file(5))
	if !strings.Contains(text, `"kind":"fill"`) || !strings.Contains(text, fmt.Sprintf(`"offset":%d`, mib)) {
		t.Errorf("after a clear: %s", text)
	}
	d.Run("drain", "rm", "g", "c", "--force")
	d.Run("unprotect", "g")
}

func equal(t *testing.T, a, b string) {
	t.Helper()
	x, err := os.ReadFile(a)
	y, err2 := os.ReadFile(b)
	if err := errors.Join(err, err2); err != nil || len(x) == 0 || !bytes.Equal(x, y) {
		t.Errorf("%s has %d bytes and %s %d, which are not the same (%v)", a, len(x), b, len(y), err)
	}
}

// TestDrainVaultAway: a consumer goes on from the spool while the vault takes
// nothing, and never holds the spool back; wait ends with unprotect.
func TestDrainVaultAway(t *testing.T) {
	disk := testkit.NewDisk(t, 8*mib)
	d := program.New(t)
	d.Protect("g", "--seal-every", "50ms", disk.Path)
	c := client.Dial(filepath.Join(d.Dir, "socket")).Consumer("g", "c", client.Options{})
	b, err := c.Next(t.Context(), 0)
	if err != nil || b.Kind != client.Fill || !b.Consistent {
		t.Fatalf("%+v, %v", b, err)
	}
	if err := c.Commit(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(d.Vault, d.Vault+".away"); err != nil {
		t.Fatal(err)
	}
	f, buf := open(t, disk.Path, unix.O_DIRECT), aligned(t, 4096)
	for n := range int64(3) {
		testkit.Fill(buf, 0, n*4096, uint64(n+1))
		if _, err := f.WriteAt(buf, n*4096); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Wait(t.Context(), 0, 0, patience); err != nil {
			t.Fatal(err)
		}
		b, err := c.Next(t.Context(), 0)
		if err != nil || len(b.Records) != 1 || b.Records[0].Offset != n*4096 || !bytes.Equal(b.Records[0].Payload, buf) {
			t.Fatalf("write %d: %+v, %v", n, b, err)
		}
		if err := c.Commit(t.Context(), b.Number); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Rename(d.Vault+".away", d.Vault); err != nil {
		t.Fatal(err)
	}
	d.Settle("g")
	ended := make(chan error, 1)
	go func() {
		_, err := c.Wait(t.Context(), 0, 0, patience)
		ended <- err
	}()
	d.Run("unprotect", "g")
	if err := <-ended; err == nil || errors.Is(err, client.ErrNothing) || errors.Is(err, io.EOF) {
		t.Errorf("a wait for a group that is unprotected ends with %v", err)
	}
}

// TestDrainToTheEnd: unprotect and drain rm refuse while anything that was captured
// is not handed over, also what is not sealed yet.
func TestDrainToTheEnd(t *testing.T) {
	disk := testkit.NewDisk(t, 8*mib)
	d := program.New(t)
	d.Protect("g", "--seal-every", "1m", disk.Path)
	c := client.Dial(filepath.Join(d.Dir, "socket")).Consumer("g", "c", client.Options{})
	for {
		b, err := c.Next(t.Context(), 0)
		if errors.Is(err, client.ErrNothing) {
			break
		}
		if err == nil {
			err = c.Commit(t.Context(), b.Number)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	f, buf := open(t, disk.Path, unix.O_DIRECT), aligned(t, 4096)
	for n, refused := range [][]string{{"unprotect", "g"}, {"drain", "rm", "g", "c"}} {
		testkit.Fill(buf, 0, 0, uint64(n+1))
		if _, err := f.WriteAt(buf, 0); err != nil {
			t.Fatal(err)
		}
		d.Refused(exitRefused, refused...)
		b, err := c.Next(t.Context(), 0) // it was sealed to be looked at
		if err != nil || len(b.Records) != 1 || !bytes.Equal(b.Records[0].Payload, buf) {
			t.Fatalf("%+v, %v", b, err)
		}
		if err := c.Commit(t.Context(), b.Number); err != nil {
			t.Fatal(err)
		}
	}
	d.Run("unprotect", "g")
}
