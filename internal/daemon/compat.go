package daemon

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"tidemark/internal/control/blksnap"
	"tidemark/internal/control/cuse"
	"tidemark/internal/control/involflt"
	"tidemark/internal/health"
)

// Compat are the interfaces of other systems that the daemon can answer.
var Compat = []string{"blksnap", "involflt"}

// ErrCompat: there is no such interface.
var ErrCompat = errors.New("no such interface")

func checkCompat(names []string) error {
	for _, n := range names {
		if !slices.Contains(Compat, n) {
			return fmt.Errorf("--compat %q: %w\n  There are: %s", n, ErrCompat, strings.Join(Compat, ", "))
		}
	}
	return nil
}

// startCompat makes the control devices of other systems. What cannot be had is
// a condition: protection goes on without it. The function ends them.
func (s *service) startCompat(ctx context.Context, cfg *Config) (stop func()) {
	var ends []func(context.Context) error
	for _, name := range cfg.Compat {
		end, err := s.startDevice(ctx, name, cfg)
		if err != nil {
			s.env.Log.Error("a compatible control device cannot be had", "device", "/dev/"+name, "error", err)
			remedy := "Load the kernel's module cuse (modprobe cuse), run as root, and start the daemon again."
			if errors.Is(err, cuse.ErrExists) {
				remedy = "Unload the kernel module that has it, or end the other daemon, and start this one again."
			}
			s.health.Raise(health.Condition{Code: "compat-unavailable", Severity: health.Error, Subject: "/dev/" + name, Detail: "The control device cannot be had: " + err.Error() + ".", Remedy: remedy})
			continue
		}
		s.env.Log.Info("answering programs written for another system", "device", "/dev/"+name)
		ends = append(ends, end)
	}
	return func() {
		end, cancel := context.WithTimeout(context.Background(), shutdownMax)
		defer cancel()
		for _, e := range ends {
			if err := e(end); err != nil {
				s.env.Log.Error("ending a compatible control device", "error", err)
			}
		}
	}
}

// startDevice makes one of them; end takes it away.
func (s *service) startDevice(ctx context.Context, name string, cfg *Config) (end func(context.Context) error, err error) {
	var device *cuse.Server
	var server interface{ Close() error }
	if name == "blksnap" {
		server, device, err = blksnap.Start(ctx, &blksnapSystem{devices: s.devices, health: &s.health, tracked: map[string]bool{}}, "/dev", s.env.Log)
	} else {
		server, device, err = s.startInvolflt(ctx, cfg.CompatVault)
	}
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context) error { return errors.Join(device.Close(ctx), server.Close()) }, nil
}

func (s *service) startInvolflt(ctx context.Context, vault string) (*involflt.Server, *cuse.Server, error) {
	dir := filepath.Join(s.env.StateDir, "involflt")
	system, err := newInvolflt(s, dir, vault)
	if err != nil {
		return nil, nil, err
	}
	return involflt.Start(ctx, system, filepath.Join(dir, "data"), s.env.Log)
}
