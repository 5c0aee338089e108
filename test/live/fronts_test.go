package live

import (
	"encoding/json"
	"errors"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// served makes a device over a file of a size, or as it is where that is 0, and
// gives its node and the file.
func served(t *testing.T, d *program.Daemon, name, front string, size int64) (node, file string) {
	t.Helper()
	file = filepath.Join(d.Dir, name+".img")
	if size > 0 {
		testkit.Run(t, "truncate", "-s", strconv.FormatInt(size, 10), file)
	}
	node = strings.TrimSpace(d.Run("device", "create", "--backing", file, "--front", front, "--name", name))
	removed(t, d, name)
	return node, file
}

// removed takes a device away before its daemon ends, where a failed test did not:
// a loop device would stay for ever.
func removed(t *testing.T, d *program.Daemon, name string) {
	t.Cleanup(func() { _, _ = d.Verb("device", "rm", name) })
}

// verified has fio write and read back a device, with checksums in every block.
func verified(t *testing.T, args ...string) {
	t.Helper()
	testkit.Run(t, "fio", append([]string{"--name=v", "--rw=randwrite", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--verify_backlog=64",
		"--size=24m", "--bsrange=4k-64k", "--blockalign=4k", "--output-format=terse"}, args...)...)
}

// TestServedLoop: a device of the loop front under fio, with 4096-byte blocks,
// zeroed, discarded, grown, and with each file system on it; it is not taken
// away while it is mounted.
func TestServedLoop(t *testing.T) {
	testkit.Need(t, "root", "tap", "loop", "fuse", "fio", "ext4", "xfs", "btrfs")
	d := program.New(t)
	t.Run("blocks of 4096 bytes", func(t *testing.T) {
		disk := testkit.NewDiskOf(t, 32*mib, 4096)
		node := strings.TrimSpace(d.Run("device", "create", "--backing", disk.Path, "--front", "loop", "--name", "blocks"))
		removed(t, d, "blocks")
		for flag, want := range map[string]string{"--getss": "4096", "--getpbsz": "4096", "--getsize64": "33554432"} {
			if got := strings.TrimSpace(testkit.Run(t, "blockdev", flag, node)); got != want {
				t.Errorf("%s of the device: %s, of its backing %s", flag, got, want)
			}
		}
		verified(t, "--filename="+node, "--direct=1", "--ioengine=libaio")
		for _, how := range [][]string{{"-z"}, {}} {
			testkit.Run(t, "dd", "if=/dev/urandom", "of="+node, "bs=64k", "count=16", "oflag=direct", "status=none")
			testkit.Run(t, "blkdiscard", append(how, "-o", "65536", "-l", "131072", node)...)
			testkit.Run(t, "cmp", "-n", "131072", node, "/dev/zero", "-i", "65536:0")
			if exec.Command("cmp", "-n", "65536", node, "/dev/zero").Run() == nil {
				t.Errorf("blkdiscard %s of a range: what lies before it is gone", how)
			}
		}
		d.Run("device", "rm", "blocks")
	})
	for kind, check := range map[string][]string{"ext4": {"e2fsck", "-fn"}, "xfs": {"xfs_repair", "-n"}, "btrfs": {"btrfs", "check", "--readonly"}} {
		t.Run(kind, func(t *testing.T) {
			// btrfs's tools take two loop devices of ours for one: they get the file.
			node, file := served(t, d, kind, "loop", 320*mib)
			ours := kind != "btrfs"
			if ours {
				testkit.Mkfs(t, node, kind)
			} else {
				d.Run("device", "rm", kind)
				testkit.Mkfs(t, file, kind)
				node, _ = served(t, d, kind, "loop", 0)
			}
			dir := testkit.Mount(t, node)
			verified(t, "--directory="+dir, "--ioengine=libaio", "--direct=1", "--end_fsync=1")
			d.Refused(9, "device", "rm", kind)
			testkit.Unmount(t, dir)
			if ours {
				testkit.Run(t, check[0], append(check[1:], node)...)
			}
			d.Run("device", "resize", kind, "--size", "400M")
			if got := strings.TrimSpace(testkit.Run(t, "blockdev", "--getsize64", node)); got != "419430400" {
				t.Errorf("grown to 400 MiB it has %s bytes", got)
			}
			d.Run("device", "rm", kind)
			testkit.Run(t, check[0], append(check[1:], file)...)
		})
	}
}

// TestServedNBD: a device of the NBD server under fio with verification, beside
// filters and a snapshot, and as the usual clients see it.
func TestServedNBD(t *testing.T) {
	testkit.Need(t, "root", "tap", "loop", "fio", "nbdclients")
	d := program.New(t)
	uri, file := served(t, d, "data", "nbd-server", 48*mib)
	verified(t, "--ioengine=nbd", "--uri="+uri)
	verified(t, "--ioengine=nbd", "--uri="+uri, "--iodepth=1", "--size=2m", "--bsrange=4k-4k")
	id := strings.TrimSpace(d.Run("snapshot", "create", "--storage", filepath.Join(d.Dir, "diff")+":64M", "data"))
	d.Run("snapshot", "take", id)
	before := filepath.Join(d.Dir, "before")
	testkit.Run(t, "cp", file, before)
	verified(t, "--ioengine=nbd", "--uri="+uri, "--randseed=9")
	_, image, _ := strings.Cut(strings.TrimSpace(d.Run("snapshot", "images", id)), " ")
	testkit.Run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", before, image)
	d.Run("snapshot", "destroy", id)
	testkit.Run(t, "nbdcopy", "--connections=4", before, uri)
	testkit.Run(t, "cmp", before, file)
	var info struct {
		Exports []struct{ Description string }
	}
	if err := json.Unmarshal([]byte(testkit.Run(t, "nbdinfo", "--json", uri)), &info); err != nil || len(info.Exports) != 1 || !strings.Contains(info.Exports[0].Description, "data") {
		t.Errorf("nbdinfo: %+v (%v)", info, err)
	}
}

// TestServedIncrement: unmodified NBD clients find what changed on a served device
// after each snapshot, as dirty bitmaps of the device and of a later image, and a
// full copy with the increment over it is the later image.
func TestServedIncrement(t *testing.T) {
	testkit.Need(t, "root", "tap", "loop", "nbdclients")
	d := program.New(t)
	uri, _ := served(t, d, "data", "nbd-server", 4*mib)
	take := func(name string) (image string) {
		id := strings.TrimSpace(d.Run("snapshot", "create", "--storage", filepath.Join(d.Dir, name)+":8M", "data"))
		t.Cleanup(func() { _, _ = d.Verb("snapshot", "destroy", id) })
		d.Run("snapshot", "take", id)
		_, image, _ = strings.Cut(strings.TrimSpace(d.Run("snapshot", "images", id)), " ")
		return image
	}
	// dirty are the ranges of a bitmap, as nbdinfo tells them.
	dirty := func(uri, bitmap string) (out [][2]int64) {
		t.Helper()
		var runs []struct{ Offset, Length, Type int64 }
		if err := json.Unmarshal([]byte(testkit.Run(t, "nbdinfo", "--json", "--map=qemu:dirty-bitmap:"+bitmap, uri)), &runs); err != nil {
			t.Fatal(err)
		}
		for _, r := range runs {
			if r.Type == 1 {
				out = append(out, [2]int64{r.Offset, r.Length})
			}
		}
		return out
	}
	testkit.Run(t, "qemu-io", "-f", "raw", uri, "-c", "write -P 1 0 4M")
	full := filepath.Join(d.Dir, "full")
	testkit.Run(t, "nbdcopy", take("first"), full)
	testkit.Run(t, "qemu-io", "-f", "raw", uri, "-c", "write -P 2 1M 4k", "-c", "write -z 2M 64k", "-c", "discard 3M 4k")
	want := [][2]int64{{1 << 20, 4096}, {2 << 20, 65536}, {3 << 20, 4096}}
	second := take("second")
	testkit.Run(t, "qemu-io", "-f", "raw", uri, "-c", "write -P 3 8k 4k")
	if got := dirty(second, "since-1"); !slices.Equal(got, want) {
		t.Errorf("between the snapshots %v changed, want %v", got, want)
	}
	if got, want := dirty(uri, "since-1"), append([][2]int64{{8192, 4096}}, want...); !slices.Equal(got, want) {
		t.Errorf("since the first %v changed, want %v", got, want)
	}
	if got, want := dirty(uri, "since-2"), [][2]int64{{8192, 4096}}; !slices.Equal(got, want) {
		t.Errorf("since the second %v changed, want %v", got, want)
	}
	for _, r := range want { // as backup tools do
		part := filepath.Join(d.Dir, "part")
		testkit.Run(t, "qemu-img", "dd", "-f", "raw", "-O", "raw", "bs=4096", "skip="+strconv.FormatInt(r[0]/4096, 10), "count="+strconv.FormatInt((r[0]+r[1])/4096, 10), "if="+second, "of="+part)
		testkit.Run(t, "dd", "if="+part, "of="+full, "bs=4096", "seek="+strconv.FormatInt(r[0]/4096, 10), "conv=notrunc", "status=none")
	}
	testkit.Run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", full, second)
}

// TestStopRefused: asked to end while a device is open the daemon says that it
// does not, unless it was started with --force; the device is there again afterwards.
func TestStopRefused(t *testing.T) {
	testkit.Need(t, "root", "tap", "loop", "fuse")
	for _, args := range [][]string{nil, {"--force"}} {
		d := program.New(t, args...)
		node, _ := served(t, d, "data", "loop", 8*mib)
		user := exec.Command("sh", "-c", "exec 3<"+node+"; echo open; exec sleep 300")
		said, err := user.StdoutPipe()
		if err == nil {
			err = user.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		end := func() { _ = user.Process.Kill(); _ = user.Wait() }
		t.Cleanup(end)
		if _, err := said.Read(make([]byte, 8)); err != nil {
			t.Fatal(err)
		}
		if args == nil {
			if err := syscall.Kill(d.PID(), syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			program.Eventually(t, patience, "the daemon says why it does not end", func() error {
				if text := d.Run("status"); !strings.Contains(text, "stop-refused") {
					return errors.New(text)
				}
				return nil
			})
			end()
		}
		d.Stop()
		end()
		d.Start()
		if got := strings.TrimSpace(testkit.Run(t, "blockdev", "--getsize64", node)); got != "8388608" {
			t.Errorf("after a restart the device has %s bytes", got)
		}
		d.Run("device", "rm", "data")
	}
}

// TestServerNeedsNothingOfItsDevice: its memory is locked, and every thread of it
// is one that the kernel does not wait for when it wants memory.
func TestServerNeedsNothingOfItsDevice(t *testing.T) {
	testkit.Need(t, "root", "tap", "loop", "fuse")
	d := program.New(t)
	image := filepath.Join(d.Dir, "image")
	testkit.Run(t, "truncate", "-s", "8M", image)
	said := testkit.Run(t, "sh", "-c", "exec \"$@\" 2>&1", "sh", "env", "TIDEMARK_SOCKET="+filepath.Join(d.Dir, "socket"),
		program.Binary(t), "device", "create", "--backing", image, "--front", "loop", "--name", "data")
	removed(t, d, "data")
	node, said, _ := strings.Cut(said, "\n")
	if !strings.Contains(said, "cannot outlive its server") {
		t.Errorf("it does not say what the loop front is: %q", said)
	}
	verified(t, "--filename="+node, "--direct=1", "--ioengine=libaio", "--size=4m")
	if status := d.Proc("status"); strings.Contains(status, "VmLck:\t       0 kB") {
		t.Errorf("no memory is locked: %s", status)
	}
	t.Run("threads", func(t *testing.T) {
		testkit.Need(t, "ioflusher")
		d.FlushersOnly()
	})
	d.Run("device", "rm", "data")
}
