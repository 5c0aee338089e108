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
	"tidemark/internal/vault"
)

// Compat are the interfaces of other systems that the daemon can answer.
var Compat = []string{"blksnap", "involflt"}

var (
	// ErrCompat: there is no such interface.
	ErrCompat = errors.New("no such interface")
	// ErrCompatVault: it is no vault, or nothing asks for one.
	ErrCompatVault = errors.New("no use of a vault for /dev/involflt")
)

// checkCompat holds the settings against one another, and has each name once.
func (c *Config) checkCompat() error {
	for _, n := range c.Compat {
		if !slices.Contains(Compat, n) {
			return fmt.Errorf("--compat %q: %w\n  There are: %s", n, ErrCompat, strings.Join(Compat, ", "))
		}
	}
	c.Compat = slices.Compact(slices.Sorted(slices.Values(c.Compat)))
	if c.CompatVault == "" {
		return nil
	}
	if !slices.Contains(c.Compat, "involflt") {
		return fmt.Errorf("--compat-vault %s: %w\n  It is for --compat involflt, which is not given", c.CompatVault, ErrCompatVault)
	}
	dir, err := vault.Folder(c.CompatVault)
	if err != nil {
		return fmt.Errorf("--compat-vault: %w", err)
	}
	c.CompatVault = dir
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
			s.health.Raise(health.Condition{Code: "compat-unavailable", Severity: health.Error, Subject: "/dev/" + name, Detail: "The control device /dev/" + name + " cannot be had: " + err.Error() + ".", Remedy: remedy})
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
