//go:build guest

package guest

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"testing"

	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// TestInvolfltFuzzed: whatever bytes a caller sends, the daemon lives, nobody
// hangs, and a command that fails has changed nothing.
func TestInvolfltFuzzed(t *testing.T) {
	testkit.Need(t, "cuse", "tap")
	rng, client := seed(t), compiled(t, "involflt_fuzz", involfltHeaders)
	disk := testkit.NewDisk(t, 8<<20)
	d := program.New(t, "--compat", "involflt", "--compat-vault", filepath.Join(testkit.Dir(t), "vault"))
	out, err := exec.CommandContext(t.Context(), client, disk.Path, fmt.Sprint(rng.Uint64()), "250").CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Fatalf("%v\n%s", err, d.Log())
	}
	d.Run("status") // it is alive
}
