package stack

import (
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"weak"
)

// call is one request on its way. It is reused, with its frames, unless an
// expelled filter still holds on to it.
type call struct {
	stack  *Stack
	shard  int
	chain  *chain
	req    Request
	frames []*frame
	kept   atomic.Bool // by an expelled filter
}

// frame is a call's stay in one filter:
//
//	       begin          enterBelow            leaveBelow        finish
//	idle ─────────▶ inside ─────────▶ below (n) ─────────▶ inside ─────▶ over
//	                   │                  └── takeAway: as soon as n is 0 ──▶ over, taken
//	                   └── takeAway ──▶ over, taken
//
// Only "inside" counts for the watchdog.
type frame struct {
	call  *call
	at    int
	run   func() // handle, made once
	done  chan struct{}
	owner atomic.Pointer[attachment]
	since atomic.Int64 // the watchdog's clock when it went inside; 0: it is not

	mu      sync.Mutex
	gen     uint64 // which stay this is: a Next of an older one is void
	below   int    // requests that are under way below
	over    bool
	waiting bool // somebody waits for done
	taken   bool // over, and not by the filter
	wanted  bool // to be taken when nothing is below
	passed  bool // the request itself was passed on, and ended with result
	result  error
	err     error
	broken  error
}

func (s *Stack) newCall() any {
	return &call{stack: s, shard: int(s.nextShard.Add(1) % shards)}
}

// do sends one request through the filters of ch from the index on.
func (s *Stack) send(c *call, ch *chain, from int) error {
	c.chain, c.req.lane = ch, c.shard
	err := c.descend(from)
	ch.leave(c.shard)
	if !c.kept.Load() {
		c.chain, c.req = nil, Request{}
		s.calls.Put(c)
	}
	return err
}

// descend goes down from a filter's index.
func (c *call) descend(i int) error {
	for {
		var broken error
		i, broken = c.sift(i)
		switch {
		case broken != nil:
			c.stack.expel(c.chain.steps[i], broken)
			i++
		case i == len(c.chain.steps):
			return c.stack.bottom(&c.req)
		case c.stack.dead.Load():
			return ErrGone
		default:
			return c.through(i, c.chain.steps[i])
		}
	}
}

// sift gives the index of the first filter, from one on, that must handle the
// request. A sieve that panics breaks, as a filter that does in Handle: then it is
// that one's.
func (c *call) sift(from int) (i int, broken error) {
	defer func() {
		if v := recover(); v != nil {
			broken = panicked(v)
		}
	}()
	for i = from; i < len(c.chain.steps); i++ {
		a := c.chain.steps[i]
		if !a.out.Load() && (a.sieve == nil || !a.sieve.Pass(&c.req)) {
			break
		}
	}
	return i, nil
}

// through has one filter handle the request, and goes on without the filter
// where that fails.
func (c *call) through(i int, a *attachment) error {
	if !a.blind {
		if err := c.req.fetch(); err != nil {
			return err
		}
	}
	f := c.frame(i)
	f.begin(a)
	if a.inline {
		f.handle()
		f.settle()
	} else {
		go f.run()
		f.await(a)
	}
	f.mu.Lock()
	err, broken, taken, passed, result := f.err, f.broken, f.taken, f.passed, f.result
	f.mu.Unlock()
	f.owner.Store(nil)
	if taken {
		c.kept.Store(true)
	}
	if broken != nil {
		c.stack.expel(a, broken)
	}
	// What a filter answers after it was taken out counts only if it is good news.
	lost := taken || broken != nil || err != nil && a.out.Load()
	switch {
	case !lost:
		return err
	case passed:
		return result
	}
	return c.descend(i + 1)
}

func (c *call) frame(i int) *frame {
	for len(c.frames) <= i {
		c.frames = append(c.frames, nil)
	}
	if c.frames[i] == nil {
		f := &frame{call: c, at: i, done: make(chan struct{}, 1)}
		f.run = f.handle
		c.frames[i] = f
		c.stack.mu.Lock()
		c.stack.frames = append(c.stack.frames, weak.Make(f))
		c.stack.mu.Unlock()
	}
	return c.frames[i]
}

func (f *frame) begin(a *attachment) {
	f.mu.Lock()
	f.gen++
	f.below, f.over, f.taken, f.wanted, f.passed = 0, false, false, false, false
	f.result, f.err, f.broken = nil, nil, nil
	f.waiting = !a.inline
	f.mu.Unlock()
	f.owner.Store(a)
	f.since.Store(a.stack.system.clock.Load())
}

// handle calls the filter.
func (f *frame) handle() {
	returned := false
	defer func() {
		if v := recover(); v != nil {
			f.finish(nil, panicked(v))
		} else if !returned {
			f.finish(nil, errors.New("the filter ended its goroutine"))
		}
	}()
	err := f.owner.Load().filter.Handle(&f.call.req, Next{f, f.gen})
	returned = true
	if errors.Is(err, ErrBroken) {
		f.finish(nil, err)
		return
	}
	f.finish(err, nil)
}

func panicked(v any) error { return fmt.Errorf("panic: %v\n%s", v, debug.Stack()) }

// finish ends the stay, unless the request was taken away before. A filter that
// broke while requests are below leaves the end to the last of them.
func (f *frame) finish(err, broken error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.over {
		return
	}
	f.since.Store(0)
	f.err, f.broken = err, broken
	if broken != nil && f.below > 0 {
		f.wanted = true
		return
	}
	f.end()
}

func (f *frame) end() {
	f.over = true
	if f.waiting {
		f.done <- struct{}{} // one a stay: there is room
	}
}

// settle returns when a filter that broke has no request below any more.
func (f *frame) settle() {
	f.mu.Lock()
	f.waiting = !f.over
	f.mu.Unlock()
	if f.waiting {
		<-f.done
	}
}

// await returns when the filter is done with the request or has lost it.
func (f *frame) await(a *attachment) {
	select {
	case <-f.done:
		return
	case <-a.gone:
	}
	f.mu.Lock()
	if !f.over && f.below == 0 {
		f.taken = true
		f.end()
	}
	f.wanted = true
	f.mu.Unlock()
	<-f.done
}

// enterBelow notes that a request goes below; own says that the caller must
// make a call of its own for it.
func (f *frame) enterBelow(gen uint64, r *Request) (own bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.gen != gen || f.over {
		return false, ErrExpelled
	}
	f.below++
	f.since.Store(0)
	return r != &f.call.req || f.below > 1, nil
}

func (f *frame) leaveBelow(itself bool, result error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if itself {
		f.passed, f.result = true, result
	}
	f.below--
	switch {
	case f.below > 0 || f.over:
	case f.wanted:
		f.taken = f.broken == nil
		f.end()
	default:
		f.since.Store(f.call.stack.system.clock.Load())
	}
}
