package daemon

import (
	"context"
	"io"
	"net/http"

	"tidemark/internal/drain"
)

// flow is the answer to who asked for batches: one behind the other, so that none
// costs a round trip. While one is on its way the next is made, where there is room
// for it. It ends behind the last that was asked for, or behind which there is none
// now for whatever reason: who asks again is told. It is used by one goroutine.
type flow struct {
	ctx   context.Context
	make  func(ctx context.Context, after uint64) (*drain.Batch, error)
	room  chan struct{} // holds one for each batch that is made or on its way
	left  int           // how many may follow
	now   *drain.Batch
	parts [][]byte          // what of now is not on its way
	ahead chan *drain.Batch // gets the next one, nil where there is none; nil: it is not being made
}

// flowing makes the first of at most so many batches (0: one), and waits for room for it.
func flowing(ctx context.Context, room chan struct{}, batches int, next func(ctx context.Context, after uint64) (*drain.Batch, error)) (*flow, error) {
	f := &flow{ctx: ctx, make: next, room: room, left: max(batches, 1)}
	select {
	case room <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	b, err := next(ctx, 0)
	if err != nil {
		<-room
		return nil, err
	}
	f.take(b)
	return f, nil
}

// take goes on with a batch.
func (f *flow) take(b *drain.Batch) {
	f.now, f.left = b, f.left-1
	for _, p := range b.Parts() {
		if len(p) > 0 {
			f.parts = append(f.parts, p)
		}
	}
}

// release lets go of what is on its way.
func (f *flow) release() {
	if f.now != nil {
		f.now.Release()
		f.now, f.parts = nil, nil
		<-f.room
	}
}

// prepare has the next batch made, unless the group's batches take all the room.
func (f *flow) prepare() {
	if f.left == 0 || f.ahead != nil {
		return
	}
	select {
	case f.room <- struct{}{}:
	default:
		return
	}
	ahead, after := make(chan *drain.Batch, 1), f.now.Header.Number
	go func() { // "ahead": ends when the batch is made
		b, err := f.make(f.ctx, after)
		if err != nil {
			<-f.room
			b = nil
		}
		ahead <- b
	}()
	f.ahead = ahead
}

// next goes on to the next batch; false: that was the last.
func (f *flow) next() bool {
	switch {
	case f.ahead != nil:
		b := <-f.ahead
		f.ahead = nil
		if b != nil {
			f.release()
			f.take(b)
			return true
		}
	case f.left > 0: // there was no room but that of the batch which has gone
		if b, err := f.make(f.ctx, f.now.Header.Number); err == nil {
			f.now.Release()
			f.take(b)
			return true
		}
	}
	f.left = 0
	return false
}

// Read gives the batches' bytes.
func (f *flow) Read(p []byte) (int, error) {
	if len(f.parts) == 0 && !f.next() {
		return 0, io.EOF
	}
	f.prepare()
	n := copy(p, f.parts[0])
	if f.parts[0] = f.parts[0][n:]; len(f.parts[0]) == 0 {
		f.parts = f.parts[1:]
	}
	return n, nil
}

// WriteTo writes them without another copy, each to its end before the next is waited for.
func (f *flow) WriteTo(w io.Writer) (total int64, err error) {
	for len(f.parts) > 0 || f.next() {
		f.prepare()
		for ; len(f.parts) > 0; f.parts = f.parts[1:] {
			n, err := w.Write(f.parts[0])
			total += int64(n)
			if err != nil {
				return total, err
			}
		}
		if h, ok := w.(http.Flusher); ok {
			h.Flush()
		}
	}
	return total, nil
}

// Close lets go of everything, also of what is being made still.
func (f *flow) Close() error {
	f.left = 0
	f.release()
	if ahead := f.ahead; ahead != nil {
		f.ahead = nil
		go func() { // "ahead": it does not wait for a vault that hangs
			if b := <-ahead; b != nil {
				b.Release()
				<-f.room
			}
		}()
	}
	return nil
}
