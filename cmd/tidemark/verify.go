package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"

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
daemon also compares the vault with the disks of the groups that it protects.`,
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
		var unseen error // of the disks; what was found in the vault is told all the same
		if live {
			disks, unseen = compareLive(cmd.Context(), dial(socketFlagOf(cmd)), v.Dir(), groups, len(args) > 0)
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
		var damage error
		switch {
		case bad > 0:
			damage = &api.Error{Code: api.CodeDamaged, Message: fmt.Sprintf("%d parts of the vault are damaged", bad), Remedy: "Points that do not need them can still be restored."}
		case different > 0:
			damage = &api.Error{Code: api.CodeDamaged, Message: fmt.Sprintf("the disks differ from the vault in %d bytes", different), Remedy: "Unprotect the group and protect it again: only what differs is copied."}
		}
		return errors.Join(err, damage, unseen)
	}
	return cmd
}

// compareLive has the daemon compare groups with their disks, and gives what was
// compared before something failed. A group that was not named and that nobody
// protects here is left out. One that the daemon protects into another vault is
// not compared: that would say nothing of this one.
func compareLive(ctx context.Context, client *api.Client, where string, groups []string, named bool) ([]api.LiveDisk, error) {
	disks := []api.LiveDisk{}
	st, err := client.Status(ctx)
	if err != nil {
		return disks, err
	}
	for _, name := range groups {
		at := slices.IndexFunc(st.Groups, func(g api.Group) bool { return g.Name == name })
		if at < 0 && !named {
			continue
		}
		if at >= 0 && !sameFolder(st.Groups[at].Vault, where) {
			other := st.Groups[at].Vault
			return disks, &api.Error{Code: api.CodeRefused, Message: fmt.Sprintf("group %s is protected into %s, not into %s", name, other, where), Remedy: "Give --vault " + other + ", or leave --live out."}
		}
		d, err := client.VerifyLive(ctx, name)
		if err != nil {
			return disks, err
		}
		disks = append(disks, d...)
	}
	if len(disks) == 0 {
		return disks, &api.Error{Code: api.CodeNotFound, Message: "none of the vault's groups is protected here: there is no disk to compare it with", Remedy: "Leave --live out, or ask the daemon that protects them."}
	}
	return disks, nil
}

// sameFolder says whether two names lead to one folder.
func sameFolder(a, b string) bool {
	x, err1 := os.Stat(a)
	y, err2 := os.Stat(b)
	return err1 == nil && err2 == nil && os.SameFile(x, y)
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
