package serve

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"tidemark/internal/backing"
	"tidemark/internal/dm"
	"tidemark/internal/front/nbd"
	"tidemark/internal/front/nbdk"
	"tidemark/internal/front/ublk"
	"tidemark/internal/splice"
)

// giveBack gives a volume its own table back while nobody serves the device
// under it. The table cannot just be swapped: to suspend the volume the kernel
// waits for the requests that the server before had, and without waiting for
// them they would fail. So this process becomes their server for a moment, without any
// filter: it recovers the front over the lower device, the requests end, and
// then the table is swapped in order.
type giveBack struct {
	daemon  int // its process, as a descriptor; of a guard only
	splice  *splice.Splice
	control *dm.Control
	claim   *splice.Claim
	kmsg    *os.File     // the kernel's log, which is in memory; nil: none
	record  func() error // called once the volume has its table; nil: nobody needs to know

	lower  *backing.Device
	served served
	out    bool // the volume has its own table
	said   string
}

const (
	stepWait  = 30 * time.Second // for one step of giving back
	againWait = time.Second      // after one that failed
)

// errContested: another process wants to serve the device.
var errContested = errors.New("another daemon takes over")

// errNotOurs: the volume is gone, or somebody else has given it another table.
var errNotOurs = errors.New("the volume does not lead to the served device")

// run gives the volume back, however often it has to try. It ends early where
// another daemon wants the device, or where the volume does not lead to it.
func (b *giveBack) run(ctx context.Context) {
	defer b.claim.Close()
	if err := b.claim.Try(); err != nil {
		return // another daemon has it
	}
	for {
		err := b.try(ctx)
		if err == nil {
			b.say(6, "the volume "+b.splice.Name+" has its own table back: no daemon served it")
			return
		}
		if errors.Is(err, errContested) || errors.Is(err, errNotOurs) {
			_ = b.leave(ctx) // the next server finds it as after a kill
			return
		}
		if b.said != err.Error() { // once
			b.said = err.Error()
			b.say(3, fmt.Sprintf("giving the volume %s its own table back: %v; it is tried again", b.splice.Name, err))
		}
		for range int(againWait / guardLook) {
			if b.claim.Contested() {
				break
			}
			time.Sleep(guardLook)
		}
	}
}

// GiveBack gives a volume its own table back that is left with neither a daemon
// nor a guard. Requests that wait are done. splice.ErrClaimed: there is one.
func GiveBack(ctx context.Context, sp *splice.Splice) error {
	c, err := dm.Open()
	if err != nil {
		return err
	}
	defer c.Close()
	claim, err := splice.OpenClaim(sp)
	if err != nil {
		return err
	}
	defer claim.Close()
	if !claim.Left() {
		return splice.ErrClaimed
	}
	if err := claim.Try(); err != nil {
		return err
	}
	b := &giveBack{splice: sp, control: c, claim: claim}
	for err = b.try(ctx); err != nil; err = b.try(ctx) {
		select {
		case <-ctx.Done():
			return errors.Join(err, b.leave(context.WithoutCancel(ctx)))
		case <-time.After(againWait):
		}
	}
	return nil
}

func (b *giveBack) say(level int, text string) {
	if b.kmsg != nil {
		fmt.Fprintf(b.kmsg, "<%d>tidemark: %s\n", level, text)
	}
}

// try does what is left to be done. After an error the volume has one table or
// the other and works, where it can be served at all.
func (b *giveBack) try(ctx context.Context) error {
	if !b.out {
		if b.claim.Contested() {
			return errContested
		}
		if err := b.serve(ctx); err != nil {
			return err
		}
		if err := b.splice.Out(b.control, false); err != nil {
			return err
		}
		b.out = true
	}
	if b.record != nil {
		if err := b.record(); err != nil {
			return fmt.Errorf("it has it back; leaving word of that: %w", err)
		}
		b.record = nil
	}
	return b.end(ctx)
}

// serve passes requests on to the lower device.
func (b *giveBack) serve(ctx context.Context) error {
	err := b.splice.Check(b.control)
	if errors.Is(err, splice.ErrReplaced) || errors.Is(err, dm.ErrAbsent) {
		return fmt.Errorf("%w: %w", errNotOurs, err)
	}
	if err != nil {
		return err
	}
	if b.served != nil {
		return nil
	}
	if b.lower == nil {
		info, err := b.control.Info(dm.Named(b.splice.Lower))
		if err != nil {
			return err
		}
		lower, err := backing.Open(info.Node(), backing.Options{})
		if err != nil {
			return err
		}
		b.lower = lower
	}
	ctx, cancel := context.WithTimeout(ctx, stepWait)
	defer cancel()
	b.served, err = passOn(ctx, b.splice.Upper, b.lower)
	return err
}

// passOn takes over a front, by its device's major:minor, without any filter.
func passOn(ctx context.Context, upper string, lower *backing.Device) (served, error) {
	link, err := os.Readlink("/sys/dev/block/" + upper)
	if err != nil {
		return nil, err
	}
	dev := shown{dev: lower, limits: lower.Limits()}
	switch name := filepath.Base(link); {
	case strings.HasPrefix(name, "ublkb"):
		n, err := strconv.Atoi(strings.TrimPrefix(name, "ublkb"))
		if err != nil {
			return nil, err
		}
		s, err := ublk.Recover(ctx, n, dev)
		if err != nil {
			return nil, err
		}
		return ublkServed{s}, nil
	case strings.HasPrefix(name, "nbd"):
		text, err := os.ReadFile("/sys/block/" + name + "/backend")
		if err != nil {
			return nil, err
		}
		identity, _, _ := strings.Cut(strings.TrimSpace(string(text)), "#")
		server := &nbd.Server{Log: slog.New(slog.DiscardHandler)}
		if err := server.Add(nbd.Export{Name: identity, Device: dev, BlockSize: dev.limits.LogicalBlock}); err != nil {
			return nil, err
		}
		s, err := nbdk.Reattach(ctx, server, identity, identity)
		if err != nil {
			return nil, err
		}
		return nbdKernelServed{s, dev}, nil
	default:
		return nil, fmt.Errorf("%s: %w: want ublk or nbd", name, ErrFront)
	}
}

// end removes what the volume does not need any more. Who looks at the front's
// device for a moment, as udev does, is waited for.
func (b *giveBack) end(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, stepWait)
	defer cancel()
	if b.served != nil {
		err := b.served.remove(ctx)
		for ; errors.Is(err, ErrInUse) && ctx.Err() == nil && !b.claim.Contested(); err = b.served.remove(ctx) {
			time.Sleep(guardLook)
		}
		if err != nil {
			return fmt.Errorf("it has it back; removing what was under it: %w", err)
		}
		b.served = nil
	}
	if b.lower != nil {
		if err := errors.Join(b.lower.Flush(), b.lower.Close()); err != nil {
			return err
		}
		b.lower = nil
	}
	return b.splice.Remove(b.control)
}

// leave lets requests wait for the next server.
func (b *giveBack) leave(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, stepWait)
	defer cancel()
	var err error
	if b.served != nil {
		err = b.served.pause(ctx)
	}
	if b.lower != nil {
		err = errors.Join(err, b.lower.Flush(), b.lower.Close())
	}
	return err
}
