package live

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// daemonWithSnapshots is one whose devices and snapshots are gone when the test ends.
func daemonWithSnapshots(t *testing.T) *program.Daemon {
	testkit.Need(t, "root", "loop", "fuse")
	d := program.New(t, "--nodes", filepath.Join(t.TempDir(), "nodes"))
	t.Cleanup(func() {
		for _, s := range snapshots(t, d) {
			d.Run("snapshot", "destroy", s.ID)
		}
		var devices []struct{ Name string }
		decode(t, d.Run("device", "ls", "--json"), &devices)
		for _, v := range devices {
			d.Run("device", "rm", v.Name)
		}
	})
	return d
}

func decode(t *testing.T, text string, into any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), into); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
}

type snapshot struct{ ID, State string }

func snapshots(t *testing.T, d *program.Daemon) (out []snapshot) {
	t.Helper()
	decode(t, d.Run("snapshot", "ls", "--json"), &out)
	return out
}

// device serves a backing through the loop front, and gives the node as it was printed.
func device(d *program.Daemon, name, backing string) string {
	return strings.TrimSpace(d.Run("device", "create", "--backing", backing, "--name", name, "--front", "loop"))
}

// backingFile lies in the daemon's folder, which outlives the devices.
func backingFile(t *testing.T, d *program.Daemon, name string, size int64) string {
	t.Helper()
	path := filepath.Join(d.Dir, name)
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size)); err != nil {
		t.Fatal(err)
	}
	return path
}

// take prepares and takes a snapshot, and gives its id and its images by the
// devices' nodes, as the verb prints them.
func take(t *testing.T, d *program.Daemon, args ...string) (id string, images map[string]string) {
	t.Helper()
	id = strings.TrimSpace(d.Run(append([]string{"snapshot", "create"}, args...)...))
	if text := d.Run("snapshot", "take", id); text != "" {
		t.Errorf("take prints %q", text)
	}
	return id, imagesOf(t, d, id)
}

func imagesOf(t *testing.T, d *program.Daemon, id string) map[string]string {
	t.Helper()
	images := map[string]string{}
	for line := range strings.Lines(d.Run("snapshot", "images", id)) {
		node, image, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		if !ok {
			t.Fatalf("images prints %q", line)
		}
		images[node] = image
	}
	return images
}

// raw is a device under self-describing sectors.
type raw struct {
	node string
	disk int
	size int64
	seqs []uint64 // that each sector has
}

// write opens the node for each burst: a daemon that is killed between them fails nobody.
func (r *raw) write(t *testing.T, seq uint64, places ...[2]int64) {
	t.Helper()
	f, err := os.OpenFile(r.node, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, p := range places {
		b := aligned(t, int(p[1]))
		testkit.Fill(b, r.disk, p[0], seq)
		if _, err := f.WriteAt(b, p[0]); err != nil {
			t.Fatalf("%s at %d+%d: %v", r.node, p[0], p[1], err)
		}
		for s := p[0] / 512; s < (p[0]+p[1])/512; s++ {
			r.seqs[s] = seq
		}
	}
}

// holds checks every sector of a node.
func (r *raw) holds(t *testing.T, node string, want []uint64, what string) {
	t.Helper()
	f, err := os.OpenFile(node, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := aligned(t, int(r.size))
	if _, err := f.ReadAt(p, 0); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	got, err := testkit.Check(p, r.disk, 0)
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("%s: sector %d came with write %d, want %d", what, i, got[i], want[i])
		}
	}
}

// boundaries are writes before, across and after borders of chunks.
func boundaries(rng *rand.Rand, size, chunk int64, n int) (out [][2]int64) {
	for range n {
		border := (1 + rng.Int64N(size/chunk-1)) * chunk
		off := max(0, border-512*rng.Int64N(4))
		n := []int64{512, 1024, 4096, chunk - 512, chunk, chunk + 512, 2*chunk + 1024}[rng.IntN(7)]
		out = append(out, [2]int64{off, min(max(n, 512), size-off)})
	}
	return out
}

