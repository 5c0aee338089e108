package testkit

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// CFact is an integer expression of C and what it must be. Where it is the
// first thing in a header that older ones lack, If names a macro that comes with it.
type CFact struct {
	Expr string
	Want uintptr
	If   string
}

// CFacts asks the C compiler about a header: our numbers and structures against
// somebody else's. TIDEMARK_KERNEL_HEADERS names a folder of newer headers than
// the system's. The headers are included in their order, after stddef.h and sys/ioctl.h.
func CFacts(t *testing.T, facts []CFact, headers ...string) {
	t.Helper()
	Need(t, "gcc")
	var c strings.Builder
	c.WriteString("#include <stddef.h>\n#include <errno.h>\n#include <linux/types.h>\n#include <sys/ioctl.h>\n")
	for _, h := range headers {
		if filepath.IsAbs(h) {
			fmt.Fprintf(&c, "#include %q\n", h)
		} else {
			fmt.Fprintf(&c, "#include <%s>\n", h)
		}
	}
	for _, f := range facts {
		line := fmt.Sprintf("_Static_assert((%s) == %d, %q);\n", f.Expr, f.Want, f.Expr)
		if f.If != "" {
			line = "#ifdef " + f.If + "\n" + line + "#endif\n"
		}
		c.WriteString(line)
	}
	path := filepath.Join(t.TempDir(), "facts.c")
	if err := os.WriteFile(path, []byte(c.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"-fsyntax-only", path}
	if dir := os.Getenv("TIDEMARK_KERNEL_HEADERS"); dir != "" {
		args = append(args, "-I", dir)
	}
	if out, err := exec.CommandContext(t.Context(), "gcc", args...).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
