package ublk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	abi "tidemark/internal/abi/ublk"
	"tidemark/internal/block"
)

// Server serves one device.
type Server struct {
	dev      *abilities
	control  *control
	id       uint32
	fd       int // the character device
	depth    int
	maxIO    int
	userCopy bool
	zeroCopy bool // requests are moved without a copy where the device lets them
	encoded  bool
	resizes  bool
	queues   []*queue

	serving bool
	ended   chan struct{} // closed when all queues have ended; then failed is theirs
	failed  error
	left    atomic.Bool
	closing sync.Mutex
	closed  bool // under closing
}

// Add makes a device that shows dev, and serves it until Delete or Leave. On any
// error nothing is left. The process must not use the new disk itself.
func Add(ctx context.Context, dev block.Device, c Config) (s *Server, err error) {
	if c, err = c.normal(runtime.NumCPU()); err != nil {
		return nil, err
	}
	ctl, err := openControl(c.plain)
	if err != nil {
		return nil, err
	}
	s = newServer(dev, ctl)
	info := abi.DevInfo{Queues: uint16(c.Queues), QueueDepth: uint16(c.Depth), MaxIOBytes: uint32(c.MaxIO), DevID: abi.AnyDev,
		Flags: abi.FlagUserRecovery | abi.FlagUserRecoveryReissue, ServerFlags: c.Token}
	if ctl.encoded {
		info.Flags |= abi.FlagIoctlEncode | ctl.features&abi.FlagUserCopy
		if ctl.canZeroCopy() && s.dev.mover != nil && !c.Copy {
			info.Flags |= abi.FlagZeroCopy
		}
	}
	if err := ctl.add(ctx, &info); err != nil {
		return nil, errors.Join(fmt.Errorf("adding a ublk device: %w (its number is limited by the module's parameter ublks_max)", err), ctl.Close())
	}
	if err := s.start(ctx, &info); err != nil {
		return nil, errors.Join(err, s.undo())
	}
	return s, nil
}

// add makes the device. A kernel that has what zero copy takes, and refuses it beside
// the rest, gets a device without.
func (c *control) add(ctx context.Context, info *abi.DevInfo) error {
	err := c.do(ctx, abi.CmdAddDev, abi.CtrlCmd{DevID: info.DevID}, bytesOf(info))
	if errors.Is(err, unix.EINVAL) && info.Flags&abi.FlagZeroCopy != 0 {
		info.Flags &^= abi.FlagZeroCopy
		err = c.do(ctx, abi.CmdAddDev, abi.CtrlCmd{DevID: info.DevID}, bytesOf(info))
	}
	return err
}

func newServer(dev block.Device, ctl *control) *Server {
	return &Server{dev: abilitiesOf(dev), control: ctl, fd: -1, ended: make(chan struct{})}
}

// start brings an added device to life.
func (s *Server) start(ctx context.Context, info *abi.DevInfo) error {
	if err := s.open(info); err != nil {
		return err
	}
	p := paramsOf(s.dev, s.maxIO)
	if err := s.control.do(ctx, abi.CmdSetParams, abi.CtrlCmd{DevID: s.id}, bytesOf(&p)); err != nil {
		return fmt.Errorf("telling the ublk driver what %s is like: %w", s.Path(), err)
	}
	s.serve()
	if err := s.ready(ctx, abi.CmdStartDev); err != nil {
		return fmt.Errorf("starting %s: %w", s.Path(), err)
	}
	return s.node(blockPath(s.id), "/sys/class/block/"+blockName(s.id), unix.S_IFBLK)
}

// open takes over what the kernel says of the device, and opens its queues.
func (s *Server) open(info *abi.DevInfo) error {
	s.id, s.depth, s.maxIO = info.DevID, int(info.QueueDepth), int(info.MaxIOBytes)
	s.userCopy, s.encoded = info.Flags&abi.FlagUserCopy != 0, info.Flags&abi.FlagIoctlEncode != 0 && s.control.encoded
	s.zeroCopy = info.Flags&abi.FlagZeroCopy != 0 && s.userCopy && s.control.canZeroCopy() && s.dev.mover != nil
	s.resizes = s.control.features&abi.FlagUpdateSize != 0
	char := charPath(s.id)
	if err := s.node(char, classPath(s.id), unix.S_IFCHR); err != nil {
		return err
	}
	var err error
	if s.fd, err = unix.Open(char, unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		s.fd = -1
		return fmt.Errorf("opening %s: %w", char, err)
	}
	for i := range int(info.Queues) {
		q, err := newQueue(s, i)
		s.queues = append(s.queues, q)
		if err != nil {
			return err
		}
	}
	return nil
}

