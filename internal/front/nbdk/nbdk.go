// Package nbdk makes block devices of the kernel (/dev/nbdN) out of the exports
// of a server in this process, through generic netlink. Kernel and server talk
// over a pair of sockets: there is no address, and no handshake.
//
// The device outlives its server. Killed, it leaves requests waiting in the
// kernel, for Options.Wait at most; a new process finds the device by its
// identity and gives it new sockets (Reattach), and what was under way is sent
// again. That is safe as the sockets of a killed process close only after the
// last of its system calls has returned: nothing of it can still write.
//
// Over several connections the kernel sends a request that took too long (a minute) on another
// one, while the server may still be at the first: something held that long and
// a later write to the same place could then swap. So one connection is the default.
package nbdk

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	abi "tidemark/internal/abi/nbd"
	"tidemark/internal/front/nbd"
)

var (
	// ErrNoKernel: no NBD client in this kernel.
	ErrNoKernel = errors.New("this kernel has no network block devices: modprobe nbd")
	// ErrBusy: somebody has the device open, or mounted.
	ErrBusy = errors.New("the device is in use")
	// ErrNotFound: no such device.
	ErrNotFound = errors.New("no network block device of that identity")
	// ErrServed: another process serves the device.
	ErrServed = errors.New("the device has a server")
)

// Options of a device.
type Options struct {
	// Identity finds the device again, without a server too. It has no "#".
	Identity string
	// Wait is how long requests wait for a new server before they fail; whole seconds, at least 1.
	Wait time.Duration
	// Connections, 1 to 16; see the package comment. 0 means 1.
	Connections int
	// BlockSize is the logical block size, a power of two from 512 to 4096. 0 means 512,
	// or the export's where that is larger.
	BlockSize int64
}

const connectionsMax = 16

// How long the kernel leaves a request before it looks after its connection.
const (
	lookAfter     = 5 * time.Second // only a connection that was replaced sends it again
	lookAfterMany = time.Minute     // any other connection sends it again
)

// Device is a device of the kernel that this process serves.
type Device struct {
	Index int
	Path  string // of the node: /dev/nbdN

	kernel  kernel
	server  *nbd.Server
	export  string
	backend string
	cancel  func()
	serving sync.WaitGroup
	done    chan struct{}
}

// Attach makes a device of an export. ctx bounds the attaching only.
func Attach(ctx context.Context, s *nbd.Server, export string, o Options) (*Device, error) {
	return attach(ctx, genl{}, s, export, o)
}

func attach(ctx context.Context, k kernel, s *nbd.Server, export string, o Options) (*Device, error) {
	offer, err := s.Offer(export)
	if err != nil {
		return nil, err
	}
	o.Connections = max(o.Connections, 1)
	if o.BlockSize == 0 {
		o.BlockSize = max(offer.BlockSize, 512)
	}
	switch {
	case o.Identity == "" || strings.Contains(o.Identity, "#"):
		return nil, fmt.Errorf("identity %q of a network block device: it must not be empty, nor have a #", o.Identity)
	case o.Connections > connectionsMax:
		return nil, fmt.Errorf("%d connections of a network block device: at most %d", o.Connections, connectionsMax)
	case offer.Size%o.BlockSize != 0:
		return nil, fmt.Errorf("a network block device of %d bytes: not whole blocks of %d bytes", offer.Size, o.BlockSize)
	}
	if _, err := find(k, o.Identity); err == nil {
		return nil, fmt.Errorf("%s: %w", o.Identity, ErrServed)
	}
	d := &Device{kernel: k, server: s, export: export, backend: o.Identity + "#" + strconv.Itoa(o.Connections), done: make(chan struct{})}
	ours, theirs, err := pairs(o.Connections)
	if err != nil {
		return nil, err
	}
	d.Index, err = k.send(ctx, abi.GenlConnect, command{
		index: -1, size: offer.Size, blockSize: o.BlockSize, flags: offer.Flags, dead: o.Wait, backend: d.backend, sockets: theirs,
	})
	closeAll(theirs)
	if err == nil && d.Index < 0 {
		err = errors.New("the kernel gave no number")
	}
	if err != nil {
		closeAll(ours)
		return nil, fmt.Errorf("attaching a network block device: %w", err)
	}
	d.Path = "/dev/nbd" + strconv.Itoa(d.Index)
	d.serve(ours)
	look := lookAfter
	if o.Connections > 1 {
		look = lookAfterMany
	}
	if err := k.setLook(d.Index, look); err != nil {
		return nil, errors.Join(err, d.Detach(ctx))
	}
	return d, nil
}

// Reattach serves a device that has lost its server. It waits, while ctx
// lasts, for the old server to end; after that ErrServed.
func Reattach(ctx context.Context, s *nbd.Server, export, identity string) (*Device, error) {
	return reattach(ctx, genl{}, s, export, identity)
}

