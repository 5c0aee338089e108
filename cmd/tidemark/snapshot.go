package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/spf13/cobra"

	"tidemark/internal/control/api"
)

func newSnapshot() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "snapshot",
		Short: "Copy-on-write snapshots of served devices",
		Long: `A snapshot keeps what several served devices held at one instant, while they go on
being written to: what is overwritten is copied to difference storage first.
Storage that is full spoils the snapshot, never a write to its devices.`,
		Example: `  id=$(tidemark snapshot create --storage /var/diff:4G data log)
  tidemark snapshot take $id
  tidemark snapshot images $id
  tidemark snapshot destroy $id`,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newSnapshotCreate(), newSnapshotTake(), newSnapshotList(), newSnapshotImages(), newSnapshotAppend(), newSnapshotEvents(), newSnapshotCopy(), newSnapshotDestroy())
	return cmd
}

func newSnapshotCreate() *cobra.Command {
	var req api.SnapshotRequest
	var storage []string
	var chunk string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "create --storage PATH[:LIMIT] DEV...",
		Short: "Prepare a snapshot and print its id",
		Long: `Prepares a snapshot of served devices and prints its id. Storage is a file, made
where it is absent, which grows up to LIMIT, or a device. Give --storage several times for more.`,
		Example: "  tidemark snapshot create --storage /var/diff:4G data\n  tidemark snapshot create --storage /dev/sdd --durable data log",
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if req.ChunkBytes, err = parseSize(chunk); err != nil {
				return usageError{fmt.Errorf("--chunk: %w", err)}
			}
			for _, text := range storage {
				s, err := parseStorage(text)
				if err != nil {
					return usageError{err}
				}
				req.Storage = append(req.Storage, s)
			}
			req.Devices = args
			s, err := dial(socketFlagOf(cmd)).CreateSnapshot(cmd.Context(), req)
			if err != nil {
				return err
			}
			return printID(cmd.OutOrStdout(), s, asJSON)
		},
	}
	socketFlag(cmd)
	f := cmd.Flags()
	f.StringArrayVar(&storage, "storage", nil, "file or device for what is overwritten, with the most that it may take (K, M, G; 1M at least)")
	f.StringVar(&chunk, "chunk", "", "unit of copying, a power of two from 4K (default 64K)")
	f.BoolVar(&req.Durable, "durable", false, "survive power loss: a first write waits until the old data is stored")
	f.BoolVar(&asJSON, "json", false, "print JSON")
	_ = cmd.MarkFlagRequired("storage")
	return cmd
}

func printID(out io.Writer, s api.Snapshot, asJSON bool) error {
	if asJSON {
		return json.NewEncoder(out).Encode(s)
	}
	_, err := fmt.Fprintln(out, s.ID)
	return err
}

// storageMin is the smallest limit, in bytes.
const storageMin = 1 << 20

// parseStorage reads PATH[:LIMIT]. What follows the last colon of the last part of
// the path is a limit, unless all of it is the path of something that exists, as
// those in /dev/disk/by-path with their colons are.
func parseStorage(text string) (s api.StorageSpec, err error) {
	s.Path = text
	i := strings.LastIndexByte(text, ':')
	if _, absent := os.Lstat(text); absent != nil && i > strings.LastIndexByte(text, '/') {
		s.Path = text[:i]
		if s.Limit, err = parseSize(text[i+1:]); err != nil || s.Limit < storageMin {
			return s, fmt.Errorf("difference storage %q: %q is not a limit: want one from 1M, with K, M, G or T behind it", text, text[i+1:])
		}
	}
	if s.Path == "" {
		return s, fmt.Errorf("difference storage %q: want PATH or PATH:LIMIT", text)
	}
	s.Path, err = filepath.Abs(s.Path)
	return s, err
}

// quietly ends a verb that prints nothing but, where it is asked to, JSON.
func quietly(cmd *cobra.Command, s api.Snapshot, err error, asJSON bool) error {
	if err != nil || !asJSON {
		return err
	}
	return json.NewEncoder(cmd.OutOrStdout()).Encode(s)
}

