package live

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"tidemark/internal/loop"
	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// TestFileSystems: mounted file systems under fio and SQLite. Crash-consistent
// points are clean after the journal's replay, file-system-consistent ones of
// ext4 and btrfs as they are; at every one the database has all that was
// committed before it.
func TestFileSystems(t *testing.T) {
	for kind, size := range map[string]int64{"ext4": 96 * mib, "xfs": 320 * mib, "btrfs": 128 * mib} {
		t.Run(kind, func(t *testing.T) {
			testkit.Need(t, "root", "tap", "loop", "fio", "sqlite3", kind)
			eachSeed(t, func(t *testing.T, rng *rand.Rand) { fileSystem(t, rng, kind, size) })
		})
	}
}

func fileSystem(t *testing.T, rng *rand.Rand, kind string, size int64) {
	disk := testkit.NewDisk(t, size)
	testkit.Mkfs(t, disk.Path, kind)
	mnt := testkit.Mount(t, disk.Path)
	d := program.New(t)
	d.Protect("g", "--ring-size", "256M", disk.Path)
	db, work := startDatabase(t, mnt), startFio(t, mnt)
	committed := map[string]int64{}
	mark := func(name, consistency string) {
		t.Helper()
		committed[name] = db.rows.Load()
		d.Run("bookmark", "g", name, "--consistency", consistency)
	}
	for i := range 2 {
		db.reach(db.rows.Load() + 5 + rng.Int64N(40))
		mark(fmt.Sprint("crash-", i), "crash")
		db.reach(db.rows.Load() + 5 + rng.Int64N(40))
		mark(fmt.Sprint("filesystem-", i), "filesystem")
	}
	work.wait()
	db.end()
	mark("filesystem-end", "filesystem")
	d.Settle("g")
	viewed(t, d, kind, "crash-0", committed["crash-0"])
	testkit.Unmount(t, mnt)
	identical(t, d, "g")
	if kind == "btrfs" { // which must never see its own copy
		d.Stop()
		if err := loop.Detach(disk.Path); err != nil {
			t.Fatal(err)
		}
		view := t.TempDir()
		d.Run("mount", "--vault", d.Vault, "g", "--at", "crash-1", view)
		t.Cleanup(func() { testkit.Unmount(t, view) })
		holds(t, view, committed["crash-1"])
		testkit.Unmount(t, view)
	}
	for name, rows := range committed {
		c := &copied{t: t, kind: kind, file: d.Restored("g", "", name)}
		if strings.HasPrefix(name, "filesystem") && kind != "xfs" { // after a freeze xfs still has a log
			c.clean(c.file)
		}
		c.replayed(func(dir string) {
			holds(t, dir, rows)
			if name == "filesystem-end" {
				fio(t, dir, "--verify_only=1")
			}
		})
		os.Remove(c.file)
	}
}

// viewed mounts a point beside its original, as `tidemark mount` does it: xfs
// under the same UUID, btrfs not.
func viewed(t *testing.T, d *program.Daemon, kind, at string, rows int64) {
	t.Helper()
	view := t.TempDir()
	args := []string{"mount", "--vault", d.Vault, "g", "--at", at, view}
	if kind == "btrfs" {
		d.Refused(exitInUse, args...)
		return
	}
	d.Run(args...)
	t.Cleanup(func() { testkit.Unmount(t, view) })
	holds(t, view, rows)
	testkit.Unmount(t, view)
}

// database is an sqlite3 process that commits a row at a time.
type database struct {
	t    *testing.T
	rows atomic.Int64 // known to be committed
	most atomic.Int64 // that it may go to: nobody outruns a busy machine's daemon
	stop atomic.Bool
	done chan error
}

func startDatabase(t *testing.T, mnt string) *database {
	t.Helper()
	db := &database{t: t, done: make(chan error, 1)}
	cmd := exec.Command("sqlite3", "-batch", filepath.Join(mnt, "db"))
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
	t.Cleanup(func() { db.stop.Store(true); _ = cmd.Process.Kill() })
	answers := bufio.NewScanner(out)
	say := func(text string) (string, error) {
		if _, err := fmt.Fprintln(in, text); err != nil {
			return "", err
		}
		answers.Scan()
		return answers.Text(), answers.Err()
	}
	// With less a commit is the removal of a journal that a power cut may undo.
	if _, err := say("PRAGMA synchronous=EXTRA; CREATE TABLE t(n INTEGER PRIMARY KEY, b BLOB); SELECT 0;"); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer cmd.Wait() //nolint:errcheck // what it says is looked at line by line
		defer in.Close()
		for !db.stop.Load() {
			n := db.rows.Load() + 1
			if n > db.most.Load() {
				time.Sleep(time.Millisecond)
				continue
			}
			text, err := say(fmt.Sprintf("INSERT INTO t VALUES(%d, randomblob(%d)); SELECT %d;", n, 100+n%3000, n))
			if err == nil && text != strconv.FormatInt(n, 10) {
				err = fmt.Errorf("sqlite3 said %q to row %d", text, n)
			}
			if err != nil {
				db.done <- err
				return
			}
			db.rows.Store(n)
		}
		db.done <- nil
	}()
	return db
}

