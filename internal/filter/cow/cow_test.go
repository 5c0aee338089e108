package cow_test

import (
	"bytes"
	"errors"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/diff"
	"tidemark/internal/filter/cow"
	"tidemark/internal/sim"
	"tidemark/internal/stack"
)

// held is one snapshot of one device full of 'o', with 64 KiB chunks.
func held(t *testing.T, cfg diff.Config, store *sim.Disk) (*bench, *device, *snap) {
	t.Helper()
	b := newBench(t, 1, 1<<20, 0)
	d := b.devices[0]
	if _, err := d.stack.WriteAt(bytes.Repeat([]byte("o"), 1<<20), 0); err != nil {
		t.Fatal(err)
	}
	if cfg.Chunk == 0 {
		cfg.Chunk = 64 << 10
	}
	n := b.take(cfg, 4, whole(t, store, block.Range{Len: store.Size()}))
	return b, d, n
}

func wantImage(t *testing.T, n *snap, what string) {
	t.Helper()
	p := make([]byte, 1<<20)
	if _, err := n.images[0].ReadAt(p, 0); err != nil || !bytes.Equal(p, bytes.Repeat([]byte("o"), 1<<20)) {
		t.Errorf("%s: the image is not what the device was: %v", what, err)
	}
}

// TestConcurrentFirstWritesCopyOnce: many writers meet in one chunk.
func TestConcurrentFirstWritesCopyOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, d, n := held(t, diff.Config{}, sim.NewDisk(2<<20))
		defer b.destroy(n)
		var reads atomic.Int64
		d.disk.Fault = func(op block.Op, r block.Range) error {
			if op == block.OpRead {
				reads.Add(1)
				time.Sleep(time.Second) // all of them are there before the copy is
			}
			return nil
		}
		var all sync.WaitGroup
		for i := range int64(20) {
			all.Go(func() {
				if _, err := d.stack.WriteAt([]byte("n"), i*3000); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if reads.Load() != 1 {
			t.Errorf("%d reads for one chunk", reads.Load())
		}
		if st := n.storage.Stats(); st.Used != 64<<10 {
			t.Errorf("%+v", st)
		}
		wantImage(t, n, "after it")
	})
}

// TestEveryKindOfFirstWriteKeepsTheOld, a full overwrite too.
func TestEveryKindOfFirstWriteKeepsTheOld(t *testing.T) {
	b, d, n := held(t, diff.Config{}, sim.NewDisk(2<<20))
	defer b.destroy(n)
	chunk := int64(64 << 10)
	r := func(i int64) block.Range { return block.Range{Off: i * chunk, Len: chunk} }
	full := bytes.Repeat([]byte("n"), int(chunk))
	_, e1 := d.stack.WriteAt(full, 0)
	_, e2 := d.stack.WriteFUA(full, chunk)
	_, e3 := d.stack.WriteAt(bytes.Repeat(full, 3), 4*chunk+512)
	if err := errors.Join(e1, e2, e3, d.stack.Discard(r(2)), d.stack.WriteZeroes(r(3))); err != nil {
		t.Fatal(err)
	}
	wantImage(t, n, "after it")
	if st := n.storage.Stats(); st.Used != 8*chunk {
		t.Errorf("%+v", st)
	}
}

// TestWriterAndStorage: a writer does not wait for the storage, a durable one's
// does; and with a storage that hangs no writer waits for ever.
func TestWriterAndStorage(t *testing.T) {
	for _, durable := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			store := sim.NewDisk(2 << 20)
			b, d, n := held(t, diff.Config{Durable: durable}, store)
			hang := make(chan struct{})
			store.Fault = func(block.Op, block.Range) error { <-hang; return nil }
			start := time.Now()
			write := func(i int64) time.Duration {
				if _, err := d.stack.WriteAt([]byte("n"), i<<16); err != nil {
					t.Error(err)
				}
				return time.Since(start)
			}
			if took := write(0); durable != (took > 0) {
				t.Errorf("durable %v: the first write took %v", durable, took)
			}
			if !durable {
				wantImage(t, n, "from memory")
			}
			for i := range int64(8) { // more than there are buffers
				write(1 + i)
			}
			if took := time.Since(start); took > 2*time.Minute {
				t.Errorf("durable %v: nine writes took %v", durable, took)
			}
			if err := n.images[0].Err(); !errors.Is(err, diff.ErrSpoiled) || n.spoiled.Load() != 1 {
				t.Errorf("durable %v: %v, %d events", durable, err, n.spoiled.Load())
			}
			close(hang)
			b.destroy(n)
		})
	}
}

