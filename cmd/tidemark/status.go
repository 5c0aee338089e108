package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/spf13/cobra"

	"tidemark/internal/control/api"
	"tidemark/internal/health"
)

func newStatus() *cobra.Command {
	var asJSON, watch bool
	cmd := &cobra.Command{
		Use:     "status [GROUP]",
		Short:   "Show what is protected, since when, and what is wrong",
		Example: "  tidemark status --watch\n  tidemark status db --json",
		RunE: func(cmd *cobra.Command, args []string) error {
			client, out := dial(socketFlagOf(cmd)), cmd.OutOrStdout()
			show := func(st api.Status) error {
				printStatus(out, st)
				if len(args) > 0 {
					printStats(out, st.Groups[0])
				}
				return nil
			}
			switch {
			case asJSON:
				show = func(st api.Status) error { return json.NewEncoder(out).Encode(st) }
			case watch:
				show = newScreen(out).show
			}
			if watch {
				return watchStatus(cmd.Context(), client, args, show, cmd.ErrOrStderr())
			}
			st, err := statusOf(cmd.Context(), client, args)
			if err != nil {
				return err
			}
			return show(st)
		},
	}
	socketFlag(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON (with --watch: a line a second)")
	cmd.Flags().BoolVar(&watch, "watch", false, "keep showing it until interrupted")
	return cmd
}

// statusOf asks for one group or all.
func statusOf(ctx context.Context, c *api.Client, args []string) (api.Status, error) {
	st, err := c.Status(ctx)
	if err != nil || len(args) == 0 {
		return st, err
	}
	g, err := groupIn(st, args[0])
	st.Groups = []api.Group{g}
	return st, err
}

func printStatus(out io.Writer, st api.Status) {
	if len(st.Groups) == 0 {
		fmt.Fprintln(out, "Nothing is protected. Begin with: tidemark protect --vault DIR DEV")
	}
	for _, g := range st.Groups {
		printGroup(out, g)
	}
	if len(st.Groups) > 1 {
		printTotals(out, &st.Totals)
	}
	printConditions(out, st.Conditions)
}

func printGroup(out io.Writer, g api.Group) {
	fmt.Fprintf(out, "%s: %s, %s mode, by %s\n", g.Name, g.State, g.Mode, g.WayIn)
	fmt.Fprintf(out, "  vault       %s\n", g.Vault)
	fmt.Fprintf(out, "  consistent  %s\n", consistency(g))
	fmt.Fprintf(out, "  captured    position %d, durable %d, lag %.1f s\n", g.CapturedPosition, g.DurablePosition, g.LagSeconds)
	fmt.Fprintf(out, "  queues      ring %s of %s, spool %s\n", formatSize(g.RingUsedBytes), formatSize(g.RingBytes), formatSize(g.SpoolBytes))
	var rows []table.Row
	for _, d := range g.Disks {
		rows = append(rows, table.Row{d.Name, d.Device, formatSize(d.SizeBytes), percent(d.GapBytes, d.SizeBytes), d.Writes, formatSize(int64(d.WrittenBytes)), d.LostWrites, d.FailedWrites, d.Identity})
	}
	printTable(out, table.Row{"disk", "device", "size", "to fill", "writes", "captured", "lost", "failed", "identity"}, rows)
	if len(g.Consumers) > 0 {
		rows = nil
		for _, c := range g.Consumers {
			rows = append(rows, consumerRow(c))
		}
		printTable(out, consumerHeader, rows)
	}
	printConditions(out, g.Conditions)
}

// consistency says since when every position of a group is a point.
func consistency(g api.Group) string {
	switch {
	case g.ConsistentSince != 0:
		return fmt.Sprintf("since position %d", g.ConsistentSince)
	case g.State == api.Offline:
		return "not known while the group is offline"
	default:
		return "not yet: a gap is being filled"
	}
}

func printConditions(out io.Writer, conditions []health.Condition) {
	for _, c := range conditions {
		fmt.Fprintf(out, "  %s %s: %s\n", c.Severity, c.Code, c.Detail)
		if c.Remedy != "" {
			fmt.Fprintf(out, "    %s\n", c.Remedy)
		}
	}
}

func percent(part, whole int64) string {
	if part == 0 || whole == 0 {
		return "-"
	}
	return fmt.Sprintf("%.1f%%", 100*float64(part)/float64(whole))
}
