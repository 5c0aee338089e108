package main

import (
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"

	"tidemark/internal/disk"
	"tidemark/internal/restore"
	"tidemark/internal/tap"
)

func newRestore() *cobra.Command {
	var (
		to            string
		force, asJSON bool
	)
	cmd := &cobra.Command{
		Use:   "restore --vault URL GROUP --at POINT --to PATH",
		Short: "Write a disk as it was at a point to a disk or file",
		Long: `Writes the disk to a block device, or to a sparse file that it makes, and reads it
back. An interrupted restore goes on where it was when it is called again. Needs
no daemon. A target that is mounted, in use, protected or too small is refused
always; one that is not empty, without --force.`,
		Example: `  tidemark restore --vault /backup/vault sdb --at before-upgrade --to /dev/sdc
  tidemark restore --vault /backup/vault sdb --at 2026-11-20T10:32:05Z --to sdb.img`,
	}
	point := addPointFlags(cmd)
	cmd.Flags().StringVar(&to, "to", "", "block device or file to write")
	cmd.Flags().BoolVar(&force, "force", false, "overwrite a target that is not empty")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON, and progress as JSON lines on standard error")
	_ = cmd.MarkFlagRequired("to")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		view, err := point.open(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		defer view.Close()
		bar := newProgress(cmd.ErrOrStderr(), "restoring", asJSON)
		report, err := restore.Write(cmd.Context(), view, to, restore.Options{
			Force: force, Protected: protectedBy, Vault: view.vault.Dir(),
			Identity: fmt.Sprintf("%x %s %s %d", view.id, view.group, view.disk, view.point.Position),
			Progress: func(p restore.Progress) { bar.Set(p.Verified, p.Total) },
		})
		bar.Done()
		if err != nil {
			return err
		}
		if asJSON {
			return json.NewEncoder(cmd.OutOrStdout()).Encode(struct {
				Group    string `json:"group"`
				Disk     string `json:"disk"`
				Position uint64 `json:"position"`
				restore.Report
			}{view.group, view.disk, uint64(view.point.Position), report})
		}
		fmt.Fprintf(cmd.OutOrStdout(), "Restored %s to %s: %s, read back and compared.\n", view, to, formatSize(report.Size))
		return nil
	}
	return cmd
}

// protectedBy looks for a tap on a device in the pins, so that it needs no daemon.
func protectedBy(path string) (string, bool) {
	i, err := disk.Inspect(path)
	if err != nil {
		return "", false
	}
	pins, err := tap.Pinned()
	if err != nil {
		return "", false
	}
	for _, p := range pins {
		for _, t := range p.Targets {
			if t.DiskSeq != 0 && t.DiskSeq != i.DiskSeq {
				continue // that disk is gone, and its number has a new owner
			}
			if t.Whole == i.WholeDev && t.Start < i.Start+i.Size && i.Start < t.Start+t.Len {
				return p.Group, true
			}
		}
	}
	return "", false
}
