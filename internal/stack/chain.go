package stack

import (
	"sync"
	"sync/atomic"
)

// shards is over how many counters the requests of a chain are counted; each
// processor mostly keeps to its own.
const shards = 16

// chain is one composition of a stack, highest filter first. It never changes;
// another takes its place, and it ends when the last request has left it.
type chain struct {
	steps   []*attachment
	in      [shards]counter
	retired atomic.Bool
	drained chan struct{} // closed when it is retired and empty
	once    sync.Once
}

type counter struct {
	n atomic.Int64
	_ [56]byte // a cache line each
}

func newChain(steps []*attachment) *chain {
	return &chain{steps: steps, drained: make(chan struct{})}
}

// enter counts a request in and gives the chain that it is in. A chain that was
// replaced meanwhile is left again: after retire a chain only gets emptier.
func (s *Stack) enter(shard int) *chain {
	for {
		c := s.chain.Load()
		c.in[shard].n.Add(1)
		if s.chain.Load() == c {
			return c
		}
		c.leave(shard)
	}
}

func (c *chain) leave(shard int) {
	c.in[shard].n.Add(-1)
	if c.retired.Load() {
		c.settle()
	}
}

// retire is called after the chain was replaced.
func (c *chain) retire() {
	c.retired.Store(true)
	c.settle()
}

// settle notes the end of a retired chain. A shard that is seen at zero holds no
// request and will hold none; one that only looked in calls settle when it leaves.
func (c *chain) settle() {
	for i := range c.in {
		if c.in[i].n.Load() != 0 {
			return
		}
	}
	c.once.Do(func() { close(c.drained) })
}

// below is the index of the first filter under an altitude.
func (c *chain) below(altitude int) int {
	for i, a := range c.steps {
		if a.altitude < altitude {
			return i
		}
	}
	return len(c.steps)
}

// swap replaces the chain by what edit makes of its filters and gives the old
// one; retired ones that are not empty yet are remembered. s.mu is held.
func (s *Stack) swap(edit func(steps []*attachment) []*attachment) *chain {
	old := s.chain.Load()
	s.chain.Store(newChain(edit(old.steps)))
	alive := s.retired[:0]
	for _, c := range append(s.retired, old) {
		c.retire()
		select {
		case <-c.drained:
		default:
			alive = append(alive, c)
		}
	}
	s.retired = alive
	return old
}
