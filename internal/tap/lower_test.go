package tap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"tidemark/internal/testkit"
)

// TestFlushesWithoutData: on a bio-based disk each fsync ends as a write of no
// bytes at no place; that is no riddle.
func TestFlushesWithoutData(t *testing.T) {
	testkit.Need(t, "dm", "ext4")
	d := testkit.NewDisk(t, 64<<20)
	name := fmt.Sprintf("flush-%d", os.Getpid())
	create := exec.Command("dmsetup", "create", name)
	create.Stdin = strings.NewReader(fmt.Sprintf("0 %d linear %s 0\n", d.Size/512, d.Path))
	if out, err := create.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Cleanup(func() { testkit.Run(t, "dmsetup", "remove", "--retry", name) })
	top := &testkit.Disk{Path: "/dev/mapper/" + name, File: d.File, Size: d.Size}
	target := targetFor(t, top)
	target.BioBased = true
	testkit.Mkfs(t, top.Path, "ext4", "-E", "lazy_itable_init=0,lazy_journal_init=0") // its thread zeroes ranges, which loop on tmpfs refuses
	unix.Sync()
	tp := startTargets(t, 32<<20, Options{}, target)
	r := newReplica(t, tp, top)
	dir := testkit.Mount(t, top.Path)
	f, err := os.Create(filepath.Join(dir, "f"))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 50 {
		_, err := fmt.Fprintln(f, i)
		if err := errors.Join(err, f.Sync(), unix.Fsync(int(direct(t, top.Path).Fd()))); err != nil {
			t.Fatal(err)
		}
	}
	f.Close()
	testkit.Unmount(t, dir)
	r.pull(tp)
	r.same(top)
	c, err := tp.Counters()
	if n := c.Disks[0]; err != nil || n.Blind != 0 || n.Unknown != 0 || n.Failed != 0 || n.Traced != n.Ended || tp.Drops() != 0 {
		t.Errorf("drops %d, counters %+v, %v", tp.Drops(), n, err)
	}
	if s, err := tp.ScanInFlight(); err != nil || s.InFlight != 0 {
		t.Errorf("%+v, %v", s, err)
	}
}

// TestPassthrough: an inquiry past the block layer is harmless, a write is not.
func TestPassthrough(t *testing.T) {
	testkit.Need(t, "dm") // a kernel with modules
	testkit.Run(t, "modprobe", "sd_mod")
	testkit.Run(t, "modprobe", "scsi_debug", "dev_size_mb=16", "delay=0")
	t.Cleanup(func() { testkit.Run(t, "rmmod", "scsi_debug") })
	var dev string
	for end := time.Now().Add(10 * time.Second); dev == "" && time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		found, _ := filepath.Glob("/sys/bus/pseudo/drivers/scsi_debug/adapter*/host*/target*/*/block/sd*")
		if len(found) == 1 {
			if _, err := os.Stat("/dev/" + filepath.Base(found[0])); err == nil {
				dev = "/dev/" + filepath.Base(found[0])
			}
		}
	}
	if dev == "" {
		t.Fatal("scsi_debug gave no disk")
	}
	pass, err := FindPassthrough(PassSCSI)
	if err != nil || pass.Kind != PassSCSI || pass.Offset == 0 {
		t.Fatalf("%+v, %v", pass, err)
	}
	target := targetFor(t, &testkit.Disk{Path: dev, Size: 16 << 20})
	target.Pass = pass
	tp := startTargets(t, 1<<20, Options{}, target)
	f := direct(t, dev)
	for _, c := range []struct {
		name    string
		command []byte
		out     bool
		bytes   int
		counted uint64
	}{
		{"inquiry", []byte{0x12, 0, 0, 0, 96, 0}, false, 96, 0},
		{"read", []byte{0x28, 0, 0, 0, 0, 8, 0, 0, 1, 0}, false, 512, 0},
		{"write", []byte{0x2a, 0, 0, 0, 0, 8, 0, 0, 1, 0}, true, 512, 1},
	} {
		before, err := tp.Counters()
		if err != nil {
			t.Fatal(err)
		}
		if err := sgIO(f, c.command, pages(t, 4096)[:c.bytes], c.out); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		now, err := tp.Counters()
		if got := now.Disks[0].Passthrough - before.Disks[0].Passthrough; err != nil || got != c.counted {
			t.Errorf("%s: counted %d times, %v", c.name, got, err)
		}
	}
}

// sgIO sends a SCSI command (struct sg_io_hdr of the kernel's include/scsi/sg.h).
func sgIO(f *os.File, command, data []byte, out bool) error {
	const size, ioctl = 88, 0x2285
	h := make([]uint64, size/8)
	b := unsafe.Slice((*byte)(unsafe.Pointer(&h[0])), size)
	le := binary.LittleEndian
	le.PutUint32(b, 'S')
	direction := int32(-3) // from the device
	if out {
		direction = -2
	}
	le.PutUint32(b[4:], uint32(direction))
	b[8] = byte(len(command))
	le.PutUint32(b[12:], uint32(len(data)))
	cmd := make([]byte, 16)
	copy(cmd, command)
	le.PutUint64(b[16:], uint64(uintptr(unsafe.Pointer(&data[0]))))
	le.PutUint64(b[24:], uint64(uintptr(unsafe.Pointer(&cmd[0]))))
	le.PutUint32(b[40:], 5000) // milliseconds
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), ioctl, uintptr(unsafe.Pointer(&h[0])))
	if errno != 0 {
		return errno
	}
	if status := b[64]; status != 0 {
		return fmt.Errorf("status %#x", status)
	}
	return nil
}
