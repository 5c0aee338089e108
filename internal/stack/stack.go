package stack

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"weak"

	"tidemark/internal/block"
)

// Stack is one device with its filters: a block.Device with every ability. All
// methods may be called concurrently.
type Stack struct {
	name   string
	system *System
	dev    block.Device
	zeroer block.Zeroer
	discer block.Discarder
	fua    block.FUAWriter
	mover  block.Mover

	chain     atomic.Pointer[chain]
	calls     sync.Pool
	nextShard atomic.Uint64
	size      atomic.Int64
	closed    atomic.Bool // no request enters from above
	dead      atomic.Bool // nothing reaches the device

	edit    sync.Mutex // one change of the composition at a time
	mu      sync.Mutex // of what follows
	retired []*chain
	frames  []weak.Pointer[frame]
}

var (
	_ block.Device    = (*Stack)(nil)
	_ block.Zeroer    = (*Stack)(nil)
	_ block.Discarder = (*Stack)(nil)
	_ block.FUAWriter = (*Stack)(nil)
	_ block.Mover     = (*Stack)(nil)
)

func newStack(name string, dev block.Device, system *System) *Stack {
	s := &Stack{name: name, system: system, dev: dev}
	s.zeroer, _ = dev.(block.Zeroer)
	s.discer, _ = dev.(block.Discarder)
	s.fua, _ = dev.(block.FUAWriter)
	s.mover, _ = dev.(block.Mover)
	s.calls.New = s.newCall
	s.size.Store(dev.Size())
	s.chain.Store(newChain(nil))
	return s
}

// Name is what the device was added as.
func (s *Stack) Name() string { return s.name }

// Size is the device's, in bytes.
func (s *Stack) Size() int64 { return s.size.Load() }

// top sends a request in from above.
func (s *Stack) top(r Request) error {
	if r.Op != block.OpFlush {
		if err := block.CheckBounds(r.Range, s.size.Load()); err != nil {
			return err
		}
		if r.Range.Empty() {
			return nil
		}
	}
	c := s.calls.Get().(*call)
	c.req = r
	ch := s.enter(c.shard)
	if s.closed.Load() {
		ch.leave(c.shard)
		return ErrGone
	}
	return s.send(c, ch, 0)
}

// ReadAt reads through the filters.
func (s *Stack) ReadAt(p []byte, off int64) (int, error) {
	size := s.size.Load()
	if off < 0 || off > size {
		return 0, fmt.Errorf("read at %d of a device of %d bytes: %w", off, size, block.ErrBounds)
	}
	var short error
	if int64(len(p)) > size-off {
		p, short = p[:size-off], io.EOF
	}
	if err := s.top(Request{Op: block.OpRead, Range: block.Range{Off: off, Len: int64(len(p))}, Data: p}); err != nil {
		return 0, err
	}
	return len(p), short
}

// WriteAt writes through the filters: all of p or, with an error, any part of it.
func (s *Stack) WriteAt(p []byte, off int64) (int, error) { return s.write(p, off, false) }

// WriteFUA is WriteAt for a write that is stable when it returns.
func (s *Stack) WriteFUA(p []byte, off int64) (int, error) { return s.write(p, off, true) }

func (s *Stack) write(p []byte, off int64, fua bool) (int, error) {
	if err := s.top(Request{Op: block.OpWrite, FUA: fua, Range: block.Range{Off: off, Len: int64(len(p))}, Data: p}); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Move reads or writes through the filters. The data comes into this process
// only for a filter that must handle the request, or where the device cannot do without.
func (s *Stack) Move(op block.Op, r block.Range, fua bool, l block.Load) error {
	return s.top(Request{Op: op, FUA: fua, Range: r, load: l})
}

// WriteZeroes makes a range read as zeroes.
func (s *Stack) WriteZeroes(r block.Range) error { return s.top(Request{Op: block.OpZeroes, Range: r}) }

// Discard tells that a range's content no longer matters.
func (s *Stack) Discard(r block.Range) error { return s.top(Request{Op: block.OpDiscard, Range: r}) }

// Flush makes stable what was written before.
func (s *Stack) Flush() error { return s.top(Request{Op: block.OpFlush}) }

// bottom does a request on the device itself.
func (s *Stack) bottom(r *Request) error {
	if s.dead.Load() {
		return ErrGone
	}
	if r.load != nil && s.mover != nil {
		return s.mover.Move(r.Op, r.Range, r.FUA, r.load)
	}
	if err := r.fetch(); err != nil {
		return err
	}
	switch r.Op {
	case block.OpRead:
		return whole(len(r.Data))(s.dev.ReadAt(r.Data, r.Range.Off))
	case block.OpWrite:
		return s.bottomWrite(r)
	case block.OpZeroes:
		if s.zeroer != nil {
			return s.zeroer.WriteZeroes(r.Range)
		}
		return s.writeZeroes(r.Range)
	case block.OpDiscard:
		if s.discer == nil {
			return nil // a hint
		}
		return s.discer.Discard(r.Range)
	case block.OpFlush:
		return s.dev.Flush()
	}
	return fmt.Errorf("%s of %s: no such operation", r.Op, r.Range)
}

func (s *Stack) bottomWrite(r *Request) error {
	if r.FUA && s.fua != nil {
		return whole(len(r.Data))(s.fua.WriteFUA(r.Data, r.Range.Off))
	}
	if err := whole(len(r.Data))(s.dev.WriteAt(r.Data, r.Range.Off)); err != nil || !r.FUA {
		return err
	}
	return s.dev.Flush()
}

var zeroes [64 << 10]byte

// writeZeroes is for devices that must be sent them.
func (s *Stack) writeZeroes(r block.Range) error {
	for at := r.Off; at < r.End(); {
		n := min(int64(len(zeroes)), r.End()-at)
		if err := whole(int(n))(s.dev.WriteAt(zeroes[:n], at)); err != nil {
			return err
		}
		at += n
	}
	return nil
}

// whole turns the answer of an io call that must do n bytes into an error.
func whole(n int) func(int, error) error {
	return func(did int, err error) error {
		if did == n {
			return nil
		}
		if err == nil || errors.Is(err, io.EOF) {
			return io.ErrUnexpectedEOF
		}
		return err
	}
}

// Info is one filter of a stack, as people are told of it.
type Info struct {
	Name     string `json:"name"`
	Altitude int    `json:"altitude"`
}

// Filters lists the filters, highest first.
func (s *Stack) Filters() []Info {
	var out []Info
	for _, a := range s.chain.Load().steps {
		out = append(out, Info{a.name, a.altitude})
	}
	return out
}

// Resized takes over the device's new size. Filters are told first, lowest
// first, where it grew; where it shrank they are told afterwards.
func (s *Stack) Resized() {
	s.edit.Lock()
	defer s.edit.Unlock()
	size := s.dev.Size()
	if size < s.size.Load() {
		s.size.Store(size)
	}
	steps := s.chain.Load().steps
	for i := len(steps) - 1; i >= 0; i-- {
		if r, ok := steps[i].filter.(Resizer); ok {
			if err := s.bounded(func() { r.Resized(size) }); err != nil {
				s.expel(steps[i], fmt.Errorf("told of a new size: %w", err))
			}
		}
	}
	s.size.Store(size)
}