// serve starts the queues' threads.
func (s *Server) serve() {
	s.serving = true
	errs := make(chan error)
	for _, q := range s.queues {
		go func() { errs <- q.run() }()
	}
	go func() { // ends with the last queue
		for range s.queues {
			if err := <-errs; err != nil && s.failed == nil {
				s.failed = err
				for _, q := range s.queues { // a device with half its queues is of no use
					q.setLeave()
				}
			}
		}
		close(s.ended)
	}()
}

// ready tells the kernel that the queues are served. It answers when they are,
// so it is not waited for when one fails.
func (s *Server) ready(ctx context.Context, nr uint32) error {
	ctx, cancel := context.WithTimeout(ctx, commandWait)
	defer cancel()
	go func() {
		select {
		case <-s.ended:
			cancel()
		case <-ctx.Done():
		}
	}()
	err := s.control.do(ctx, nr, abi.CtrlCmd{DevID: s.id, Data: uint64(os.Getpid())}, nil)
	select {
	case <-s.ended:
		return errors.Join(s.failed, err)
	default:
		return err
	}
}

// node waits for a device's node; where nobody makes it, we do.
func (s *Server) node(path, sys string, kind uint32) error {
	for end := time.Now().Add(time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(path); err == nil {
			return nil
		}
		if time.Now().After(end) {
			break
		}
	}
	text, err := os.ReadFile(sys + "/dev")
	if err != nil {
		return fmt.Errorf("waiting for %s: %w", path, err)
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(string(text), "%d:%d", &major, &minor); err != nil {
		return fmt.Errorf("%s/dev: %w", sys, err)
	}
	if err := unix.Mknod(path, kind|0o600, int(unix.Mkdev(major, minor))); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("making %s: %w", path, err)
	}
	return nil
}

// Recover serves a device whose server has left or died, with the requests that
// wait. It waits for the old server's end: ErrServed where that does not come
// before ctx ends. dev may have grown meanwhile, and must not have shrunk.
func Recover(ctx context.Context, number int, dev block.Device) (*Server, error) {
	ctl, err := openControl(false)
	if err != nil {
		return nil, err
	}
	s := newServer(dev, ctl)
	s.id = uint32(number)
	if err := s.recover(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("recovering %s: %w", s.Path(), err), s.abandon())
	}
	return s, nil
}

// abandon leaves a device that could not be recovered for another attempt.
func (s *Server) abandon() error {
	ctx, cancel := context.WithTimeout(context.Background(), commandWait)
	defer cancel()
	return errors.Join(s.stop(ctx), s.control.Close())
}

func (s *Server) recover(ctx context.Context) error {
	size, err := s.fitting(ctx)
	if err != nil {
		return err
	}
	info, err := s.takeOver(ctx)
	if err != nil {
		return err
	}
	if err := s.open(info); err != nil {
		return err
	}
	s.serve()
	if err := s.ready(ctx, abi.CmdEndUserRecovery); err != nil {
		return err
	}
	if s.dev.Size() > size && s.resizes {
		return s.Resize(ctx)
	}
	return nil
}

// fitting gives the size that the kernel takes the device to have, in bytes,
// where ours is at least as large and of the same blocks.
func (s *Server) fitting(ctx context.Context) (int64, error) {
	p, err := s.control.params(ctx, s.id)
	if err != nil {
		return 0, err
	}
	size := int64(p.DevSectors) * block.SectorSize
	if s.dev.Size() < size || int64(1)<<p.LogicalShift%s.dev.limits.LogicalBlock != 0 {
		return 0, fmt.Errorf("the device has %d bytes in blocks of %d; what is to be served has %d in blocks of %d",
			size, int64(1)<<p.LogicalShift, s.dev.Size(), s.dev.limits.LogicalBlock)
	}
	return size, nil
}

