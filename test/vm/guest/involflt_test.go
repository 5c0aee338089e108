//go:build guest

package guest

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

const involfltHeaders = "../../../internal/abi/involflt/testdata"

// TestInvolflt: a client in C walks through every command, right and wrong.
func TestInvolflt(t *testing.T) {
	testkit.Need(t, "cuse", "tap", "ext4")
	client := compiled(t, "involflt", involfltHeaders)
	d := program.New(t, "--compat", "involflt,blksnap", "--compat-vault", filepath.Join(testkit.Dir(t), "vault"))
	other := testkit.NewDisk(t, 16<<20)
	testkit.Run(t, "mkfs.ext4", "-q", other.Path)
	testkit.Mount(t, other.Path)
	walked := testkit.NewDisk(t, 8<<20)
	if out, err := exec.CommandContext(t.Context(), client, "walk", walked.Path, other.Path).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s\n%s", err, out, d.Log())
	}
	if text := d.Run("status"); strings.Contains(text, filepath.Base(walked.Path)) {
		t.Errorf("the group of a disk that was stopped is left: %s", text)
	}

	d.Stop()
	if _, err := os.Lstat("/dev/involflt"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the device is left: %v", err)
	}
}
