package blksnap

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"syscall"
	"time"

	"tidemark/internal/abi/blksnap"
	"tidemark/internal/block"
)

// Bounds of what a client may pass at once.
const (
	devicesMax = 4096
	rangesMax  = 1 << 20
	chunkBytes = 1 << 20 // of a change map, that are copied at a time
	pageBytes  = 4096    // of difference storage
)

// command answers one command. Every error has an errno in it.
func (s *Server) command(ctx context.Context, cmd uint32, arg uint64, m memory) (int32, error) {
	switch cmd {
	case blksnap.Version:
		return 0, put(m, arg, blksnap.VersionInfo{Major: 1}, syscall.ENODATA)
	case blksnap.TrackerRemove:
		return 0, s.untrack(arg, m)
	case blksnap.TrackerCollect:
		return 0, s.trackers(arg, m)
	case blksnap.ReadMap:
		return s.readMap(arg, m)
	case blksnap.MarkDirty:
		return 0, s.markDirty(arg, m)
	case blksnap.SnapshotCreate:
		return 0, s.create(arg, m)
	case blksnap.SnapshotDestroy:
		return 0, s.destroy(ctx, arg, m)
	case blksnap.AppendStorage:
		return 0, s.appendStorage(arg, m)
	case blksnap.SnapshotTake:
		return 0, s.take(ctx, arg, m)
	case blksnap.SnapshotCollect:
		return 0, s.snapshots(arg, m)
	case blksnap.CollectImages:
		return 0, s.images(arg, m)
	case blksnap.SnapshotWaitEvent:
		return 0, s.waitEvent(ctx, arg, m)
	}
	return 0, syscall.ENOTTY
}

// get reads a structure of abi/blksnap, or fails with an errno.
func get(m memory, addr uint64, v any, fault syscall.Errno) error {
	b := make([]byte, blksnap.Size(v))
	if len(b) == 0 {
		return nil
	}
	if err := m.Read(addr, b); err != nil {
		return fault
	}
	return blksnap.Decode(b, v)
}

func put(m memory, addr uint64, v any, fault syscall.Errno) error {
	if err := m.Write(addr, blksnap.Bytes(v)); err != nil {
		return fault
	}
	return nil
}

// list reads an array of ranges as bytes on a device.
func list(m memory, addr uint64, count uint32, fault syscall.Errno) ([]block.Range, error) {
	if count > rangesMax {
		return nil, syscall.ENOMEM
	}
	in := make([]blksnap.Range, count)
	if err := get(m, addr, in, fault); err != nil {
		return nil, err
	}
	out := make([]block.Range, 0, count)
	for _, r := range in {
		if r.Offset > math.MaxInt64/blksnap.Sector || r.Count > math.MaxInt64/blksnap.Sector-r.Offset {
			return nil, syscall.EINVAL
		}
		out = append(out, block.Range{Off: int64(r.Offset) * blksnap.Sector, Len: int64(r.Count) * blksnap.Sector})
	}
	return out, nil
}

// answerList is what the three collecting commands have in common: a null
// pointer asks for the count; a list that is too small is not filled.
func answerList[T any](m memory, countAt, array uint64, room uint32, have []T, small syscall.Errno) error {
	count := put(m, countAt, []uint32{uint32(len(have))}, syscall.ENODATA)
	switch {
	case count != nil || array == 0 || len(have) == 0:
		return count
	case int(room) < len(have):
		return small
	}
	return put(m, array, have, syscall.ENODATA)
}

func (s *Server) trackers(arg uint64, m memory) error {
	var in blksnap.Collect
	if err := get(m, arg, &in, syscall.ENODATA); err != nil {
		return err
	}
	tracked, err := s.system.Tracked()
	if err != nil {
		return to(err, nil)
	}
	have := []blksnap.TrackerInfo{}
	for _, t := range tracked {
		have = append(have, blksnap.TrackerInfo{Dev: t.Dev, BlockSize: uint32(t.BlockSize), Capacity: uint64(t.Capacity), Blocks: uint32(t.Blocks),
			Generation: t.Generation, Number: t.Number})
	}
	return answerList(m, arg, in.Array, in.Count, have, syscall.ENOBUFS)
}

