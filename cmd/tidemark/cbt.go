package main

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/spf13/cobra"

	"tidemark/internal/control/api"
)

func newCBT() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cbt",
		Short: "Read what changed on a device since a snapshot",
		Long: `Changed-block tracking. A served device has a map of its blocks with the number of
the snapshot after which each was last changed. Numbers belong to a generation;
where continuity is lost a new one begins, and only a full copy will do.

A tapped disk has a map too, GROUP/DISK: what changed since the tap began.`,
		Example: "  tidemark cbt ls\n  tidemark cbt read data --since 6f1c...:3 --json",
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newCBTList(), newCBTRead(), newCBTMark(), newCBTReset())
	return cmd
}

func newCBTList() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:     "ls",
		Short:   "List the change maps",
		Example: "  tidemark cbt ls",
		RunE: func(cmd *cobra.Command, _ []string) error {
			maps, err := dial(socketFlagOf(cmd)).ChangeMaps(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(maps)
			}
			if len(maps) == 0 {
				fmt.Fprintln(cmd.OutOrStdout(), "Nothing is tracked: no device is served, no disk is tapped.")
				return nil
			}
			var rows []table.Row
			for _, m := range maps {
				rows = append(rows, table.Row{m.Name, m.WayIn, formatSize(m.SizeBytes), formatSize(m.BlockSize), m.Generation, m.Snapshot})
			}
			printTable(cmd.OutOrStdout(), table.Row{"MAP", "WAY IN", "SIZE", "BLOCK", "GENERATION", "SNAPSHOT"}, rows)
			return nil
		},
	}
	socketFlag(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func newCBTRead() *cobra.Command {
	var req api.ChangesRequest
	var since string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "read MAP",
		Short: "Print what changed, as ranges of bytes",
		Long: `Prints "OFFSET LENGTH" for every range that changed after the snapshot --since, up
to the newest snapshot or, with --live, up to now. Without --since: all that
changed in the generation up to the newest snapshot.

Where it is not known any more what changed since then it ends with exit code 11:
take a full copy.`,
		Example: "  tidemark cbt read data --since 6f1c9a0b3d5e7f2846c8e0a2b4d6f801:3\n  tidemark cbt read db/sdb --json",
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if req.Generation, req.Since, err = parseSince(since); err != nil {
				return usageError{err}
			}
			c, err := dial(socketFlagOf(cmd)).Changes(cmd.Context(), args[0], req)
			if err != nil {
				return err
			}
			if asJSON {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(c)
			}
			for _, e := range c.Extents {
				fmt.Fprintln(cmd.OutOrStdout(), e.Offset, e.Length)
			}
			return nil
		},
	}
	socketFlag(cmd)
	f := cmd.Flags()
	f.StringVar(&since, "since", "", "GENERATION:N, as cbt ls and snapshots name them")
	f.BoolVar(&req.Live, "live", false, "up to now, not to the newest snapshot")
	f.BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// parseSince reads GENERATION:N; "" is neither.
func parseSince(text string) (generation string, number uint8, err error) {
	if text == "" {
		return "", 0, nil
	}
	generation, digits, ok := strings.Cut(text, ":")
	n, err := strconv.ParseUint(digits, 10, 8)
	if !ok || err != nil || generation == "" || n == 0 {
		return "", 0, fmt.Errorf("--since %q: want GENERATION:N with N from 1 to 255", text)
	}
	return generation, uint8(n), nil
}

func newCBTMark() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "mark MAP OFFSET:LENGTH...",
		Short:   "Mark ranges as changed that no write told of",
		Example: "  tidemark cbt mark data 0:1M 4G:64K",
		RunE: func(cmd *cobra.Command, args []string) error {
			var req api.MarkRequest
			for _, text := range args[1:] {
				r, err := parseByteRange(text)
				if err != nil {
					return usageError{err}
				}
				req.Ranges = append(req.Ranges, r)
			}
			return dial(socketFlagOf(cmd)).MarkChanged(cmd.Context(), args[0], req)
		},
	}
	socketFlag(cmd)
	return cmd
}

// parseByteRange reads OFFSET:LENGTH, both as sizes; an offset may be 0.
func parseByteRange(text string) (r api.ByteRange, err error) {
	offset, length, ok := strings.Cut(text, ":")
	if ok && offset != "0" {
		r.Offset, err = parseSize(offset)
	}
	if ok && err == nil && length != "" {
		r.Length, err = parseSize(length)
	}
	if !ok || err != nil || r.Length == 0 || offset == "" {
		return r, fmt.Errorf("%q is not a range: want OFFSET:LENGTH in bytes, with K, M, G or T behind each if you like", text)
	}
	return r, nil
}

func newCBTReset() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "reset MAP",
		Short: "Begin a new generation",
		Long: `Forgets what changed: the next copy is a full one. Do it after a backing was written
to behind the server's back.`,
		Example: "  tidemark cbt reset data",
		RunE: func(cmd *cobra.Command, args []string) error {
			return dial(socketFlagOf(cmd)).ResetChanges(cmd.Context(), args[0])
		},
	}
	socketFlag(cmd)
	return cmd
}
