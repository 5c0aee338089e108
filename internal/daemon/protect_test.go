package daemon

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"

	"tidemark/internal/control/api"
	"tidemark/internal/protect"
	"tidemark/internal/tap"
	"tidemark/internal/testkit"
)

// TestProtectInterrupted: who asks for a group and is gone when it is there
// leaves none behind; the same can be asked for again at once.
func TestProtectInterrupted(t *testing.T) {
	testkit.Need(t, "root", "tap", "loop")
	testkit.NoLeaks(t)
	disk := testkit.NewDisk(t, 8<<20)
	ctx, cancel := context.WithCancel(t.Context())
	state := t.TempDir()
	s := &service{groups: map[string]*protect.Group{}, env: &protect.Env{StateDir: state, Instance: "0123456789abcdef",
		Log: slog.New(onMessage{call: func(message string) {
			if strings.Contains(message, "gap opened") { // it is nearly made
				cancel()
			}
		}})}}
	t.Cleanup(func() {
		s.stop()
		if err := tap.Discard(s.env.Instance, "g"); err != nil {
			t.Error(err)
		}
	})
	request := api.ProtectRequest{Name: "g", Vault: filepath.Join(t.TempDir(), "vault"), Devices: []string{disk.Path}}
	if _, err := s.Protect(ctx, request); !errors.Is(err, context.Canceled) {
		t.Fatalf("protect: %v, want context.Canceled", err)
	}
	if left, err := filepath.Glob(filepath.Join(state, "groups", "*")); err != nil || len(left) > 0 || len(s.list()) > 0 {
		t.Errorf("left behind: %v %v, %v", s.list(), left, err)
	}
	if _, err := s.Protect(t.Context(), request); err != nil {
		t.Fatalf("the second: %v", err)
	}
	if err := s.Unprotect(t.Context(), "g", true, false); err != nil {
		t.Fatal(err)
	}
}
