package stack

import "tidemark/internal/block"

// Next is what lies below a filter, for one request: good until Handle returns.
type Next struct {
	f   *frame
	gen uint64
}

// Do sends a request on: the one that is handled, or one of the filter's own.
// It may be called concurrently.
func (n Next) Do(r *Request) error {
	f := n.f
	own, err := f.enterBelow(n.gen, r)
	if err != nil {
		return err
	}
	if !own {
		err = f.call.descend(f.at + 1)
	} else {
		s := f.call.stack
		c := s.calls.Get().(*call)
		c.req = *r
		ch := f.call.chain // stays alive: f.call is in it
		ch.in[c.shard].n.Add(1)
		err = s.send(c, ch, f.at+1)
	}
	f.leaveBelow(r == &f.call.req, err)
	return err
}

// Wait waits until done is closed by whoever has a request of the filter's under
// way below: as that, it does not count as keeping the request. ErrExpelled: the
// filter was taken out meanwhile.
func (n Next) Wait(done <-chan struct{}) error {
	f := n.f
	a := f.owner.Load()
	if _, err := f.enterBelow(n.gen, nil); err != nil {
		return err
	}
	defer f.leaveBelow(false, nil)
	select {
	case <-done:
		return nil
	case <-a.gone:
		return ErrExpelled
	}
}

// Read fills p from off.
func (n Next) Read(p []byte, off int64) error {
	return n.Do(&Request{Op: block.OpRead, Range: block.Range{Off: off, Len: int64(len(p))}, Data: p})
}

// Write writes p at off.
func (n Next) Write(p []byte, off int64) error {
	return n.Do(&Request{Op: block.OpWrite, Range: block.Range{Off: off, Len: int64(len(p))}, Data: p})
}
