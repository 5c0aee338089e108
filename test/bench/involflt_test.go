//go:build guest

package bench

import (
	"path/filepath"
	"runtime"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"tidemark/internal/abi/involflt"
	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// BenchmarkGuestIoctl: a round trip through the control device, that is through the kernel, the
// daemon and back, beside one that the kernel answers by itself: without more than 16 bytes, with a page
// that is written into the caller, with a nested pointer, and with a block of 8 KiB.
func BenchmarkGuestIoctl(b *testing.B) {
	testkit.Need(b, "cuse", "tap")
	disk := testkit.NewDisk(b, 8<<20)
	program.New(b, "--compat", "involflt", "--compat-vault", filepath.Join(testkit.Dir(b), "vault"))
	control, plain := opened(b, "/dev/"+involflt.Device), opened(b, disk.Path)
	start := involflt.DeviceInfo{Type: involflt.HostVolume, BlockSize: 512}
	copy(start.Device[:], disk.Path)
	copy(start.Persistent[:], "bench")
	in := involflt.Bytes(start)
	ioctl(b, control, involflt.StartFiltering, in)
	ioctl(b, control, involflt.GetDirtyBlocksV2, make([]byte, involflt.Size(involflt.DirtyBlock{}))) // the copies are made

	text, size := make([]byte, 64<<10), make([]byte, 8)
	var pin runtime.Pinner
	defer pin.Unpin()
	pin.Pin(&text[0])
	list := involflt.Bytes(involflt.List{Buffer: uint64(uintptr(unsafe.Pointer(&text[0]))), Length: uint32(len(text))})
	peers := []struct {
		name string
		fd   int
		cmd  uint
		arg  []byte
	}{
		{"kernel", plain, unix.BLKGETSIZE64, size},
		{"version", control, involflt.DriverVersion, make([]byte, 16)},
		{"page", control, involflt.GlobalStats, make([]byte, 4096)},
		{"nested", control, involflt.ProtectedVolumes, list},
		{"block", control, involflt.GetDirtyBlocksV2, make([]byte, involflt.Size(involflt.DirtyBlock{}))},
	}
	const calls = 500
	for b.Loop() {
		took := map[string][]float64{}
		for range turns {
			for _, p := range peers {
				began := time.Now()
				for range calls {
					ioctl(b, p.fd, p.cmd, p.arg)
				}
				took[p.name] = append(took[p.name], time.Since(began).Seconds()/calls)
			}
		}
		for _, p := range peers {
			b.ReportMetric(median(took[p.name])*1e6, p.name+"-us")
		}
		b.ReportMetric(median(took["version"])/median(took["kernel"]), "version/kernel")
		b.ReportMetric(median(took["block"])/median(took["version"]), "block/version")
	}
}

func opened(b *testing.B, path string) int {
	b.Helper()
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		b.Fatalf("%s: %v", path, err)
	}
	b.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

func ioctl(b *testing.B, fd int, cmd uint, arg []byte) {
	b.Helper()
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(cmd), uintptr(unsafe.Pointer(&arg[0])))
		switch errno {
		case 0:
			return
		case unix.EINTR: // the Go runtime's own signals
		default:
			b.Fatalf("%#x: %v", cmd, errno)
		}
	}
}
