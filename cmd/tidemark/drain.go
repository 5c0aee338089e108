package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/spf13/cobra"

	"tidemark/internal/batch"
	"tidemark/internal/block"
	"tidemark/internal/control/api"
)

func newDrain() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "drain",
		Short: "Hand a group's writes and bookmarks to a program that keeps a copy",
		Long: `A consumer is a named reader of a group. It gets batches: writes in order, a bookmark
on its own, or content that its copy lacks. It gets the same batch until it commits
it, also after a crash of either side. A consumer never holds the protection back:
what the spool no longer has comes from the vault.

docs/drain.md tells more; the Go package "client" does all of it.`,
		Example: `  tidemark drain next db copy --to batch.bin --json
  tidemark drain commit db copy 1
  tidemark drain wait db copy --timeout 1m --bytes 4M`,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newDrainNext(), newDrainCommit(), newDrainWait(), newDrainClear(), newDrainList(), newDrainRemove())
	return cmd
}

// nextFlags are those of drain next.
type nextFlags struct {
	req    api.DrainRequest
	size   string
	to     string
	wait   time.Duration
	asJSON bool
}

func newDrainNext() *cobra.Command {
	var n nextFlags
	cmd := &cobra.Command{
		Use:   "next GROUP CONSUMER",
		Short: "Give the consumer's next batch, the same until it is committed",
		Long: `Makes the consumer where there is none of this name. Its copy is empty then, and the
first batches bring all of the disks; with --from POINT it is that point already, as
restore or export made it.

The batch goes to --to FILE, or to standard output in the form of
docs/formats/batch.md; a terminal gets a table. With --json its header and its
records are lines of JSON, without payload.

Where nothing is pending it ends with exit code 12.`,
		Example: `  tidemark drain next db copy --to batch.bin
  tidemark drain next db copy --after 7 --to batch8.bin
  tidemark drain next db copy --disk sdb --from before-upgrade --wait 1m --json`,
		RunE: func(cmd *cobra.Command, args []string) error { return n.run(cmd, args[0], args[1]) },
	}
	socketFlag(cmd)
	f := cmd.Flags()
	f.Uint64Var(&n.req.After, "after", 0, "the batch behind this one, which is not committed yet: several can be outstanding")
	f.StringVar(&n.req.From, "from", "", "of a new consumer: empty, or the point that its copy is")
	f.StringVar(&n.req.Disk, "disk", "", "of a new consumer: this disk only")
	f.StringVar(&n.size, "batch-size", "", "of a new consumer: most payload of a batch (default 8M)")
	f.BoolVar(&n.req.Ranges, "ranges", false, "of a new consumer: while a gap is open, tell what to read from the disk meanwhile")
	f.DurationVar(&n.wait, "wait", 0, "wait so long until something is pending")
	f.StringVar(&n.to, "to", "", "write the batch to this file (-: standard output)")
	f.BoolVar(&n.asJSON, "json", false, "print header and records as lines of JSON")
	return cmd
}

func (n *nextFlags) run(cmd *cobra.Command, group, consumer string) error {
	c, ctx := dial(socketFlagOf(cmd)), cmd.Context()
	out := cmd.OutOrStdout()
	toOut := n.to == "-" || n.to == "" && !n.asJSON && terminalWidth(out) == 0
	var err error
	if n.req.BatchBytes, err = parseSize(n.size); err != nil {
		return usageError{fmt.Errorf("--batch-size: %w", err)}
	}
	switch {
	case n.wait < 0:
		return usageError{fmt.Errorf("--wait %s: want 0 or more", n.wait)}
	case toOut && n.asJSON:
		return usageError{errors.New("--json and the batch itself cannot both go to standard output: give --to FILE")}
	}
	if n.to != "" && n.to != "-" {
		if err := canHold(n.to); err != nil { // before a consumer is made
			return fmt.Errorf("--to: %w", err)
		}
	}
	raw, err := n.fetch(ctx, c, group, consumer)
	if err != nil {
		return err
	}
	b, err := batch.Read(bytes.NewReader(raw)) // nobody gets what is not whole
	if err != nil {
		return err
	}
	switch {
	case toOut:
		_, err = out.Write(raw)
		return err
	case n.to != "":
		if err := writeWhole(n.to, raw); err != nil {
			return fmt.Errorf("the batch was not written, and comes again: %w", err)
		}
	}
	if n.asJSON {
		return printBatchJSON(out, b)
	}
	printBatch(out, b, n.to == "")
	return nil
}

