package daemon

import (
	"context"
	"time"

	"tidemark/internal/filter/capture"
	"tidemark/internal/protect"
	"tidemark/internal/serve"
)

// servedDevices are the daemon's served devices, as groups need them.
type servedDevices struct{ *serve.Server }

func (d servedDevices) Device(name string) (protect.ServedDevice, bool) {
	f, ok := d.Find(name)
	return protect.ServedDevice(f), ok
}

func (d servedDevices) Capture(group string) *capture.Ring { return d.Captured(group) }

func (d servedDevices) StartCapture(c protect.Capture) (*capture.Ring, error) {
	return d.Server.StartCapture(serve.Capture(c))
}

func (d servedDevices) Hold(ctx context.Context, max time.Duration, devices []string) (func() error, error) {
	up, err := d.Server.Hold(ctx, max, devices)
	if err != nil {
		return nil, err
	}
	return up.Release, nil
}

func (d servedDevices) Mounts(name string) ([]string, error) { return d.MountsOf(name) }

// captures are those of the groups of the state folder.
func (s *service) captures() (out []serve.Capture) {
	for _, g := range s.list() {
		if c, ok := g.Config().Capture(); ok {
			out = append(out, serve.Capture(c))
		}
	}
	return out
}

// closeDevices lets go of what groups worked with until now.
func (s *service) closeDevices() {
	if err := s.devices.Close(); err != nil {
		s.env.Log.Error("letting go of the captures of served devices", "error", err)
	}
}
