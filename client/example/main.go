// Command example keeps a copy of a disk on another disk, or in a file: an example
// of how the package client is used, and a program that is tested doing it. It
// can be killed at any moment and started again.
//
//	go run ./client/example -group db -disk sdb -to /dev/sdc
//
// With -on-bookmark PROGRAM that is run at each bookmark, while the copy is just
// what the source was then: it gets the bookmark's name and the copy as arguments.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"syscall"

	"tidemark/client"
)

func main() {
	group := flag.String("group", "", "the group to drain")
	disk := flag.String("disk", "", "the disk to copy")
	name := flag.String("consumer", "copy", "name of the consumer")
	from := flag.String("from", "", "the point that the copy is already (default: it is empty)")
	to := flag.String("to", "", "the disk or file to copy to; everything on it is lost")
	hook := flag.String("on-bookmark", "", "program to run at each bookmark")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *group, *disk, *name, *from, *to, *hook); err != nil && ctx.Err() == nil {
		fmt.Fprintf(os.Stderr, "example: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, group, disk, name, from, to, hook string) error {
	if group == "" || disk == "" || to == "" {
		return fmt.Errorf("-group, -disk and -to are needed")
	}
	f, err := os.OpenFile(to, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	c := client.Dial("").Consumer(group, name, client.Options{Disk: disk, From: from})
	return c.Follow(ctx, &replica{f: f, disk: disk, hook: hook})
}

// replica is the copy: a client.Follower.
type replica struct {
	f    *os.File
	disk string
	hook string
	ok   bool // the target has been looked at
}

// Apply puts a batch into the copy.
func (r *replica) Apply(b *client.Batch) error {
	if err := r.fit(b.Disks); err != nil {
		return err
	}
	for _, rec := range b.Records {
		var err error
		switch rec.Op {
		case client.Write:
			_, err = r.f.WriteAt(rec.Payload, rec.Offset)
		case client.Zeroes, client.Discard: // undefined content may as well be zero
			err = r.zero(rec.Offset, rec.Length)
		}
		if err != nil {
			return err
		}
	}
	if b.Kind == client.Bookmark {
		return r.bookmark(b)
	}
	return nil
}

// Sync makes the copy stable.
func (r *replica) Sync() error { return r.f.Sync() }

// fit refuses a target that is too small, and gives a file the disk's size.
func (r *replica) fit(disks []client.Disk) error {
	if r.ok {
		return nil
	}
	i := slices.IndexFunc(disks, func(d client.Disk) bool { return d.Name == r.disk })
	if i < 0 {
		return fmt.Errorf("the group has no disk %s", r.disk)
	}
	size, err := r.f.Seek(0, 2)
	if err != nil {
		return err
	}
	st, err := r.f.Stat()
	if err != nil {
		return err
	}
	if size < disks[i].Size {
		if !st.Mode().IsRegular() {
			return fmt.Errorf("%s has %d bytes, and the disk has %d", r.f.Name(), size, disks[i].Size)
		}
		if err := r.f.Truncate(disks[i].Size); err != nil {
			return err
		}
	}
	r.ok = true
	return nil
}

var zeroes [1 << 20]byte

func (r *replica) zero(off, n int64) error {
	for n > 0 {
		k := min(n, int64(len(zeroes)))
		if _, err := r.f.WriteAt(zeroes[:k], off); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

// bookmark makes the copy stable as it is at a bookmark, and tells of it.
func (r *replica) bookmark(b *client.Batch) error {
	if err := r.f.Sync(); err != nil {
		return err
	}
	fmt.Printf("bookmark %s at position %d\n", b.Bookmark, b.To)
	if r.hook == "" {
		return nil
	}
	cmd := exec.Command(r.hook, b.Bookmark, r.f.Name())
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd.Run()
}
