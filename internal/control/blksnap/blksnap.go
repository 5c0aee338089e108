// Package blksnap answers the control device of Veeam's blksnap module with
// Tidemark's own change maps and snapshots, for programs that were written
// against it. docs/blksnap.md compares the two, errno by errno.
//
// What a client makes here the native commands see, and the other way round.
// Nothing belongs to a descriptor: clients open, send one command and close.
package blksnap

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"syscall"
	"time"

	"tidemark/internal/abi/blksnap"
	"tidemark/internal/block"
	"tidemark/internal/control/cuse"
)

// What a System's errors wrap, so that a client gets the errno that it expects.
var (
	ErrNoDevice   = errors.New("there is no block device of that number")
	ErrForeign    = errors.New("the device is not one that Tidemark serves")
	ErrUntracked  = errors.New("the device's changes are not tracked")
	ErrNoSnapshot = errors.New("there is no such snapshot")
	ErrTaken      = errors.New("the snapshot was taken already")
	ErrNotTaken   = errors.New("the snapshot was not taken yet")
	ErrNoStorage  = errors.New("the snapshot has no difference storage")
	ErrRange      = errors.New("the range does not lie on the device, or is not aligned")
)

// Tracking is a device with a change map.
type Tracking struct {
	Dev        blksnap.Dev
	BlockSize  int64 // bytes
	Capacity   int64 // bytes
	Blocks     int64
	Generation [16]byte
	Number     uint8
	Held       bool // a taken snapshot holds it
}

// Image is a device of a taken snapshot. Image is zero where it is not shown as a device.
type Image struct{ Original, Image blksnap.Dev }

// Event is what happened to a snapshot. Code is of abi/blksnap.
type Event struct {
	Code     uint32
	Sequence uint64 // from 1 on
	Time     time.Time
	Bytes    int64       // low free space: how much more is wanted
	Original blksnap.Dev // corrupted
	Errno    syscall.Errno
}

// System is what the daemon supplies. Methods may be called concurrently.
// Devices are named by their number, or by that of an image of theirs.
type System interface {
	// Tracked lists the devices whose changes are tracked.
	Tracked() ([]Tracking, error)
	// Table is the newest snapshot's of a device. ErrNoDevice, ErrUntracked.
	Table(dev blksnap.Dev) (Table, error)
	// Untrack forgets a device's changes.
	Untrack(dev blksnap.Dev) error
	// MarkDirty notes changes, all or none. ErrNoDevice, ErrUntracked, ErrRange.
	MarkDirty(dev blksnap.Dev, ranges []block.Range) error
	// Create prepares a snapshot of one or more devices. ErrNoDevice, ErrForeign.
	Create(devs []blksnap.Dev) (blksnap.ID, error)
	// Append gives it ranges, one at least, of a device for difference storage. ErrNoSnapshot, ErrNoDevice, ErrRange.
	Append(id blksnap.ID, dev blksnap.Dev, ranges []block.Range) error
	// Take returns when the images' nodes are there. ErrNoSnapshot, ErrTaken, ErrNoStorage.
	Take(ctx context.Context, id blksnap.ID) error
	// Destroy never waits for who has an image open. ErrNoSnapshot.
	Destroy(ctx context.Context, id blksnap.ID) error
	// Snapshots lists them, taken or not.
	Snapshots() []blksnap.ID
	// Images lists those of a taken snapshot. ErrNoSnapshot, ErrNotTaken.
	Images(id blksnap.ID) ([]Image, error)
	// Event gives the first event of a snapshot after a number, and waits for it
	// until ctx ends. ErrNoSnapshot, also when it is destroyed meanwhile.
	Event(ctx context.Context, id blksnap.ID, after uint64) (Event, error)
	// OnImages has f called when images came or went, whoever asked for it; nil: no more.
	OnImages(f func())
}

// Table is a change map as of one snapshot, a byte a block.
type Table interface {
	// Read copies it from block i on; 0 bytes and io.EOF at its end.
	Read(p []byte, i int64) (int, error)
}

// minimum is by how much difference storage is asked for at a time, bytes.
const minimum = 1 << 30

// Server answers one control device.
type Server struct {
	system System
	log    *slog.Logger
	nodes  *nodes
	ready  chan struct{} // closed when nodes are right, and the device may be opened

	showing sync.Mutex // from what the images are to their nodes

	mu    sync.Mutex
	empty map[blksnap.ID]chan struct{} // snapshots of no device, which clients may make; closed at their end
	read  map[blksnap.ID]uint64        // events given out, by snapshot
	made  map[blksnap.ID]*making       // what is known of the snapshots that were made here
}

// making is how a snapshot was made.
type making struct {
	at    time.Time // storage was asked for then
	asked bool      // and somebody has been given that event
}

// Start serves /dev/blksnap. dev is the folder of the images' nodes, /dev but in tests.
func Start(ctx context.Context, system System, dev string, log *slog.Logger) (*Server, *cuse.Server, error) {
	s := New(system, dev, log)
	s.ready = make(chan struct{})
	// First: where another daemon has the device, the nodes are its.
	c, err := cuse.Start(ctx, cuse.Device{Name: blksnap.Control, Open: s.Open, Log: log})
	if err != nil {
		return nil, nil, err
	}
	err = s.nodes.adopt()
	if err == nil {
		system.OnImages(s.show)
		s.show()
	}
	close(s.ready)
	if err != nil {
		return nil, nil, errors.Join(err, c.Close(ctx))
	}
	return s, c, nil
}

// New gives a server without a device, whose Open may be called.
func New(system System, dev string, log *slog.Logger) *Server {
	ready := make(chan struct{})
	close(ready)
	return &Server{system: system, log: log, nodes: &nodes{dir: dev, made: map[string]blksnap.Dev{}}, ready: ready,
		empty: map[blksnap.ID]chan struct{}{}, read: map[blksnap.ID]uint64{}, made: map[blksnap.ID]*making{}}
}

// Close takes the images' nodes away.
func (s *Server) Close() error {
	s.system.OnImages(nil)
	s.showing.Lock()
	defer s.showing.Unlock()
	return s.nodes.show(nil)
}

// Open is for cuse.Device. Descriptors have no state.
func (s *Server) Open(cuse.Caller) (cuse.File, error) {
	<-s.ready
	return file{s}, nil
}

type file struct{ s *Server }

func (file) Close() {}

// Ioctl answers a command of the interface.
func (f file) Ioctl(ctx context.Context, c *cuse.Call) (int32, error) {
	n, err := f.s.command(ctx, c.Cmd, c.Arg, c)
	if err != nil && !isErrno(err) && f.s.log != nil {
		f.s.log.Warn("a command of /dev/blksnap fails", "command", fmt.Sprintf("%#x", c.Cmd), "error", err)
	}
	return n, err
}

// isErrno says whether an error is nothing but an errno, which says it all to who knows the interface.
func isErrno(err error) bool {
	_, ok := err.(syscall.Errno)
	return ok
}

// memory is a caller's.
type memory interface {
	Read(addr uint64, b []byte) error
	Write(addr uint64, b []byte) error
}

// show brings the images' nodes up to date. One at a time: who looked earlier
// must not take away what has come since.
func (s *Server) show() {
	s.showing.Lock()
	defer s.showing.Unlock()
	var all []Image
	for _, id := range s.system.Snapshots() {
		images, err := s.system.Images(id)
		if err == nil {
			all = append(all, images...)
		}
	}
	if err := s.nodes.show(all); err != nil && s.log != nil {
		s.log.Error("nodes of snapshot images", "error", err)
	}
}
