package snapshot

import (
	"sync"
	"testing"

	"tidemark/internal/block"
	"tidemark/internal/sim"
)

// life is a disk as one process has it. A test that goes on with the disk in another
// rig has killed the process before: what that one still does reaches the disk no
// more, and never ends, which a process that is killed does not see either.
type life struct {
	block.Device
	mu   sync.RWMutex
	dead bool
	end  chan struct{} // of the test
}

var lives struct {
	mu sync.Mutex
	m  map[block.Device]*life
}

// begun is the disk in the hands of a new process.
func begun(t *testing.T, disk block.Device) *life {
	l := &life{Device: disk, end: make(chan struct{})}
	lives.mu.Lock()
	defer lives.mu.Unlock()
	if lives.m == nil {
		lives.m = map[block.Device]*life{}
	}
	if before := lives.m[disk]; before != nil {
		before.mu.Lock() // what reached the disk is done
		before.dead = true
		before.mu.Unlock()
	}
	lives.m[disk] = l
	t.Cleanup(func() {
		close(l.end)
		lives.mu.Lock()
		defer lives.mu.Unlock()
		if lives.m[disk] == l {
			delete(lives.m, disk)
		}
	})
	return l
}

// do is a request of this process.
func (l *life) do(request func() error) error {
	l.mu.RLock()
	if l.dead {
		l.mu.RUnlock()
		<-l.end
		return sim.ErrCrashed
	}
	defer l.mu.RUnlock()
	return request()
}

func (l *life) ReadAt(p []byte, off int64) (n int, err error) {
	err = l.do(func() (err error) { n, err = l.Device.ReadAt(p, off); return err })
	return n, err
}

func (l *life) WriteAt(p []byte, off int64) (n int, err error) {
	err = l.do(func() (err error) { n, err = l.Device.WriteAt(p, off); return err })
	return n, err
}

func (l *life) Flush() error { return l.do(l.Device.Flush) }

func (l *life) WriteFUA(p []byte, off int64) (n int, err error) {
	err = l.do(func() (err error) {
		if f, ok := l.Device.(block.FUAWriter); ok {
			n, err = f.WriteFUA(p, off)
			return err
		}
		if n, err = l.Device.WriteAt(p, off); err == nil {
			err = l.Device.Flush()
		}
		return err
	})
	return n, err
}

func (l *life) WriteZeroes(r block.Range) error {
	return l.do(func() error {
		if z, ok := l.Device.(block.Zeroer); ok {
			return z.WriteZeroes(r)
		}
		_, err := l.Device.WriteAt(make([]byte, r.Len), r.Off)
		return err
	})
}

func (l *life) Discard(r block.Range) error {
	return l.do(func() error {
		if d, ok := l.Device.(block.Discarder); ok {
			return d.Discard(r)
		}
		return nil // which leaves the content
	})
}
