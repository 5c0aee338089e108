package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"tidemark/internal/block"
	"tidemark/internal/stream"
	"tidemark/internal/timeline"
	"tidemark/internal/vault"
)

// vaultFlag adds --vault to a verb that works straight on a vault.
func vaultFlag(cmd *cobra.Command) *string {
	v := cmd.Flags().String("vault", "", "the vault: a folder, or a file:// URL")
	_ = cmd.MarkFlagRequired("vault")
	return v
}

// groupsOf opens a vault and gives the group that was asked for, or all.
func groupsOf(ctx context.Context, where string, args []string) (*vault.Vault, []string, error) {
	v, err := vault.Open(ctx, where)
	if err != nil {
		return nil, nil, err
	}
	if len(args) > 0 {
		_, err := v.Segments(ctx, args[0])
		return v, args[:1], err
	}
	groups, err := v.Groups(ctx)
	return v, groups, err
}

// pointFlags are how a verb is told which disk at which point.
type pointFlags struct {
	vault    *string
	disk, at string
	fuzzy    bool // a point inside a gap will do
}

func addPointFlags(cmd *cobra.Command) *pointFlags {
	p := &pointFlags{vault: vaultFlag(cmd)}
	cmd.Flags().StringVar(&p.disk, "disk", "", "which disk of the group (may be left out where there is one)")
	cmd.Flags().StringVar(&p.at, "at", "", "latest, a bookmark's name, an RFC 3339 time, or seq:N")
	_ = cmd.MarkFlagRequired("at")
	return p
}

// opened is a view with what people want to be told of it.
type opened struct {
	*timeline.View
	vault *vault.Vault
	group string
	id    [16]byte // of the group: two vaults may know one by the same name
	disk  string
	point timeline.Point
	// uncertain may be something else than the disk held then: nothing, unless
	// the point lies inside a gap.
	uncertain []block.Range
}

// open finds the point and opens the disk at it.
func (p *pointFlags) open(ctx context.Context, group string) (*opened, error) {
	spec, err := stream.ParseSpec(p.at)
	if err != nil {
		return nil, usageError{err}
	}
	v, err := vault.Open(ctx, *p.vault)
	if err != nil {
		return nil, err
	}
	h, err := timeline.Load(ctx, v, group)
	if err != nil {
		return nil, err
	}
	resolve, look := h.Resolve, h.View
	if p.fuzzy {
		resolve, look = h.ResolveFuzzy, h.ViewFuzzy
	}
	point, err := resolve(spec)
	if err != nil {
		return nil, err
	}
	disk, err := h.Disk(p.disk)
	if err != nil {
		return nil, err
	}
	uncertain, err := h.Fuzzy(ctx, disk, point.Position)
	if err != nil {
		return nil, err
	}
	view, err := look(ctx, disk, point.Position)
	if err != nil {
		return nil, err
	}
	return &opened{View: view, vault: v, group: group, id: h.GroupID(), disk: h.Disks()[disk].Name, point: point, uncertain: uncertain}, nil
}

// consistent says whether the point lies inside a stretch.
func (o *opened) consistent() bool { return o.point.Stretch != 0 }

func (o *opened) String() string {
	return fmt.Sprintf("disk %s of group %s at position %d (%s)", o.disk, o.group, o.point.Position, o.point.Time.Format("2006-01-02 15:04:05.000 MST"))
}
