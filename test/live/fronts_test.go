package live

import (
	"encoding/json"
	"errors"
	"os/exec"
	"path/filepath"
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
