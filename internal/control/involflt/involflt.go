// Package involflt answers the control device of Azure Site Recovery's disk
// filter driver with Tidemark's own capture, drain, bookmarks and barriers, for
// programs that were written against it. docs/involflt.md compares the two.
//
// What is drained is handed over in the interface's data-file form: a file of
// the daemon's own for each block, which goes away when the block is committed.
// A mapping into the caller, the driver's usual form, cannot be had from user
// space.
//
// What a descriptor stands for, as with the driver: the disk that was filtered
// through it first (GET_DIRTY_BLOCKS, COMMIT and WAIT mean that one), and the
// leases of the service and of the drainer, which end with its last copy.
// Consistency points do not belong to a descriptor: their timers end them.
//
// Locks: gate before disk.busy before Server.mu. gate and busy are held while the
// System works and end with their caller's context; mu never is.
package involflt

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"tidemark/internal/abi/involflt"
	"tidemark/internal/control/cuse"
)

// What a System's errors wrap, so that a client gets the errno that it expects.
var (
	ErrNoDevice = errors.New("there is no such block device")
	ErrRefused  = errors.New("the disk cannot be filtered")
	ErrEmpty    = errors.New("nothing is pending")
	ErrVerdict  = errors.New("a mark waits for its verdict")
	ErrNoOrder  = errors.New("the disk is not in write order")
	ErrFrozen   = errors.New("the file system cannot be frozen, or is already")
)

// System is what the daemon supplies. Methods may be called concurrently and
// return soon after their context has ended.
type System interface {
	// Start has a disk's changes kept for this interface: from now on or, where
	// they are kept already, from what was committed last. ErrNoDevice, ErrRefused.
	Start(ctx context.Context, device, name string) (Queue, error)
	// Same says whether two paths lead to one device.
	Same(a, b string) bool
	// Stop keeps them no more, and forgets what is pending. Of a disk that is not kept it does nothing.
	Stop(ctx context.Context, device string) error
	// Kept lists the disks that were started and not stopped, also by earlier daemons.
	Kept() []Kept
	// Mark puts tags into the order of several disks, at one instant. ErrNoOrder: into none.
	Mark(ctx context.Context, m Mark) (Marked, error)
	// Hold has the writes of all kept disks wait where that can be done, until
	// release is called or the time has come. release fails where some went on before.
	Hold(ctx context.Context, until time.Time) (release func() error, err error)
	// Freeze freezes the file system on a device until thaw is called or the time
	// has come, also without us. thaw fails where it did not hold. ErrNoDevice, ErrFrozen.
	Freeze(ctx context.Context, device string, until time.Time) (thaw func() error, err error)
}

// Kept is a disk whose changes are kept.
type Kept struct {
	Device, Name string
	Queue        Queue
}

// Queue is what is kept of one disk's changes. Next and Commit are never called at the same time.
type Queue interface {
	// Next gives what comes after the last committed batch, the same again until
	// that is committed. It does not wait. ErrEmpty, ErrVerdict.
	Next(ctx context.Context) (Batch, error)
	// Commit lets a batch go for good. resync is how many reasons for a resync the
	// client has dealt with; 0: it says nothing of that. Number 0: it only says that.
	Commit(ctx context.Context, number, resync uint64) error
	// Wait returns nil when so many bytes are pending, or a tag, or something else
	// that is worth a batch; and the context's error.
	Wait(ctx context.Context, bytes int64) error
	// Clear drops what is pending.
	Clear(ctx context.Context) error
	// Settle returns when all writes have ended that began before.
	Settle(ctx context.Context) error
	State() State
	// Pending counts what comes after the last committed batch. With an error it is
	// what was counted before that. ErrNoDevice: the disk's changes are kept no more,
	// though nobody has stopped it here.
	Pending(ctx context.Context) (Pending, error)
}

// State is where a disk stands.
type State struct {
	Order     uint32         // of abi/involflt: what a mark that is made now would lie in
	Committed involflt.Stamp // end of the last committed batch
	Known     involflt.Stamp // what is not pending by now is later than this
	Resync    Resync
}

