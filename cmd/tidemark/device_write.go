package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"tidemark/internal/control/api"
	"tidemark/internal/front/nbd"
)

// clientWait is how long an NBD server may take for one request.
const clientWait = time.Minute

// newDeviceWrite is for demonstrations and scripts on machines without an NBD client.
func newDeviceWrite() *cobra.Command {
	var offset string
	cmd := &cobra.Command{
		Use:   "write NAME",
		Short: "Write standard input to a served device",
		Long: `Writes standard input to a served device, as any client of it does, and makes it
stable. It stands in for qemu-io or nbdcopy where there is neither.`,
		Example: "  tidemark device write data --offset 1M < part",
		Hidden:  true,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			at, err := parseSize(offset)
			if err != nil {
				return usageError{fmt.Errorf("--offset: %w", err)}
			}
			devices, err := dial(socketFlagOf(cmd)).Devices(cmd.Context())
			if err != nil {
				return err
			}
			for _, d := range devices {
				if d.Name == args[0] {
					return copyTo(d.Node, at, cmd.InOrStdin())
				}
			}
			return &api.Error{Code: api.CodeNotFound, Message: fmt.Sprintf("no device %q", args[0]), Remedy: "tidemark device ls lists the devices."}
		},
	}
	socketFlag(cmd)
	cmd.Flags().StringVar(&offset, "offset", "", "where to begin (default 0)")
	return cmd
}

// copyTo writes everything from r to a block device or NBD export.
func copyTo(node string, at int64, r io.Reader) (err error) {
	var to interface {
		io.WriterAt
		io.Closer
	}
	var flush func() error
	if strings.Contains(node, "://") {
		c, err := nbd.Dial(node, clientWait)
		if err != nil {
			return err
		}
		to, flush = c, c.Flush
	} else {
		f, err := os.OpenFile(node, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		to, flush = f, f.Sync
	}
	defer func() { err = errors.Join(err, to.Close()) }()
	buf := make([]byte, 1<<20)
	for {
		n, failed := io.ReadFull(r, buf)
		if n > 0 {
			if _, err := to.WriteAt(buf[:n], at); err != nil {
				return err
			}
			at += int64(n)
		}
		switch {
		case errors.Is(failed, io.EOF), errors.Is(failed, io.ErrUnexpectedEOF):
			return flush()
		case failed != nil:
			return failed
		}
	}
}
