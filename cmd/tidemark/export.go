package main

import (
	"fmt"
	"log/slog"
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
Listens on a unix socket, on loopback, or with TLS on any address. With TLS every
client needs a certificate: DIR holds ca-cert.pem, server-cert.pem and
server-key.pem, as for qemu and libnbd.`,
		Example: `  tidemark export --vault /backup/vault sdb --at latest --nbd 'nbd+unix:///sdb?socket=/run/sdb.sock'
  tidemark export --vault /backup/vault sdb --at before-upgrade --nbd nbd://127.0.0.1:10809/sdb
  qemu-img convert nbd://127.0.0.1:10809/sdb sdb.qcow2
  tidemark export --vault /backup/vault sdb --at latest --nbd 'nbds://0.0.0.0/sdb?tls-certificates=/etc/tidemark/tls'`,
	}
	point := addPointFlags(cmd)
	cmd.Flags().StringVar(&uri, "nbd", "", "nbd://127.0.0.1:PORT/NAME, nbd+unix:///NAME?socket=PATH, or nbds:// or nbds+unix:// with &tls-certificates=DIR")
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
		l, err := nbd.Listen(uri)
		if err != nil {
			return err
		}
		defer l.Close()
		s := nbd.Server{Log: slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))}
		if err := s.Add(nbd.Export{Name: l.Export, Description: view.String(), Device: dev, ReadOnly: !writable, UndefinedReadsZero: true}); err != nil {
			return usageError{err}
		}
		fmt.Fprintf(cmd.OutOrStdout(), "Serving %s at %s; interrupt ends it.\n", view, l.URI)
		return s.Serve(cmd.Context(), l)
	}
	return cmd
}
