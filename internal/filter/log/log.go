// Package log is a filter for tests: it writes down the requests that pass it.
// It must not write to a device that it is over.
package log

import (
	"fmt"
	"io"
	"sync"

	"tidemark/internal/stack"
)

// Driver gives a filter that writes one line a request, when it has ended:
//
//	DEVICE OPERATION OFFSET+LENGTH [fua] ok|ERROR
func Driver(w io.Writer) stack.Driver {
	var mu sync.Mutex
	return stack.DriverFunc(func(below *stack.Below) (stack.Filter, error) {
		return &filter{below.Device(), w, &mu}, nil
	})
}

type filter struct {
	device string
	w      io.Writer
	mu     *sync.Mutex // of w, which all devices share
}

func (f *filter) Handle(r *stack.Request, next stack.Next) error {
	err := next.Do(r)
	fua, end := "", "ok"
	if r.FUA {
		fua = " fua"
	}
	if err != nil {
		end = err.Error()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, bad := fmt.Fprintf(f.w, "%s %s %s%s %s\n", f.device, r.Op, r.Range, fua, end); bad != nil {
		return fmt.Errorf("log: %w: %w", bad, stack.ErrBroken)
	}
	return err
}

func (f *filter) Spoil(error) string  { return "the log of " + f.device }
func (f *filter) Detach(stack.Reason) {}
