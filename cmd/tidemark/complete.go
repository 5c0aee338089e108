package main

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"tidemark/internal/control/api"
	"tidemark/internal/vault"
)

// completeWithin bounds what the shell's Tab key may wait for.
const completeWithin = 2 * time.Second

// completeGroups offers a first argument: the groups of --vault where the verb
// has that flag, those of the daemon elsewhere.
func completeGroups(cmd *cobra.Command, args []string, begun string) ([]string, cobra.ShellCompDirective) {
	if len(args) == 1 && takesConsumer(cmd.Use) {
		return completeConsumers(cmd, args[0], begun)
	}
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveDefault
	}
	ctx, cancel := context.WithTimeout(context.Background(), completeWithin)
	defer cancel()
	var names []string
	if where, err := cmd.Flags().GetString("vault"); err == nil {
		if v, err := vault.Open(ctx, where); err == nil {
			names, _ = v.Groups(ctx) // nothing to offer is all that can be said here
		}
	} else if st, err := dial(socketFlagOf(cmd)).Status(ctx); err == nil {
		for _, g := range st.Groups {
			names = append(names, g.Name)
		}
	}
	var out []string
	for _, n := range names {
		if strings.HasPrefix(n, begun) {
			out = append(out, n)
		}
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

// completeFrom offers names that the daemon knows.
func completeFrom(cmd *cobra.Command, begun string, names func(context.Context, *api.Client) ([]string, error)) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(context.Background(), completeWithin)
	defer cancel()
	all, _ := names(ctx, dial(socketFlagOf(cmd))) // nothing to offer is all that can be said here
	return slices.DeleteFunc(all, func(n string) bool { return !strings.HasPrefix(n, begun) }), cobra.ShellCompDirectiveNoFileComp
}
