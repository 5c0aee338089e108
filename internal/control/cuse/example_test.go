package cuse_test

import (
	"context"
	"fmt"
	"syscall"

	"tidemark/internal/control/cuse"
)

// double answers one command: it doubles the number that its argument points to.
type double struct{}

const cmdDouble = 0xc0085601 // _IOWR('V', 1, uint64)

func (double) Ioctl(_ context.Context, c *cuse.Call) (int32, error) {
	if c.Cmd != cmdDouble {
		return 0, syscall.ENOTTY
	}
	b := make([]byte, 8)
	if err := c.Read(c.Arg, b); err != nil {
		return 0, err // EFAULT, as from a driver
	}
	carry := byte(0)
	for i := range b {
		b[i], carry = b[i]<<1|carry, b[i]>>7
	}
	return 0, c.Write(c.Arg, b)
}

func (double) Close() {}

// A device of its own: /dev/double is there from Start to Close, for root alone.
func ExampleStart() {
	ctx := context.Background()
	s, err := cuse.Start(ctx, cuse.Device{Name: "double", Open: func(cuse.Caller) (cuse.File, error) { return double{}, nil }})
	if err != nil {
		fmt.Println(err) // ErrUnavailable where the module cuse is not loaded
		return
	}
	defer s.Close(ctx)
	<-s.Gone()
}
