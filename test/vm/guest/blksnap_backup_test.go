//go:build guest

package guest

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"tidemark/internal/control/api"
	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

const blksnapHeaders = "../../../internal/abi/blksnap/testdata"

// agent is a backup client of /dev/blksnap with its own copies of some devices.
type agent struct {
	t       *testing.T
	d       *program.Daemon
	client  string
	folder  string   // of its copies
	storage []string // device, from, first and end, in MiB
	devices []string
}

// backup is one session of an agent: a snapshot, and what is copied from it.
type backup struct {
	*drainer
	of     *agent
	in     io.Writer
	id     string
	images []string
}

// begin takes the snapshot.
func (a *agent) begin() *backup {
	a.t.Helper()
	if err := os.MkdirAll(a.folder, 0o700); err != nil {
		a.t.Fatal(err)
	}
	cmd := exec.CommandContext(a.t.Context(), a.client, slices.Concat([]string{a.folder}, a.storage, a.devices)...)
	in, err := cmd.StdinPipe()
	if err != nil {
		a.t.Fatal(err)
	}
	b := &backup{drainer: follow(a.t, cmd), of: a, in: in}
	for range a.devices {
		b.images = append(b.images, strings.TrimPrefix(b.line("image ", "", a.d.Log), "image "))
	}
	b.id = strings.TrimPrefix(b.line("taken ", "", a.d.Log), "taken ")
	return b
}

func (b *backup) goOn() {
	b.t.Helper()
	if _, err := io.WriteString(b.in, "\n"); err != nil {
		b.t.Fatal(err)
	}
}

// copies has the images copied and compared; n tells how often storage was asked for.
func (b *backup) copies() (kinds []string, n int) {
	b.t.Helper()
	b.goOn()
	for i := range b.of.devices {
		l := b.line("backup ", "", b.of.d.Log)
		b.t.Log(filepath.Base(b.of.folder), l)
		var k int
		var kind string
		var copied, size int64
		if n, _ := fmt.Sscanf(l, "backup %d %s %d %d", &k, &kind, &copied, &size); n < 2 || k != i || kind == "incremental" && copied >= size {
			b.t.Errorf("it says %q of device %d", l, i)
		}
		kinds = append(kinds, kind)
	}
	if _, err := fmt.Sscanf(b.line("copied ", "", b.of.d.Log), "copied after %d", &n); err != nil {
		b.t.Error(err)
	}
	return kinds, n
}

// copy is copies of which each must be full, or incremental.
func (b *backup) copy(how string) (requests int) {
	b.t.Helper()
	kinds, requests := b.copies()
	if slices.ContainsFunc(kinds, func(k string) bool { return k != how }) {
		b.t.Errorf("%s of %s, want %s", kinds, b.of.folder, how)
	}
	return requests
}

// end destroys the snapshot, with the images open.
func (b *backup) end() {
	b.t.Helper()
	b.goOn()
	b.line("destroyed", "", b.of.d.Log)
	if err := b.cmd.Wait(); err != nil {
		b.t.Error(err)
	}
}

func (a *agent) run(how string) {
	a.t.Helper()
	b := a.begin()
	b.copy(how)
	b.end()
}

func (a *agent) copyOf(i int) []byte {
	a.t.Helper()
	b, err := os.ReadFile(filepath.Join(a.folder, fmt.Sprint(i, ".copy")))
	if err != nil {
		a.t.Fatal(err)
	}
	return b
}

