package involflt

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"syscall"

	"tidemark/internal/abi/involflt"
)

// find gives a disk by its device, or its persistent name; nil: it is not filtered.
func (s *Server) find(name string) *disk {
	if d := s.byDevice(name); d != nil {
		return d
	}
	for _, d := range s.all() {
		if d.name == name {
			return d
		}
	}
	return nil
}

// byDevice gives a disk by any path of its device; nil: it is not filtered.
func (s *Server) byDevice(path string) *disk {
	s.mu.Lock()
	d := s.disks[path]
	s.mu.Unlock()
	if d != nil {
		return d
	}
	for _, d := range s.all() {
		if s.system.Same(d.device, path) {
			return d
		}
	}
	return nil
}

// all lists the disks by their devices.
func (s *Server) all() []*disk {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*disk
	for _, d := range s.disks {
		out = append(out, d)
	}
	slices.SortFunc(out, func(x, y *disk) int { return cmp.Compare(x.device, y.device) })
	return out
}

// name reads the one at the beginning of a structure.
func name(arg uint64, m memory) (string, error) {
	var n involflt.Name
	if err := get(m, arg, &n); err != nil {
		return "", err
	}
	name, ok := n.String()
	if !ok || name == "" {
		return "", syscall.EINVAL
	}
	return name, nil
}

// named finds the disk that a structure begins with; nil: it is not filtered.
func (s *Server) named(arg uint64, m memory) (*disk, error) {
	name, err := name(arg, m)
	if err != nil {
		return nil, err
	}
	return s.find(name), nil
}

// start filters a disk and binds it to the descriptor, if that has none yet.
func (f *file) start(ctx context.Context, arg uint64, m memory) error {
	var in involflt.DeviceInfo
	if err := get(m, arg, &in); err != nil {
		return err
	}
	device, ok := in.Device.String()
	name, named := in.Persistent.String()
	switch {
	case in.Type != involflt.HostVolume, !ok, !named, device == "", len(device) >= len(involflt.Name{}), len(name) >= len(involflt.Name{}), strings.Contains(name, "/"):
		return syscall.EINVAL
	case name == "": // as its clients make it
		name = strings.ReplaceAll(device, "/", "_")
	}
	s := f.s
	if err := s.enterQuiet(ctx); err != nil {
		return err
	}
	defer s.gate.leave()
	d, err := s.filtered(ctx, device, name)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.bound == nil || f.bound.stopped.Load() {
		f.bound = d
	}
	return nil
}

func (s *Server) filtered(ctx context.Context, device, name string) (*disk, error) {
	if d := s.byDevice(device); d != nil && d.name == name {
		if _, err := d.queue.Pending(ctx); !errors.Is(err, ErrNoDevice) {
			return d, nil
		}
		if err := s.drop(ctx, d); err != nil { // it was stopped by other means: it begins anew
			return nil, err
		}
	} else if d != nil {
		return nil, syscall.EINVAL
	}
	all := s.all()
	if slices.ContainsFunc(all, func(d *disk) bool { return d.name == name }) {
		return nil, syscall.EINVAL
	}
	if len(all) >= disksMax {
		return nil, syscall.ENOMEM
	}
	q, err := s.system.Start(ctx, device, name)
	if err != nil {
		s.trouble("a disk cannot be filtered", "device", device, "error", err)
		return nil, err
	}
	d := newDisk(s, device, name, q)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.disks[device] = d
	return d, nil
}

func (f *file) stop(ctx context.Context, arg uint64, m memory) error {
	s := f.s
	name, err := name(arg, m)
	if err != nil {
		return err
	}
	if err := s.enterQuiet(ctx); err != nil {
		return err
	}
	defer s.gate.leave()
	d := s.find(name)
	if d == nil {
		return syscall.ENODEV
	}
	if err := s.drop(ctx, d); err != nil {
		return err
	}
	f.unbind()
	return nil
}

// unbind lets a disk go that is filtered no more.
func (f *file) unbind() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.bound != nil && f.bound.stopped.Load() {
		f.bound = nil
	}
}

// drop stops filtering a disk. Called within the gate.
func (s *Server) drop(ctx context.Context, d *disk) error {
	if err := d.busy.enter(ctx); err != nil {
		return err
	}
	defer d.busy.leave()
	if err := s.system.Stop(ctx, d.device); err != nil {
		s.trouble("a disk's filtering does not end", "device", d.device, "error", err)
		return err
	}
	d.stopped.Store(true)
	d.forget()
	s.files.leave(d.name)
	s.mu.Lock()
	delete(s.disks, d.device)
	s.mu.Unlock()
	d.wake()
	return nil
}

// stopAll stops all that it can. What the driver cannot do after it, filter again, can be done here.
func (f *file) stopAll(ctx context.Context) error {
	s := f.s
	if err := s.enterQuiet(ctx); err != nil {
		return err
	}
	defer s.gate.leave()
	for _, d := range s.all() {
		if err := s.drop(ctx, d); err != nil && ctx.Err() != nil {
			return err
		}
	}
	f.unbind()
	return nil
}

func (s *Server) clear(ctx context.Context, arg uint64, m memory) error {
	d, err := s.named(arg, m)
	if err != nil || d == nil {
		return err // nothing is pending of a disk that is not filtered
	}
	return d.clear(ctx)
}

// list answers with the devices' paths, a line each.
func (s *Server) list(arg uint64, m memory) error {
	var in involflt.List
	if err := get(m, arg, &in); err != nil {
		return err
	}
	var text strings.Builder
	for _, d := range s.all() {
		text.WriteString(d.device + "\n")
	}
	b := append([]byte(text.String()), 0)
	if int64(in.Length) < int64(len(b)) {
		in.Buffer, in.Length = 0, uint32(len(b)+1+involflt.ListReserve)
		if err := put(m, arg, in); err != nil {
			return err
		}
		return syscall.EAGAIN
	}
	return put(m, in.Buffer, b)
}

// trouble tells the log why a client gets an errno.
func (s *Server) trouble(what string, args ...any) {
	if s.log != nil {
		s.log.Warn("/dev/involflt: "+what, args...)
	}
}
