package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"tidemark/internal/block"
	"tidemark/internal/mount"
	"tidemark/internal/overlay"
	"tidemark/internal/vault"
)

// mountSpec tells the serving process which view to open.
type mountSpec struct {
	Vault, Group, Disk, At string
}

func newMount() *cobra.Command {
	var o mount.Options
	cmd := &cobra.Command{
		Use:   "mount --vault URL GROUP --at POINT DIR",
		Short: "Mount a disk as it was at a point",
		Long: `Shows the file system of a disk as it was at a point below DIR. The file system's
journal is replayed into scratch space, which umount throws away; the vault is
never changed. It returns when the tree is there. umount ends it.`,
		Example: "  tidemark mount --vault /backup/vault sdb --at before-upgrade /mnt\n  umount /mnt",
	}
	point := addPointFlags(cmd)
	f := cmd.Flags()
	f.IntVar(&o.Partition, "partition", 0, "number of the partition, where the disk has a partition table")
	f.BoolVar(&o.Writable, "writable", false, "let the tree be changed; changes are thrown away by umount")
	f.StringVar(&o.Scratch, "scratch", "", "folder for changes (default: the system's for temporary files)")
	f.StringVarP(&o.Data, "options", "o", "", "options for the file system, as mount -o takes them")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		view, err := point.open(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		defer view.Close()
		where, err := vault.Folder(*point.vault)
		if err != nil {
			return err
		}
		self, err := os.Executable()
		if err != nil {
			return err
		}
		// The position, not the name: "latest" must not move on in between.
		spec := mountSpec{Vault: where, Group: view.group, Disk: view.disk, At: fmt.Sprintf("seq:%d", view.point.Position)}
		if o.Spec, err = json.Marshal(spec); err != nil {
			return err
		}
		o.Server, o.Visible = []string{self, "mount-serve"}, []string{where}
		if err := mount.Mount(cmd.Context(), view, args[1], o); err != nil {
			return err
		}
		fmt.Fprintf(cmd.OutOrStdout(), "Mounted %s at %s; umount ends it.\n", view, args[1])
		return nil
	}
	return cmd
}

// newMountServe is what mount starts in the background.
func newMountServe() *cobra.Command {
	return &cobra.Command{
		Use: "mount-serve", Hidden: true,
		RunE: func(*cobra.Command, []string) error { return mount.ServeMain(openSpec, scratchOver) },
	}
}

func openSpec(ctx context.Context, raw json.RawMessage) (block.Device, error) {
	var s mountSpec
	if err := json.Unmarshal(raw, &s); err != nil {
		return nil, err
	}
	return (&pointFlags{vault: &s.Vault, disk: s.Disk, at: s.At}).open(ctx, s.Group)
}

// scratch is an overlay that owns its file, which has no name any more.
type scratch struct {
	*overlay.Overlay
	file *os.File
}

func (s *scratch) Close() error { return s.file.Close() }

func scratchOver(view block.Device, dir string) (block.Device, error) {
	f, err := os.CreateTemp(dir, "tidemark-scratch-")
	if err != nil {
		return nil, err
	}
	o, err := overlay.New(view, f)
	if err := errors.Join(err, os.Remove(f.Name())); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &scratch{o, f}, nil
}
