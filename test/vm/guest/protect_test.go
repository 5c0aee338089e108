//go:build guest

package guest

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// raw is direct access to a disk.
type raw struct {
	t    testing.TB
	file *os.File
	size int64
}

func openRaw(t testing.TB, dev string) *raw {
	t.Helper()
	f, err := os.OpenFile(dev, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	n, err := f.Seek(0, 2)
	if err != nil {
		t.Fatal(err)
	}
	return &raw{t: t, file: f, size: n}
}

func aligned(t testing.TB, n int) []byte {
	t.Helper()
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(b) })
	return b
}

// scribble makes writes of random size (4 to 128 KiB), place and content.
func (r *raw) scribble(buf []byte, count int, rng *mrand.Rand) error {
	for range count {
		n := int64(4096) << rng.IntN(6)
		_, _ = rand.Read(buf[:n])
		if _, err := r.file.WriteAt(buf[:n], rng.Int64N((r.size-n)/4096)*4096); err != nil {
			return err
		}
	}
	return nil
}

// same fails the test where the disk is not the image.
func (r *raw) same(what string, image []byte) {
	r.t.Helper()
	truth := r.content()
	if len(truth) != len(image) {
		r.t.Fatalf("%s: the disk has %d bytes, what was restored %d", what, len(truth), len(image))
	}
	bad, first := 0, -1
	for off := 0; off < len(truth); off += 4096 {
		end := min(off+4096, len(truth))
		if !bytes.Equal(truth[off:end], image[off:end]) {
			if bad++; first < 0 {
				first = off
			}
		}
	}
	if bad > 0 {
		r.t.Errorf("%s: %d blocks are not the disk's, the first at %d", what, bad, first)
	}
}

func (r *raw) content() []byte {
	r.t.Helper()
	b := aligned(r.t, int(r.size))
	for off := 0; off < len(b); off += 1 << 20 {
		if _, err := r.file.ReadAt(b[off:min(off+1<<20, len(b))], int64(off)); err != nil {
			r.t.Fatal(err)
		}
	}
	return b
}

// restored is the one disk of group g as it was at a point.
func restored(t testing.TB, d *program.Daemon, at string) []byte {
	t.Helper()
	file := d.Restored("g", "", at)
	defer os.Remove(file)
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func seed(t testing.TB) *mrand.Rand {
	s := uint64(time.Now().UnixNano())
	if v, err := strconv.ParseUint(os.Getenv("TIDEMARK_SEED"), 10, 64); err == nil {
		s = v
	}
	t.Logf("TIDEMARK_SEED=%d", s)
	return mrand.New(mrand.NewPCG(s, 1))
}

// TestProtect: the real program, from live writes to restored disks, on the tops
// of stacks and on disks that CI's own kernel does not have, in one group.
func TestProtect(t *testing.T) {
	rng, buf := seed(t), aligned(t, 128<<10)
	var devices []string
	var disks []*raw
	for _, make := range []func(testing.TB) string{partition, scsi, nvme, mirror} {
		dev := make(t)
		devices, disks = append(devices, dev), append(disks, openRaw(t, dev))
	}
	d := program.New(t)
	d.Protect("g", devices...)
	scribbled := func() {
		t.Helper()
		for range 100 {
			for _, disk := range disks {
				if err := disk.scribble(buf, 1, rng); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	scribbled()
	d.Run("bookmark", "g", "quiet")
	var then [][]byte
	for _, disk := range disks {
		then = append(then, disk.content())
	}
	scribbled()
	g := d.Settle("g")
	for i, disk := range disks {
		name := g.Disks[i].Name
		disk.same(devices[i]+" at latest", imageOf(t, d, name, "latest"))
		if !bytes.Equal(then[i], imageOf(t, d, name, "quiet")) {
			t.Errorf("%s at the bookmark is not what it was then", devices[i])
		}
	}
	d.Run("verify", "--vault", d.Vault)
	d.Run("unprotect", "g")
	for _, disk := range disks {
		disk.file.Close()
	}
}

// TestFillUnderLoad: a ring far too small, writes that overlap and wait long on
// a slow disk with four requests, the daemon killed in the middle. Once it is
// quiet, what the vault gives is the disk.
func TestFillUnderLoad(t *testing.T) {
	testkit.Run(t, "modprobe", "dm-delay")
	lower := testkit.NewDisk(t, small)
	fewRequests(t, lower.Path)
	dev := table(t, "slow", fmt.Sprintf("0 %d delay %s 0 0 %[2]s 0 30\n", small/512, lower.Path))
	disk, rng := openRaw(t, dev), seed(t)
	d := program.New(t)
	d.Run("protect", "--vault", d.Vault, "--name", "g", "--ring-size", "256K", dev) // the first fill is under load too

	var stop atomic.Bool
	var all sync.WaitGroup
	var failed atomic.Pointer[error]
	for range 8 {
		own, buf := mrand.New(mrand.NewPCG(rng.Uint64(), 2)), aligned(t, 128<<10)
		all.Go(func() {
			for !stop.Load() {
				if err := disk.scribble(buf, 1, own); err != nil && !errors.Is(err, unix.EINTR) {
					failed.Store(&err)
					return
				}
			}
		})
	}
	time.Sleep(2 * time.Second)
	d.Kill()
	time.Sleep(time.Second)
	d.Start()
	time.Sleep(2 * time.Second)
	stop.Store(true)
	all.Wait()
	if err := failed.Load(); err != nil {
		t.Fatal("a write of the protected disk failed: ", *err)
	}
	if g := d.Settle("g"); g.Disks[0].Lost == 0 {
		t.Error("the ring held everything: this tested nothing")
	}
	disk.same("latest", restored(t, d, "latest"))
	d.Run("verify", "--vault", d.Vault)
	d.Run("unprotect", "g")
}