func reattach(ctx context.Context, k kernel, s *nbd.Server, export, identity string) (*Device, error) {
	found, err := find(k, identity)
	if err != nil {
		return nil, err
	}
	d := &Device{Index: found.Index, Path: "/dev/nbd" + strconv.Itoa(found.Index), kernel: k, server: s, export: export, backend: found.backend, done: make(chan struct{})}
	var taken []*os.File
	for len(taken) < found.Connections {
		conn, err := d.reconnect(ctx)
		if err != nil {
			closeAll(taken)
			return nil, fmt.Errorf("serving %s again: %w", d.Path, err)
		}
		taken = append(taken, conn)
	}
	d.serve(taken)
	offer, err := s.Offer(export)
	if err == nil {
		err = d.Resize(ctx, offer.Size)
	}
	if err != nil {
		d.Release()
		return nil, err
	}
	return d, nil
}

// reconnect has the kernel take a new socket in place of a dead one.
func (d *Device) reconnect(ctx context.Context) (*os.File, error) {
	for {
		ours, theirs, err := pairs(1)
		if err != nil {
			return nil, err
		}
		_, err = d.kernel.send(ctx, abi.GenlReconfigure, command{index: d.Index, backend: d.backend, sockets: theirs})
		closeAll(theirs)
		if err == nil && held(ours[0]) {
			return ours[0], nil
		}
		closeAll(ours)
		if err != nil {
			return nil, err
		}
		select { // it has a live one, which may have to find out yet
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", ErrServed, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// serve answers the kernel on its connections.
func (d *Device) serve(conns []*os.File) {
	ctx, cancel := context.WithCancel(context.Background())
	d.cancel = cancel
	for _, c := range conns {
		d.serving.Go(func() { d.keep(ctx, c) })
	}
	go func() { d.serving.Wait(); close(d.done) }()
}

// keep serves one connection, and the next where the kernel gave it up: it does
// that with one that it took for dead.
func (d *Device) keep(ctx context.Context, f *os.File) {
	for {
		conn, err := net.FileConn(f)
		f.Close()
		if err != nil {
			return
		}
		if err := d.server.ServeConn(ctx, conn, d.export); !errors.Is(err, nbd.ErrHungUp) {
			return
		}
		if f, err = d.reconnect(ctx); err != nil {
			return // detached by somebody else
		}
	}
}

// Done is closed when the kernel is served no more: after Detach or Release, or
// because somebody else detached the device.
func (d *Device) Done() <-chan struct{} { return d.done }

// Resize tells the kernel the export's new size, in bytes. Grow the export
// before, or shrink it after.
func (d *Device) Resize(ctx context.Context, size int64) error {
	if _, err := d.kernel.send(ctx, abi.GenlReconfigure, command{index: d.Index, backend: d.backend, size: size}); err != nil {
		return fmt.Errorf("%s: resizing to %d bytes: %w", d.Path, size, err)
	}
	return nil
}

// Release stops serving and leaves the device to a later Reattach, by this
// process or another; until then its requests wait.
func (d *Device) Release() {
	d.cancel()
	<-d.done
}

// Detach takes the device away. ErrBusy: it is open or mounted, and stays.
func (d *Device) Detach(ctx context.Context) error {
	if err := detach(ctx, d.kernel, d.Index); err != nil {
		return err
	}
	d.Release()
	return nil
}

// Forget detaches a device that has no server; what waits for one fails.
// ErrBusy: it is open or mounted, and stays.
func Forget(ctx context.Context, identity string) error {
	return forget(ctx, genl{}, identity)
}

func forget(ctx context.Context, k kernel, identity string) error {
	found, err := find(k, identity)
	if err != nil {
		return err
	}
	return detach(ctx, k, found.Index)
}

func detach(ctx context.Context, k kernel, index int) error {
	user, err := k.inUse(index)
	if err != nil {
		return fmt.Errorf("who uses /dev/nbd%d: %w", index, err)
	}
	if user != "" {
		return fmt.Errorf("/dev/nbd%d: %w: %s", index, ErrBusy, user)
	}
	if _, err := k.send(ctx, abi.GenlDisconnect, command{index: index}); err != nil {
		return fmt.Errorf("detaching /dev/nbd%d: %w", index, err)
	}
	return nil
}

// Found is a device that the kernel has.
type Found struct {
	Index       int
	Connections int
	backend     string
}

// Find looks for a device by its identity, whether it has a server or not. ErrNotFound: there is none.
func Find(identity string) (Found, error) { return find(genl{}, identity) }

func find(k kernel, identity string) (Found, error) {
	all, err := k.backends()
	if err != nil {
		return Found{}, err
	}
	for index, backend := range all {
		name, count, _ := strings.Cut(backend, "#")
		if n, err := strconv.Atoi(count); name == identity && err == nil {
			return Found{Index: index, Connections: n, backend: backend}, nil
		}
	}
	return Found{}, fmt.Errorf("%s: %w", identity, ErrNotFound)
}