// TestSnapshotSectors: two devices at one instant, written to at the borders of
// chunks before, between and after kills of the daemon; images changed; one
// snapshot after the other, side by side, destroyed in another order; storage that
// is full spoils its own snapshot alone; what images hold reaches a vault.
func TestSnapshotSectors(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		const size = 2*mib + 512*9
		chunk := int64(4096 << rng.IntN(5))
		d := daemonWithSnapshots(t)
		var devices []*raw
		for i := range 2 {
			r := &raw{disk: i, size: size, seqs: make([]uint64, size/512)}
			r.node = device(d, fmt.Sprint("d", i), backingFile(t, d, fmt.Sprint("backing", i), size))
			r.write(t, 1, [2]int64{0, size})
			devices = append(devices, r)
		}
		dir := d.Dir
		args := func(name, limit string) []string {
			return []string{"--storage", filepath.Join(dir, name) + ":" + limit, "--chunk", fmt.Sprint(chunk), devices[0].node, "d1"}
		}
		type one struct {
			id   string
			want [2][]uint64
		}
		var all []one
		check := func(s one) {
			t.Helper()
			images := imagesOf(t, d, s.id)
			for i, r := range devices {
				if images[r.node] == "" {
					t.Fatalf("no image of %s among %v", r.node, images)
				}
				r.holds(t, images[r.node], s.want[i], fmt.Sprintf("image %d of %s, chunk %d", i, s.id, chunk))
			}
		}
		seq := uint64(1)
		burst := func() {
			t.Helper()
			seq++
			for _, r := range devices {
				r.write(t, seq, boundaries(rng, size, chunk, 12)...)
			}
		}
		killed := rng.IntN(3)
		for round := range 3 {
			burst()
			id, _ := take(t, d, args(fmt.Sprint("diff", len(all)), "64M")...)
			all = append(all, one{id, [2][]uint64{slices.Clone(devices[0].seqs), slices.Clone(devices[1].seqs)}})
			burst()
			if round == killed {
				d.Restart()
				burst()
			}
		}
		image := raw{node: imagesOf(t, d, all[1].id)[devices[1].node], disk: 1, size: size, seqs: all[1].want[1]}
		image.write(t, 1000, boundaries(rng, size, chunk, 8)...)
		for _, s := range all {
			check(s)
		}
		d.Run("snapshot", "copy", all[1].id, "--vault", d.Vault, "--name", "both")
		full, _ := take(t, d, args("small", "1M")...)
		for _, r := range devices {
			r.write(t, seq+1, [2]int64{0, size})
		}
		if text := d.Run("snapshot", "events", full); !strings.Contains(text, "overflow") || !strings.Contains(text, "corrupt") {
			t.Errorf("events of a full storage: %q", text)
		}
		for node, image := range imagesOf(t, d, full) {
			if _, err := os.ReadFile(image); err == nil {
				t.Errorf("the image of %s can be read although its storage was full", node)
			}
		}
		for _, i := range []int{1, 0} {
			check(all[i])
			d.Run("snapshot", "destroy", all[i].id)
			check(all[2])
		}
		d.Run("snapshot", "destroy", full)
		before := d.Run("points", "--vault", d.Vault, "both", "--json")
		cutOff := d.Background("snapshot", "copy", all[2].id, "--vault", d.Vault, "--name", "both")
		time.Sleep(time.Duration(rng.IntN(200)) * time.Millisecond) // anywhere in it
		d.Restart()
		_ = cutOff.Wait() // it lost its daemon, or was done
		d.Run("verify", "--vault", d.Vault)
		if after := d.Run("points", "--vault", d.Vault, "both", "--json"); after != before && !strings.Contains(after, all[2].id) {
			t.Errorf("a copy that was cut off: the points are %s, were %s", after, before)
		}
		d.Run("snapshot", "copy", all[2].id, "--vault", d.Vault, "--name", "both")
		for i, r := range devices {
			r.holds(t, r.node, r.seqs, "the device")
			for _, s := range all[1:] {
				to := filepath.Join(dir, "restored")
				d.Run("restore", "--vault", d.Vault, "both", "--disk", fmt.Sprint("d", i), "--at", s.id, "--to", to, "--force")
				r.holds(t, to, s.want[i], "restored from the vault")
			}
		}
		// The same place again, after all that.
		id, _ := take(t, d, args("small", "64M")...)
		s := one{id, [2][]uint64{slices.Clone(devices[0].seqs), slices.Clone(devices[1].seqs)}}
		burst()
		check(s)
	})
}

