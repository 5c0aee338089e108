package barrier

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/health"
	"tidemark/internal/sim"
	"tidemark/internal/stack"
)

type served struct {
	disk   *sim.Disk
	stack  *stack.Stack
	filter *Filter
}

func serve(t *testing.T, n int) (*stack.System, []served, []*Filter) {
	t.Helper()
	y := stack.New(stack.Config{}, &health.Set{})
	t.Cleanup(func() { _ = y.Close() })
	var out []served
	var filters []*Filter
	for i := range n {
		d := served{disk: sim.NewDisk(1 << 20)}
		var err error
		if d.stack, err = y.Add(fmt.Sprint(i), d.disk); err != nil {
			t.Fatal(err)
		}
		if _, err := d.stack.Attach(Name, Altitude, Driver(func(f *Filter) { d.filter = f })); err != nil {
			t.Fatal(err)
		}
		out, filters = append(out, d), append(filters, d.filter)
	}
	return y, out, filters
}

// TestHoldsEveryChangeAndNothingElse, and lets all of it go on afterwards.
func TestHoldsEveryChangeAndNothingElse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, d, filters := serve(t, 1)
		b, err := Raise(t.Context(), time.Minute, filters...)
		if err != nil {
			t.Fatal(err)
		}
		var writes, others atomic.Int64
		s, p, r := d[0].stack, make([]byte, 512), block.Range{Len: 512}
		for _, do := range []func() error{
			func() error { _, err := s.WriteAt(p, 0); return err }, func() error { _, err := s.WriteFUA(p, 0); return err },
			func() error { return s.Discard(r) }, func() error { return s.WriteZeroes(r) },
		} {
			go func() {
				if err := do(); err != nil {
					t.Error(err)
				}
				writes.Add(1)
			}()
		}
		for _, do := range []func() error{func() error { _, err := s.ReadAt(p[:1:1], 0); return err }, s.Flush} {
			go func() {
				if err := do(); err != nil {
					t.Error(err)
				}
				others.Add(1)
			}()
		}
		synctest.Wait()
		if writes.Load() != 0 || others.Load() != 2 {
			t.Errorf("while it is up: %d writes, %d others", writes.Load(), others.Load())
		}
		if _, err := Raise(t.Context(), time.Minute, filters...); !errors.Is(err, ErrUp) {
			t.Errorf("raised twice: %v", err)
		}
		if err := b.Release(); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		if writes.Load() != 4 {
			t.Errorf("after it: %d writes", writes.Load())
		}
	})
}

// TestWaitsForWhatIsUnderWay, until its context ends; then nothing is held.
func TestWaitsForWhatIsUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, d, filters := serve(t, 2)
		let := make(chan struct{})
		d[1].disk.Fault = func(op block.Op, r block.Range) error {
			if r.Off == 0 {
				<-let
			}
			return nil
		}
		go func() { _, _ = d[1].stack.WriteAt(make([]byte, 512), 0) }()
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		if _, err := Raise(ctx, time.Minute, filters...); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("raised over a write under way: %v", err)
		}
		for i := range d {
			if _, err := d[i].stack.WriteAt(make([]byte, 512), 4096); err != nil {
				t.Error(err)
			}
		}
		var up atomic.Bool
		go func() {
			b, err := Raise(t.Context(), time.Minute, filters...)
			if err != nil {
				t.Error(err)
				return
			}
			up.Store(true)
			_ = b.Release()
		}()
		synctest.Wait()
		if up.Load() {
			t.Error("up while a write is under way")
		}
		close(let)
		synctest.Wait()
		if !up.Load() {
			t.Error("not up when it has ended")
		}
	})
}

// TestBoundAndLoss: writes are never held for good, and who believed them held is told.
func TestBoundAndLoss(t *testing.T) {
	for what, c := range map[string]struct {
		lose func(y *stack.System, s *stack.Stack, f *Filter)
		want error
	}{
		"too long":  {func(*stack.System, *stack.Stack, *Filter) { time.Sleep(11 * time.Second) }, ErrExpired},
		"taken out": {func(_ *stack.System, s *stack.Stack, f *Filter) { f.below.Fail(errors.New("broken")) }, ErrLost},
		"surprise":  {func(y *stack.System, s *stack.Stack, f *Filter) { _ = y.Surprise("0") }, ErrLost},
	} {
		synctest.Test(t, func(t *testing.T) {
			y, d, filters := serve(t, 1)
			b, err := Raise(t.Context(), 10*time.Second, filters...)
			if err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { _, err := d[0].stack.WriteAt([]byte("x"), 0); ended <- err }()
			synctest.Wait()
			c.lose(y, d[0].stack, d[0].filter)
			if err := <-ended; err != nil && what != "surprise" {
				t.Errorf("%s: the held write: %v", what, err)
			}
			if err := b.Release(); !errors.Is(err, c.want) {
				t.Errorf("%s: release: %v", what, err)
			}
		})
	}
}

// TestOneInstant: two devices, each write to the second made after one to the
// first ended; under the barrier the second never has what the first lacks.
func TestOneInstant(t *testing.T) {
	_, d, filters := serve(t, 2)
	var stop atomic.Bool
	var load sync.WaitGroup
	for w := range 3 {
		load.Go(func() {
			off := int64(w) * 512
			for n := byte(1); !stop.Load(); n++ {
				for i := range d {
					if _, err := d[i].stack.WriteAt([]byte{n}, off); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	for range 150 {
		b, err := Raise(t.Context(), time.Minute, filters...)
		if err != nil {
			t.Fatal(err)
		}
		first, second := d[0].disk.Bytes(), d[1].disk.Bytes()
		for w := range 3 {
			if n := first[w*512] - second[w*512]; n > 1 {
				t.Errorf("writer %d: %d on the first, %d on the second", w, first[w*512], second[w*512])
			}
		}
		if err := b.Release(); err != nil {
			t.Fatal(err)
		}
	}
	stop.Store(true)
	load.Wait()
}
