//go:build guest

package guest

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
	"tidemark/internal/disk"
	"tidemark/internal/tap"
	"tidemark/internal/testkit"
)

// watched is a tapped device with a copy of it that only the ring's records change.
type watched struct {
	t    testing.TB
	tap  *tap.Tap
	info *disk.Info
	dev  *os.File // direct I/O
	buf  []byte
	copy []byte

	place   tap.Place
	records int
	failed  int // writes that the device refused
}

// watch taps a device that nobody writes to yet.
func watch(t testing.TB, dev string, ring int) *watched {
	t.Helper()
	testkit.Need(t, "tap")
	info, err := disk.Inspect(dev)
	if err != nil {
		t.Fatal(err)
	}
	w := &watched{t: t, info: info}
	if w.dev, err = os.OpenFile(dev, os.O_RDWR|unix.O_DIRECT, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.dev.Close() })
	if w.buf, err = unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(w.buf) })
	_, _ = rand.Read(w.buf)
	w.copy = w.content()
	pass := tap.Passthrough{Kind: tap.PassNone}
	if info.Kind == disk.NVMe {
		if pass, err = tap.FindPassthrough(tap.PassNVMe); err != nil {
			t.Fatal(err)
		}
	}
	cfg := tap.Config{Instance: "guest", Group: fmt.Sprintf("g%d", os.Getpid()), RingBytes: ring, Targets: []tap.Target{{
		Name: info.Name, Whole: info.WholeDev, Start: info.Start, Len: info.Size, DiskSeq: info.DiskSeq, BlockSize: 4096,
		BioBased: info.BioBased, Pass: pass}}}
	if w.tap, err = tap.Start(cfg); err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() {
		if err := w.tap.Remove(); err != nil {
			t.Error(err)
		}
	})
	if !w.tap.PayloadCaptured() {
		t.Error("payloads are not captured: the calibration failed on this kernel")
	}
	w.place = w.tap.Consumer()
	return w
}

// content is what the device holds, zeroes where it cannot be read.
func (w *watched) content() []byte {
	w.t.Helper()
	all := make([]byte, w.info.Size)
	for off := int64(0); off < w.info.Size; {
		n := min(int64(len(w.buf)), w.info.Size-off)
		if _, err := w.dev.ReadAt(w.buf[:n], off); err != nil && !errors.Is(err, unix.EIO) {
			w.t.Fatal(err)
		}
		copy(all[off:], w.buf[:n])
		clear(w.buf[:n])
		off += n
	}
	return all
}

// write makes writes of random size, place and content inside a range.
func (w *watched) write(count int, in block.Range) {
	w.t.Helper()
	for range count {
		n := int64(w.info.LogicalSector) << mrand.IntN(9)
		off := in.Off + mrand.Int64N((in.Len-n)/w.info.LogicalSector)*w.info.LogicalSector
		_, _ = rand.Read(w.buf[:n])
		switch _, err := w.dev.WriteAt(w.buf[:n], off); {
		case errors.Is(err, unix.EIO):
			w.failed++
		case err != nil:
			w.t.Fatal(err)
		}
		w.pull()
	}
}

func (w *watched) whole() block.Range { return block.Range{Len: w.info.Size} }

// pull applies what the ring has to the copy.
func (w *watched) pull() {
	w.t.Helper()
	next, err := w.tap.Read(w.place, func(r *tap.Record) error {
		w.records++
		if r.Kind == tap.Write && r.Op == block.OpWrite {
			copy(w.copy[r.Range.Off:r.Range.End()], r.Payload)
		}
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.tap.Commit(next)
	w.place = next
}

// identical fails the test where the copy is not the device, outside the gap.
// It returns how many bytes the gap holds.
func (w *watched) identical() int64 {
	w.t.Helper()
	w.pull()
	peek, err := w.tap.PeekGaps()
	if err != nil {
		w.t.Fatal(err)
	}
	truth, bad := w.content(), 0
	var gap int64
	for _, g := range peek.Ranges {
		gap += g.Range.Len
		clear(truth[g.Range.Off:g.Range.End()])
		clear(w.copy[g.Range.Off:g.Range.End()])
	}
	for off := int64(0); off < w.info.Size; off += 512 {
		if !bytes.Equal(truth[off:off+512], w.copy[off:off+512]) {
			if bad++; bad == 1 {
				w.t.Errorf("sector %d is not what was captured", off/512)
			}
		}
	}
	c, err := w.tap.Counters()
	w.t.Logf("%s (%s): %d records, %d bytes of gap, %d sectors wrong, counters %+v, %v", w.info.Name, w.info.Kind, w.records, gap, bad, c, err)
	if w.records == 0 {
		w.t.Error("nothing was captured")
	}
	return gap
}
