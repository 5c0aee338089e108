package live

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"tidemark/internal/loop"
	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// TestChangedUnseen: while no daemon runs, a disk becomes a window on other
// bytes, without one write. The next daemon finds out and compares.
func TestChangedUnseen(t *testing.T) {
	const size = 4 * mib
	testkit.Need(t, "root", "tap", "loop")
	file := filepath.Join(testkit.Dir(t), "file")
	half := make([]byte, size)
	testkit.Fill(half, 0, 0, 1)
	other := make([]byte, size)
	testkit.Fill(other, 0, 0, 2)
	if err := os.WriteFile(file, append(half, other...), 0o600); err != nil {
		t.Fatal(err)
	}
	dev, err := loop.Attach(file, loop.Options{SizeLimit: size})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { loop.Detach(dev.Path) })
	d := program.New(t)
	d.Protect("g", dev.Path)
	d.Kill()
	info, err := unix.IoctlLoopGetStatus64(int(dev.File().Fd()))
	if err != nil {
		t.Fatal(err)
	}
	info.Offset = size
	if err := unix.IoctlLoopSetStatus64(int(dev.File().Fd()), info); err != nil {
		t.Fatal(err)
	}
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	d.Start()
	d.Await("g", "told", func(g *program.Group) bool { return g.Has("unknown-territory") || g.Since > 1 })
	identical(t, d, "g")
	d.Run("verify", "--vault", d.Vault, "--live")
	all := stretches(t, d, "g")
	if len(all) != 2 {
		t.Fatalf("stretches %v, want two", all)
	}
	same(t, "the stretch before", half, image(t, d, "g", "", seq(all[0].last)))

	// Nothing happens: nothing is compared.
	d.Restart()
	d.Settle("g")
	if n := len(stretches(t, d, "g")); n != 2 {
		t.Errorf("%d stretches after nothing had happened, want two", n)
	}
}