// TestBlksnapBackup: agents for image backups, unmodified, over a mounted device
// and two raw ones under load: full copies, then increments by the change map, each
// compared with the image byte by byte, while storage is appended as it is asked
// for; two agents at a time with a device in common; the daemon killed while an
// image is held; storage that overflows; images destroyed while open and mounted.
// The writers never see an error.
func TestBlksnapBackup(t *testing.T) {
	testkit.Need(t, "cuse", "ext4")
	client := compiled(t, "blksnap_backup", blksnapHeaders)
	storage := testkit.NewDisk(t, 3<<30) // sparse, and let go by the daemon before it is detached
	rng, kinds := seed(t), fronts()
	d := program.New(t, "--compat", "blksnap")
	fs := served(t, d, "fs", kinds[0], 8<<20)
	testkit.Run(t, "mkfs.ext4", "-q", fs)
	dir := testkit.Mount(t, fs)
	nodes := []string{fs, served(t, d, "first", kinds[0], 2*noiseStart), served(t, d, "second", kinds[len(kinds)-1], 2*noiseStart)}
	raws := []*raw{openRaw(t, nodes[1]), openRaw(t, nodes[2])}
	stop, wrote := make(chan struct{}), make(chan error, 1)
	go func() { wrote <- churn(dir, stop) }()
	counted := counted(t, raws, rng)
	buf := aligned(t, noiseStart)
	place := int64(0)
	once := func() { // to places of the raw devices that nothing else is ever written to
		t.Helper()
		place += 4096
		binary.LittleEndian.PutUint64(buf, uint64(place))
		for _, r := range raws {
			if _, err := r.file.WriteAt(buf[:4096], place); err != nil {
				t.Fatal(err)
			}
		}
	}
	overwrite := func() {
		t.Helper()
		for _, r := range raws {
			for off := int64(noiseStart); off < r.size; off += noiseStart {
				if _, err := r.file.WriteAt(buf, off); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	agentOf := func(name, from, first, end string, devices ...string) *agent {
		return &agent{t, d, client, filepath.Join(d.Dir, name), []string{storage.Path, from, first, end}, devices}
	}
	oneInstant := func(a *agent) {
		t.Helper()
		testkit.Run(t, "e2fsck", "-fn", filepath.Join(a.folder, "0.copy"))
		if x, y := counter(a.copyOf(1)), counter(a.copyOf(2)); x != y && x != y+1 || x == 0 {
			t.Errorf("the first image has write %d and the second %d, which came after it", x, y)
		}
	}

	// Room for 1 MiB above what is too little: then more is asked for, while it is held.
	all := agentOf("all", "0", "513", "1300", nodes...)
	once()
	b := all.begin()
	once()
	overwrite()
	program.Eventually(t, time.Minute, "the native command sees storage that was appended", func() error {
		var all []api.Snapshot
		text := d.Run("snapshot", "ls", "--json")
		if err := json.Unmarshal([]byte(text), &all); err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		if len(all) != 1 || all[0].ID != b.id || len(all[0].Devices) != 3 || all[0].State != "taken" || all[0].Storage.Capacity < 800<<20 {
			return errors.New(text)
		}
		return nil
	})
	if n := b.copy("full"); n < 2 {
		t.Errorf("it was asked for storage %d times", n)
	}
	oneInstant(all)
	b.end()

	// Two agents, with a device in common: what the earlier one notes must fit its image.
	one, other := agentOf("one", "0", "520", "1300", nodes[0], nodes[1]), agentOf("other", "1300", "1820", "3000", nodes[1], nodes[2])
	b = one.begin()
	once()
	c := other.begin()
	once()
	b.copy("full")
	c.copy("full")
	b.end()
	c.end()
	once()
	one.run("incremental")

	// The daemon is killed while images are held: nothing notes what changed before.
	b = all.begin()
	once()
	d.Restart()
	once()
	b.copy("full")
	b.end()
	once()
	all.run("full")

	// An overflow ends the images and nothing else.
	once()
	small := agentOf("all", "0", "1", "1", nodes...)
	b = small.begin()
	overwrite()
	if kinds, _ := b.copies(); kinds[1] != "spoiled" {
		t.Errorf("more was overwritten than its storage holds, and the images are %s", kinds)
	}
	b.end()
	once()
	b = all.begin()
	b.copy("incremental")
	oneInstant(all)

	// Destroyed while it is mounted.
	image := t.TempDir()
	testkit.Run(t, "mount", "-o", "ro,noload", b.images[0], image)
	t.Cleanup(func() { _ = exec.Command("umount", image).Run() })
	b.end()
	if _, err := os.Lstat(b.images[0]); err == nil {
		t.Error("the image's node is still there")
	}
	testkit.Run(t, "umount", image)
	nothingLeft(t, "the mounted image", 3)

	close(stop)
	counted()
	if err := <-wrote; err != nil {
		t.Error(err)
	}
	testkit.Run(t, "umount", dir)
	all.run("incremental")
	for i, r := range raws {
		r.same("the copy at the end", all.copyOf(i+1))
		r.file.Close()
	}
	testkit.Run(t, "e2fsck", "-fn", fs)
	for _, name := range []string{"fs", "first", "second"} {
		d.Run("device", "rm", name)
	}
	nothingLeft(t, "the devices", 0)
}