// reach waits for so many rows.
func (db *database) reach(rows int64) {
	db.t.Helper()
	db.most.Store(rows + 20) // it goes on while the caller does something
	program.Eventually(db.t, patience, fmt.Sprintf("%d rows are committed", rows), func() error {
		if n := db.rows.Load(); n < rows {
			return fmt.Errorf("%d are", n)
		}
		return nil
	})
}

func (db *database) end() {
	db.t.Helper()
	db.stop.Store(true)
	if err := <-db.done; err != nil {
		db.t.Fatal(err)
	}
}

// holds checks a database, and that it has at least the rows that were committed.
func holds(t *testing.T, dir string, rows int64) {
	t.Helper()
	// A copy: the view may be read-only, and the database has a journal to replay.
	own := t.TempDir()
	for _, name := range []string{"db", "db-journal"} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if name == "db-journal" && os.IsNotExist(err) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(own, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out := strings.Fields(testkit.Run(t, "sqlite3", "-batch", filepath.Join(own, "db"), "PRAGMA integrity_check; SELECT count(*), max(n) FROM t;"))
	var count, newest int64
	if len(out) != 2 || out[0] != "ok" {
		t.Fatalf("the database is damaged: %q", out)
	}
	if _, err := fmt.Sscanf(out[1], "%d|%d", &count, &newest); err != nil || count != newest || count < rows {
		t.Errorf("%d rows, the newest is %d, and %d were committed: %v", count, newest, rows, err)
	}
}

// fio writes files that it can tell from others, in part, in any order, or
// checks them.
func fio(t *testing.T, dir string, more ...string) {
	t.Helper()
	testkit.Run(t, "fio", fioArgs(dir, more...)...)
}

func fioArgs(dir string, more ...string) []string {
	return append([]string{"--name=work", "--directory=" + dir, "--ioengine=psync", "--rw=randwrite", "--bs=4k", "--size=4m", "--numjobs=2",
		"--fsync=16", "--verify=crc32c", "--do_verify=0", "--verify_state_save=0", "--randseed=7", "--output-format=terse"}, more...)
}

// running is a command in the background.
type running struct {
	t    *testing.T
	done chan error
	cmd  *exec.Cmd
}

func startFio(t *testing.T, dir string) *running {
	t.Helper()
	r := &running{t: t, done: make(chan error, 1), cmd: exec.Command("fio", fioArgs(dir)...)}
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { r.done <- r.cmd.Wait() }()
	t.Cleanup(func() { _ = r.cmd.Process.Kill() })
	return r
}

func (r *running) wait() {
	r.t.Helper()
	if err := <-r.done; err != nil {
		r.t.Fatal("fio: ", err)
	}
}

// copied is a restored file system that nobody else looks at.
type copied struct {
	t    *testing.T
	kind string
	file string
}

// clean checks it without a change.
func (c *copied) clean(path string) {
	c.t.Helper()
	switch c.kind {
	case "ext4":
		testkit.Run(c.t, "e2fsck", "-fn", path)
	case "xfs":
		testkit.Run(c.t, "xfs_repair", "-n", path)
	case "btrfs":
		testkit.Run(c.t, "btrfs", "check", "--readonly", path)
	}
}

// replayed mounts it, so that its journal is replayed, looks into it, and checks it after.
func (c *copied) replayed(look func(dir string)) {
	c.t.Helper()
	dev, err := loop.Attach(c.file, loop.Options{})
	if err != nil {
		c.t.Fatal(err)
	}
	defer dev.Detach() //nolint:errcheck // below
	var options []string
	if c.kind == "xfs" {
		options = append(options, "nouuid")
	}
	dir := testkit.Mount(c.t, dev.Path, options...)
	look(dir)
	testkit.Unmount(c.t, dir)
	c.clean(dev.Path)
	if err := dev.Detach(); err != nil {
		c.t.Error(err)
	}
}
