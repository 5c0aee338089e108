package main

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/spf13/cobra"

	"tidemark/internal/control/api"
	"tidemark/internal/serve"
)

func newDevice() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "device",
		Short: "Serve a disk or image file as a device with filters in front of it",
		Long: `A served device stands in front of a disk or image file. Its requests pass through
filters: change tracking, snapshots, barriers, capture. It is a block device of
its own (/dev/tidemark/NAME), or an NBD server that needs no privileges.

A served device depends on its server, the daemon. The fronts differ in what
happens when the daemon ends:
  ublk        requests wait for the next daemon
  nbd         requests wait for the next daemon, for a bounded time
  loop        requests fail: whoever has it open sees I/O errors
  nbd-server  connections end; clients that reconnect go on`,
		Example: "  tidemark device create --backing /srv/disk.img --name data\n  tidemark device ls",
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newDeviceCreate(), newDeviceList(), newDeviceRemove(), newDeviceResize(), newDeviceFilters(), newDeviceSplice(), newDeviceUnsplice(), newDeviceWrite())
	return cmd
}

func newDeviceCreate() *cobra.Command {
	var req api.DeviceRequest
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "create --backing PATH",
		Short: "Make a served device and print its node",
		Long: `Makes a device that comes back whenever the daemon starts, and prints its node:
/dev/tidemark/NAME, or for nbd-server an NBD URI. The backing must not be in use.`,
		Example: `  tidemark device create --backing /dev/sdb --name data
  tidemark device create --backing disk.img --front nbd-server --listen nbd://127.0.0.1:10809/disk`,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if req.Backing, err = filepath.Abs(req.Backing); err != nil {
				return err
			}
			if req.Name == "" {
				if req.Name = nameFrom(req.Backing); req.Name == "" {
					return usageError{fmt.Errorf("no name can be made of %s: give one with --name", req.Backing)}
				}
			}
			d, err := dial(socketFlagOf(cmd)).CreateDevice(cmd.Context(), req)
			if err != nil {
				return err
			}
			if asJSON {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(d)
			}
			fmt.Fprintln(cmd.OutOrStdout(), d.Node)
			if d.Front == "loop" {
				fmt.Fprintln(cmd.ErrOrStderr(), "The loop front cannot outlive its server: when the daemon ends, whoever has the device open gets I/O errors.")
			}
			return nil
		},
	}
	socketFlag(cmd)
	f := cmd.Flags()
	f.StringVar(&req.Backing, "backing", "", "the disk or image file behind it")
	f.StringVar(&req.Name, "name", "", "its name (default: made of the backing's)")
	f.StringVar(&req.Front, "front", "auto", "how it is shown: auto, ublk, nbd, loop or nbd-server")
	f.StringVar(&req.Listen, "listen", "", "where nbd-server listens, an NBD URI (default: a unix socket in the state folder)")
	f.BoolVar(&req.ReadOnly, "read-only", false, "take no writes")
	f.BoolVar(&req.NoZeroCopy, "no-zero-copy", false, "ublk: copy data also where the kernel can do without")
	f.BoolVar(&asJSON, "json", false, "print JSON")
	_ = cmd.MarkFlagRequired("backing")
	_ = cmd.RegisterFlagCompletionFunc("front", cobra.FixedCompletions([]string{"auto", "ublk", "nbd", "loop", "nbd-server"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

var notInNames = regexp.MustCompile(`[^A-Za-z0-9._-]+`)

// nameFrom makes a device's name of a path, "" where nothing is left of it.
func nameFrom(path string) string {
	base := filepath.Base(path)
	base = strings.TrimSuffix(base, filepath.Ext(base))
	name := strings.Trim(notInNames.ReplaceAllString(base, "-"), "._-")
	return name[:min(len(name), 64)]
}

func newDeviceList() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:     "ls",
		Short:   "List the served devices",
		Example: "  tidemark device ls\n  tidemark device ls --json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			devices, err := dial(socketFlagOf(cmd)).Devices(cmd.Context())
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			if asJSON {
				return json.NewEncoder(out).Encode(devices)
			}
			if len(devices) == 0 {
				fmt.Fprintln(out, "No device is served. Begin with: tidemark device create --backing PATH")
				return nil
			}
			var rows []table.Row
			for _, d := range devices {
				state := "idle"
				switch {
				case d.Node == "":
					state = "offline"
				case d.Open:
					state = "open"
				}
				rows = append(rows, table.Row{d.Name, d.Front, state, formatSize(d.SizeBytes), d.Node, d.Backing})
			}
			printTable(out, table.Row{"NAME", "FRONT", "STATE", "SIZE", "NODE", "BACKING"}, rows)
			for _, d := range devices {
				printConditions(out, d.Conditions)
			}
			return nil
		},
	}
	socketFlag(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func newDeviceRemove() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "rm NAME",
		Short:   "Remove a served device; what is behind it stays",
		Example: "  tidemark device rm data",
		RunE: func(cmd *cobra.Command, args []string) error {
			return dial(socketFlagOf(cmd)).RemoveDevice(cmd.Context(), args[0])
		},
		ValidArgsFunction: completeDevices,
	}
	socketFlag(cmd)
	return cmd
}

