package daemon

import (
	"context"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
	"tidemark/internal/control/api"
	"tidemark/internal/health"
	"tidemark/internal/serve"
)

// Devices lists the served devices.
func (s *service) Devices(context.Context) ([]api.Device, error) {
	out := []api.Device{}
	for _, i := range s.devices.List() {
		out = append(out, deviceOf(i))
	}
	return out, nil
}

func (s *service) CreateDevice(ctx context.Context, r api.DeviceRequest) (api.Device, error) {
	i, err := s.devices.Create(ctx, serve.Spec{Name: r.Name, Backing: r.Backing, Front: r.Front, Listen: r.Listen, ReadOnly: r.ReadOnly, Copy: r.NoZeroCopy})
	if err != nil {
		return api.Device{}, coded(err)
	}
	return deviceOf(i), nil
}

func (s *service) RemoveDevice(ctx context.Context, name string) error {
	return coded(s.devices.Remove(ctx, name))
}

func (s *service) ResizeDevice(ctx context.Context, name string, r api.ResizeRequest) (api.Device, error) {
	i, err := s.devices.Resize(ctx, name, r.SizeBytes)
	if err != nil {
		return api.Device{}, coded(err)
	}
	return deviceOf(i), nil
}

// ChangeFilters puts a filter over a live device or takes one off.
func (s *service) ChangeFilters(_ context.Context, name string, r api.FilterRequest) (api.Device, error) {
	var i serve.Info
	var err error
	switch {
	case (r.Attach == "") == (r.Detach == ""):
		return api.Device{}, &api.Error{Code: api.CodeUsage, Message: "one filter is attached or detached at a time: want one of attach and detach"}
	case r.Attach != "":
		spec := serve.FilterSpec{Name: r.Attach, Delay: time.Duration(r.DelaySeconds * float64(time.Second))}
		if r.Range != nil {
			spec.Range = block.Range{Off: r.Range.Offset, Len: r.Range.Length}
		}
		i, err = s.devices.AttachFilter(name, spec, r.Force)
	default:
		i, err = s.devices.DetachFilter(name, r.Detach, r.Force)
	}
	if err != nil {
		return api.Device{}, coded(err)
	}
	return deviceOf(i), nil
}

func (s *service) Splice(ctx context.Context, r api.SpliceRequest) (api.Device, error) {
	bound := serve.DefaultGiveBack
	if r.GiveBackSeconds != nil {
		bound = time.Duration(*r.GiveBackSeconds * float64(time.Second))
	}
	i, err := s.devices.Splice(ctx, r.Device, r.Name, r.Front, bound)
	if err != nil {
		return api.Device{}, coded(err)
	}
	return deviceOf(i), nil
}

func (s *service) Unsplice(ctx context.Context, name string) error {
	if group := s.devices.CapturedBy(name); group != "" {
		return coded(fmt.Errorf("%s: %w by the group %s, which protects it: tidemark unprotect %[3]s", name, serve.ErrInUse, group))
	}
	return coded(s.devices.Unsplice(ctx, name))
}

// takenByGroup says which group has tapped a device: a served device over it
// would be a second way in, and its writes another order.
func (s *service) takenByGroup(path string) string {
	for _, g := range s.list() {
		for _, d := range g.Config().Disks {
			if sameDisk(d.Path, path) {
				return fmt.Sprintf("the group %s protects it", g.Config().Name)
			}
		}
	}
	return ""
}

func sameDisk(a, b string) bool {
	var x, y unix.Stat_t
	return unix.Stat(a, &x) == nil && unix.Stat(b, &y) == nil && x.Mode&unix.S_IFMT == unix.S_IFBLK && x.Mode&unix.S_IFMT == y.Mode&unix.S_IFMT && x.Rdev == y.Rdev
}

func deviceOf(i serve.Info) api.Device {
	out := api.Device{Name: i.Name, Node: i.Node, Kernel: i.Kernel, Front: i.Front, Backing: i.Backing, SizeBytes: i.Size,
		ReadOnly: i.ReadOnly, Open: i.Open, Filters: []api.Filter{}, Conditions: i.Conditions}
	for _, f := range i.Filters {
		out.Filters = append(out.Filters, api.Filter{Name: f.Name, Altitude: f.Altitude})
	}
	return out
}

// stopDevices lets go of the served devices.
func (s *service) stopDevices() {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := s.devices.Stop(ctx); err != nil {
		s.env.Log.Error("stopping the served devices", "error", err)
	}
}

// mayStop is closed when the daemon is to end: at the end of ctx, or when it was
// asked to and no served device is open.
func (s *service) mayStop(ctx context.Context, cfg Config) <-chan struct{} {
	may := make(chan struct{})
	go func() {
		defer close(may)
		for {
			select {
			case <-ctx.Done():
				return
			case sig := <-cfg.Stop:
				open := s.devices.InUse()
				if len(open) == 0 || cfg.Force {
					return
				}
				s.env.Log.Error("the daemon does not end while served devices are open", "signal", sig.String(), "devices", open)
				s.health.Raise(health.Condition{Code: "stop-refused", Severity: health.Warning, Subject: strings.Join(open, ", "),
					Detail: "The daemon was asked to end and did not, as served devices are open.",
					Remedy: "Unmount or close them and ask again, or start the daemon with --force; kill -9 ends it in any case."})
			}
		}
	}()
	return may
}
