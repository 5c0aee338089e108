package freeze_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tidemark/internal/testkit"
)

// nested mounts an ext4 that lies in a file of a mounted file system.
func nested(t *testing.T, outer string) string {
	t.Helper()
	file := filepath.Join(outer, "image")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, 64<<20); err != nil {
		t.Fatal(err)
	}
	testkit.Mkfs(t, file, "ext4")
	dev := strings.TrimSpace(testkit.Run(t, "losetup", "--find", "--show", file))
	t.Cleanup(func() { testkit.Run(t, "losetup", "--detach", dev) })
	return mount(t, dev)
}