func newDeviceResize() *cobra.Command {
	var text string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "resize NAME",
		Short: "Make a device as large as what is behind it",
		Long: `Tells the device's users how large its backing is by now. With --size a backing
file is made as large first. A device never becomes smaller.`,
		Example: "  tidemark device resize data --size 20G",
		RunE: func(cmd *cobra.Command, args []string) error {
			size, err := parseSize(text)
			if err != nil {
				return usageError{fmt.Errorf("--size: %w", err)}
			}
			d, err := dial(socketFlagOf(cmd)).ResizeDevice(cmd.Context(), args[0], api.ResizeRequest{SizeBytes: size})
			if err != nil {
				return err
			}
			if asJSON {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(d)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "Device %s has %s.\n", d.Name, formatSize(d.SizeBytes))
			return nil
		},
		ValidArgsFunction: completeDevices,
	}
	socketFlag(cmd)
	cmd.Flags().StringVar(&text, "size", "", "size for the backing file, which must be larger than it is")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func newDeviceSplice() *cobra.Command {
	var req api.SpliceRequest
	var asJSON bool
	var giveBack time.Duration
	cmd := &cobra.Command{
		Use:   "splice DM-DEVICE",
		Short: "Put a served device under an LVM volume that is in use",
		Long: `Leads a device-mapper device with a linear, striped or crypt table, an LVM volume for
example, through a served device: its table is swapped while it is in use, and
its users see a pause and no error. The volume keeps its name.

While the daemon is not there, requests of the volume wait for it. After --give-back
a small process that guards the volume gives it its own table back, and what is written
from then on is not seen; the next daemon says so (splice-given-back).`,
		Example: "  tidemark device splice /dev/vg/data\n  tidemark device splice /dev/vg/data --give-back 10m\n  tidemark device unsplice vg-data",
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			seconds := giveBack.Seconds()
			req.GiveBackSeconds = &seconds
			if req.Device, err = filepath.Abs(args[0]); err != nil {
				return err
			}
			d, err := dial(socketFlagOf(cmd)).Splice(cmd.Context(), req)
			if err != nil {
				return err
			}
			if asJSON {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(d)
			}
			fmt.Fprintln(cmd.OutOrStdout(), d.Name)
			return nil
		},
	}
	socketFlag(cmd)
	f := cmd.Flags()
	f.StringVar(&req.Name, "name", "", "name of the served device (default: the volume's)")
	f.StringVar(&req.Front, "front", "auto", "how it is shown: auto, ublk or nbd")
	f.DurationVar(&giveBack, "give-back", time.Minute, "give the volume its own table back after so long without a daemon; 0: never")
	f.BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func newDeviceUnsplice() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "unsplice NAME",
		Short:   "Give a spliced volume its own table back",
		Example: "  tidemark device unsplice vg-data",
		RunE: func(cmd *cobra.Command, args []string) error {
			return dial(socketFlagOf(cmd)).Unsplice(cmd.Context(), args[0])
		},
		ValidArgsFunction: completeDevices,
	}
	socketFlag(cmd)
	return cmd
}

// newDeviceHelper is what the daemon starts to touch a loop device, or a file system, that it serves itself.
func newDeviceHelper() *cobra.Command {
	return &cobra.Command{Use: "device-helper ACTION [ABOUT]", Hidden: true, RunE: func(_ *cobra.Command, args []string) error { return serve.HelperMain(args) }}
}

func completeDevices(cmd *cobra.Command, args []string, begun string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return completeFrom(cmd, begun, func(ctx context.Context, c *api.Client) (names []string, err error) {
		devices, err := c.Devices(ctx)
		for _, d := range devices {
			names = append(names, d.Name)
		}
		return names, err
	})
}
