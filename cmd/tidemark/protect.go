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

	"github.com/spf13/cobra"

	"tidemark/internal/control/api"
	"tidemark/internal/vault"
)

func newProtect() *cobra.Command {
	var (
		req                  api.ProtectRequest
		wait, asJSON         bool
		ring, segment, spool string
		rate                 string
		seal                 time.Duration
	)
	cmd := &cobra.Command{
		Use:   "protect --vault URL DEV...",
		Short: "Protect live disks, or served devices, as one group",
		Long: `Taps the disks, mounted or not, keeps every write to them in order, and copies
what they hold now. Disks of one group share one order: a point of the group is
one instant over all of them. The vault is made if the folder is absent or empty.

A device that Tidemark serves (tidemark device ls) is named by its name or by what
device create printed. Its writes are captured by a filter in its stack, which
needs neither root nor eBPF. A group is of disks or of served devices, not of both.

Where the vault already holds a history of the same disks under this name, the
history goes on: only what differs is copied.`,
		Example: `  tidemark protect --vault /backup/vault --wait /dev/sdb
  tidemark protect --vault /backup/vault --name db /dev/vg/data /dev/vg/log
  tidemark protect --vault /backup/vault --back-pressure --wait data`,
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, size := range []struct {
				flag, text string
				into       *int64
			}{{"ring-size", ring, &req.RingBytes}, {"segment-size", segment, &req.SegmentBytes}, {"spool-size", spool, &req.SpoolBytes}, {"fill-rate", rate, &req.FillRate}} {
				n, err := parseSize(size.text)
				if err != nil {
					return usageError{fmt.Errorf("--%s: %w", size.flag, err)}
				}
				*size.into = n
			}
			if cmd.Flags().Changed("seal-every") && seal < time.Millisecond {
				return usageError{fmt.Errorf("--seal-every: %v: want 10ms to 1m", seal)}
			}
			req.SealMillis = seal.Milliseconds()
			var err error
			if req.HookDir, err = hookFolder(req.HookDir); err != nil {
				return usageError{err}
			}
			if req.Vault, err = vault.Folder(req.Vault); err != nil {
				return err
			}
			for _, dev := range args {
				if strings.ContainsRune(dev, '/') && !strings.Contains(dev, "://") {
					if dev, err = filepath.Abs(dev); err != nil {
						return err
					}
				}
				req.Devices = append(req.Devices, dev)
			}
			client := dial(socketFlagOf(cmd))
			g, err := client.Protect(cmd.Context(), req)
			if err != nil && cmd.Context().Err() != nil {
				return interrupted{"the daemon takes back what it had begun; tidemark status tells"}
			}
			if err != nil {
				return err
			}
			if wait {
				if g, err = waitProtected(cmd.Context(), client, g.Name, cmd.ErrOrStderr(), asJSON); err != nil {
					return err
				}
			}
			if asJSON {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(g)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "Group %s is %s.\n", g.Name, g.State)
			return nil
		},
	}
	socketFlag(cmd)
	f := cmd.Flags()
	f.StringVar(&req.Vault, "vault", "", "where the history is kept: a folder, or a file:// URL")
	f.StringVar(&req.Name, "name", "", "the group's name (default: the disk's, where there is one disk)")
	f.BoolVar(&wait, "wait", false, "return when the group is consistent and durable in the vault")
	f.StringVar(&ring, "ring-size", "", "memory that holds writes until they are stable, a power of two (default 128M)")
	f.StringVar(&segment, "segment-size", "", "seal a segment when it holds this much (default 8M)")
	f.DurationVar(&seal, "seal-every", 0, "seal a segment when its first record is this old (default 1s)")
	f.StringVar(&spool, "spool-size", "", "bound of the local queue in front of the vault (default 4G)")
	f.StringVar(&rate, "fill-rate", "", "bound on reading the disks while filling, bytes a second (default 400M)")
	f.StringVar(&req.HookDir, "hook-dir", "", "folder of executables run with freeze and thaw around consistent bookmarks")
	f.BoolVar(&req.BackPressure, "back-pressure", false, "a write waits for room in the ring (20s at most) instead of becoming a gap; served devices only")
	f.BoolVar(&req.Force, "force", false, "accept shared disks and cluster file systems")
	f.BoolVar(&req.MetadataOnly, "metadata-only", false, "keep ranges, never payloads, in the capture")
	f.BoolVar(&asJSON, "json", false, "print JSON")
	_ = cmd.MarkFlagRequired("vault")
	_ = f.MarkHidden("metadata-only")
	return cmd
}

// hookFolder makes the folder's name absolute, as the daemon has a working directory of its own.
func hookFolder(dir string) (string, error) {
	if dir == "" {
		return "", nil
	}
	if st, err := os.Stat(dir); err != nil || !st.IsDir() {
		return "", fmt.Errorf("--hook-dir: %s is not a folder", dir)
	}
	return filepath.Abs(dir)
}

func socketFlagOf(cmd *cobra.Command) *string {
	s, _ := cmd.Flags().GetString("socket")
	return &s
}

// answerWithin bounds one question to the daemon while something is waited for:
// a daemon that hangs is told of, and asked again.
const answerWithin = 15 * time.Second

// waitProtected follows a group until its newest position is a point that the
// vault holds. It says what it waits for.
func waitProtected(ctx context.Context, c *api.Client, name string, progress io.Writer, asJSON bool) (api.Group, error) {
	bar := newProgress(progress, "filling", asJSON)
	defer bar.Done()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	var w waiting
	for {
		asked, cancel := context.WithTimeout(ctx, answerWithin)
		g, err := groupStatus(asked, c, name)
		silent := err != nil && asked.Err() != nil && ctx.Err() == nil
		cancel()
		switch {
		case ctx.Err() != nil:
			return g, interrupted{fmt.Sprintf("group %s is protected and goes on being copied; tidemark status --watch shows it", name)}
		case silent:
			bar.Note([]string{fmt.Sprintf("the daemon has not answered for %v", answerWithin)})
			continue
		case err != nil:
			return g, err
		}
		size, gap := sizeAndGap(g)
		bar.Set(size-gap, size)
		reasons := holdups(g)
		if len(reasons) == 0 {
			return g, nil
		}
		for _, c := range g.Conditions {
			if c.Severity == "error" && g.State == api.Offline {
				return g, &api.Error{Code: api.CodeRefused, Message: fmt.Sprintf("group %s is offline: %s", name, c.Detail), Remedy: c.Remedy}
			}
		}
		if w.due(time.Now(), reasons) {
			bar.Note(reasons)
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
}

func groupStatus(ctx context.Context, c *api.Client, name string) (api.Group, error) {
	st, err := c.Status(ctx)
	if err != nil {
		return api.Group{}, err
	}
	return groupIn(st, name)
}

func groupIn(st api.Status, name string) (api.Group, error) {
	for _, g := range st.Groups {
		if g.Name == name {
			return g, nil
		}
	}
	return api.Group{}, &api.Error{Code: api.CodeNotFound, Message: fmt.Sprintf("no group %q", name), Remedy: "tidemark status lists the groups."}
}