func (s *Server) untrack(arg uint64, m memory) error {
	var dev blksnap.Dev
	if err := get(m, arg, &dev, syscall.ENODATA); err != nil {
		return err
	}
	t, err := s.tracking(dev)
	switch {
	case err != nil:
		return to(err, nil)
	case t.Held:
		return syscall.EBUSY
	}
	return to(s.system.Untrack(dev), nil)
}

// tracking finds a tracked device.
func (s *Server) tracking(dev blksnap.Dev) (Tracking, error) {
	all, err := s.system.Tracked()
	if err != nil {
		return Tracking{}, err
	}
	if i := slices.IndexFunc(all, func(t Tracking) bool { return t.Dev == dev }); i >= 0 {
		return all[i], nil
	}
	_, err = s.system.Table(dev) // that there is no such device is another error
	if err == nil {
		err = ErrUntracked
	}
	return Tracking{}, err
}

func (s *Server) readMap(arg uint64, m memory) (int32, error) {
	var in blksnap.ReadMapArg
	if err := get(m, arg, &in, syscall.ENODATA); err != nil {
		return 0, err
	}
	t, err := s.tracking(in.Dev)
	switch {
	case err != nil:
		return 0, to(err, nil)
	case !t.Held:
		return 0, syscall.EPERM
	case int64(in.Offset) > t.Blocks:
		return 0, syscall.EINVAL
	}
	table, err := s.system.Table(in.Dev) // one for all of the answer
	if err != nil {
		return 0, to(err, nil)
	}
	length := min(int64(in.Length), math.MaxInt32)
	buf, done := make([]byte, min(chunkBytes, length)), int32(0)
	for int64(done) < length {
		n, err := table.Read(buf[:min(int64(len(buf)), length-int64(done))], int64(in.Offset)+int64(done))
		if n == 0 {
			if err == nil || errors.Is(err, io.EOF) {
				break
			}
			return 0, to(err, nil)
		}
		if err := m.Write(in.Buffer+uint64(done), buf[:n]); err != nil {
			return 0, syscall.ENODATA
		}
		done += int32(n)
	}
	return done, nil
}

func (s *Server) markDirty(arg uint64, m memory) error {
	var in blksnap.MarkDirtyArg
	if err := get(m, arg, &in, syscall.ENODATA); err != nil {
		return err
	}
	ranges, err := list(m, in.Array, in.Count, syscall.ENODATA)
	if err != nil {
		return err
	}
	return to(s.system.MarkDirty(in.Dev, ranges), map[error]syscall.Errno{ErrUntracked: syscall.ENODEV})
}

func (s *Server) create(arg uint64, m memory) error {
	var in blksnap.Create
	if err := get(m, arg, &in, syscall.ENODATA); err != nil {
		return err
	}
	if in.Count > devicesMax {
		return syscall.ENOMEM
	}
	devs := make([]blksnap.Dev, in.Count)
	if err := get(m, in.Array, devs, syscall.ENODATA); err != nil {
		return err
	}
	for i, d := range devs {
		if slices.Contains(devs[:i], d) {
			return syscall.EINVAL
		}
	}
	if err := put(m, arg, in, syscall.ENODATA); err != nil { // before anything is made: its maker would never know its name
		return err
	}
	if len(devs) == 0 {
		rand.Read(in.ID[:])
	} else {
		var err error
		if in.ID, err = s.system.Create(devs); err != nil {
			return to(err, nil)
		}
	}
	s.mu.Lock()
	s.made[in.ID] = &making{at: time.Now()}
	if len(devs) == 0 {
		s.empty[in.ID] = make(chan struct{})
	}
	s.mu.Unlock()
	if err := put(m, arg, in, syscall.ENODATA); err != nil {
		_ = s.drop(context.Background(), in.ID)
		return err
	}
	return nil
}

// snapshotID reads one and says whether it is of an empty snapshot.
func (s *Server) snapshotID(arg uint64, m memory) (id blksnap.ID, empty bool, err error) {
	err = get(m, arg, &id, syscall.ENODATA)
	return id, s.ended(id) != nil, err
}

// ended is closed when an empty snapshot ends; nil for others.
func (s *Server) ended(id blksnap.ID) <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.empty[id]
}

func (s *Server) destroy(ctx context.Context, arg uint64, m memory) error {
	id, _, err := s.snapshotID(arg, m)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), takeMax) // half of it would be worse than late
	defer cancel()
	return to(s.drop(ctx, id), map[error]syscall.Errno{ErrNoSnapshot: syscall.ENODEV})
}

