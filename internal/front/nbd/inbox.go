package nbd

import (
	"io"
	"time"
)

// inbox is what a client has sent and nobody has taken yet: a bufio.Reader that
// can also look for more without waiting. Its reader owns it.
type inbox struct {
	from io.Reader
	b    []byte
	r, w int // b[r:w] is there
	luck int // of late, with looking for more
	most int // that is fetched at a time
}

const (
	inboxBytes = 64 << 10
	inboxHeads = 4 << 10 // while large payloads come: what of one is fetched with its head is copied twice
)

func newInbox(from io.Reader) *inbox {
	return &inbox{from: from, b: make([]byte, inboxBytes), most: inboxBytes}
}

// expect says that the next request is most likely like one with that payload, in bytes.
func (in *inbox) expect(payload uint32) {
	in.most = inboxBytes
	if payload >= inboxBytes {
		in.most = inboxHeads
	}
}

// room is where what comes next is put.
func (in *inbox) room() []byte { return in.b[in.w:min(in.w+in.most, len(in.b))] }

// reset goes on with another reader; what is there is forgotten.
func (in *inbox) reset(from io.Reader) { in.from, in.r, in.w = from, 0, 0 }

// buffered is how many bytes are there.
func (in *inbox) buffered() int { return in.w - in.r }

// Read takes what is there; it waits where that is nothing.
func (in *inbox) Read(p []byte) (int, error) {
	if in.r == in.w {
		if s, ok := in.from.(*socket); ok {
			s.dry = false // it is what was begun: it is most likely here by now
			in.r, in.w = 0, 0
			n, err := s.readBoth(p, in.room())
			in.w = max(n-len(p), 0)
			return min(n, len(p)), err
		}
		if len(p) >= len(in.b) {
			return in.from.Read(p)
		}
		if err := in.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(p, in.b[in.r:in.w])
	in.r += n
	return n, nil
}

// take gives the next n bytes, at most inboxBytes, until the next call of anything.
// io.EOF says that there are none at all, or not as many.
func (in *inbox) take(n int) ([]byte, error) {
	for in.buffered() < n {
		if err := in.fill(); err != nil {
			return nil, err
		}
	}
	p := in.b[in.r : in.r+n]
	in.r += n
	return p, nil
}

// peek gives the next n bytes where they are there, and leaves them.
func (in *inbox) peek(n int) []byte {
	if in.buffered() < n {
		return nil
	}
	return in.b[in.r : in.r+n]
}

func (in *inbox) fill() error {
	in.compact()
	for range 100 {
		n, err := in.from.Read(in.room())
		in.w += n
		if n > 0 {
			return nil // an error comes again
		}
		if err != nil {
			return err
		}
	}
	return io.ErrNoProgress
}

// compact makes room behind what is there.
func (in *inbox) compact() {
	if in.r > 0 {
		in.w = copy(in.b, in.b[in.r:in.w])
		in.r = 0
	}
}

// luckMost is up to how often more looks in vain before it does so less often.
const luckMost = 16

// more looks for more, for no longer than a moment, and says whether it found
// any. Without a moment, where there mostly is none, as from a client with one
// request at a time, it mostly does not look.
func (in *inbox) more(moment time.Duration) bool {
	s, ok := in.from.(*socket)
	if !ok {
		return false
	}
	if in.compact(); in.w == len(in.b) {
		return false
	}
	if in.luck--; in.luck < 0 && in.luck%luckMost != 0 && moment == 0 {
		return false
	}
	n, _ := s.tryRead(in.room(), moment) // an error comes again
	in.w += n
	if n > 0 {
		in.luck = luckMost
	}
	return n > 0
}
