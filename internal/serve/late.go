package serve

import (
	"context"
	"errors"
	"slices"

	"tidemark/internal/health"
	"tidemark/internal/snapshot"
)

// late tries each offline device once. Those that a snapshot is of wait for the
// next start of the daemon: their images have to begin before the first request.
// So do those under a volume.
func (s *Server) late(ctx context.Context) {
	held := s.set.List()
	for _, d := range s.list() {
		if d.served != nil || d.spec.Splice != nil || slices.ContainsFunc(held, func(i snapshot.Info) bool {
			return slices.ContainsFunc(i.Devices, func(x snapshot.DeviceInfo) bool { return x.Name == d.spec.Name })
		}) {
			continue
		}
		r, err := s.load(d.spec.Name)
		if err != nil || !r.Made {
			continue
		}
		d.set(func() { d.spec = r.Spec })
		d.was = r.Disk
		err = s.lay(d)
		if err != nil && !errors.Is(err, ErrOtherDisk) {
			continue // what is wrong is told already
		}
		if err == nil {
			err = s.bringBack(ctx, d, r)
		}
		if err != nil {
			if !slices.ContainsFunc(d.health.List(), func(c health.Condition) bool { return c.Detail == err.Error() }) { // not each second
				s.offline(d, err)
			}
			continue
		}
		d.health.Clear("device-offline", d.spec.Name)
		s.env.Log.Info("a served device is back", "device", d.spec.Name)
	}
}
