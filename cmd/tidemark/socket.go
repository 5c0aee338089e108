package main

import (
	"cmp"
	"os"

	"github.com/spf13/cobra"

	"tidemark/internal/control/api"
)

const socketDefault = "/run/tidemark/tidemark.sock"

// socketFlag adds --socket to a verb that speaks to the daemon.
func socketFlag(cmd *cobra.Command) *string {
	return cmd.Flags().String("socket", cmp.Or(os.Getenv("TIDEMARK_SOCKET"), socketDefault), "the daemon's socket (environment: TIDEMARK_SOCKET)")
}

func dial(socket *string) *api.Client { return api.Dial(*socket) }
