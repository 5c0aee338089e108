//go:build guest

package guest

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// daemon is the real program, TIDEMARK_BIN, with a state, a vault and a socket of its own.
type daemon struct {
	t     testing.TB
	dir   string
	vault string
	cmd   *exec.Cmd
}

func newDaemon(t testing.TB) *daemon {
	t.Helper()
	d := &daemon{t: t, dir: t.TempDir()}
	d.vault = filepath.Join(d.dir, "vault")
	d.start()
	t.Cleanup(func() {
		if t.Failed() {
			text, _ := d.try("status", "--json")
			t.Logf("status %s\nthe daemon said:\n%s", text, d.log())
		}
		d.kill()
	})
	return d
}

// start begins a daemon, also after an earlier one was killed, and waits until it answers.
func (d *daemon) start() {
	d.t.Helper()
	log, err := os.OpenFile(filepath.Join(d.dir, "log"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		d.t.Fatal(err)
	}
	defer log.Close()
	d.cmd = exec.Command(os.Getenv("TIDEMARK_BIN"), "daemon", "--state", filepath.Join(d.dir, "state"))
	d.cmd.Env, d.cmd.Stderr = d.env(), log
	if err := d.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	deadline := time.Now().Add(time.Minute)
	for {
		if _, err := d.try("status", "--json"); err == nil {
			return
		}
		if time.Now().After(deadline) {
			d.t.Fatalf("the daemon does not answer: %s", d.log())
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func (d *daemon) kill() {
	_ = d.cmd.Process.Kill()
	_ = d.cmd.Wait()
}

func (d *daemon) env() []string {
	return append(os.Environ(), "TIDEMARK_SOCKET="+filepath.Join(d.dir, "socket"))
}

func (d *daemon) log() string {
	b, _ := os.ReadFile(filepath.Join(d.dir, "log"))
	lines := strings.Split(string(b), "\n")
	return strings.Join(lines[max(0, len(lines)-30):], "\n")
}

func (d *daemon) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second) // a verb that waits for ever must not take all tests with it
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Getenv("TIDEMARK_BIN"), args...)
	cmd.Env = d.env()
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// run is one verb, which must succeed.
func (d *daemon) run(args ...string) string {
	d.t.Helper()
	out, err := d.try(args...)
	if err != nil {
		d.t.Fatalf("tidemark %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// status is what the tests here look at.
type status struct {
	Groups []struct {
		Name     string `json:"name"`
		Mode     string `json:"mode"`
		Since    uint64 `json:"consistent_since"`
		Captured uint64 `json:"captured_position"`
		Durable  uint64 `json:"durable_position"`
		Disks    []struct {
			Gap  int64  `json:"gap_bytes"`
			Lost uint64 `json:"lost_writes"`
		} `json:"disks"`
	} `json:"groups"`
}

// settle waits until the group is consistent and all of it is in the vault. It
// returns how many writes were lost to gaps so far.
func (d *daemon) settle(group string) (lost uint64) {
	d.t.Helper()
	deadline := time.Now().Add(3 * time.Minute)
	for {
		text := d.run("status", "--json")
		var s status
		if err := json.Unmarshal([]byte(text), &s); err != nil {
			d.t.Fatalf("%v in %s", err, text)
		}
		for _, g := range s.Groups {
			var gap int64
			var n uint64
			for _, disk := range g.Disks {
				gap += disk.Gap
				n += disk.Lost
			}
			if g.Name == group && g.Since > 0 && gap == 0 && g.Captured == g.Durable {
				return n
			}
		}
		if time.Now().After(deadline) {
			d.t.Fatalf("group %s does not settle: %s", group, text)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// restored is a disk of a group as it was at a point.
func (d *daemon) restored(group, point string) []byte {
	d.t.Helper()
	file := filepath.Join(d.dir, "restored")
	defer os.Remove(file)
	d.run("restore", "--vault", d.vault, group, "--at", point, "--to", file)
	b, err := os.ReadFile(file)
	if err != nil {
		d.t.Fatal(err)
	}
	return b
}