// fetch asks for the batch, and waits for it if it may.
func (n *nextFlags) fetch(ctx context.Context, c *api.Client, group, consumer string) ([]byte, error) {
	until := time.Now().Add(n.wait)
	for {
		body, err := c.DrainNext(ctx, group, consumer, n.req)
		if err == nil {
			defer body.Close()
			return io.ReadAll(body)
		}
		left := time.Until(until)
		if api.CodeOf(err) != api.CodeNothing || left <= 0 {
			return nil, err
		}
		if _, err := c.DrainWait(ctx, group, consumer, api.DrainWait{After: n.req.After, TimeoutMillis: min(left, api.WaitMax).Milliseconds() + 1}); err != nil {
			return nil, err
		}
	}
}

// opNames are what records do, as people and programs read it.
var opNames = map[block.Op]string{block.OpRead: "read", block.OpWrite: "write", block.OpZeroes: "zeroes", block.OpDiscard: "discard"}

func printBatchJSON(out io.Writer, b *batch.Batch) error {
	enc := json.NewEncoder(out)
	head := map[string]any{"message_type": "batch", "number": b.Number, "kind": b.Kind.String(), "consistent": b.Consistent, "from": b.From, "to": b.To,
		"time": time.Unix(0, b.Time).UTC(), "group": b.Group, "consumer": b.Consumer, "records": len(b.Records)}
	if b.Kind == batch.Bookmark {
		head["bookmark"], head["consistency"] = b.Bookmark, b.Consistency
	}
	if err := enc.Encode(head); err != nil {
		return err
	}
	for _, r := range b.Records {
		line := map[string]any{"message_type": "record", "disk": b.Disks[r.Disk].Name, "op": opNames[r.Op], "offset": r.Range.Off, "length": r.Range.Len}
		if r.Position != 0 {
			line["position"], line["time"] = r.Position, time.Unix(0, r.Time).UTC()
		}
		if err := enc.Encode(line); err != nil {
			return err
		}
	}
	return nil
}

func printBatch(out io.Writer, b *batch.Batch, records bool) {
	fmt.Fprintf(out, "Batch %d of consumer %s: %s, from position %d to %d", b.Number, b.Consumer, b.Kind, b.From, b.To)
	if b.Kind == batch.Bookmark {
		fmt.Fprintf(out, ": %s (%s-consistent)", b.Bookmark, b.Consistency)
	}
	if !b.Consistent {
		fmt.Fprint(out, "; the copy is not right before a later one")
	}
	fmt.Fprintln(out)
	if !records || len(b.Records) == 0 {
		return
	}
	var rows []table.Row
	for _, r := range b.Records {
		rows = append(rows, table.Row{b.Disks[r.Disk].Name, opNames[r.Op], r.Range.Off, r.Range.Len, r.Position})
	}
	printTable(out, table.Row{"disk", "op", "offset", "length", "position"}, rows)
}

func newDrainCommit() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "commit GROUP CONSUMER NUMBER",
		Short: "Say that the consumer has everything up to a batch for good",
		Long: `The batches up to NUMBER are not given again. Only a batch that was given can be
committed: anything else ends with exit code 13, and changes nothing.`,
		Example: "  tidemark drain commit db copy 7",
		RunE: func(cmd *cobra.Command, args []string) error {
			n, err := strconv.ParseUint(args[2], 10, 64)
			if err != nil || n == 0 {
				return usageError{fmt.Errorf("%q is no batch's number: they count from 1", args[2])}
			}
			return dial(socketFlagOf(cmd)).DrainCommit(cmd.Context(), args[0], args[1], api.DrainCommit{Number: n})
		},
	}
	socketFlag(cmd)
	return cmd
}

