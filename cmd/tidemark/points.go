package main

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/spf13/cobra"

	"tidemark/internal/stream"
	"tidemark/internal/timeline"
)

// pointRow is a contract: fields are added, never changed.
type pointRow struct {
	Group       string             `json:"group"`
	Position    stream.Position    `json:"position"`
	Time        time.Time          `json:"time"`
	Bookmark    string             `json:"bookmark"`
	Consistency stream.Consistency `json:"consistency"`
	Stretch     int                `json:"stretch"`
}

func newPoints() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "points --vault URL [GROUP]",
		Short: "List the moments that can be recovered",
		Long: `Lists every bookmark, and the first and last position of each stretch: an unbroken
run of positions. Every position in between can be recovered too, as seq:N, and
every moment by its time. Needs no daemon.`,
		Example: "  tidemark points --vault /backup/vault sdb",
	}
	where := vaultFlag(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON array")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		v, groups, err := groupsOf(cmd.Context(), *where, args)
		if err != nil {
			return err
		}
		rows := []pointRow{}
		var damage error
		for _, g := range groups {
			h, err := timeline.Load(cmd.Context(), v, g)
			if err != nil {
				return err
			}
			if d := h.Damage(); d != nil {
				damage = d
			}
			for _, p := range h.Points() {
				rows = append(rows, pointRow{Group: g, Position: p.Position, Time: p.Time, Bookmark: p.Bookmark, Consistency: p.Consistency, Stretch: p.Stretch})
			}
		}
		if asJSON {
			err = json.NewEncoder(cmd.OutOrStdout()).Encode(rows)
		} else {
			printPoints(cmd, rows)
		}
		if err == nil {
			err = damage
		}
		return err
	}
	return cmd
}

func printPoints(cmd *cobra.Command, rows []pointRow) {
	if len(rows) == 0 {
		fmt.Fprintln(cmd.OutOrStdout(), "There is no consistent point yet.")
		return
	}
	var lines []table.Row
	for _, r := range rows {
		lines = append(lines, table.Row{r.Group, r.Stretch, r.Position, r.Time.Format(time.RFC3339Nano), r.Bookmark, r.Consistency})
	}
	printTable(cmd.OutOrStdout(), table.Row{"group", "stretch", "position", "time", "bookmark", "consistency"}, lines)
}
