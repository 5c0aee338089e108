//go:build guest

package guest

import (
	"encoding/binary"
	"os"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TestNVMeCommands: what an NVMe disk is told past the block layer, directly,
// through its controller or through the path of one with several, counts where
// it may have written, and does not where it only read.
func TestNVMeCommands(t *testing.T) {
	const admin, io = 0xc0484e41, 0xc0484e43 // NVME_IOCTL_ADMIN_CMD, NVME_IOCTL_IO_CMD
	for name, make := range map[string]func(testing.TB) string{"nvme": nvme, "paths": paths} {
		t.Run(name, func(t *testing.T) {
			w := watch(t, make(t), 1<<20)
			for _, c := range []struct {
				name    string
				ioctl   uintptr
				code    byte
				ns      uint32
				cdw10   uint32
				bytes   uint32
				counted uint64
			}{
				{"identify", admin, 0x06, 0, 1, 4096, 0},
				{"read", io, 0x02, 1, 8, 512, 0},
				{"flush", io, 0x00, 1, 0, 0, 0},
				{"write", io, 0x01, 1, 8, 512, 1},
				{"write zeroes", io, 0x08, 1, 8, 0, 1},
				{"format", admin, 0x80, 1, 0, 0, 1},
			} {
				before, err := w.tap.Counters()
				if err != nil {
					t.Fatal(err)
				}
				if err := nvmeCommand(w.dev, c.ioctl, c.code, c.ns, c.cdw10, w.buf[:c.bytes]); err != nil {
					t.Errorf("%s: %v", c.name, err)
				}
				now, err := w.tap.Counters()
				if got := now.Disks[0].Passthrough - before.Disks[0].Passthrough; err != nil || got != c.counted {
					t.Errorf("%s: counted %d times, want %d; %v", c.name, got, c.counted, err)
				}
			}
			if w.tap.Drops() != 0 {
				t.Errorf("%d drops", w.tap.Drops())
			}
		})
	}
}

// nvmeCommand sends one (struct nvme_passthru_cmd of the kernel's linux/nvme_ioctl.h).
func nvmeCommand(f *os.File, ioctl uintptr, code byte, ns, cdw10 uint32, data []byte) error {
	var c [72]byte
	le := binary.LittleEndian
	c[0] = code
	le.PutUint32(c[4:], ns)
	if len(data) > 0 {
		le.PutUint64(c[24:], uint64(uintptr(unsafe.Pointer(&data[0]))))
	}
	le.PutUint32(c[36:], uint32(len(data)))
	le.PutUint32(c[40:], cdw10)
	le.PutUint32(c[64:], 30_000) // milliseconds
	status, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), ioctl, uintptr(unsafe.Pointer(&c[0])))
	if errno != 0 {
		return errno
	}
	if status != 0 {
		return unix.EIO
	}
	return nil
}