// takeOver begins the recovery as soon as the old server is gone.
func (s *Server) takeOver(ctx context.Context) (*abi.DevInfo, error) {
	for {
		info, err := s.control.info(ctx, s.id)
		if err != nil {
			return nil, err
		}
		if info.Flags&abi.FlagUserRecovery == 0 {
			return nil, errors.New("it was made without recovery")
		}
		if info.State == abi.StateDead {
			return nil, fmt.Errorf("%w: it was never started, or was stopped", ErrNoDevice)
		}
		err = s.control.do(ctx, abi.CmdStartUserRecovery, abi.CtrlCmd{DevID: s.id}, nil)
		if err == nil || errors.Is(err, unix.EINVAL) && info.State == abi.StateQuiesced {
			return &info, nil // or somebody began and died: then the kernel waits for the queues already
		}
		if !errors.Is(err, unix.EBUSY) {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%w (number %d)", ErrServed, info.ServerPID)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Number is the device's, Path its node.
func (s *Server) Number() int  { return int(s.id) }
func (s *Server) Path() string { return blockPath(s.id) }

// Done is closed when the device is no longer served; Err then says why.
func (s *Server) Done() <-chan struct{} { return s.ended }

// Err is nil after Delete, ErrLeft after Leave, else what failed. Before the end
// of Done it is nil.
func (s *Server) Err() error {
	select {
	case <-s.ended:
	default:
		return nil
	}
	if s.failed == nil && s.left.Load() {
		return ErrLeft
	}
	return s.failed
}

// Resize tells the kernel of the size that the device has got.
func (s *Server) Resize(ctx context.Context) error {
	if !s.resizes {
		return fmt.Errorf("%s: %w", s.Path(), ErrResize)
	}
	n := sectors(s.dev.Size(), s.dev.limits.LogicalBlock)
	if err := s.control.do(ctx, abi.CmdUpdateSize, abi.CtrlCmd{DevID: s.id, Data: n}, nil); err != nil {
		return fmt.Errorf("resizing %s to %d sectors: %w", s.Path(), n, err)
	}
	return nil
}

// Leave ends serving and keeps the device: its requests wait for Recover, in
// this process or another. Requests that have begun are ended first. It returns
// when the kernel has noticed.
func (s *Server) Leave(ctx context.Context) error {
	s.left.Store(true)
	if err := s.stop(ctx); err != nil {
		return fmt.Errorf("leaving %s: %w", s.Path(), err)
	}
	for {
		info, err := s.control.info(ctx, s.id)
		if err != nil || info.State != abi.StateLive {
			return errors.Join(err, s.control.Close())
		}
		select {
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("leaving %s: the kernel still holds it for served: %w", s.Path(), context.Cause(ctx)), s.control.Close())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (s *Server) wait(ctx context.Context) error {
	select {
	case <-s.ended:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("a request has not ended: %w", context.Cause(ctx))
	}
}

// stop ends the queues, where they run, and lets go of the character device.
// Where a request does not end in time all stays for another attempt.
func (s *Server) stop(ctx context.Context) error {
	s.closing.Lock()
	defer s.closing.Unlock()
	if s.closed {
		return nil
	}
	if s.serving {
		for _, q := range s.queues {
			q.setLeave()
		}
		if err := s.wait(ctx); err != nil {
			return err
		}
	}
	s.closed = true
	var errs []error
	for _, q := range s.queues {
		errs = append(errs, q.free())
	}
	if s.fd >= 0 {
		errs = append(errs, unix.Close(s.fd))
	}
	return errors.Join(errs...)
}

// Delete removes the device, and does not wait for those who have it open: they
// get errors from here on. What they wrote and did not sync is written where the
// kernel does that (6.8), else lost. The kernel's answer to stopping waits for
// requests under way, which are served meanwhile, and for no opener.
func (s *Server) Delete(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*commandWait) // for the command, and for the queues' end
	defer cancel()
	if err := s.control.do(ctx, abi.CmdStopDev, abi.CtrlCmd{DevID: s.id}, nil); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("stopping %s: %w", s.Path(), err)
	}
	if err := s.wait(ctx); err != nil {
		return fmt.Errorf("stopping %s: %w", s.Path(), err)
	}
	return errors.Join(s.stop(ctx), s.control.remove(ctx, s.id), s.control.Close())
}

// undo removes a device that could not be started.
func (s *Server) undo() error {
	ctx, cancel := context.WithTimeout(context.Background(), commandWait)
	defer cancel()
	var err error
	if s.serving {
		err = s.control.do(ctx, abi.CmdStopDev, abi.CtrlCmd{DevID: s.id}, nil)
	}
	return errors.Join(err, s.stop(ctx), s.control.remove(ctx, s.id), s.control.Close())
}
