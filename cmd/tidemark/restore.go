package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"tidemark/internal/block"
	"tidemark/internal/disk"
	"tidemark/internal/restore"
	"tidemark/internal/tap"
	"tidemark/internal/timeline"
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
always; one that is not empty, without --force. A point inside a gap is refused
without --fuzzy: with it the best known content is written, and the ranges that
may have held something else are listed.`,
		Example: `  tidemark restore --vault /backup/vault sdb --at before-upgrade --to /dev/sdc
  tidemark restore --vault /backup/vault sdb --at 2026-11-20T10:32:05Z --to sdb.img`,
	}
	point := addPointFlags(cmd)
	cmd.Flags().StringVar(&to, "to", "", "block device or file to write")
	cmd.Flags().BoolVar(&force, "force", false, "overwrite a target that is not empty")
	cmd.Flags().BoolVar(&point.fuzzy, "fuzzy", false, "take a point inside a gap too: parts of it are uncertain")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON, and progress as JSON lines on standard error")
	_ = cmd.MarkFlagRequired("to")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		view, err := point.open(cmd.Context(), args[0])
		if errors.Is(err, timeline.ErrInsideGap) {
			return fmt.Errorf("%w; --fuzzy restores the best known content, and lists what is uncertain", err)
		}
		if err != nil {
			return err
		}
		defer view.Close()
		bar := newProgress(cmd.ErrOrStderr(), "restoring", asJSON)
		report, err := restore.Write(cmd.Context(), view, to, restore.Options{
			Force: force, Protected: protectedBy, Vault: view.vault.Dir(),
			Identity: fmt.Sprintf("%x %s %s %d fuzzy %t", view.id, view.group, view.disk, view.point.Position, !view.consistent()),
			Progress: func(p restore.Progress) { bar.Set(p.Verified, p.Total) },
		})
		bar.Done()
		if errors.Is(err, restore.ErrInterrupted) {
			return interrupted{"the same command goes on where it was"}
		}
		if err != nil {
			return err
		}
		if asJSON {
			return json.NewEncoder(cmd.OutOrStdout()).Encode(restored{view.group, view.disk, uint64(view.point.Position), report, view.consistent(), ranges(view.uncertain)})
		}
		fmt.Fprintf(cmd.OutOrStdout(), "Restored %s to %s: %s, read back and compared.\n", view, to, formatSize(report.Size))
		if !view.consistent() {
			printUncertain(cmd.OutOrStdout(), view.uncertain)
		}
		return nil
	}
	return cmd
}

// restored is a contract: fields are added, never changed.
type restored struct {
	Group    string `json:"group"`
	Disk     string `json:"disk"`
	Position uint64 `json:"position"`
	restore.Report
	Consistent bool          `json:"consistent"`
	Uncertain  []block.Range `json:"uncertain"` // bytes; none where it is consistent
}

func ranges(r []block.Range) []block.Range {
	if r == nil {
		return []block.Range{}
	}
	return r
}

// uncertainLines bounds how many ranges are printed; --json has all.
const uncertainLines = 20

// printUncertain says what may be something else than the disk held.
func printUncertain(out io.Writer, uncertain []block.Range) {
	total := int64(0)
	for _, r := range uncertain {
		total += r.Len
	}
	if total == 0 {
		fmt.Fprintln(out, "NOT CONSISTENT: the point lies inside a gap. All of this disk is known, but the group as a whole is not: use it with care.")
		return
	}
	fmt.Fprintf(out, "NOT CONSISTENT: the point lies inside a gap. %d bytes are uncertain: they may be older or newer than the rest, or zero where nothing is known:\n", total)
	for i, r := range uncertain {
		if i == uncertainLines {
			fmt.Fprintf(out, "  and %d more ranges (--json lists all)\n", len(uncertain)-i)
			return
		}
		fmt.Fprintf(out, "  bytes %d to %d (%s)\n", r.Off, r.End()-1, formatSize(r.Len))
	}
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
