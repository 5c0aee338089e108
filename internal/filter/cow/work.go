package cow

import "sync"

// work counts what is under way, so that it can be waited for.
type work struct {
	mu     sync.Mutex
	idle   sync.Cond
	n      int
	closed bool
}

func (w *work) enter() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return false
	}
	w.n++
	return true
}

// more is for what begins while something else is under way, or holds the image's place.
func (w *work) more() {
	w.mu.Lock()
	w.n++
	w.mu.Unlock()
}

func (w *work) leave() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.n--; w.n == 0 {
		w.idle.Broadcast()
	}
}

func (w *work) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	for w.n > 0 {
		w.idle.Wait()
	}
}