func (s *Server) drop(ctx context.Context, id blksnap.ID) error {
	if s.ended(id) == nil {
		if err := s.system.Destroy(ctx, id); err != nil {
			return err
		}
	}
	s.forget(id)
	s.show()
	return nil
}

// forget drops what is kept of a snapshot.
func (s *Server) forget(id blksnap.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if gone := s.empty[id]; gone != nil {
		close(gone)
	}
	delete(s.empty, id)
	delete(s.read, id)
	delete(s.made, id)
}

func (s *Server) appendStorage(arg uint64, m memory) error {
	var in blksnap.Append
	if err := get(m, arg, &in, syscall.EINVAL); err != nil {
		return err
	}
	ranges, err := list(m, in.Array, in.Count, syscall.EINVAL)
	if err != nil {
		return err
	}
	if s.ended(in.ID) != nil {
		return nil // it will never need any
	}
	for i := range ranges { // what is less than a page at the end of one is not used
		ranges[i].Len -= ranges[i].Len % pageBytes
	}
	ranges = slices.DeleteFunc(ranges, func(r block.Range) bool { return r.Empty() })
	switch {
	case len(ranges) > 0:
		return to(s.system.Append(in.ID, in.Dev, ranges), nil)
	case slices.Contains(s.system.Snapshots(), in.ID):
		return nil
	}
	return syscall.ESRCH
}

// takeMax bounds a take, which its caller cannot interrupt.
const takeMax = time.Minute

func (s *Server) take(ctx context.Context, arg uint64, m memory) error {
	// As in the module a signal does not end it: there would be a snapshot without images.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), takeMax)
	defer cancel()
	id, empty, err := s.snapshotID(arg, m)
	switch {
	case err != nil:
		return err
	case empty:
		return syscall.ENODEV
	}
	err = s.system.Take(ctx, id)
	s.show()
	if errors.Is(err, ErrNoStorage) { // as the module does: its clients make a new one
		_ = s.drop(ctx, id)
	}
	return to(err, nil)
}

func (s *Server) snapshots(arg uint64, m memory) error {
	var in blksnap.Collect
	if err := get(m, arg, &in, syscall.ENODATA); err != nil {
		return err
	}
	s.mu.Lock()
	have := slices.Collect(maps.Keys(s.empty))
	s.mu.Unlock()
	return answerList(m, arg, in.Array, in.Count, append(s.system.Snapshots(), have...), syscall.ENODATA)
}

func (s *Server) images(arg uint64, m memory) error {
	var in blksnap.Images
	if err := get(m, arg, &in, syscall.ENODATA); err != nil {
		return err
	}
	images, err := []Image(nil), error(ErrNotTaken)
	if s.ended(in.ID) == nil {
		images, err = s.system.Images(in.ID)
	}
	if err != nil {
		return to(err, map[error]syscall.Errno{ErrNotTaken: syscall.ENODEV})
	}
	s.show() // a snapshot that was taken by other means has its nodes from now on
	have := []blksnap.ImageInfo{}
	for _, i := range images {
		have = append(have, blksnap.ImageInfo{Original: i.Original, Image: i.Image})
	}
	return answerList(m, arg+16, in.Array, in.Count, have, syscall.ENODATA)
}

// to finds the errno of an error; special ones come first. What has no errno that
// says it all keeps its text, for the log.
func to(err error, special map[error]syscall.Errno) error {
	if err == nil {
		return nil
	}
	for is, errno := range special {
		if errors.Is(err, is) {
			return errno
		}
	}
	for _, known := range []struct {
		is    error
		errno syscall.Errno
	}{{ErrNoDevice, syscall.ENXIO}, {ErrForeign, syscall.EOPNOTSUPP}, {ErrUntracked, syscall.ENODATA}, {ErrNoSnapshot, syscall.ESRCH},
		{ErrTaken, syscall.EALREADY}, {ErrNotTaken, syscall.ENODEV}, {ErrNoStorage, syscall.EFAULT}, {ErrRange, syscall.EINVAL}, {context.Canceled, syscall.EINTR}} {
		if errors.Is(err, known.is) {
			return known.errno
		}
	}
	if isErrno(err) {
		return err
	}
	e := syscall.EIO
	_ = errors.As(err, &e)
	return fmt.Errorf("%w: %w", cmp.Or(e, syscall.EIO), err)
}
