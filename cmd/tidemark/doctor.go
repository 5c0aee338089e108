package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/spf13/cobra"

	"tidemark/internal/doctor"
	"tidemark/internal/vault"
)

// diagnosis is a contract: fields are added, never changed.
type diagnosis struct {
	Device *doctor.Report `json:"device,omitempty"`
	Checks []doctor.Check `json:"checks"`
	Pins   []doctor.Pin   `json:"pins"`
	Locks  []doctor.Lock  `json:"locks"`
	Fixes  []doctor.Fix   `json:"fixes"`
}

func newDoctor() *cobra.Command {
	var (
		asJSON, fix bool
		places      doctor.Places
	)
	cmd := &cobra.Command{
		Use:   "doctor [DEV]",
		Short: "Say what this machine can do for a disk, and why not the rest",
		Long: `Tries out what Tidemark needs and says for each way of protecting a disk whether it
can be had here, why not, and what to do about it. Also finds taps that nobody
owns any more, which --fix removes, and volumes left spliced with neither a daemon nor
a guard, to which --fix gives their own tables back.`,
		Example: "  tidemark doctor /dev/sdb\n  tidemark doctor --fix",
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := diagnose(cmd.Context(), args, places)
			if err != nil {
				return err
			}
			if fix {
				for _, f := range d.Fixes {
					if err := f.Apply(); err != nil {
						return fmt.Errorf("%s: %w", f.Action, err)
					}
					fmt.Fprintf(cmd.ErrOrStderr(), "Done: %s\n", f.Action)
				}
			}
			if asJSON {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(d)
			}
			printDiagnosis(cmd.OutOrStdout(), d, fix)
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().BoolVar(&fix, "fix", false, "remove what nobody owns any more")
	cmd.Flags().StringSliceVar(&places.States, "state", nil, "state folders of this machine's daemons (default "+doctor.DefaultState+")")
	cmd.Flags().StringSliceVar(&places.Vaults, "vault", nil, "vaults whose locks are to be looked at")
	return cmd
}

func diagnose(ctx context.Context, args []string, places doctor.Places) (d diagnosis, err error) {
	for _, state := range places.States { // the default one may be absent, and one that was named may not
		if _, err := os.Stat(state); err != nil {
			return d, fmt.Errorf("--state: %w", err)
		}
	}
	for i, where := range places.Vaults {
		v, err := vault.Open(ctx, where)
		if err != nil {
			return d, fmt.Errorf("--vault: %w", err)
		}
		places.Vaults[i] = v.Dir()
	}
	if len(args) == 1 {
		if d.Device, err = doctor.Device(args[0]); err != nil {
			return d, err
		}
		d.Checks = d.Device.Checks
	} else {
		d.Checks = doctor.Machine()
	}
	if d.Pins, err = doctor.Pins(places); err != nil {
		return d, err
	}
	if d.Locks, err = doctor.Locks(places); err != nil {
		return d, err
	}
	splices, err := doctor.SpliceFixes()
	d.Fixes = append(doctor.Fixes(places, d.Pins), splices...)
	d.Pins, d.Locks, d.Fixes = list(d.Pins), list(d.Locks), list(d.Fixes)
	return d, err
}

// list makes an empty list of none: in JSON it is one too.
func list[T any](s []T) []T {
	if s == nil {
		return []T{}
	}
	return s
}

func printDiagnosis(out io.Writer, d diagnosis, fixed bool) {
	if d.Device != nil {
		i := d.Device.Device
		fmt.Fprintf(out, "%s: %s, %s, %s\n", i.Path, i.Kind, formatSize(i.Size), i.Identity)
		var ways []table.Row
		for _, w := range d.Device.Ways {
			ways = append(ways, table.Row{w.Way, w.Answer, w.Reason, w.Remedy})
		}
		printTable(out, table.Row{"way in", "answer", "why not", "what to do"}, ways)
	}
	var checks []table.Row
	for _, c := range d.Checks {
		checks = append(checks, table.Row{c.What, c.Answer, c.Reason, c.Remedy})
	}
	printTable(out, table.Row{"this machine has", "answer", "why not", "what to do"}, checks)
	for _, p := range d.Pins {
		what := "tap"
		if p.Orphan {
			what = "orphaned tap"
		}
		fmt.Fprintf(out, "%s of group %s: %s\n", what, p.Group, p.Reason)
	}
	for _, l := range d.Locks {
		if l.Held {
			fmt.Fprintf(out, "lock %s: held by process %d (%s)\n", l.Path, l.PID, l.By)
		}
	}
	for _, f := range d.Fixes {
		if !fixed {
			fmt.Fprintf(out, "tidemark doctor --fix would: %s\n", f.Action)
		}
	}
}
