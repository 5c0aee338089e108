package nbd

import (
	"sync/atomic"
	"time"

	"tidemark/internal/abi/nbd"
)

// A request is done by a goroutine of its own, while the reader reads on. Where
// the device answers within a few microseconds that is a waste: waking another
// thread takes longer. Then the reader does it by itself, and sends the
// answers of what came in one piece in one piece. When it turns out to take long
// all the same, another goroutine reads on.
const (
	quickBytes = 64 << 10               // of a request that the reader may do by itself
	quickTime  = 20 * time.Microsecond  // that requests of late took
	slowTime   = 200 * time.Microsecond // what counts as slow counts no more than this
	patience   = 500 * time.Microsecond // with the reader that does something by itself
)

// turns say who reads.
type turns struct {
	over   chan error    // what reading ended with
	last   uint64        // number of the reader's last turn; its own
	busy   atomic.Uint64 // number of the turn in which the reader does something by itself; 0: it reads
	relief *time.Timer   // its time is over
	pace   atomic.Int64  // nanoseconds that small requests took of late
}

// transmission reads requests and has them done side by side, a bounded number
// at a time. It returns when the client is gone and its requests are done.
func (c *connection) transmission() error {
	c.turns.over = make(chan error, 1)
	c.turns.relief = time.AfterFunc(time.Hour, c.relieve)
	defer c.turns.relief.Stop()
	c.busy.Go(c.reads)
	err := <-c.turns.over
	c.busy.Wait()
	return err
}

// reads reads until the client is gone, or until somebody else does.
func (c *connection) reads() {
	unsent := false // answers are queued that nobody is about to send
	for {
		select {
		case c.slots <- struct{}{}:
		default: // answers that wait for more may have them
			if !c.mine(c.send) {
				return
			}
			unsent = false
			c.slots <- struct{}{}
		}
		r, err := c.next()
		if err != nil || r.cmd == nbd.CmdDisc {
			_ = c.flush() // the client may be gone
			c.turns.over <- err
			return
		}
		free := r.free
		r.free = func() { free(); <-c.slots }
		if !c.quick(r) {
			c.busy.Go(func() {
				c.timed(r)
				c.send()
			})
		} else if unsent = true; !c.mine(func() { c.timed(r) }) {
			c.send()
			return
		}
		if unsent && !c.more() {
			if !c.mine(c.send) {
				return
			}
			unsent = false
		}
	}
}

// mine has the reader do something by itself, and says whether it still reads afterwards.
func (c *connection) mine(do func()) bool {
	t := &c.turns
	t.last++
	turn := t.last
	t.busy.Store(turn)
	t.relief.Reset(patience)
	do()
	if !t.busy.CompareAndSwap(turn, 0) {
		return false
	}
	t.relief.Stop()
	return true
}

// relieve reads on for a reader that takes its time with something else.
func (c *connection) relieve() {
	if turn := c.turns.busy.Load(); turn != 0 && c.turns.busy.CompareAndSwap(turn, 0) {
		c.busy.Go(func() {
			c.send()
			c.reads()
		})
	}
}

// send sends what is queued. A client that cannot be answered is not read from either.
func (c *connection) send() {
	if err := c.flush(); err != nil {
		c.cut(err)
	}
}

// quick says that a request will take less time than having somebody else do it.
func (c *connection) quick(r request) bool {
	return (r.cmd == nbd.CmdRead || r.cmd == nbd.CmdWrite) && r.flags&nbd.CmdFlagFUA == 0 && r.n <= quickBytes && c.turns.pace.Load() < int64(quickTime)
}

// timed does a request and notes how long small ones take.
func (c *connection) timed(r request) {
	if r.buf == nil || r.n > quickBytes {
		c.do(r)
		return
	}
	start := time.Now()
	c.do(r)
	took := min(time.Since(start), slowTime)
	pace := c.turns.pace.Load()
	c.turns.pace.Store(pace + (int64(took)-pace)/8) // of two at a time one may be forgotten
}

// more says that the next request is here as a whole, so that reading it will not wait.
func (c *connection) more() bool {
	if c.in.Buffered() < nbd.RequestSize {
		return false
	}
	h, err := c.in.Peek(nbd.RequestSize)
	if err != nil || be.Uint16(h[6:]) != nbd.CmdWrite {
		return err == nil
	}
	return int64(c.in.Buffered()) >= nbd.RequestSize+int64(be.Uint32(h[24:]))
}
