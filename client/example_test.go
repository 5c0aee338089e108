package client_test

import (
	"context"
	"fmt"

	"tidemark/client"
)

// printer is a Follower that keeps nothing.
type printer struct{}

func (printer) Apply(b *client.Batch) error {
	for _, r := range b.Records {
		fmt.Printf("%s: %d bytes at %d, at position %d\n", b.Disks[r.Disk].Name, r.Length, r.Offset, r.Position)
	}
	if b.Kind == client.Bookmark {
		fmt.Printf("bookmark %s: a copy would be what the disk was then\n", b.Bookmark)
	}
	return nil
}

func (printer) Sync() error { return nil }

// Every write to the group db is printed in order, and none is left out although
// daemon and program may be killed in between; one that was not committed then is
// printed again.
func ExampleConsumer_Follow() {
	c := client.Dial("").Consumer("db", "printer", client.Options{})
	if err := c.Follow(context.Background(), printer{}); err != nil {
		fmt.Println(err)
	}
}
