package timeline

import (
	"errors"
	"fmt"
	"io"
	"sync"

	"tidemark/internal/segment"
)

const (
	objectsMax = 128
	framesMax  = 512 // 32 MiB
)

// store reads payloads through a few open objects and decoded frames. Different
// frames are read side by side, the same one only once. The tables of frames are
// those that the view was made from: what an object holds later does not matter.
type store struct {
	open    opener
	tables  []*segment.Frames // by number of the segment; nil where the view needs nothing of it
	mu      sync.Mutex
	objects cache[int32, *object]
	frames  cache[frameKey, *frame]
}

// opener opens the bytes of a segment by its number.
type opener func(i int32) (io.ReaderAt, io.Closer, error)

type frameKey struct {
	segment int32
	frame   int
}

type frame struct {
	once sync.Once
	data []byte
	err  error
}

// object is an open segment, closed with its last user.
type object struct {
	once  sync.Once
	r     io.ReaderAt
	c     io.Closer
	err   error
	users int // under store.mu; the cache is one
}

// cache keeps the newest few.
type cache[K comparable, V any] struct {
	max   int
	have  map[K]V
	order []K
}

func newCache[K comparable, V any](n int) cache[K, V] { return cache[K, V]{max: n, have: map[K]V{}} }

// add puts a value in, and gives the one that had to go.
func (c *cache[K, V]) add(k K, v V) (gone V, full bool) {
	if len(c.order) == c.max {
		oldest := c.order[0]
		c.order = c.order[1:]
		gone, full = c.have[oldest]
		delete(c.have, oldest)
	}
	c.have[k] = v
	c.order = append(c.order, k)
	return gone, full
}

// drop takes a value out again.
func (c *cache[K, V]) drop(k K) {
	delete(c.have, k)
	for i, o := range c.order {
		if o == k {
			c.order = append(c.order[:i:i], c.order[i+1:]...)
			return
		}
	}
}

func newStore(open opener, tables []*segment.Frames) *store {
	return &store{open: open, tables: tables, objects: newCache[int32, *object](objectsMax), frames: newCache[frameKey, *frame](framesMax)}
}

func (s *store) read(e extent, dst []byte) error {
	for at := e.place(); len(dst) > 0; {
		k := frameKey{e.segment, int(at / segment.FrameSize)}
		if at%segment.FrameSize == 0 && len(dst) >= segment.FrameSize { // all of it: not by way of the cache
			data, err := s.decode(k, dst[:segment.FrameSize])
			if err != nil {
				clear(dst[:segment.FrameSize])
				return err
			}
			dst, at = dst[len(data):], at+uint64(len(data))
			continue
		}
		data, err := s.frame(k)
		if err != nil {
			return err
		}
		if at%segment.FrameSize >= uint64(len(data)) {
			return fmt.Errorf("%w: a payload ends early", segment.ErrDamaged)
		}
		n := copy(dst, data[at%segment.FrameSize:])
		dst, at = dst[n:], at+uint64(n)
	}
	return nil
}

// frame gives a decoded frame; it is not changed by anybody.
func (s *store) frame(k frameKey) ([]byte, error) {
	s.mu.Lock()
	f, ok := s.frames.have[k]
	if !ok {
		f = &frame{}
		s.frames.add(k, f)
	}
	s.mu.Unlock()
	f.once.Do(func() {
		if f.data, f.err = s.decode(k, make([]byte, segment.FrameSize)); f.err != nil { // it may be read when it is asked for again
			s.mu.Lock()
			s.frames.drop(k)
			s.mu.Unlock()
		}
	})
	return f.data, f.err
}

// decode reads a frame into dst, which must have room for segment.FrameSize bytes.
func (s *store) decode(k frameKey, dst []byte) ([]byte, error) {
	o, err := s.take(k.segment)
	defer s.put(o)
	if err != nil {
		return nil, err
	}
	return s.tables[k.segment].Read(o.r, k.frame, dst)
}

// take opens a segment, or finds it open. put gives it back.
func (s *store) take(i int32) (*object, error) {
	s.mu.Lock()
	o, ok := s.objects.have[i]
	var gone *object
	if !ok {
		o = &object{users: 1}
		gone, _ = s.objects.add(i, o)
	}
	o.users++
	s.mu.Unlock()
	s.put(gone)
	o.once.Do(func() {
		o.r, o.c, o.err = s.open(i)
	})
	if o.err != nil {
		s.mu.Lock()
		if s.objects.have[i] == o {
			s.objects.drop(i)
			o.users--
		}
		s.mu.Unlock()
	}
	return o, o.err
}

func (s *store) put(o *object) {
	if o == nil {
		return
	}
	s.mu.Lock()
	o.users--
	last := o.users == 0
	s.mu.Unlock()
	if last && o.c != nil {
		o.c.Close() // it was only read
	}
}

func (s *store) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, o := range s.objects.have {
		if o.c != nil {
			errs = append(errs, o.c.Close())
		}
	}
	s.objects = newCache[int32, *object](objectsMax)
	return errors.Join(errs...)
}
