//go:build guest

package guest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// lvm runs LVM itself over disks, without udev, which the guest has not.
type lvm struct {
	t      *testing.T
	config string
}

func newLVM(t *testing.T, disks ...string) *lvm {
	t.Helper()
	testkit.Need(t, "dm", "lvm")
	var only []string
	for _, d := range disks {
		only = append(only, `"a|^`+d+`$|"`)
	}
	return &lvm{t, `devices { use_devicesfile=0 filter=[` + strings.Join(append(only, `"r|.*|"`), ",") + `] external_device_info_source="none" obtain_device_list_from_udev=0 }
activation { udev_sync=0 udev_rules=0 verify_udev_operations=1 monitoring=0 } backup { backup=0 archive=0 } global { event_activation=0 use_lvmpolld=0 }`}
}

func (l *lvm) run(args ...string) string {
	l.t.Helper()
	return testkit.Run(l.t, "lvm", append(args, "--config", l.config)...)
}

// TestLVM: LVM itself gives a spliced volume other tables, which takes the splice
// out: it is noticed, the volume is spliced again as a new generation, and
// what is written meanwhile sees no error. While blocks are moved there is no
// splice, as LVM could not end that otherwise.
func TestLVM(t *testing.T) {
	a, b := testkit.NewDisk(t, 96<<20), testkit.NewDisk(t, 96<<20)
	l := newLVM(t, a.Path, b.Path)
	l.run("vgcreate", "-qq", "tidevg", a.Path, b.Path)
	t.Cleanup(func() { l.run("vgremove", "-qq", "-f", "tidevg") })
	l.run("lvcreate", "-qq", "-Wn", "-L", "48M", "-n", "data", "tidevg", a.Path)
	dev := node(t, "/dev/mapper/tidevg-data")
	v := mountedVolume(t, dev)
	d := program.New(t)
	w := startWriter(t, v.dir)
	d.Run("device", "splice", dev, "--name", "data")
	again := func(what string, do func()) {
		t.Helper()
		before := generation(t, d)
		do()
		program.Eventually(t, time.Minute, what+" is noticed", func() error {
			if text := d.Run("device", "ls", "--json"); strings.Contains(text, "splice-lost") || !strings.Contains(text, "splice-replaced") {
				return fmt.Errorf("the daemon says %s, the table is %s", text, v.table(t))
			}
			if maps := d.Run("cbt", "ls", "--json"); strings.Contains(maps, before) || !strings.Contains(maps, "eneration") { // for a moment there is none
				return fmt.Errorf("the change maps are still %s", maps)
			}
			if text := v.table(t); !strings.Contains(text, "linear") || strings.Count(text, "\n") != 1 { // pvmove gives it more than one
				return fmt.Errorf("the table is %s", text)
			}
			return nil
		})
	}
	again("lvextend", func() { l.run("lvextend", "-qq", "-L", "+32M", "tidevg/data", b.Path) })
	if got := testkit.Run(t, "blockdev", "--getsize64", dev); strings.TrimSpace(got) != "83886080" {
		t.Errorf("after lvextend it has %s bytes", got)
	}
	if text := d.Run("device", "ls", "--json"); !strings.Contains(text, `"size_bytes":83886080`) {
		t.Errorf("the served device has not grown: %s", text)
	}
	testkit.Run(t, "resize2fs", dev)
	again("lvchange --refresh", func() { l.run("lvchange", "-qq", "--refresh", "tidevg/data") })
	testkit.Run(t, "modprobe", "dm-mirror")
	again("pvmove", func() { l.run("pvmove", "-qq", "--interval", "1", "-n", "data", a.Path, b.Path) })
	if at := l.run("lvs", "--noheadings", "-o", "devices", "tidevg/data"); strings.Contains(at, a.Path+"(") {
		t.Errorf("after pvmove it still lies on %s: %s", a.Path, at)
	}
	d.Run("device", "unsplice", "data")
	w.end()
	v.original = v.table(t) // LVM's newest
	if strings.Count(v.original, "linear") != 2 {
		t.Errorf("afterwards the table is %s", v.original)
	}
	v.clean(t)
	if _, err := os.Stat(filepath.Join("/dev/mapper", v.name)); err != nil {
		t.Error(err)
	}
}