func newSnapshotTake() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "take ID",
		Short: "Take a prepared snapshot: now",
		Long: `One instant over all its devices: their file systems are frozen together, requests
held, change maps switched, and all let go again.`,
		Example: "  tidemark snapshot take 5f3a",
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := dial(socketFlagOf(cmd)).TakeSnapshot(cmd.Context(), args[0])
			return quietly(cmd, s, err, asJSON)
		},
		ValidArgsFunction: completeSnapshots,
	}
	socketFlag(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func newSnapshotList() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:     "ls",
		Short:   "List the snapshots",
		Example: "  tidemark snapshot ls",
		RunE: func(cmd *cobra.Command, _ []string) error {
			all, err := dial(socketFlagOf(cmd)).Snapshots(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(all)
			}
			if len(all) == 0 {
				fmt.Fprintln(cmd.OutOrStdout(), "There is no snapshot. Begin with: tidemark snapshot create --storage FILE:LIMIT DEV")
				return nil
			}
			var rows []table.Row
			for _, s := range all {
				var devices []string
				for _, d := range s.Devices {
					devices = append(devices, d.Device)
				}
				taken := ""
				if !s.Taken.IsZero() {
					taken = s.Taken.Local().Format(time.DateTime)
				}
				rows = append(rows, table.Row{s.ID, s.State, taken, strings.Join(devices, " "),
					fmt.Sprintf("%s of %s", formatSize(s.Storage.Used), formatSize(s.Storage.Limit))})
			}
			printTable(cmd.OutOrStdout(), table.Row{"ID", "STATE", "TAKEN", "DEVICES", "STORAGE"}, rows)
			for _, s := range all {
				printConditions(cmd.OutOrStdout(), s.Conditions)
			}
			return nil
		},
	}
	socketFlag(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func newSnapshotImages() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:     "images ID",
		Short:   "Print a line DEVICE IMAGE for each device of a taken snapshot",
		Example: "  tidemark snapshot images 5f3a | while read device image; do mount -o ro $image /mnt; done",
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := findSnapshot(cmd, args[0])
			if err != nil {
				return err
			}
			if asJSON {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(s.Devices)
			}
			for _, d := range s.Devices {
				if d.Image == "" && s.State != "created" {
					return &api.Error{Code: api.CodeRefused, Message: fmt.Sprintf("the image of %s is not there%s", d.Device, because(d.Spoiled)), Remedy: "tidemark status says why; start the daemon again, or destroy the snapshot."}
				}
				if d.Image == "" {
					return &api.Error{Code: api.CodeRefused, Message: "snapshot " + s.ID + " has not been taken", Remedy: "tidemark snapshot take " + s.ID}
				}
				fmt.Fprintln(cmd.OutOrStdout(), d.Device, d.Image)
			}
			return nil
		},
		ValidArgsFunction: completeSnapshots,
	}
	socketFlag(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func because(why string) string {
	if why == "" {
		return ""
	}
	return ": " + why
}

func findSnapshot(cmd *cobra.Command, id string) (api.Snapshot, error) {
	all, err := dial(socketFlagOf(cmd)).Snapshots(cmd.Context())
	for _, s := range all {
		if s.ID == id {
			return s, nil
		}
	}
	if err != nil {
		return api.Snapshot{}, err
	}
	return api.Snapshot{}, &api.Error{Code: api.CodeNotFound, Message: fmt.Sprintf("no snapshot %q", id), Remedy: "tidemark snapshot ls lists them."}
}

func newSnapshotAppend() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:     "append ID PATH[:LIMIT]",
		Short:   "Give a snapshot more difference storage",
		Example: "  tidemark snapshot append 5f3a /var/more:2G",
		RunE: func(cmd *cobra.Command, args []string) error {
			spec, err := parseStorage(args[1])
			if err != nil {
				return usageError{err}
			}
			s, err := dial(socketFlagOf(cmd)).AppendStorage(cmd.Context(), args[0], spec)
			return quietly(cmd, s, err, asJSON)
		},
		ValidArgsFunction: completeSnapshots,
	}
	socketFlag(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func newSnapshotEvents() *cobra.Command {
	var follow, asJSON bool
	cmd := &cobra.Command{
		Use:   "events ID",
		Short: "Print what happened to a snapshot: low-space, overflow, corrupt",
		Long: `Prints the events that there are and ends; with --follow it goes on until it is
interrupted or the snapshot is destroyed.`,
		Example: "  tidemark snapshot events 5f3a --follow --json",
		RunE: func(cmd *cobra.Command, args []string) error {
			client, out := dial(socketFlagOf(cmd)), cmd.OutOrStdout()
			after, wait := uint64(0), time.Duration(0)
			for {
				events, err := client.SnapshotEvents(cmd.Context(), args[0], after, wait)
				switch {
				case follow && wait > 0 && (cmd.Context().Err() != nil || api.CodeOf(err) == api.CodeNotFound):
					return nil
				case err != nil:
					return err
				}
				for _, e := range events {
					after = e.Sequence
					if asJSON {
						if err := json.NewEncoder(out).Encode(e); err != nil {
							return err
						}
						continue
					}
					fmt.Fprintf(out, "%s %s %s %s\n", e.Time.Format(time.RFC3339), e.Kind, e.Device, e.Detail)
				}
				if !follow {
					return nil
				}
				wait = 20 * time.Second
			}
		},
		ValidArgsFunction: completeSnapshots,
	}
	socketFlag(cmd)
	cmd.Flags().BoolVar(&follow, "follow", false, "go on printing as they happen")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON, a line an event")
	return cmd
}

func newSnapshotDestroy() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "destroy ID",
		Short: "End a snapshot, its images and its storage",
		Long: `Ends a snapshot at once, also while its images are open or mounted: they give
errors from then on. Files that were made for it are removed.`,
		Example: "  tidemark snapshot destroy 5f3a",
		RunE: func(cmd *cobra.Command, args []string) error {
			return dial(socketFlagOf(cmd)).DestroySnapshot(cmd.Context(), args[0])
		},
		ValidArgsFunction: completeSnapshots,
	}
	socketFlag(cmd)
	return cmd
}

func completeSnapshots(cmd *cobra.Command, args []string, begun string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveDefault
	}
	return completeFrom(cmd, begun, func(ctx context.Context, c *api.Client) (names []string, err error) {
		all, err := c.Snapshots(ctx)
		for _, s := range all {
			names = append(names, s.ID)
		}
		return names, err
	})
}
