package serve

import (
	"context"
	"fmt"
	"time"

	"tidemark/internal/filter/barrier"
)

// Hold holds the writes of devices: when it returns those under way have ended,
// and none goes on before the barrier's Release or the end of max. Reads go on.
// Where it fails nothing is held.
func (s *Server) Hold(ctx context.Context, max time.Duration, devices []string) (*barrier.Barrier, error) {
	var filters []*barrier.Filter
	for _, name := range devices {
		d, err := s.find(name)
		if err != nil {
			return nil, err
		}
		f := d.now().part.Barrier
		if f == nil {
			return nil, fmt.Errorf("the device %s is offline: %w", name, ErrNotFound)
		}
		filters = append(filters, f)
	}
	return barrier.Raise(ctx, max, filters...)
}