// TestSnapshotFileSystems: file systems on served devices and on images are clean,
// with the difference storage on the device itself where its file system allows
// that; an image can be mounted and is destroyed under who reads it.
func TestSnapshotFileSystems(t *testing.T) {
	for kind, size := range map[string]int64{"ext4": 64 * mib, "xfs": 320 * mib, "btrfs": 128 * mib} {
		t.Run(kind, func(t *testing.T) {
			testkit.Need(t, "root", "loop", "fuse", kind)
			snapshotFileSystem(t, kind, size)
		})
	}
}

func snapshotFileSystem(t *testing.T, kind string, size int64) {
	d := daemonWithSnapshots(t)
	backing := backingFile(t, d, "backing", size)
	if kind == "btrfs" { // whose tools take any two loop devices of ours, mounted by whomever, for one: they get the file
		testkit.Mkfs(t, backing, kind)
	}
	node := device(d, "data", backing)
	var options []string
	if kind == "ext4" {
		options = []string{"-b", "4096"} // those with smaller blocks do not lie where difference storage can
	}
	if kind != "btrfs" {
		testkit.Mkfs(t, node, kind, options...)
	}
	mnt := testkit.Mount(t, node)
	content := func(b byte) []byte { return bytes.Repeat([]byte{b}, 3*mib) }
	put := func(b byte) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(mnt, "file"), content(b), 0o600); err != nil {
			t.Fatal(err)
		}
		testkit.Run(t, "sync", "-f", mnt)
	}
	put('a')
	storage := filepath.Join(mnt, "diff")
	if kind == "btrfs" {
		d.Refused(5, "snapshot", "create", "--storage", storage+":16M", "data")
		if _, err := os.Stat(storage); !os.IsNotExist(err) {
			t.Errorf("what was refused is left: %v", err)
		}
		storage = filepath.Join(d.Dir, "diff")
	}
	id, images := take(t, d, "--storage", storage+":16M", "--chunk", "4K", "data")
	put('b')
	image := images[node]
	fsck(t, kind, image)
	if kind == "btrfs" { // which must never see its own copy
		d.Run("snapshot", "copy", id, "--vault", d.Vault)
		d.Run("snapshot", "destroy", id)
	} else {
		destroyedUnderReaders(t, d, kind, id, image, content('a'))
	}
	if got, err := os.ReadFile(filepath.Join(mnt, "file")); err != nil || !bytes.Equal(got, content('b')) {
		t.Errorf("the device's file: %v", err)
	}
	testkit.Unmount(t, mnt)
	fsck(t, kind, node)
	to := filepath.Join(d.Dir, "restored")
	d.Run("restore", "--vault", d.Vault, "data", "--at", "latest", "--to", to)
	fsck(t, kind, to)
}

// destroyedUnderReaders mounts the image, reads it, writes to it, copies it into a
// vault, and destroys the snapshot while it is mounted and open.
func destroyedUnderReaders(t *testing.T, d *program.Daemon, kind, id, image string, want []byte) {
	t.Helper()
	d.Run("snapshot", "copy", id, "--vault", d.Vault)
	var options []string
	if kind == "xfs" {
		options = []string{"nouuid"}
	}
	at := testkit.Mount(t, image, options...)
	if got, err := os.ReadFile(filepath.Join(at, "file")); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("the image's file: %v", err)
	}
	if err := os.WriteFile(filepath.Join(at, "private"), want, 0o600); err != nil {
		t.Error(err)
	}
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	reader := exec.Command("sh", "-c", "while dd if="+image+" of=/dev/null bs=1M iflag=direct 2>/dev/null; do :; done")
	if err := reader.Start(); err != nil {
		t.Fatal(err)
	}
	d.Run("snapshot", "destroy", id)
	timer := time.AfterFunc(patience, func() { _ = reader.Process.Kill() })
	if err := reader.Wait(); err != nil || !timer.Stop() {
		t.Errorf("the reader met no error: %v", err)
	}
	if len(snapshots(t, d)) != 0 {
		t.Error("the snapshot is still listed")
	}
	if _, err := os.Stat(image); !os.IsNotExist(err) {
		t.Errorf("the image's node: %v", err)
	}
	_ = exec.Command("umount", "-l", at).Run() // its device is gone
}

