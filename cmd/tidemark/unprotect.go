package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func newUnprotect() *cobra.Command {
	var abandon, force bool
	cmd := &cobra.Command{
		Use:   "unprotect GROUP",
		Short: "Drain a group to its vault and remove every trace of it here",
		Long: `Waits until all that was captured is in the vault, then removes the tap, its pins
and the spool. The vault and every point in it stay.

Refused while a consumer of the group has not got everything (tidemark drain), unless
--force or --abandon.`,
		Example: "  tidemark unprotect sdb",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := dial(socketFlagOf(cmd)).Unprotect(cmd.Context(), args[0], abandon, force); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "Group %s is no longer protected; its vault stays.\n", args[0])
			return nil
		},
	}
	socketFlag(cmd)
	cmd.Flags().BoolVar(&abandon, "abandon", false, "do not wait for the vault: what is not in it yet is lost")
	cmd.Flags().BoolVar(&force, "force", false, "also while a consumer has something pending")
	return cmd
}
