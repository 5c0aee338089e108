package main

import (
	"context"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"tidemark/internal/daemon"
)

func newDaemon() *cobra.Command {
	var state string
	var nodes string
	var compat []string
	var metrics string
	var compatVault string
	var asJSON, force bool
	cmd := &cobra.Command{
		Use:   "daemon",
		Short: "Run the daemon in the foreground",
		Long: `Watches over the groups and answers on its socket. Ending it, in whatever way, does
not end the capture: that goes on in the kernel, and the next daemon takes over.`,
		Example: "  tidemark daemon --state /var/lib/tidemark",
		RunE: func(cmd *cobra.Command, _ []string) error {
			var h slog.Handler = slog.NewTextHandler(os.Stderr, nil)
			if asJSON {
				h = slog.NewJSONHandler(os.Stderr, nil)
			}
			self, err := os.Executable()
			if err != nil {
				return err
			}
			log := slog.New(h)
			daemon.BecomeFlusher(log)
			stop := make(chan os.Signal, 1)
			signal.Notify(stop, os.Interrupt, syscall.SIGTERM)
			defer signal.Stop(stop)
			return daemon.Run(context.WithoutCancel(cmd.Context()), daemon.Config{StateDir: state, Socket: *socketFlagOf(cmd), Version: version, Log: log,
				DeviceHelper: []string{self, "device-helper"}, SpliceGuard: []string{"/proc/self/exe"}, Nodes: nodes, Stop: stop, Force: force, Compat: compat, CompatVault: compatVault, Metrics: metrics, Step: step})
		},
	}
	socketFlag(cmd)
	cmd.Flags().StringVar(&state, "state", "/var/lib/tidemark", "folder for groups and what waits for their vaults")
	cmd.Flags().StringVar(&nodes, "nodes", "/dev/tidemark", "folder for the names of served devices")
	cmd.Flags().BoolVar(&force, "force", false, "end on a signal also while served devices are open")
	cmd.Flags().StringSliceVar(&compat, "compat", nil, "control devices of other systems to answer: "+strings.Join(daemon.Compat, ", "))
	cmd.Flags().StringVar(&metrics, "metrics", "", "answer Prometheus at HOST:PORT of this machine alone, or at the path of a unix socket")
	cmd.Flags().StringVar(&compatVault, "compat-vault", "", "vault of the groups that /dev/involflt makes for disks that are in none")
	cmd.Flags().BoolVar(&asJSON, "json", false, "log JSON")
	return cmd
}
