package daemon

import (
	"log/slog"
	"net/http"
	"time"

	"tidemark/internal/control/metrics"
)

// openMetrics takes an address, if one is given; tell answers Prometheus there, until end.
func (s *service) openMetrics(address string) (tell, end func(), err error) {
	if address == "" {
		return func() {}, func() {}, nil
	}
	l, err := metrics.Listen(address)
	if err != nil {
		return nil, nil, err
	}
	server := &http.Server{Handler: metrics.Handler(s.Status), ReadHeaderTimeout: 10 * time.Second, ErrorLog: slog.NewLogLogger(s.env.Log.Handler(), slog.LevelWarn)}
	tell = func() {
		go func() { _ = server.Serve(l) }() // "metrics": ends with the server, and with nothing to say but that
		s.env.Log.Info("metrics are told", "at", l.Addr().String())
	}
	return tell, func() { server.Close(); l.Close() }, nil
}
