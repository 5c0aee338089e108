package backing

import (
	"fmt"
	"sync"
	"testing"

	"tidemark/internal/testkit"
	"tidemark/internal/uring"
)

// shared is a ring for many goroutines, as it would serve a Device: whoever
// wants something submits it, and one goroutine hands out what completes.
type shared struct {
	mu    sync.Mutex
	ring  *uring.Ring
	slots chan int
	done  []chan int32
}

func (s *shared) read(fd int, p []byte, off int64) int32 {
	i := <-s.slots
	s.mu.Lock()
	s.ring.Next().Read(fd, p, off, uint64(i))
	err := s.ring.Submit(0)
	s.mu.Unlock()
	if err != nil {
		return -1
	}
	n := <-s.done[i]
	s.slots <- i
	return n
}

// BenchmarkRead compares, for one reader and for many, a system call on the
// caller's thread with a ring that all share, and with one ring and thread for each.
func BenchmarkRead(b *testing.B) {
	testkit.Need(b, "uring")
	d := open(b, testkit.NewDisk(b, 64<<20).Path, Options{})
	fd := int(d.file.Fd())
	for _, workers := range []int{1, 32} {
		run := func(name string, read func(worker int, p []byte, off int64) error) {
			b.Run(fmt.Sprintf("%s/%d", name, workers), func(b *testing.B) {
				var wg sync.WaitGroup
				for w := range workers {
					wg.Go(func() {
						p := aligned(make([]byte, 8192))[:4096]
						for i := w; i < b.N; i += workers {
							if err := read(w, p, int64(i*7919)%(16<<10)*4096); err != nil {
								b.Error(err)
							}
						}
					})
				}
				wg.Wait()
			})
		}
		run("call", func(_ int, p []byte, off int64) error {
			_, err := d.ReadAt(p, off)
			return err
		})
		rings := make([]*uring.Ring, workers)
		for i := range rings {
			rings[i] = newRing(b)
		}
		run("own ring", func(w int, p []byte, off int64) error {
			rings[w].Next().Read(fd, p, off, 1)
			err := rings[w].Submit(1)
			if c, ok := rings[w].Reap(); !ok || c.Res != 4096 {
				return fmt.Errorf("%+v, %v", c, err)
			}
			return err
		})
		s := share(b)
		run("shared ring", func(_ int, p []byte, off int64) error {
			if n := s.read(fd, p, off); n != 4096 {
				return fmt.Errorf("%d", n)
			}
			return nil
		})
	}
}

func newRing(b *testing.B) *uring.Ring {
	r, err := uring.New(uring.Config{Entries: 64})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { r.Close() })
	return r
}

const lastWord = 1 << 32

func share(b *testing.B) *shared {
	s := &shared{ring: newRing(b), slots: make(chan int, 64), done: make([]chan int32, 64)}
	for i := range s.done {
		s.done[i] = make(chan int32, 1)
		s.slots <- i
	}
	ended := make(chan struct{})
	go func() { // completions only: the submission side is the callers'
		defer close(ended)
		for {
			if err := s.ring.Wait(1); err != nil {
				b.Error(err)
				return
			}
			for c, ok := s.ring.Reap(); ok; c, ok = s.ring.Reap() {
				if c.UserData == lastWord {
					return
				}
				s.done[c.UserData] <- c.Res
			}
		}
	}()
	b.Cleanup(func() {
		s.mu.Lock()
		s.ring.Next().Nop(lastWord)
		_ = s.ring.Submit(0)
		s.mu.Unlock()
		<-ended
	})
	return s
}
