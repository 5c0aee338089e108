package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"tidemark/internal/block"
	"tidemark/internal/front/nbd"
)

func newExport() *cobra.Command {
	var (
		uri, dir string
		writable bool
	)
	cmd := &cobra.Command{
		Use:   "export --vault URL GROUP --at POINT --nbd URI",
		Short: "Serve a disk as it was at a point over NBD",
		Long: `Serves the disk to NBD clients (qemu, nbdcopy, nbd-client) until it is interrupted.
It is read-only, or with --writable takes changes that are thrown away at the end.
Listens on a unix socket or on loopback.`,
		Example: `  tidemark export --vault /backup/vault sdb --at latest --nbd 'nbd+unix:///sdb?socket=/run/sdb.sock'
  tidemark export --vault /backup/vault sdb --at before-upgrade --nbd nbd://127.0.0.1:10809/sdb
  qemu-img convert nbd://127.0.0.1:10809/sdb sdb.qcow2`,
	}
	point := addPointFlags(cmd)
	cmd.Flags().StringVar(&uri, "nbd", "", "nbd://127.0.0.1:PORT/NAME or nbd+unix:///NAME?socket=PATH")
	cmd.Flags().BoolVar(&writable, "writable", false, "take changes, and throw them away at the end")
	cmd.Flags().StringVar(&dir, "scratch", os.TempDir(), "folder for changes")
	_ = cmd.MarkFlagRequired("nbd")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		view, err := point.open(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		defer view.Close()
		var dev block.Device = view
		if writable {
			if dev, err = scratchOver(view, dir); err != nil {
				return err
			}
			defer dev.(*scratch).Close()
		}
		l, name, err := nbd.Listen(uri)
		if err != nil {
			return err
		}
		fmt.Fprintf(cmd.OutOrStdout(), "Serving %s at %s; interrupt ends it.\n", view, uri)
		s := nbd.Server{Exports: []nbd.Export{{Name: name, Description: view.String(), Device: dev, ReadOnly: !writable}}}
		return s.Serve(cmd.Context(), l)
	}
	return cmd
}