// TestSettledChunksCostNothing: a second write passes at a glance.
func TestSettledChunksCostNothing(t *testing.T) {
	b, d, n := held(t, diff.Config{}, sim.NewDisk(2<<20))
	defer b.destroy(n)
	p := make([]byte, 4096)
	if _, err := d.stack.WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
	r := &stack.Request{Op: block.OpWrite, Range: block.Range{Off: 8192, Len: 4096}, Data: p}
	if allocs := testing.AllocsPerRun(100, func() {
		if !d.cow.Pass(r) {
			t.Error("a settled chunk is handled")
		}
	}); allocs != 0 {
		t.Errorf("%v allocations", allocs)
	}
	r.Range.Off = 1<<16 - 512 // reaches into the next chunk
	if d.cow.Pass(r) {
		t.Error("an untouched chunk is passed")
	}
	r.Op = block.OpRead
	if !d.cow.Pass(r) {
		t.Error("a read is handled")
	}
}

// TestOverflow spoils the image, with an event and ENOSPC for its readers; a
// private change that finds no room fails alone.
func TestOverflow(t *testing.T) {
	var events []diff.Event
	store := sim.NewDisk(8192 + 2<<16)
	b, d, n := held(t, diff.Config{Notify: func(e diff.Event) { events = append(events, e) }}, store)
	defer b.destroy(n)
	m := n.images[0]
	for i := range int64(2) {
		if _, err := m.WriteAt([]byte("p"), i<<16); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := m.WriteAt([]byte("p"), 5<<16); !errors.Is(err, diff.ErrFull) || m.Err() != nil {
		t.Errorf("a change without room: %v, the image: %v", err, m.Err())
	}
	p := make([]byte, 2)
	if _, err := m.ReadAt(p, 5<<16); err != nil || string(p) != "oo" {
		t.Errorf("%q, %v", p, err)
	}
	if _, err := d.stack.WriteAt([]byte("n"), 5<<16); err != nil {
		t.Errorf("the origin: %v", err)
	}
	if _, err := m.ReadAt(p, 0); !errors.Is(err, diff.ErrSpoiled) || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("a spoiled image: %v", err)
	}
	if n.spoiled.Load() != 1 || !slices.ContainsFunc(events, func(e diff.Event) bool { return e.Kind == diff.Overflow }) {
		t.Errorf("%d corrupt events, %+v", n.spoiled.Load(), events)
	}
}

// TestLossOfTheFilter declares every snapshot spoiled before a write goes past it.
func TestLossOfTheFilter(t *testing.T) {
	b, d, n := held(t, diff.Config{}, sim.NewDisk(2<<20))
	defer b.destroy(n)
	d.cow.Below().Fail(errors.New("a bug"))
	if err := n.images[0].Err(); !errors.Is(err, diff.ErrSpoiled) {
		t.Errorf("the image: %v", err)
	}
	if _, err := d.stack.WriteAt([]byte("n"), 0); err != nil {
		t.Error(err)
	}
	if c := b.health.List(); len(c) != 1 || c[0].Code != "filter-lost" {
		t.Errorf("%+v", c)
	}
}

// TestClosedImage answers nobody, and its chunks are not copied any more.
func TestClosedImage(t *testing.T) {
	b, d, n := held(t, diff.Config{}, sim.NewDisk(2<<20))
	b.destroy(n)
	if _, err := n.images[0].ReadAt(make([]byte, 1), 0); !errors.Is(err, cow.ErrClosed) {
		t.Errorf("read: %v", err)
	}
	if _, err := n.images[0].WriteAt(make([]byte, 1), 0); !errors.Is(err, cow.ErrClosed) {
		t.Errorf("write: %v", err)
	}
	if _, err := d.stack.WriteAt([]byte("n"), 0); err != nil || n.spoiled.Load() != 0 {
		t.Errorf("%v, %d events", err, n.spoiled.Load())
	}
}

