package main

import (
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"

	"tidemark/internal/control/api"
	"tidemark/internal/stream"
)

func newBookmark() *cobra.Command {
	var (
		consistency string
		asJSON      bool
	)
	cmd := &cobra.Command{
		Use:   "bookmark GROUP NAME",
		Short: "Name this moment in a group's history",
		Long: `Puts a bookmark over all disks of the group at one instant.

  crash        no pause; what a power cut at this instant would have left
  filesystem   every mounted file system of the group is frozen for the instant
  application  hooks run before and after; each must succeed

A bookmark that cannot have what was asked fails; it is never weakened.`,
		Example: "  tidemark bookmark sdb before-upgrade\n  tidemark bookmark db nightly --consistency filesystem",
		RunE: func(cmd *cobra.Command, args []string) error {
			req := api.BookmarkRequest{Name: args[1]}
			if err := req.Consistency.UnmarshalText([]byte(consistency)); err != nil {
				return usageError{err}
			}
			if err := stream.CheckBookmarkName(req.Name); err != nil {
				return usageError{err}
			}
			b, err := dial(socketFlagOf(cmd)).Bookmark(cmd.Context(), args[0], req)
			if err != nil {
				return err
			}
			if asJSON {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(b)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "Bookmark %s of group %s is at position %d (%s-consistent).\n", b.Name, b.Group, b.Position, b.Consistency)
			return nil
		},
	}
	socketFlag(cmd)
	cmd.Flags().StringVar(&consistency, "consistency", "crash", "crash, filesystem or application")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}
