package main

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"tidemark/internal/control/api"
	"tidemark/internal/vault"
)

func newSnapshotCopy() *cobra.Command {
	var req api.CopyRequest
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "copy ID --vault URL",
		Short: "Copy a snapshot into a vault as a recovery point",
		Long: `Copies what the snapshot's images hold into a vault, as one point of a group, and
prints "GROUP POINT" when it is there: for points, restore, export, mount and
verify. After the first one only what changed since the last copy is read; where
the change map does not know that, all of it, and a sentence says why.

A copy that is cut off leaves the vault as it was; the next one goes on. Images
that are written to meanwhile make no point. The vault is made if the folder is
absent or empty.`,
		Example: "  tidemark snapshot copy 5f3a --vault /backup/vault\n  tidemark snapshot copy 5f3a --vault /backup/vault --name db --bookmark nightly-17",
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if req.Vault, err = vault.Folder(req.Vault); err != nil {
				return err
			}
			client := dial(socketFlagOf(cmd))
			bar := newProgress(cmd.ErrOrStderr(), "copying", asJSON)
			stop := followCopy(cmd.Context(), client, args[0], req.Vault, bar)
			done, err := client.CopySnapshot(cmd.Context(), args[0], req)
			stop()
			bar.Done()
			if err != nil && cmd.Context().Err() != nil {
				return interrupted{"no point was made; the next copy goes on"}
			}
			if err != nil {
				return err
			}
			if asJSON {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(done)
			}
			for _, d := range done.Devices {
				if d.Whole {
					fmt.Fprintf(cmd.ErrOrStderr(), "%s was read as a whole: %s.\n", d.Device, d.Why)
				}
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), done.Group, done.Point)
			return err
		},
		ValidArgsFunction: completeSnapshots,
	}
	socketFlag(cmd)
	f := cmd.Flags()
	f.StringVar(&req.Vault, "vault", "", "where the point goes: a folder, or a file:// URL")
	f.StringVar(&req.Group, "name", "", "the group's name (default: the device's, where there is one device)")
	f.StringVar(&req.Bookmark, "bookmark", "", "the point's name (default: the snapshot's id)")
	f.BoolVar(&asJSON, "json", false, "print JSON")
	_ = cmd.MarkFlagRequired("vault")
	return cmd
}

// followCopy shows how far a copy is, until the function that it gives is called.
func followCopy(ctx context.Context, c *api.Client, id, where string, bar *progress) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	over := make(chan struct{})
	go func() { // ends with ctx
		defer close(over)
		tick := time.NewTicker(500 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			all, err := c.Snapshots(ctx)
			i := slices.IndexFunc(all, func(s api.Snapshot) bool { return s.ID == id })
			if err != nil || i < 0 {
				continue // the copy itself tells of it
			}
			for _, now := range all[i].Copies {
				if now.Vault == where && now.Total > 0 {
					bar.Set(now.Done, now.Total)
				}
			}
		}
	}()
	return func() { cancel(); <-over }
}
