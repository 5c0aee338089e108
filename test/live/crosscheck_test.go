package live

import (
	"errors"
	"path/filepath"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// TestWrittenPastTheTap: writes that the tap does not see at all (its tables
// of programs are empty while they are made) are found by the disk's own count,
// and the disk is compared. They are repeated as the count is only trusted from a
// quiet moment on.
func TestWrittenPastTheTap(t *testing.T) {
	testkit.Need(t, "root", "tap", "loop")
	disk := testkit.NewDisk(t, 8*mib)
	d := program.New(t)
	d.Protect("g", disk.Path)
	since := d.Settle("g").Since
	f, buf := open(t, disk.Path, unix.O_DIRECT), aligned(t, 4096)
	n := uint64(0)
	program.Eventually(t, time.Minute, "the unseen writes found", func() error {
		n++
		testkit.Fill(buf, 0, 4*mib, n)
		unseen(t, filepath.Dir(pinned(t, d, "g")[0]), func() {
			if _, err := f.WriteAt(buf, 4*mib); err != nil {
				t.Fatal(err)
			}
		})
		if g := d.Group("g"); !g.Has("unknown-territory") && g.Since == since {
			return errors.New("nothing was noticed")
		}
		return nil
	})
	// One that came between the finding and the next quiet moment counts as nothing; this one does.
	testkit.Fill(buf, 0, 4*mib, n+1)
	if _, err := f.WriteAt(buf, 4*mib); err != nil {
		t.Fatal(err)
	}
	identical(t, d, "g")
	d.Run("verify", "--vault", d.Vault, "--live")
}

// unseen runs write while the tables of the tracepoints' programs are empty.
func unseen(t *testing.T, pins string, write func()) {
	t.Helper()
	tables, err := filepath.Glob(filepath.Join(pins, "map_to_*"))
	if err != nil || len(tables) < 3 {
		t.Fatal(tables, err)
	}
	for _, table := range tables {
		m, err := ebpf.LoadPinnedMap(table, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		var id uint32
		if err := m.Lookup(uint32(0), &id); err != nil {
			t.Fatal(err)
		}
		prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
		if err != nil {
			t.Fatal(err)
		}
		defer prog.Close()
		if err := m.Delete(uint32(0)); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := m.Put(uint32(0), prog); err != nil {
				t.Fatal(err)
			}
		}()
	}
	write()
}
