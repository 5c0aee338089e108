package serve

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"path/filepath"

	"tidemark/internal/front/nbd"
)

// nbdServer shows a device to NBD clients. It needs no privileges. Clients that
// reconnect (qemu, nbdkit, nbd-client -persist) see no error when it is restarted.
type nbdServer struct {
	folder string
	log    *slog.Logger
}

type nbdServed struct {
	where  string
	server *nbd.Server
	cancel context.CancelFunc
	ended  chan struct{}
}

func (f nbdServer) probe() error { return nil }

func (f nbdServer) serve(_ context.Context, spec Spec, dev shown, _ json.RawMessage) (served, error) {
	where := spec.Listen
	if where == "" {
		where = "nbd+unix:///" + spec.Name + "?socket=" + url.QueryEscape(filepath.Join(f.folder, spec.Name+".sock"))
	}
	l, err := nbd.Listen(where)
	if err != nil {
		return nil, err
	}
	server := &nbd.Server{Log: f.log}
	if err := server.Add(nbd.Export{Name: l.Export, Description: "tidemark device " + spec.Name, Device: dev, ReadOnly: spec.ReadOnly, BlockSize: dev.limits.LogicalBlock,
		Bitmaps: dev.bitmaps}); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &nbdServed{where: l.URI, server: server, cancel: cancel, ended: make(chan struct{})}
	go func() {
		defer close(s.ended)
		if err := server.Serve(ctx, l); err != nil {
			f.log.Error("the NBD server of a device ended", "device", spec.Name, "error", err)
		}
	}()
	return s, nil
}

func (f nbdServer) forget(context.Context, Spec, json.RawMessage) error { return nil } // a stale socket is replaced

func (s *nbdServed) kernel() string          { return "" }
func (s *nbdServed) uri() string             { return s.where }
func (s *nbdServed) memory() json.RawMessage { return nil }
func (s *nbdServed) open() bool              { return s.server.Clients() > 0 }
func (s *nbdServed) outlives() bool          { return false }

// resized does nothing: NBD clients learn the size when they connect.
func (s *nbdServed) resized(context.Context) error { return nil }

func (s *nbdServed) pause(ctx context.Context) error {
	s.cancel()
	select {
	case <-s.ended:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *nbdServed) remove(ctx context.Context) error {
	if n := s.server.Clients(); n > 0 {
		return fmt.Errorf("%s is %w by %d connections", s.where, ErrInUse, n)
	}
	return s.pause(ctx)
}

func (s *nbdServed) end(ctx context.Context) error { return s.pause(ctx) }
