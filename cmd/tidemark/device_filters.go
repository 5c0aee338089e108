package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/spf13/cobra"

	"tidemark/internal/control/api"
)

func newDeviceFilters() *cobra.Command {
	var attach, detach string
	var force, asJSON bool
	cmd := &cobra.Command{
		Use:   "filters NAME",
		Short: "List, attach and detach the filters of a live device",
		Long: `Lists the filters of a device, highest altitude first. With --attach or --detach one
comes or goes first, while the device is in use: its requests see no error.

A device has barrier, cow and track, which snapshots and change maps need, and capture
while it is protected. One that failed and was taken out (filter-lost) is put back with
--attach. Two more are for trials, and gone when the daemon ends:
  delay=DURATION         each request waits so long
  error[=OFFSET:LENGTH]  requests that touch the range fail, or all of them

What would spoil a snapshot or a change map, or fail requests of a device that is open,
is refused without --force.`,
		Example: "  tidemark device filters data\n  tidemark device filters data --attach track\n  tidemark device filters data --attach delay=10ms\n  tidemark device filters data --detach delay",
		RunE: func(cmd *cobra.Command, args []string) error {
			req, err := parseFilters(attach, detach)
			if err != nil {
				return usageError{err}
			}
			req.Force = force
			filters, err := changeFilters(cmd.Context(), dial(socketFlagOf(cmd)), args[0], req)
			if err != nil {
				return err
			}
			if asJSON {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(filters)
			}
			var rows []table.Row
			for _, f := range filters {
				rows = append(rows, table.Row{f.Altitude, f.Name})
			}
			printTable(cmd.OutOrStdout(), table.Row{"ALTITUDE", "FILTER"}, rows)
			return nil
		},
		ValidArgsFunction: completeDevices,
	}
	socketFlag(cmd)
	f := cmd.Flags()
	f.StringVar(&attach, "attach", "", "put a filter over the device")
	f.StringVar(&detach, "detach", "", "take a filter off the device")
	f.BoolVar(&force, "force", false, "though it spoils something")
	f.BoolVar(&asJSON, "json", false, "print JSON")
	_ = cmd.RegisterFlagCompletionFunc("attach", cobra.FixedCompletions([]string{"barrier", "cow", "track", "capture", "delay=", "error"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// parseFilters reads what is to be attached or detached.
func parseFilters(attach, detach string) (req api.FilterRequest, err error) {
	if attach != "" && detach != "" {
		return req, errors.New("--attach and --detach: want one of them at a time")
	}
	name, setting, set := strings.Cut(attach, "=")
	req.Attach, req.Detach = name, detach
	switch {
	case name == "delay":
		d, err := time.ParseDuration(setting)
		if err != nil || d <= 0 {
			return req, fmt.Errorf("--attach %q: want delay=DURATION, as in delay=10ms", attach)
		}
		req.DelaySeconds = d.Seconds()
	case name == "error" && set:
		r, err := parseByteRange(setting)
		if err != nil {
			return req, fmt.Errorf("--attach %q: %w", attach, err)
		}
		req.Range = &r
	case set:
		return req, fmt.Errorf("--attach %q: only delay and error take a setting", attach)
	}
	return req, nil
}

// changeFilters does what is asked for, and gives the filters that the device has then.
func changeFilters(ctx context.Context, c *api.Client, name string, req api.FilterRequest) ([]api.Filter, error) {
	if req.Attach != "" || req.Detach != "" {
		d, err := c.ChangeFilters(ctx, name, req)
		return d.Filters, err
	}
	devices, err := c.Devices(ctx)
	if err != nil {
		return nil, err
	}
	for _, d := range devices {
		if d.Name == name {
			return d.Filters, nil
		}
	}
	return nil, &api.Error{Code: api.CodeNotFound, Message: fmt.Sprintf("no device %q", name), Remedy: "tidemark device ls lists the devices."}
}
