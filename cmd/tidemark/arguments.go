package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// positionals are the arguments that a verb's usage line names: GROUP, [GROUP],
// DEV... What belongs to a flag is none.
func positionals(use string) []string {
	var out []string
	words := strings.Fields(use)[1:]
	for i := 0; i < len(words); i++ {
		if strings.HasPrefix(words[i], "--") {
			i++ // and its value
			continue
		}
		out = append(out, words[i])
	}
	return out
}

// checkArguments holds what was given against the usage line, and says what is
// missing, empty or too much.
func checkArguments(cmd *cobra.Command, args []string) error {
	want := positionals(cmd.Use)
	wrong := func(format string, a ...any) error {
		return usageError{fmt.Errorf(format+"\n  Usage: %s", append(a, cmd.UseLine())...)}
	}
	for i, name := range want {
		if i < len(args) && args[i] == "" {
			return wrong("%s is empty", strings.Trim(name, "[.]"))
		}
		if i >= len(args) && !strings.HasPrefix(name, "[") {
			return wrong("%s is missing", strings.Trim(name, "."))
		}
	}
	many := slices.ContainsFunc(want, func(name string) bool { return strings.HasSuffix(strings.Trim(name, "[]"), "...") })
	if len(args) > len(want) && !many {
		return wrong("%q is one argument too many", args[len(want)])
	}
	return nil
}

// checkFlags says which flag is missing that a verb needs, and which was given
// with nothing in it: as a rule a variable of a script that was never set, and
// not a wish for the default.
func checkFlags(cmd *cobra.Command, _ []string) (err error) {
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		required := slices.Equal(f.Annotations[cobra.BashCompOneRequiredFlag], []string{"true"})
		what := ""
		switch {
		case f.Changed && f.Value.Type() == "string" && f.Value.String() == "":
			what = "empty"
		case required && !f.Changed:
			what = "missing"
		}
		if err != nil || what == "" {
			return
		}
		err = usageError{fmt.Errorf("--%s is %s: %s\n  Usage: %s", f.Name, what, f.Usage, cmd.UseLine())}
	})
	return err
}

// unknownVerb is what comes of a first word that is no verb.
func unknownVerb(above *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	hint := above.CommandPath() + " --help lists the verbs."
	if like := above.SuggestionsFor(args[0]); len(like) > 0 {
		hint = "Did you mean: " + strings.Join(like, ", ") + "?"
	}
	_, path, _ := strings.Cut(above.CommandPath()+" "+args[0], " ")
	return usageError{fmt.Errorf("there is no verb %q\n  %s", path, hint)}
}

// addHelpers adds help and completion, which refuse what they do not know.
func addHelpers(root *cobra.Command) {
	root.SetHelpCommand(&cobra.Command{
		Use:   "help [VERB]",
		Short: "Say what a verb does, with examples",
		RunE: func(_ *cobra.Command, args []string) error {
			about, rest, err := root.Find(args)
			if err != nil || len(rest) > 0 {
				return unknownVerb(root, args)
			}
			return about.Help()
		},
	})
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	for _, c := range root.Commands() {
		if c.Name() == "completion" {
			c.Args = cobra.ArbitraryArgs
			c.RunE = func(c *cobra.Command, args []string) error {
				return usageError{fmt.Errorf("want bash, zsh, fish or powershell, not %q\n  Usage: tidemark completion SHELL", strings.Join(args, " "))}
			}
		}
	}
}
