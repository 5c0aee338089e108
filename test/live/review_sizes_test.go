package live

import (
	"testing"

	"golang.org/x/sys/unix"

	"tidemark/internal/loop"
	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// TestSmallestDisks: disks of one sector, of less and more than a block, and
// one that cannot be written to, in one group.
func TestSmallestDisks(t *testing.T) {
	testkit.Need(t, "root", "tap", "loop")
	var paths []string
	for _, size := range []int64{512, 3 * 512, 4096, 4096 + 512, 2*4096 - 512} {
		paths = append(paths, testkit.NewDisk(t, size).Path)
	}
	fixed := testkit.NewDisk(t, 8192)
	f, buf := open(t, fixed.Path, unix.O_DIRECT), aligned(t, 8192)
	testkit.Fill(buf, 9, 0, 1)
	if _, err := f.WriteAt(buf, 0); err != nil {
		t.Fatal(err)
	}
	readOnly, err := loop.Attach(fixed.File, loop.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	readOnly.Close()
	t.Cleanup(func() { loop.Detach(readOnly.Path) })
	d := program.New(t)
	d.Protect("g", append(paths, readOnly.Path)...)
	write := func(n uint64) {
		t.Helper()
		for i, path := range paths {
			f := open(t, path, unix.O_DIRECT)
			size, err := f.Seek(0, 2)
			if err != nil {
				t.Fatal(err)
			}
			testkit.Fill(buf[:512], i, size-512, n)
			if _, err := f.WriteAt(buf[:512], size-512); err != nil {
				t.Fatal(err)
			}
			f.Close()
		}
	}
	write(1)
	d.Run("bookmark", "g", "one")
	write(2)
	d.Kill()
	write(3)
	d.Start()
	identical(t, d, "g")
	d.Run("verify", "--vault", d.Vault, "--live")
	for i, name := range diskNames(d.Group("g"))[:len(paths)] {
		whole := image(t, d, "g", name, "one")
		last := whole[len(whole)-512:]
		if have, err := testkit.Check(last, i, int64(len(whole)-512)); err != nil || have[0] != 1 {
			t.Errorf("disk of %d bytes at the bookmark: %v, %v", len(whole), have, err)
		}
	}
	if n := len(stretches(t, d, "g")); n != 1 {
		t.Errorf("%d stretches, want one", n)
	}
}