// TestDamageInStorage is found by whoever reads it, and spoils the image.
func TestDamageInStorage(t *testing.T) {
	store := sim.NewDisk(2 << 20)
	b, d, n := held(t, diff.Config{Durable: true}, store)
	defer b.destroy(n)
	if _, err := d.stack.WriteAt([]byte("n"), 0); err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(store.Bytes(), bytes.Repeat([]byte("o"), 1<<16))
	if _, err := store.WriteAt([]byte("x"), int64(at)+100); err != nil {
		t.Fatal(err)
	}
	if _, err := n.images[0].ReadAt(make([]byte, 10), 0); !errors.Is(err, diff.ErrCorrupt) || n.spoiled.Load() != 1 {
		t.Errorf("%v, %d events", err, n.spoiled.Load())
	}
}

// TestSurvivesTheProcess: with the chunks in memory that outlives it, an image is
// whole after a kill at any moment; the storage never wrote some of them.
func TestSurvivesTheProcess(t *testing.T) {
	store := sim.NewDisk(4 << 20)
	var hangs atomic.Bool
	gone := make(chan struct{})
	store.Fault = func(op block.Op, _ block.Range) error {
		if !hangs.Load() || op == block.OpRead {
			return nil
		}
		<-gone
		return errors.New("the process is gone")
	}
	b := newBench(t, 1, 1<<20, 0)
	d := b.devices[0]
	if _, err := d.stack.WriteAt(bytes.Repeat([]byte("o"), 1<<20), 0); err != nil {
		t.Fatal(err)
	}
	cfg := diff.Config{ID: diff.ID{4}, Chunk: 64 << 10}
	space := whole(t, store, block.Range{Len: store.Size()})
	storage, err := diff.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := storage.Append(space); err != nil {
		t.Fatal(err)
	}
	file, err := os.Create(t.TempDir() + "/pending")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	pending, err := diff.NewPending(storage, 8, file)
	if err != nil {
		t.Fatal(err)
	}
	m := cow.New(d.cow, cow.Config{Storage: storage, Pending: pending, Patience: time.Second})
	d.cow.Begin(m)
	private := bytes.Repeat([]byte("o"), 1<<20)
	change := func(at int64, s string) {
		if _, err := m.WriteAt([]byte(s), at); err != nil {
			t.Fatal(err)
		}
		copy(private[at:], s)
	}
	if _, err := d.stack.WriteAt(bytes.Repeat([]byte("n"), 3<<16), 100); err != nil {
		t.Fatal(err)
	}
	change(7<<16, "first")
	var idle []*diff.Buffer
	for range 8 { // until all of that is stored
		buffer, err := pending.Take(time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		idle = append(idle, buffer)
	}
	for _, buffer := range idle {
		buffer.Drop()
	}
	hangs.Store(true) // from now on the storage takes nothing
	if _, err := d.stack.WriteAt(bytes.Repeat([]byte("n"), 1<<16), 10<<16); err != nil {
		t.Fatal(err)
	}
	change(7<<16+2, "second")
	change(7<<16+4, "third")
	// Killed. What another process finds:
	after := sim.NewDisk(store.Size())
	if _, err := after.WriteAt(store.Bytes(), 0); err != nil {
		t.Fatal(err)
	}
	space = whole(t, after, block.Range{Len: after.Size()})
	again, found, err := diff.Recover(cfg, []diff.Space{space})
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	more, sealed, err := diff.RecoverPending(again, 8, file, found)
	if err != nil {
		t.Fatal(err)
	}
	if len(sealed) != 3 {
		t.Errorf("%d chunks were in memory", len(sealed))
	}
	c := newBench(t, 1, 1<<20, 0)
	if _, err := c.devices[0].disk.WriteAt(d.disk.Bytes(), 0); err != nil {
		t.Fatal(err)
	}
	r := cow.Restore(c.devices[0].cow, cow.Config{Storage: again, Pending: more, Patience: time.Second}, 1<<20, found, sealed)
	c.devices[0].cow.Begin(r)
	for range 2 {
		p := make([]byte, 1<<20)
		if _, err := r.ReadAt(p, 0); err != nil || !bytes.Equal(p, private) {
			t.Errorf("the image differs at %d, %v", firstDifference(p, private), err)
		}
		if _, err := c.devices[0].stack.WriteAt(bytes.Repeat([]byte("z"), 1<<20), 0); err != nil {
			t.Fatal(err)
		}
	}
	r.Close()
	if st := again.Stats(); st.Used != 16<<16 {
		t.Errorf("%+v", st)
	}
	close(gone)
	m.Close()
	storage.Close()
	if err := errors.Join(more.Close(), pending.Close()); err != nil {
		t.Error(err)
	}
}