func fsck(t *testing.T, kind, path string) {
	t.Helper()
	switch kind {
	case "ext4":
		testkit.Run(t, "e2fsck", "-fn", path)
	case "xfs": // whose freeze leaves a log to be replayed
		at := testkit.Mount(t, path, "loop", "nouuid")
		testkit.Unmount(t, at)
		testkit.Run(t, "xfs_repair", "-n", path)
	case "btrfs":
		testkit.Run(t, "btrfs", "check", "--readonly", "--force", path)
	}
}

// TestSnapshotLargeBlocks: a backing with logical blocks of 4096 bytes gives a
// device and an image of such; what is discarded or zeroed on the device the image keeps.
func TestSnapshotLargeBlocks(t *testing.T) {
	disk := testkit.NewDiskOf(t, 8*mib, 4096)
	d := daemonWithSnapshots(t)
	node := device(d, "data", disk.Path)
	r := &raw{node: node, size: 8 * mib, seqs: make([]uint64, 8*mib/512)}
	r.write(t, 1, [2]int64{0, r.size})
	id, images := take(t, d, "--storage", filepath.Join(d.Dir, "diff")+":32M", "--chunk", "16K", "data")
	for _, n := range []string{node, images[node]} {
		if got := strings.TrimSpace(testkit.Run(t, "blockdev", "--getss", n)); got != "4096" {
			t.Errorf("%s has logical blocks of %s bytes", n, got)
		}
	}
	want := slices.Clone(r.seqs)
	testkit.Run(t, "blkdiscard", "-f", "-o", "1M", "-l", "1M", node)
	testkit.Run(t, "blkdiscard", "-f", "-z", "-o", "3M", "-l", "1064960", node)
	r.write(t, 2, [2]int64{5*mib - 4096, 8192})
	r.holds(t, images[node], want, "the image")
	d.Run("snapshot", "copy", id, "--vault", d.Vault)
	to := filepath.Join(d.Dir, "restored")
	d.Run("restore", "--vault", d.Vault, "data", "--at", id, "--to", to)
	r.holds(t, to, want, "restored from the vault")
}

// TestTappedChanges: the map of a tapped disk is read by the same verbs; it names
// what was written since the tap began, also after the daemon was killed.
func TestTappedChanges(t *testing.T) {
	disk := testkit.NewDisk(t, 16*mib)
	d := program.New(t)
	d.Protect("g", disk.Path)
	d.Settle("g")
	r := &raw{node: disk.Path, size: disk.Size, seqs: make([]uint64, 16*mib/512)}
	type changeMap struct {
		Name       string
		WayIn      string `json:"way_in"`
		Generation string
		BlockSize  int64 `json:"block_size"`
		Extents    []struct{ Offset, Length int64 }
	}
	var all []changeMap
	decode(t, d.Run("cbt", "ls", "--json"), &all)
	if len(all) != 1 || all[0].WayIn != "tap" || all[0].BlockSize == 0 {
		t.Fatalf("%+v", all)
	}
	name, block := all[0].Name, all[0].BlockSize
	want := map[int64]bool{}
	write := func(off, n int64) {
		r.write(t, 7, [2]int64{off, n})
		for b := off / block; b*block < off+n; b++ {
			want[b] = true
		}
	}
	check := func() {
		t.Helper()
		var m changeMap
		decode(t, d.Run("cbt", "read", name, "--json"), &m)
		got := map[int64]bool{}
		for _, e := range m.Extents {
			for b := e.Offset / block; b*block < e.Offset+e.Length; b++ {
				got[b] = true
			}
		}
		if !maps.Equal(got, want) || m.Generation != all[0].Generation {
			t.Errorf("blocks %v of generation %s, want %v of %s", got, m.Generation, want, all[0].Generation)
		}
	}
	write(0, 512)
	write(5*mib-512, 1024)
	check()
	d.Kill()
	write(9*mib, 64<<10)
	d.Start()
	d.Settle("g")
	check()
	d.Refused(11, "cbt", "read", name, "--since", all[0].Generation+":1")
	d.Refused(exitRefused, "cbt", "mark", name, "0:4K")
	d.Refused(exitRefused, "cbt", "reset", name)
}
