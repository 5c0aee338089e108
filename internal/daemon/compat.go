package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"tidemark/internal/control/blksnap"
	"tidemark/internal/control/cuse"
	"tidemark/internal/health"
)

// Compat are the interfaces of other systems that the daemon can answer.
var Compat = []string{"blksnap"}

var (
	// ErrCompat: there is no such interface.
	ErrCompat = errors.New("no such interface")
	// ErrCompatUnbuilt: there will be one, and it does not work as a whole yet.
	ErrCompatUnbuilt = errors.New("this interface is not served yet")
)

func checkCompat(names []string) error {
	for _, n := range names {
		if n == "involflt" {
			return fmt.Errorf("--compat involflt: %w: /dev/involflt is not connected with the groups (docs/involflt.md)\n  There are: %s", ErrCompatUnbuilt, strings.Join(Compat, ", "))
		}
		if !slices.Contains(Compat, n) {
			return fmt.Errorf("--compat %q: %w\n  There are: %s", n, ErrCompat, strings.Join(Compat, ", "))
		}
	}
	return nil
}

// startCompat makes the control devices of other systems. What cannot be had is
// a condition: protection goes on without it. The function ends them.
func (s *service) startCompat(ctx context.Context, names []string) (stop func()) {
	var devices []*cuse.Server
	var servers []*blksnap.Server
	for _, name := range names {
		server, device, err := blksnap.Start(ctx, &blksnapSystem{devices: s.devices, health: &s.health, tracked: map[string]bool{}}, "/dev", s.env.Log)
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
		devices, servers = append(devices, device), append(servers, server)
	}
	return func() {
		end, cancel := context.WithTimeout(context.Background(), shutdownMax)
		defer cancel()
		for i, d := range devices {
			if err := errors.Join(d.Close(end), servers[i].Close()); err != nil {
				s.env.Log.Error("ending a compatible control device", "error", err)
			}
		}
	}
}
