//go:build guest

package guest

import (
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

// TestServed: a mounted file system on a served device sees a pause and no error
// when the daemon is killed under load and started again, and when it ends in
// order; the device goes when it is removed, and what is behind it stays.
func TestServed(t *testing.T) {
	for front, module := range map[string]string{"ublk": "ublk_drv", "nbd": "nbd"} {
		t.Run(front, func(t *testing.T) {
			if out, err := exec.Command("modprobe", module).CombinedOutput(); err != nil {
				t.Logf("modprobe %s: %v: %s", module, err, out)
			}
			testkit.Need(t, front)
			d := program.New(t)
			image := filepath.Join(d.Dir, "image")
			if err := os.WriteFile(image, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(image, 96<<20); err != nil {
				t.Fatal(err)
			}
			node := strings.TrimSpace(d.Run("device", "create", "--backing", image, "--front", front, "--name", "data"))
			if node != "/dev/tidemark/data" {
				t.Fatalf("the node is %q", node)
			}
			dir := t.TempDir()
			testkit.Run(t, "mkfs.ext4", "-q", node)
			testkit.Run(t, "mount", node, dir)
			t.Cleanup(func() { _ = exec.Command("umount", dir).Run() })

			fio := exec.Command("fio", "--name=served", "--directory="+dir, "--size=24m", "--rw=randwrite", "--bs=4k", "--iodepth=8", "--ioengine=libaio",
				"--direct=1", "--verify=crc32c", "--verify_fatal=1", "--time_based", "--runtime=12", "--loops=100", "--randseed=7")
			var out strings.Builder
			fio.Stdout, fio.Stderr = &out, &out
			if err := fio.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- fio.Wait() }()
			for range 2 {
				time.Sleep(2 * time.Second)
				d.Kill()
				time.Sleep(500 * time.Millisecond)
				d.Start()
			}
			if _, err := d.Verb("device", "rm", "data"); err == nil {
				t.Error("a mounted device was removed")
			}
			if err := syscall.Kill(d.PID(), syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
			if text := d.Run("status"); !strings.Contains(text, "stop-refused") {
				t.Errorf("it was asked to end while a device is mounted, and says nothing of it: %s", text)
			}
			select {
			case err := <-ended:
				if err != nil {
					t.Errorf("fio: %v: %s", err, out.String())
				}
			case <-time.After(2 * time.Minute):
				_ = fio.Process.Kill()
				t.Fatalf("fio hangs: %s\n%s", out.String(), d.Run("device", "ls"))
			}
			testkit.Run(t, "umount", dir)
			testkit.Run(t, "e2fsck", "-fn", node)
			if text := d.Run("device", "ls", "--json"); !strings.Contains(text, `"open":false`) {
				t.Errorf("devices: %s", text)
			}
			// In order: the daemon ends, the device waits, the next daemon has it.
			d.Stop()
			d.Start()
			testkit.Run(t, "e2fsck", "-fn", node)
			d.Run("device", "rm", "data")
			if _, err := os.Lstat(node); err == nil {
				t.Errorf("%s is still there", node)
			}
			testkit.Run(t, "e2fsck", "-fn", image)
		})
	}
}