func newDrainWait() *cobra.Command {
	var (
		req     api.DrainWait
		timeout time.Duration
		size    string
		wake    bool
		asJSON  bool
	)
	cmd := &cobra.Command{
		Use:   "wait GROUP [CONSUMER]",
		Short: "Wait until so much is pending for a consumer",
		Long: `Returns when --bytes of payload are pending, or a bookmark is; without --bytes, when
anything is. It also returns when somebody wakes it, and when the group is
unprotected. When the time-out passes it ends with exit code 12.

With --wake it ends every wait of the group's consumers instead.`,
		Example: "  tidemark drain wait db copy --timeout 65s --bytes 4M\n  tidemark drain wait db --wake",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, ctx := dial(socketFlagOf(cmd)), cmd.Context()
			switch {
			case wake:
				return c.DrainWake(ctx, args[0])
			case len(args) < 2:
				return usageError{errors.New("CONSUMER is missing")}
			}
			var err error
			if req.Bytes, err = parseSize(size); err != nil {
				return usageError{fmt.Errorf("--bytes: %w", err)}
			}
			req.TimeoutMillis = timeout.Milliseconds()
			p, err := c.DrainWait(ctx, args[0], args[1], req)
			if err != nil {
				return err
			}
			if asJSON {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(p)
			}
			what := fmt.Sprintf("%s are pending", formatSize(p.Bytes))
			if p.Bookmark {
				what += ", and a bookmark"
			}
			if p.Woken {
				what = "Woken"
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s.\n", what)
			return nil
		},
	}
	socketFlag(cmd)
	f := cmd.Flags()
	f.DurationVar(&timeout, "timeout", time.Minute, "how long to wait")
	f.StringVar(&size, "bytes", "", "until so much payload is pending")
	f.Uint64Var(&req.After, "after", 0, "behind this batch, which is not committed yet")
	f.BoolVar(&wake, "wake", false, "end every wait of the group's consumers")
	f.BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func newDrainClear() *cobra.Command {
	var req api.DrainClear
	cmd := &cobra.Command{
		Use:   "clear GROUP CONSUMER",
		Short: "Drop what is pending for a consumer",
		Long: `The consumer goes to the newest settled position. What it was to get comes as one
fill, without order and without bookmarks; status says so until it has it. With
--skip not even that comes: the consumer makes its copy right by itself, from a point
at or behind the position that drain ls then shows.

Batches that were given and not committed cannot be committed any more.`,
		Example: "  tidemark drain clear db copy",
		RunE: func(cmd *cobra.Command, args []string) error {
			return dial(socketFlagOf(cmd)).DrainClear(cmd.Context(), args[0], args[1], req)
		},
	}
	socketFlag(cmd)
	cmd.Flags().BoolVar(&req.Skip, "skip", false, "no fill either: the copy is made right by other means")
	return cmd
}

func newDrainList() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:     "ls [GROUP]",
		Short:   "List the consumers",
		Example: "  tidemark drain ls\n  tidemark drain ls db --json",
		RunE: func(cmd *cobra.Command, args []string) error {
			st, err := statusOf(cmd.Context(), dial(socketFlagOf(cmd)), args)
			if err != nil {
				return err
			}
			type row struct {
				Group string `json:"group"`
				api.Consumer
			}
			all := []row{}
			for _, g := range st.Groups {
				for _, c := range g.Consumers {
					all = append(all, row{g.Name, c})
				}
			}
			if asJSON {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(all)
			}
			if len(all) == 0 {
				fmt.Fprintln(cmd.OutOrStdout(), "There is no consumer. Begin with: tidemark drain next GROUP CONSUMER")
				return nil
			}
			var rows []table.Row
			for _, r := range all {
				rows = append(rows, append(table.Row{r.Group}, consumerRow(r.Consumer)...))
			}
			printTable(cmd.OutOrStdout(), append(table.Row{"group"}, consumerHeader...), rows)
			return nil
		},
	}
	socketFlag(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

var consumerHeader = table.Row{"consumer", "disk", "position", "behind", "pending", "lag", "committed", "outstanding", "state"}

func consumerRow(c api.Consumer) table.Row {
	state := "follows"
	switch {
	case c.Error != "":
		state = c.Error
	case c.Cleared:
		state = "needs a fill: it was cleared"
	case c.NeedsFill:
		state = "needs a fill"
	}
	disk := c.Disk
	if disk == "" {
		disk = "all"
	}
	pending := "-"
	if c.PendingBytes != nil {
		pending = formatSize(*c.PendingBytes)
	}
	return table.Row{c.Name, disk, c.Position, c.Behind, pending, fmt.Sprintf("%.1f s", c.LagSeconds), c.Committed, c.Outstanding, state}
}

func newDrainRemove() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:     "rm GROUP CONSUMER",
		Short:   "Forget a consumer",
		Long:    "Refused while something is pending for it, unless --force.",
		Example: "  tidemark drain rm db copy",
		RunE: func(cmd *cobra.Command, args []string) error {
			return dial(socketFlagOf(cmd)).RemoveConsumer(cmd.Context(), args[0], args[1], force)
		},
	}
	socketFlag(cmd)
	cmd.Flags().BoolVar(&force, "force", false, "also where something is pending, or its state is damaged")
	return cmd
}

// completeConsumers offers a group's.
func completeConsumers(cmd *cobra.Command, group, begun string) ([]string, cobra.ShellCompDirective) {
	return completeFrom(cmd, begun, func(ctx context.Context, c *api.Client) ([]string, error) {
		all, err := c.Consumers(ctx, group)
		var names []string
		for _, k := range all {
			names = append(names, k.Name)
		}
		return names, err
	})
}

// takesConsumer says whether a verb's second argument is a consumer.
func takesConsumer(use string) bool {
	want := positionals(use)
	return len(want) > 1 && strings.Trim(want[1], "[]") == "CONSUMER"
}
