package main

import (
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"tidemark/internal/daemon"
)

func newDaemon() *cobra.Command {
	var state string
	var asJSON bool
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
			return daemon.Run(cmd.Context(), daemon.Config{StateDir: state, Socket: *socketFlagOf(cmd), Version: version, Log: slog.New(h)})
		},
	}
	socketFlag(cmd)
	cmd.Flags().StringVar(&state, "state", "/var/lib/tidemark", "folder for groups and what waits for their vaults")
	cmd.Flags().BoolVar(&asJSON, "json", false, "log JSON")
	return cmd
}
