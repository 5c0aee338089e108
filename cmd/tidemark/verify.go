package main

import (
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"

	"tidemark/internal/control/api"
	"tidemark/internal/timeline"
)

func newVerify() *cobra.Command {
	var live, asJSON bool
	cmd := &cobra.Command{
		Use:   "verify --vault URL [GROUP]",
		Short: "Read everything in a vault and say what is damaged",
		Long: `Reads every object and checks every checksum, index and link of the chain. Damage is
named by group, disk, range and the points that it spoils. With --live the
daemon also compares the vault with the disks themselves.`,
		Example: "  tidemark verify --vault /backup/vault\n  tidemark verify --vault /backup/vault sdb --live",
	}
	where := vaultFlag(cmd)
	socketFlag(cmd)
	cmd.Flags().BoolVar(&live, "live", false, "compare with the disks too, through the daemon")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		v, groups, err := groupsOf(cmd.Context(), *where, args)
		if err != nil {
			return err
		}
		reports := []timeline.Report{}
		bad := 0
		for _, g := range groups {
			bar := newProgress(cmd.ErrOrStderr(), "verifying "+g, asJSON)
			r, err := timeline.Verify(cmd.Context(), v, g, bar.Set)
			bar.Done()
			if err != nil {
				return err
			}
			r.Damage = list(r.Damage)
			reports = append(reports, r)
			bad += len(r.Damage)
		}
		disks := []api.LiveDisk{}
		if live {
			for _, g := range groups {
				d, err := dial(socketFlagOf(cmd)).VerifyLive(cmd.Context(), g)
				if err != nil {
					return err
				}
				disks = append(disks, d...)
			}
		}
		different := int64(0)
		for _, d := range disks {
			different += d.DifferentBytes
		}
		if asJSON {
			err = json.NewEncoder(cmd.OutOrStdout()).Encode(map[string]any{"groups": reports, "live": disks})
		} else {
			printReports(cmd, reports, disks)
		}
		switch {
		case err != nil:
			return err
		case bad > 0:
			return &api.Error{Code: api.CodeDamaged, Message: fmt.Sprintf("%d parts of the vault are damaged", bad), Remedy: "Points that do not need them can still be restored."}
		case different > 0:
			return &api.Error{Code: api.CodeDamaged, Message: fmt.Sprintf("the disks differ from the vault in %d bytes", different), Remedy: "Unprotect the group and protect it again: only what differs is copied."}
		}
		return nil
	}
	return cmd
}

func printReports(cmd *cobra.Command, reports []timeline.Report, disks []api.LiveDisk) {
	out := cmd.OutOrStdout()
	for _, r := range reports {
		if len(r.Damage) == 0 {
			fmt.Fprintf(out, "Group %s: %d segments, %s, all sound.\n", r.Group, r.Segments, formatSize(r.Bytes))
		}
		for _, d := range r.Damage {
			fmt.Fprintf(out, "Group %s: %s\n", r.Group, d)
		}
	}
	for _, d := range disks {
		switch {
		case d.DifferentBytes > 0:
			fmt.Fprintf(out, "Disk %s differs from position %d in %d bytes, first at %d.\n", d.Disk, d.Position, d.DifferentBytes, d.FirstDifferent)
		case !d.Settled:
			fmt.Fprintf(out, "Disk %s is equal to position %d but for blocks that never held still.\n", d.Disk, d.Position)
		default:
			fmt.Fprintf(out, "Disk %s is equal to position %d.\n", d.Disk, d.Position)
		}
	}
}