// Pending is what a client has not committed, with what it was given. A queue may stop
// counting at a bound of its own.
type Pending struct {
	Any     bool // there is something, if only a tag
	Bytes   int64
	Changes int64
	Oldest  uint64 // time of the oldest of them; 0: there is none
}

// Resync says why a client's copy cannot be right any more. Zero: it can.
type Resync struct {
	Count uint64
	Code  uint32
	Time  uint64
	Text  string
}

// Kind is what a batch holds.
type Kind int

const (
	Writes Kind = iota // in their order
	Copies             // content of ranges, all as of one moment; the disk's copy is right again after the last of them
	Ranges             // to be read from the disk
	Tags               // of one mark; nothing else
)

// Batch is what is handed over and committed as a whole.
type Batch struct {
	Number  uint64
	Kind    Kind
	Changes []Change
	At      involflt.Stamp // of tags
	Tags    [][]byte
}

// Change is a write. Discards are left out: nobody knows what they leave.
type Change struct {
	Offset, Length int64
	At             involflt.Stamp
	Data           []byte // nil: zeroes, or of Ranges
}

// Mark is what Mark puts in.
type Mark struct {
	GUID    string
	Tags    [][]byte
	Devices []string
	Until   time.Time // revoked by itself then; zero: it is final
}

// Marked is a mark that waits for its verdict.
type Marked interface {
	// Commit fails where it was revoked already.
	Commit(ctx context.Context) error
	Revoke(ctx context.Context) error
}

// Server answers one control device.
type Server struct {
	system System
	files  *folder
	log    *slog.Logger
	began  time.Time
	gate   gate // of those that change which disks there are, and of consistency points
	point  point

	mu       sync.Mutex
	disks    map[string]*disk // by device
	drainer  *file            // who has sent PROCESS_START
	service  *file            // and SERVICE_START
	services uint64           // started so far
}

// Start serves /dev/involflt. dir is a folder of its own for data files.
func Start(ctx context.Context, system System, dir string, log *slog.Logger) (*Server, *cuse.Server, error) {
	s, err := New(system, dir, log)
	if err != nil {
		return nil, nil, err
	}
	c, err := cuse.Start(ctx, cuse.Device{Name: involflt.Device, Open: s.Open, Log: log})
	if err != nil {
		return nil, nil, errors.Join(err, s.Close())
	}
	return s, c, nil
}

// New gives a server without a device, whose Open may be called.
func New(system System, dir string, log *slog.Logger) (*Server, error) {
	files, err := openFolder(dir)
	if err != nil {
		return nil, err
	}
	s := &Server{system: system, files: files, log: log, began: time.Now(), gate: newGate(), disks: map[string]*disk{}}
	for _, k := range system.Kept() {
		s.disks[k.Device] = newDisk(s, k.Device, k.Name, k.Queue)
	}
	return s, nil
}

// Close ends a consistency point that is under way and removes the data files.
// No request may be under way.
func (s *Server) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), endMax)
	defer cancel()
	if err := s.gate.enter(ctx); err != nil {
		return err
	}
	defer s.gate.leave()
	s.dissolve("the control device is going away")
	return s.files.clear()
}

// file is an open descriptor.
type file struct {
	s *Server

	mu    sync.Mutex
	bound *disk
}

// Open is for cuse.Device.
func (s *Server) Open(cuse.Caller) (cuse.File, error) { return &file{s: s}, nil }

// Ioctl answers a command of the interface.
func (f *file) Ioctl(ctx context.Context, c *cuse.Call) (int32, error) {
	return f.command(ctx, c.Cmd, c.Arg, c)
}

// Close ends the descriptor's leases. It waits for nobody.
func (f *file) Close() {
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	if f.s.service == f {
		f.s.service = nil
	}
	if f.s.drainer == f { // what it had and did not commit another one gets
		f.s.drainer = nil
		for _, d := range f.s.disks {
			d.died.Store(true)
		}
	}
}

// gate is a lock that one need not wait for.
type gate chan struct{}

func newGate() gate { return make(gate, 1) }

func (g gate) enter(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case g <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (g gate) leave() { <-g }
