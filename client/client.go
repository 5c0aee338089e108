// Package client lets a program drain a group of a tidemark daemon on the same
// machine: it gets every write and bookmark in order, in batches, the same batch
// until it commits it. docs/drain.md tells what that means.
//
//	c := client.Dial("").Consumer("db", "copy", client.Options{Disk: "sdb"})
//	err := c.Follow(ctx, copy) // copy has Apply and Sync
//
// Follow is all that a program needs as a rule; Next, Commit and Wait are there
// for those that want to go about it in another way. The folder example has a
// program that keeps a copy of a disk on another one.
//
// Everything may be called concurrently, but for Follow: one at a time for a
// consumer.
package client

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"time"

	"tidemark/internal/batch"
	"tidemark/internal/control/api"
)

// SocketDefault is where the daemon answers if nothing else is said.
const SocketDefault = "/run/tidemark/tidemark.sock"

// Errors that programs branch on; each is wrapped with what it is about.
var (
	ErrNothing     = errors.New("nothing is pending")
	ErrNotGiven    = errors.New("not a batch that was given and is not committed")
	ErrUnreachable = errors.New("out of reach: try again") // the daemon, the group, or the vault
	ErrDamaged     = errors.New("damaged")                 // a segment, the consumer's state, or a batch on its way
	ErrNotFound    = errors.New("not found")               // the group, the consumer, or a point
)

// Client speaks to one daemon.
type Client struct{ api *api.Client }

// Dial gives a client of the daemon behind a unix socket; "" is that of
// TIDEMARK_SOCKET or SocketDefault. Nothing is sent yet.
func Dial(socket string) *Client {
	return &Client{api.Dial(cmp.Or(socket, os.Getenv("TIDEMARK_SOCKET"), SocketDefault))}
}

// Options are what a consumer is made with, at its first batch.
type Options struct {
	From       string // "": its copy is empty. Otherwise the point that it is: latest, seq:N, an RFC 3339 time, a bookmark
	Disk       string // "": all of the group
	BatchBytes int64  // most payload in a batch, unless one write has more; 0: 8 MiB
	Ranges     bool   // while a gap is open, tell what to read from the disk meanwhile
}

// Consumer is a named reader of a group.
type Consumer struct {
	api         *api.Client
	group, name string
	options     Options
}

// Consumer names one. It is made by the first Next where the group has none of this name.
func (c *Client) Consumer(group, name string, o Options) *Consumer {
	return &Consumer{c.api, group, name, o}
}

// Next gives the batch behind the newest committed one, the same each time, or,
// where after is not 0, behind that batch, which must have been given and not
// be committed. ErrNothing: there is none yet.
func (c *Consumer) Next(ctx context.Context, after uint64) (*Batch, error) {
	body, err := c.ask(ctx, after, 1)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	b, err := c.read(body)
	if err == io.EOF {
		err = fmt.Errorf("%w: an answer without a batch", ErrUnreachable)
	}
	return b, err
}

// inAnAnswer is how many batches are asked for at a time: fewer than may be
// given and not committed.
const inAnAnswer = 64

// Batches gives what follows, batch by batch: first what Next would, then the one
// behind each. Unlike with Next no batch costs a round trip: while one is looked
// at the daemon makes and sends those behind it. It ends with an error, which is
// ErrNothing behind the last one that is there. What was given is to be committed
// in time: 256 batches may be given and not committed.
func (c *Consumer) Batches(ctx context.Context, after uint64) iter.Seq2[*Batch, error] {
	return func(yield func(*Batch, error) bool) {
		for {
			newest, err := c.answer(ctx, after, yield)
			if err == errEnough {
				return
			}
			if err == nil && newest == after {
				err = fmt.Errorf("%w: an answer without a batch", ErrUnreachable)
			}
			if err != nil {
				yield(nil, err)
				return
			}
			after = newest
		}
	}
}

// errEnough: whoever looks at the batches wants no more.
var errEnough = errors.New("enough")

// answer hands on the batches of one answer, and gives the number of the newest.
func (c *Consumer) answer(ctx context.Context, after uint64, yield func(*Batch, error) bool) (newest uint64, err error) {
	body, err := c.ask(ctx, after, inAnAnswer)
	if err != nil {
		return after, err
	}
	defer body.Close()
	for newest = after; ; {
		b, err := c.read(body)
		if err == io.EOF {
			return newest, nil
		}
		if err != nil {
			return newest, err
		}
		if newest = b.Number; !yield(b, nil) {
			return newest, errEnough
		}
	}
}

// ask asks for batches.
func (c *Consumer) ask(ctx context.Context, after uint64, batches int) (io.ReadCloser, error) {
	body, err := c.api.DrainNext(ctx, c.group, c.name, api.DrainRequest{After: after, Batches: batches, From: c.options.From, Disk: c.options.Disk,
		BatchBytes: c.options.BatchBytes, Ranges: c.options.Ranges})
	return body, known(err)
}

// read reads one batch; io.EOF: there is none.
func (c *Consumer) read(body io.Reader) (*Batch, error) {
	b, err := batch.Read(body)
	if errors.Is(err, batch.ErrDamaged) || errors.Is(err, batch.ErrVersion) {
		return nil, fmt.Errorf("%w: group %s, consumer %s: %w", ErrDamaged, c.group, c.name, err)
	}
	if err != nil {
		if err != io.EOF {
			err = known(err)
		}
		return nil, err
	}
	return batchOf(b), nil
}

// Commit says that the consumer has every batch up to a number for good: they
// are not given again. ErrNotGiven: it has not been given that one.
func (c *Consumer) Commit(ctx context.Context, number uint64) error {
	return known(c.api.DrainCommit(ctx, c.group, c.name, api.DrainCommit{Number: number}))
}

// Pending is what a Wait has found.
type Pending struct {
	Batches  int
	Bytes    int64 // of payload, as far as it was counted
	Bookmark bool
	Woken    bool // somebody woke it
}

// Wait returns when so many bytes of payload are pending behind a batch (0: the
// newest committed one), or a bookmark is; with bytes 0, when anything is.
// ErrNothing: the time-out, at most an hour, has passed.
func (c *Consumer) Wait(ctx context.Context, after uint64, bytes int64, timeout time.Duration) (Pending, error) {
	p, err := c.api.DrainWait(ctx, c.group, c.name, api.DrainWait{After: after, Bytes: bytes, TimeoutMillis: timeout.Milliseconds()})
	return Pending(p), known(err)
}

// Wake ends every Wait of the group's consumers.
func (c *Consumer) Wake(ctx context.Context) error { return known(c.api.DrainWake(ctx, c.group)) }

// Clear drops what is pending. It comes as one fill or, where skip is set, not at all.
func (c *Consumer) Clear(ctx context.Context, skip bool) error {
	return known(c.api.DrainClear(ctx, c.group, c.name, api.DrainClear{Skip: skip}))
}

// Remove forgets the consumer; it is refused while something is pending, unless force.
func (c *Consumer) Remove(ctx context.Context, force bool) error {
	return known(c.api.RemoveConsumer(ctx, c.group, c.name, force))
}

// known gives an error the sentinel that programs branch on.
func known(err error) error {
	if err == nil {
		return nil
	}
	is := map[api.Code]error{api.CodeNothing: ErrNothing, api.CodeNotGiven: ErrNotGiven, api.CodeUnreachable: ErrUnreachable, api.CodeNoDaemon: ErrUnreachable,
		api.CodeDamaged: ErrDamaged, api.CodeNotFound: ErrNotFound}[api.CodeOf(err)]
	if is == nil {
		return err
	}
	return fmt.Errorf("%w: %w", is, err)
}
