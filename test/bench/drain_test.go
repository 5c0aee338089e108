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
	start, newest := time.Now(), uint64(0)
	for batch, err := range c.Batches(b.Context(), 0) {
		if errors.Is(err, client.ErrNothing) {
			break
		}
		if err != nil {
			b.Fatal(err)
		}
		bytes, newest = bytes+batch.Bytes(), batch.Number
		if newest%16 == 0 {
			if err := c.Commit(b.Context(), newest); err != nil {
				b.Fatal(err)
			}
		}
	}
	if newest > 0 {
		if err := c.Commit(b.Context(), newest); err != nil {
			b.Fatal(err)
		}
	}
	return bytes, time.Since(start)
}

// oneByOne is drainAll with a round trip for each batch.
func oneByOne(b *testing.B, c *client.Consumer) (bytes int64, took time.Duration) {
	b.Helper()
	start := time.Now()
	for {
		batch, err := c.Next(b.Context(), 0)
		if errors.Is(err, client.ErrNothing) {
			return bytes, time.Since(start)
		}
		if err != nil {
			b.Fatal(err)
		}
		if err := c.Commit(b.Context(), batch.Number); err != nil {
			b.Fatal(err)
		}
		bytes += batch.Bytes()
	}
}

// BenchmarkConsumer: a program takes what was sealed: the first fill of a disk with
// data that does not compress, then writes to it. Nothing is applied.
func BenchmarkConsumer(b *testing.B) {
	for b.Loop() {
		disk := randomDisk(b, diskSize)
		d := program.New(b)
		d.Protect("g", disk.Path)
		daemon := client.Dial(filepath.Join(d.Dir, "socket"))
		c, slow := daemon.Consumer("g", "c", client.Options{}), daemon.Consumer("g", "slow", client.Options{})
		n, took := drainAll(b, c)
		b.ReportMetric(float64(n)/took.Seconds()/1e6, "fill-MB/s")
		n, took = oneByOne(b, slow)
		b.ReportMetric(float64(n)/took.Seconds()/1e6, "fill-one-by-one-MB/s")

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
		n, took = oneByOne(b, slow)
		b.ReportMetric(float64(n)/took.Seconds()/1e6, "writes-one-by-one-MB/s")
	}
}
