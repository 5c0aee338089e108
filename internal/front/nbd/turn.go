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
	quickBytes = 64 << 10              // of a request that the reader may do by itself
	quickTime  = 20 * time.Microsecond // that one takes where they are quick, besides
	quickRate  = 2                     // bytes a nanosecond

	// The device is quick while slow is below slowMost/2. A slow request counts as
	// much as slowStep quick ones: one in twenty may be slow, as where a busy
	// machine takes the processor away.
	slowStep  = 20
	slowMost  = 8 * slowStep
	slowFirst = slowMost/2 + 20 // that it is quick has to be shown

	// patience with the reader that does something by itself; it ends up to twice as late.
	patience = time.Millisecond

	// moment is what the rest of a request that is here in part may take before
	// the answers that are ready are sent.
	moment = 50 * time.Microsecond
)

// turns say who reads. Each thing that a reader does by itself is a turn.
type turns struct {
	over   chan error    // what reading ended with
	turn   atomic.Uint64 // twice the number of the reader's last turn; one more while it lasts
	seen   atomic.Uint64 // what turn was when the bell rang last
	armed  atomic.Bool   // the bell will ring
	bell   *time.Timer
	slow   atomic.Int32 // how slow the device is, up to slowMost
	unsent bool         // answers are queued that nobody is about to send; the reader's
}

// transmission reads requests and has them done side by side, a bounded number
// at a time. It returns when the client is gone and its requests are done.
func (c *connection) transmission() error {
	c.turns.over = make(chan error, 1)
	c.turns.bell = time.AfterFunc(time.Hour, c.rings)
	defer c.turns.bell.Stop()
	c.busy.Go(c.reads)
	err := <-c.turns.over
	c.busy.Wait()
	return err
}

// reads reads until the client is gone, or until somebody else does.
func (c *connection) reads() {
	for {
		if c.turns.unsent && !c.more() && !c.sends() {
			return
		}
		select {
		case c.slots <- struct{}{}:
		default: // answers that wait for more may have them
			if !c.sends() {
				return
			}
			c.slots <- struct{}{}
		}
		r, err := c.next()
		if err != nil || r.cmd == nbd.CmdDisc {
			_ = c.flush() // the client may be gone
			c.turns.over <- err
			return
		}
		r.held.slot = true
		if !c.quick(&r) {
			c.handOver(r)
			continue
		}
		if !c.mine(func() { c.timed(&r) }) {
			c.send()
			return
		}
		c.turns.unsent = true
	}
}

// sends has the reader send, and says whether it still reads afterwards.
func (c *connection) sends() bool {
	c.turns.unsent = false
	return c.mine(c.send)
}

// handOver has another goroutine do a request.
func (c *connection) handOver(r request) {
	c.busy.Go(func() {
		c.timed(&r)
		c.send()
	})
}

// mine has the reader do something by itself, and says whether it still reads afterwards.
func (c *connection) mine(do func()) bool {
	t := &c.turns
	turn := t.turn.Add(1)
	if !t.armed.Load() && t.armed.CompareAndSwap(false, true) {
		t.bell.Reset(patience)
	}
	do()
	return t.turn.CompareAndSwap(turn, turn+1)
}

// rings looks whether the reader is where it was when the bell rang before, and
// reads on for one that takes its time. The bell rings on while there are turns.
func (c *connection) rings() {
	t := &c.turns
	turn := t.turn.Load()
	if t.seen.Swap(turn) != turn {
		t.bell.Reset(patience)
		return
	}
	t.armed.Store(false) // the next turn arms it
	if turn%2 == 1 && t.turn.CompareAndSwap(turn, turn+1) {
		c.busy.Go(func() {
			if c.sends() {
				c.reads()
			}
		})
		return
	}
	if t.turn.Load() != turn && t.armed.CompareAndSwap(false, true) { // one began meanwhile, and did not
		t.bell.Reset(patience)
	}
}

// send sends what is queued. A client that cannot be answered is not read from either.
func (c *connection) send() {
	if err := c.flush(); err != nil {
		c.cut(err)
	}
}

// quick says that a request will take less time than having somebody else do it.
func (c *connection) quick(r *request) bool {
	return (r.cmd == nbd.CmdRead || r.cmd == nbd.CmdWrite) && r.flags&nbd.CmdFlagFUA == 0 && r.n <= quickBytes && c.turns.slow.Load() < slowMost/2
}

// timed does a request and notes whether small ones are quick.
func (c *connection) timed(r *request) {
	if r.buf == nil || r.n > quickBytes {
		c.do(r)
		return
	}
	start := time.Now()
	c.do(r)
	slow := c.turns.slow.Load()
	if time.Since(start) > quickTime+time.Duration(r.n/quickRate) {
		slow = min(slow+slowStep, slowMost)
	} else {
		slow = max(slow-1, 0)
	}
	c.turns.slow.Store(slow) // of two at a time one may be forgotten
}

// more says that the next request is here as a whole, so that reading it will not wait.
func (c *connection) more() bool {
	if c.whole() {
		return true
	}
	c.in.more(0)
	for c.in.buffered() > 0 && !c.whole() {
		if !c.in.more(moment) {
			return false
		}
	}
	return c.in.buffered() > 0
}

// whole says that a request is here, with its payload, unless that is large.
func (c *connection) whole() bool {
	h := c.in.peek(nbd.RequestSize)
	if h == nil {
		return false
	}
	return be.Uint16(h[6:]) != nbd.CmdWrite || int64(c.in.buffered()) >= nbd.RequestSize+int64(be.Uint32(h[24:]))
}
