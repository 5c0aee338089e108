package serve

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"tidemark/internal/block"
	"tidemark/internal/cbt"
	"tidemark/internal/front/nbd"
	"tidemark/internal/stack"
	"tidemark/internal/vfs"
)

// changesSuffix ends the names of the files that keep change maps over clean restarts.
const changesSuffix = ".cbt"

func (s *Server) changesFile(name string) string {
	return filepath.Join(s.folder, name+changesSuffix)
}

// openChanges begins or goes on with a device's change map. state is what
// backingState said before the backing was opened. foreign: since this process's
// predecessor ended in order somebody else has written to the backing.
func (s *Server) openChanges(spec Spec, state backingState, st *stack.Stack) (m *cbt.Map, foreign bool, err error) {
	fits := func(was string) bool {
		foreign = !state.continues(was)
		return !foreign
	}
	m, why, err := cbt.Open(vfs.OS{}, s.changesFile(spec.Name), fits, st.Size())
	if err != nil {
		return nil, false, fmt.Errorf("the change map of %s: %w", spec.Name, err)
	}
	if why != "" {
		s.env.Log.Info("a change map begins anew", "device", spec.Name, "generation", m.Writing().Generation.String(), "why", why)
	}
	return m, foreign, nil
}

// saveChanges keeps the map for the next process; nothing is written any more.
func (s *Server) saveChanges(d *Device) error {
	return d.part.Changes.Save(vfs.OS{}, s.changesFile(d.spec.Name), d.spec.backingState().String())
}

func (s *Server) eraseChanges(name string) error {
	err := os.Remove(s.changesFile(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// backingState says what the backing is at a moment, so that a later one can tell
// whether anybody has written to it since: of an image file how large it is and when
// it was last written, of a disk how much was written to it since it appeared.
type backingState struct {
	id   string // the device's
	file string // of an image file; the rest is of a disk
	boot string
	disk string // its number in this boot
	// written is in sectors, and discarded; counted is false where the disk does not count.
	written, discarded uint64
	counted            bool
}

func (spec Spec) backingState() backingState {
	now := backingState{id: spec.ID}
	if st, err := os.Stat(spec.Backing); err == nil && st.Mode().IsRegular() {
		now.file = fmt.Sprintf("%d %d", st.Size(), st.ModTime().UnixNano())
		return now
	}
	i := incarnationOf(spec.Backing)
	boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	stat, _ := os.ReadFile("/sys/class/block/" + i.name + "/stat")
	iostats, _ := os.ReadFile("/sys/class/block/" + i.name + "/queue/iostats") // absent: it counts, or is a partition
	now.boot, now.disk = strings.TrimSpace(string(boot)), i.seq
	if f := strings.Fields(string(stat)); len(f) > 13 {
		var e1, e2 error
		now.written, e1 = strconv.ParseUint(f[6], 10, 64)
		now.discarded, e2 = strconv.ParseUint(f[13], 10, 64)
		now.counted = e1 == nil && e2 == nil && now.boot != "" && strings.TrimSpace(string(iostats)) != "0"
	}
	return now
}

// String is what a change map's file remembers.
func (b backingState) String() string {
	if b.file != "" {
		return b.id + " " + b.file
	}
	return fmt.Sprintf("%s disk %s %s %d %d", b.id, b.boot, cmp.Or(b.disk, "-"), b.written, b.discarded)
}

// continues says whether nothing was written to the backing since it was as text
// says, in this boot or, where nobody has written to it since the start, in another.
func (b backingState) continues(text string) bool {
	if b.file != "" || !b.counted {
		return b.file != "" && text == b.String()
	}
	if text == b.String() {
		return true
	}
	f := strings.Fields(text)
	return len(f) == 6 && f[0] == b.id && f[1] == "disk" && f[2] != "" && f[2] != b.boot && b.written == 0 && b.discarded == 0
}

// Changes gives the change map of a device.
func (s *Server) Changes(name string) (*cbt.Map, error) {
	d, err := s.find(name)
	if err != nil {
		return nil, err
	}
	now := d.now()
	if now.served == nil {
		return nil, fmt.Errorf("%s is offline: %w", name, ErrNotFound)
	}
	return now.part.Changes, nil
}

// bitmaps shows NBD clients what changed after each snapshot of the map's
// generation: since-N is what changed after snapshot N, up to when it is first looked at.
func bitmaps(m *cbt.Map) (out []nbd.Bitmap) {
	taken, ok := m.Newest()
	if !ok {
		return nil
	}
	newest := taken.Info()
	for n := 1; n <= int(newest.Number); n++ {
		table := sync.OnceValues(func() (*cbt.Changes, error) { return m.Live(newest.Generation, uint8(n)) }) // 16 MiB, maybe
		out = append(out, nbd.Bitmap{Name: fmt.Sprintf("since-%d", n), Map: changeRuns(table)})
	}
	return out
}

// changeRuns is a table as the NBD server asks for it.
type changeRuns func() (*cbt.Changes, error)

// Run gives the run at the beginning of a range.
func (c changeRuns) Run(r block.Range) (int64, bool, error) {
	table, err := c()
	if err != nil {
		return 0, false, err
	}
	for n, changed := range table.Extents(r.Off, r.Len) {
		return n, changed, nil
	}
	return r.Len, true, nil // beyond what the table knows: it may have changed
}

// runsOf is a table that is there already.
func runsOf(c *cbt.Changes) changeRuns {
	return func() (*cbt.Changes, error) { return c, nil }
}
