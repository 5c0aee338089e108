package bench

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"tidemark/client"
	"tidemark/internal/testkit/program"
)

// drainAll takes and commits everything, several batches outstanding, and gives
// the bytes of payload and how long that took.
func drainAll(b *testing.B, c *client.Consumer) (bytes int64, took time.Duration) {
	b.Helper()
	start, after := time.Now(), uint64(0)
	for n := 1; ; n++ {
		batch, err := c.Next(b.Context(), after)
		if errors.Is(err, client.ErrNothing) {
			break
		}
		if err != nil {
			b.Fatal(err)
		}
		bytes, after = bytes+batch.Bytes(), batch.Number
		if n%16 == 0 {
			if err := c.Commit(b.Context(), after); err != nil {
				b.Fatal(err)
			}
		}
	}
	if after > 0 {
		if err := c.Commit(b.Context(), after); err != nil && !errors.Is(err, client.ErrNotGiven) {
			b.Fatal(err)
		}
	}
	return bytes, time.Since(start)
}

// BenchmarkConsumer: a program takes what was sealed: the first fill of a disk with
// data that does not compress, then writes to it. Nothing is applied.
func BenchmarkConsumer(b *testing.B) {
	for b.Loop() {
		disk := randomDisk(b, diskSize)
		d := program.New(b)
		d.Protect("g", disk.Path)
		c := client.Dial(filepath.Join(d.Dir, "socket")).Consumer("g", "c", client.Options{})
		n, took := drainAll(b, c)
		b.ReportMetric(float64(n)/took.Seconds()/1e6, "fill-MB/s")

		f, err := os.OpenFile(disk.Path, os.O_RDWR, 0)
		if err != nil {
			b.Fatal(err)
		}
		random, err := os.Open("/dev/urandom")
		if err != nil {
			b.Fatal(err)
		}
		_, err = io.CopyN(f, random, diskSize/2)
		if err := errors.Join(err, f.Sync(), f.Close(), random.Close()); err != nil {
			b.Fatal(err)
		}
		d.Settle("g")
		n, took = drainAll(b, c)
		b.ReportMetric(float64(n)/took.Seconds()/1e6, "writes-MB/s")
	}
}
