package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"tidemark/internal/control/api"
	"tidemark/internal/stream"
)

// bookmarking are the flags of the verb.
type bookmarking struct {
	consistency, barrier string
	prepare              bool
	timeout              time.Duration
	commit, revoke       string
	pending, asJSON      bool
}

func newBookmark() *cobra.Command {
	var b bookmarking
	cmd := &cobra.Command{
		Use:   "bookmark [GROUP...] [NAME]",
		Short: "Name this moment in a group's history, or in several",
		Long: `Puts a bookmark over all disks of the group at one instant, or over those of
several groups: in all of them, or in none.

  crash        no pause; what a power cut at this instant would have left
  filesystem   every mounted file system of the groups is frozen for the instant
  application  hooks run before and after; each must succeed

A bookmark that cannot have what was asked fails; it is never weakened.

Over several groups tapped disks get one cut through their writes, without a pause
(barrier "cut"); new writes of served devices wait for the moment in which it is
made, and those under way have ended (barrier "held").

In two phases: with --prepare the mark is durable and no point yet; --commit makes
it a bookmark in all groups, --revoke takes it back, and so does the time that
--timeout gave. A daemon that is killed before the commit was decided revokes it
when it is back; one that was killed after that goes on with the commit.`,
		Example: "  tidemark bookmark sdb before-upgrade\n  tidemark bookmark db nightly --consistency filesystem\n" +
			"  tidemark bookmark --prepare --timeout 30s db web logs release-7\n  tidemark bookmark --commit release-7",
		RunE: func(cmd *cobra.Command, args []string) error {
			return b.run(cmd.Context(), cmd, args)
		},
	}
	socketFlag(cmd)
	f := cmd.Flags()
	f.StringVar(&b.consistency, "consistency", "crash", "crash, filesystem or application")
	f.StringVar(&b.barrier, "barrier", "auto", "cut, held (served devices only), or auto: held for served devices of several groups, cut elsewhere")
	f.BoolVar(&b.prepare, "prepare", false, "leave it without a verdict")
	f.DurationVar(&b.timeout, "timeout", time.Minute, "with --prepare: revoked by itself after this long")
	f.StringVar(&b.commit, "commit", "", "make the prepared mark of this name a bookmark")
	f.StringVar(&b.revoke, "revoke", "", "take the prepared mark of this name back")
	f.BoolVar(&b.pending, "pending", false, "list the marks that wait for a verdict")
	f.BoolVar(&b.asJSON, "json", false, "print JSON")
	return cmd
}

func (b *bookmarking) run(ctx context.Context, cmd *cobra.Command, args []string) error {
	client, out := dial(socketFlagOf(cmd)), cmd.OutOrStdout()
	if err := b.check(cmd, args); err != nil {
		return err
	}
	switch {
	case b.pending:
		all, err := client.Marks(ctx)
		return b.show(out, all, err, func() {
			for _, m := range all {
				printMark(out, m)
			}
		})
	case b.commit != "":
		m, err := client.CommitMark(ctx, b.commit)
		return b.show(out, m, err, func() { printMark(out, m) })
	case b.revoke != "":
		err := client.RevokeMark(ctx, b.revoke)
		return b.show(out, map[string]string{"bookmark": b.revoke, "state": "revoked"}, err, func() { fmt.Fprintf(out, "Mark %s is revoked.\n", b.revoke) })
	}
	groups, name := args[:len(args)-1], args[len(args)-1]
	var consistency stream.Consistency
	if err := consistency.UnmarshalText([]byte(b.consistency)); err != nil {
		return usageError{err}
	}
	if err := stream.CheckBookmarkName(name); err != nil {
		return usageError{err}
	}
	if err := b.noGroup(ctx, client, name); err != nil {
		return err
	}
	if len(groups) == 1 && !b.prepare && b.barrier != "held" {
		m, err := client.Bookmark(ctx, groups[0], api.BookmarkRequest{Name: name, Consistency: consistency})
		return b.show(out, m, err, func() {
			fmt.Fprintf(out, "Bookmark %s of group %s is at position %d (%s-consistent).\n", m.Name, m.Group, m.Position, m.Consistency)
		})
	}
	req := api.MarkGroupsRequest{Groups: groups, Name: name, Consistency: consistency, Prepare: b.prepare, TimeoutMillis: b.timeout.Milliseconds()}
	if b.barrier != "auto" {
		req.Barrier = b.barrier
	}
	m, err := client.MarkGroups(ctx, req)
	return b.show(out, m, err, func() { printMark(out, m) })
}

// noGroup refuses a name that is a group's: a list of groups whose name was
// forgotten would put a bookmark of that name into all of them but the last.
func (b *bookmarking) noGroup(ctx context.Context, client *api.Client, name string) error {
	status, err := client.Status(ctx)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(status.Groups, func(g api.Group) bool { return g.Name == name }) {
		return usageError{fmt.Errorf("NAME is missing: %q is a group\n  Remedy: give the bookmark's name after the groups; it may not be called as one of them", name)}
	}
	return nil
}

// check holds arguments and flags against one another.
func (b *bookmarking) check(cmd *cobra.Command, args []string) error {
	wrong := func(text string) error {
		return usageError{fmt.Errorf("%s\n  Usage: tidemark bookmark GROUP... NAME, or --commit, --revoke or --pending without them", text)}
	}
	verdicts := 0
	for _, is := range []bool{b.commit != "", b.revoke != "", b.pending} {
		if is {
			verdicts++
		}
	}
	switch {
	case verdicts > 1 || verdicts == 1 && b.prepare:
		return wrong("--prepare, --commit, --revoke and --pending exclude one another")
	case verdicts == 1 && len(args) > 0:
		return wrong(fmt.Sprintf("%q is one argument too many", args[0]))
	case verdicts == 1:
		return nil
	case len(args) == 0:
		return wrong("GROUP is missing")
	case len(args) == 1:
		return wrong("NAME is missing")
	case cmd.Flags().Changed("timeout") && !b.prepare:
		return wrong("--timeout needs --prepare")
	case b.prepare && b.timeout < time.Millisecond:
		return wrong("--timeout is too short")
	case cmp.Or(b.barrier, "auto") != "auto" && b.barrier != "cut" && b.barrier != "held":
		return wrong(fmt.Sprintf("--barrier %q: want auto, cut or held", b.barrier))
	}
	for _, a := range args {
		if a == "" {
			return usageError{errors.New("GROUP or NAME is empty")}
		}
	}
	return nil
}

// show prints an answer as JSON or by text.
func (b *bookmarking) show(out io.Writer, answer any, err error, text func()) error {
	if err != nil {
		return err
	}
	if b.asJSON {
		return json.NewEncoder(out).Encode(answer)
	}
	text()
	return nil
}

func printMark(out io.Writer, m api.Mark) {
	what, until := "Bookmark", ""
	if m.State == api.MarkPrepared {
		what, until = "Prepared mark", fmt.Sprintf(", until %s", m.Until.Local().Format(time.RFC3339))
	}
	fmt.Fprintf(out, "%s %s (%s-consistent%s):\n", what, m.Name, m.Consistency, until)
	for _, g := range m.Groups {
		fmt.Fprintf(out, "  %s at position %d, barrier %s\n", g.Group, g.Position, g.Barrier)
	}
	if m.HeldSeconds > 0 {
		fmt.Fprintf(out, "  new writes of served devices waited for %.1f ms\n", 1000*m.HeldSeconds)
	}
}
