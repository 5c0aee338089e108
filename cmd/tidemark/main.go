// Command tidemark protects block devices continuously and gives any of them
// back as it was at any bookmark or moment. Each verb has a file of its own.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"tidemark/internal/freeze"
	"tidemark/internal/serve"
)

// version is set at link time.
var version = "devel"

func main() {
	if freeze.IsWatchdog() { // before anything that a watchdog must not do
		os.Exit(freeze.WatchdogMain())
	}
	if serve.IsGuard() {
		os.Exit(serve.GuardMain())
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	go func() {
		<-ctx.Done()
		stop() // who signals again does not want to wait
	}()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// run executes one command line and returns its exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := newRoot()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	code := exitCode(ctx, err)
	if code == exitInterrupted && errors.Is(err, context.Canceled) {
		err = interruption(err)
	}
	if errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0 && !strings.Contains(err.Error(), "Run as root") {
		err = fmt.Errorf("%w%s", err, "\n  Run as root.")
	}
	if slices.Contains(args, "--json") {
		_ = json.NewEncoder(stderr).Encode(map[string]any{"message_type": "exit_error", "code": code, "message": err.Error()})
	} else {
		fmt.Fprintf(stderr, "tidemark: %v\n", err)
	}
	return code
}

// interrupted is what a verb wants to be said when a signal ends it.
type interrupted struct{ hint string }

func (i interrupted) Error() string { return "interrupted: " + i.hint }
func (i interrupted) Unwrap() error { return context.Canceled }

// interruption leaves out in the middle of what the signal came.
func interruption(err error) error {
	var i interrupted
	if errors.As(err, &i) {
		return i
	}
	return errors.New("interrupted")
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "tidemark",
		Short: "Continuous protection of block devices, without a kernel module",
		Long: `Tidemark sees every write to the disks it protects, keeps an ordered history of
them in a vault, and gives any disk back as it was at any bookmark or moment.

A first round trip:
  tidemark daemon &
  tidemark protect --vault /backup/vault --wait /dev/sdb
  tidemark bookmark sdb before-upgrade
  tidemark points --vault /backup/vault
  tidemark restore --vault /backup/vault sdb --at before-upgrade --to /dev/sdc`,
		Version:       version,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          unknownVerb,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cmd.Help()
		},
		SuggestionsMinimumDistance: 2,
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w\n  See: %s --help", err, cmd.CommandPath())}
	})
	root.AddCommand(newDaemon(), newProtect(), newUnprotect(), newStatus(), newBookmark(), newPoints(),
		newRestore(), newExport(), newMount(), newVerify(), newDoctor(), newDevice(), newCBT(), newSnapshot(), newDrain(), newMan(), newMountServe(), newDeviceHelper())
	for _, c := range allCommands(root) {
		c.Args, c.PreRunE, c.DisableFlagsInUseLine = checkArguments, checkFlags, true
		if want := positionals(c.Use); len(want) > 0 && strings.Trim(want[0], "[.]") == "GROUP" {
			c.ValidArgsFunction = completeGroups
		}
	}
	addHelpers(root)
	arrange(root)
	return root
}

// arrange puts the verbs under headings, and gives those with verbs below them
// the same answer to a word that is none.
func arrange(root *cobra.Command) {
	for _, heading := range []struct{ id, title, verbs string }{
		{"protect", "Protect live disks:", "daemon protect unprotect status bookmark drain doctor"},
		{"recover", "Recover, straight from a vault:", "points restore export mount verify"},
		{"serve", "Serve devices:", "device cbt snapshot"},
	} {
		root.AddGroup(&cobra.Group{ID: heading.id, Title: heading.title})
		for _, c := range root.Commands() {
			if slices.Contains(strings.Fields(heading.verbs), c.Name()) {
				c.GroupID = heading.id
			}
		}
	}
	for _, c := range root.Commands() {
		if c.HasSubCommands() && c.Name() != "completion" {
			c.Args, c.SuggestionsMinimumDistance = unknownVerb, root.SuggestionsMinimumDistance
		}
	}
}

// allCommands are the verbs and the verbs below them.
func allCommands(of *cobra.Command) (out []*cobra.Command) {
	for _, c := range of.Commands() {
		out = append(append(out, c), allCommands(c)...)
	}
	return out
}
