// Package stack lays ordered filters over a block device, on the fly.
//
// A Stack is a block.Device over another one. A request descends from the
// filter at the highest altitude to the device, and its completion ascends the
// same way: a filter's Handle is called with the request and passes it on,
// completes it itself, holds it (by not returning yet), or issues requests of its
// own, which enter just below it and which only lower filters see.
//
//	front ──▶ barrier 400 ──▶ cow 300 ──▶ track 200 ──▶ capture 100 ──▶ device
//
// Filters come and go under load. A request finishes in the chain of filters
// that it entered; Attach returns when no request is left that did not pass the
// new filter, Detach when none is left that did.
//
// # A filter that misbehaves
//
// Unless it says otherwise (Inline) a filter's Handle runs on a goroutine of its
// own, so that the request can be taken from it. A filter that returns ErrBroken,
// panics, or keeps a request longer than Config.Stall is taken out: first it
// declares what its loss spoils (Spoil), then the stack goes on without it, then
// the requests that it had are continued below it - or, where it had passed them
// on, end as they ended there. Time in which a request is below a filter does not
// count. What an expelled filter does afterwards leads nowhere: its requests are
// refused with ErrExpelled. Only the bytes of a read that it still holds are not
// protected from it.
//
// # Cost
//
// A request that every filter lets pass at a glance (Sieve) meets no lock and
// allocates nothing; nor does one that a filter handles, but for a goroutine's
// hand-over.
package stack

import (
	"errors"

	"tidemark/internal/block"
)

// Errors that callers branch on.
var (
	// ErrBroken is wrapped by a filter that cannot go on: it is taken out, and
	// the request that it returned it for continues below.
	ErrBroken = errors.New("the filter cannot go on")
	// ErrExpelled is what a filter's requests get after it was taken out, or, for
	// those through a Next, after Handle returned.
	ErrExpelled = errors.New("the filter is no longer part of the stack")
	// ErrGone is what requests get when the device is gone or was removed.
	ErrGone = errors.New("the device is gone")
	// ErrExists: a name or an altitude is taken.
	ErrExists = errors.New("exists already")
	// ErrNoSuch: no filter or device has that name.
	ErrNoSuch = errors.New("no such filter or device")
	// ErrStalled: a filter did not answer in time.
	ErrStalled = errors.New("did not answer in time")
)

// Request is one I/O on its way through a stack. It belongs to the filter that
// handles it until Handle returns and is not to be changed: a filter that wants
// another one makes it and passes that on.
type Request struct {
	Op    block.Op
	FUA   bool        // of a write: it is stable when it ends
	Range block.Range // bytes; empty for a flush
	Data  []byte      // of a read and of a write, Range.Len bytes

	lane int
	load block.Load // where the data is until fetch; then nil
}

// fetch has Data hold the data.
func (r *Request) fetch() error {
	if r.load == nil {
		return nil
	}
	p, err := r.load.Data()
	if err == nil {
		r.Data, r.load = p, nil
	}
	return err
}

// Lanes is over how many counters a filter that counts requests should spread
// them, and Lane a request's, from 0: processors mostly keep to their own.
const Lanes = shards

// Lane is below Lanes.
func (r *Request) Lane() int { return r.lane }

// Writes says whether the request changes content.
func (r *Request) Writes() bool { return r.Op != block.OpRead && r.Op != block.OpFlush }

// Reason says why a filter is detached.
type Reason string

const (
	Detached Reason = "detached" // from a device that lives on
	Removed  Reason = "removed"  // the device is removed in order: what lies below still works
	Surprise Reason = "surprise" // the device is gone: everything below fails
	Lost     Reason = "lost"     // the filter was taken out for its own fault
)

// Filter is one filter over one device. Its methods are called concurrently.
type Filter interface {
	// Handle does one request: next.Do(r) passes it on. Its error is the
	// request's, unless it wraps ErrBroken.
	Handle(r *Request, next Next) error
	// Spoil is called, once, before a filter is taken out for its own fault: it
	// declares what is no longer true without it and says so in one sentence. It
	// must not wait for anything that Handle may hold.
	Spoil(cause error) string
	// Detach is the last call: the filter lets go of what it has. Its Below still
	// works, except after a Surprise and when it was Lost.
	Detach(why Reason)
}

// Sieve is a Filter that sees at a glance which requests need no handling.
// Pass says that a request goes on without Handle; it must not wait or allocate,
// and not look at Data, which may be nil: what no filter handles may never come
// into this process.
type Sieve interface {
	Pass(r *Request) bool
}

// Inline is a Filter whose Handle waits for nothing but what lies below it, and
// for no longer than until its Below.Gone. It is called on the caller's goroutine.
// Requests that it keeps nevertheless are lost to their callers, and it is
// reported and taken out all the same.
type Inline interface {
	Inline()
}

// Blind is a Filter whose Handle looks at no Data, which may be nil, and passes a
// request on once at most: what only such filters handle need not come into this process.
type Blind interface {
	Blind()
}

// Resizer is a Filter that wants to know the device's new size, in bytes, before
// the first request beyond the old one.
type Resizer interface {
	Resized(size int64)
}

// Driver makes filters: it is asked about each device, synchronously and before
// the first request of a new one.
type Driver interface {
	// Attach gives the filter for a device, or nil where it does not want it. The
	// filter keeps below for requests of its own.
	Attach(below *Below) (Filter, error)
}

// DriverFunc is a Driver that is one function.
type DriverFunc func(below *Below) (Filter, error)

// Attach calls the function.
func (f DriverFunc) Attach(below *Below) (Filter, error) { return f(below) }
