package main

import (
	"fmt"
	"io/fs"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"tidemark/internal/vault"
)

// TestUnitFile: what the unit file starts is a verb with flags that it has, and
// systemd waits until it is ready.
func TestUnitFile(t *testing.T) {
	text, err := os.ReadFile("../../docs/tidemark.service")
	if err != nil {
		t.Fatal(err)
	}
	settings := map[string]string{}
	for _, line := range strings.Split(string(text), "\n") {
		if key, value, ok := strings.Cut(line, "="); ok {
			settings[key] = value
		}
	}
	words := strings.Fields(settings["ExecStart"])
	if len(words) < 2 {
		t.Fatalf("ExecStart is %q", settings["ExecStart"])
	}
	verb, rest, err := newRoot().Find(words[1:])
	if err != nil || verb.Name() != "daemon" {
		t.Fatalf("ExecStart runs %q: %v", words, err)
	}
	if rest[len(rest)-1] != "$TIDEMARK_FLAGS" || settings["EnvironmentFile"] != "-/etc/default/tidemark" {
		t.Errorf("ExecStart %q, EnvironmentFile %s: its flags cannot be set", rest, settings["EnvironmentFile"])
	}
	guide, err := os.ReadFile("../../docs/operating.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, where := range [][]byte{text, guide} { // the example of more flags
		_, more, ok := strings.Cut(string(where), "TIDEMARK_FLAGS=")
		more = more[:max(0, strings.IndexAny(more, "`\n"))]
		if err := verb.ParseFlags(strings.Fields(more)); !ok || err != nil {
			t.Errorf("more flags %q: %v", more, err)
		}
	}
	if err := verb.ParseFlags(rest[:len(rest)-1]); err != nil {
		t.Errorf("ExecStart: %v", err)
	}
	// The state folder is the one that doctor looks in when it is told of none, and systemd makes it.
	if state, _ := verb.Flags().GetString("state"); state != "/var/lib/"+settings["StateDirectory"] || state != daemonDefault(t, "state") {
		t.Errorf("--state %s, StateDirectory %s, default %s", state, settings["StateDirectory"], daemonDefault(t, "state"))
	}
	if settings["RuntimeDirectory"] != "tidemark" || !strings.HasPrefix(socketDefault, "/run/tidemark/") {
		t.Errorf("RuntimeDirectory %s is not where %s lies", settings["RuntimeDirectory"], socketDefault)
	}
	if settings["Type"] != "notify" || settings["Restart"] != "always" {
		t.Errorf("Type=%s, Restart=%s", settings["Type"], settings["Restart"])
	}
}

// daemonDefault is the default of one of the daemon's flags.
func daemonDefault(t *testing.T, name string) string {
	t.Helper()
	verb, _, err := newRoot().Find([]string{"daemon"})
	if err != nil {
		t.Fatal(err)
	}
	return verb.Flag(name).DefValue
}

// TestWithoutPermission: what no waiting mends is not told as a vault that is away.
func TestWithoutPermission(t *testing.T) {
	denied := fmt.Errorf("%w: %w", vault.ErrUnreachable, &fs.PathError{Op: "open", Path: "vault", Err: unix.EACCES})
	away := fmt.Errorf("%w: %w", vault.ErrUnreachable, &fs.PathError{Op: "open", Path: "vault", Err: unix.EIO})
	if a, b := exitCode(t.Context(), denied), exitCode(t.Context(), away); a != exitRefused || b != exitUnreachable {
		t.Errorf("codes %d and %d", a, b)
	}
}
