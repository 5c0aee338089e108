package nbdk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"

	"tidemark/internal/abi/nbd"
)

// command is what the kernel is told; attributes that are zero are left out.
type command struct {
	index     int // -1: the kernel chooses
	size      int64
	blockSize int64
	flags     uint16
	dead      time.Duration
	backend   string
	sockets   []*os.File
}

// attributes encodes a command.
func (c command) attributes() ([]byte, error) {
	e := netlink.NewAttributeEncoder()
	if c.index >= 0 {
		e.Uint32(nbd.AttrIndex, uint32(c.index))
	}
	for _, a := range []struct {
		kind  uint16
		value int64
	}{
		{nbd.AttrSizeBytes, c.size}, {nbd.AttrBlockSizeBytes, c.blockSize}, {nbd.AttrServerFlags, int64(c.flags)},
		{nbd.AttrDeadConnTimeout, int64((c.dead + time.Second - 1) / time.Second)},
	} {
		if a.value != 0 {
			e.Uint64(a.kind, uint64(a.value))
		}
	}
	if c.backend != "" {
		e.String(nbd.AttrBackend, c.backend)
	}
	if len(c.sockets) > 0 {
		e.Nested(nbd.AttrSockets, func(list *netlink.AttributeEncoder) error {
			for _, s := range c.sockets {
				list.Nested(nbd.AttrSocketItem, func(item *netlink.AttributeEncoder) error {
					item.Uint32(nbd.AttrSocketFD, uint32(s.Fd()))
					return nil
				})
			}
			return nil
		})
	}
	return e.Encode()
}

// send has the kernel do a command, and gives the number of the device that a
// connect was given.
func (genl) send(ctx context.Context, what uint8, c command) (index int, err error) {
	conn, err := genetlink.Dial(nil)
	if err != nil {
		return 0, fmt.Errorf("generic netlink: %w", err)
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		err = conn.SetDeadline(deadline)
	}
	id, ferr := family(conn)
	attrs, aerr := c.attributes()
	if err := errors.Join(err, ferr, aerr); err != nil {
		return 0, err
	}
	replies, err := conn.Execute(genetlink.Message{Header: genetlink.Header{Command: what, Version: nbd.FamilyVersion}, Data: attrs},
		id, netlink.Request|netlink.Acknowledge)
	if err != nil || what != nbd.GenlConnect {
		return -1, err // there is nothing else in the acknowledgement
	}
	return number(replies)
}

// Probe says whether the kernel can do it at all; ErrNoKernel: it cannot.
func Probe() error {
	conn, err := genetlink.Dial(nil)
	if err != nil {
		return fmt.Errorf("generic netlink: %w", err)
	}
	defer conn.Close()
	_, err = family(conn)
	return err
}

func family(conn *genetlink.Conn) (id uint16, err error) {
	f, err := conn.GetFamily(nbd.Family)
	if errors.Is(err, os.ErrNotExist) {
		return 0, ErrNoKernel
	}
	return f.ID, err
}

// number finds the device's number among what the kernel answered; -1 where it said none.
func number(replies []genetlink.Message) (index int, err error) {
	for _, m := range replies {
		d, err := netlink.NewAttributeDecoder(m.Data)
		if err != nil {
			return -1, err
		}
		for d.Next() {
			if d.Type() == nbd.AttrIndex {
				return int(d.Uint32()), d.Err()
			}
		}
		if err := d.Err(); err != nil {
			return -1, err
		}
	}
	return -1, nil
}
