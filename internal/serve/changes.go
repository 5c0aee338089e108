package serve

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"tidemark/internal/block"
	"tidemark/internal/cbt"
	"tidemark/internal/filter/track"
	"tidemark/internal/front/nbd"
	"tidemark/internal/stack"
	"tidemark/internal/vfs"
)

// changesSuffix ends the names of the files that keep change maps over clean restarts.
const changesSuffix = ".cbt"

func (s *Server) changesFile(name string) string {
	return filepath.Join(s.folder, name+changesSuffix)
}

// trackChanges begins or goes on with a device's change map. state is what
// backingState said before the backing was opened.
func (s *Server) trackChanges(spec Spec, state string, st *stack.Stack) (*cbt.Map, error) {
	m, why, err := cbt.Open(vfs.OS{}, s.changesFile(spec.Name), state, st.Size())
	if err != nil {
		return nil, fmt.Errorf("the change map of %s: %w", spec.Name, err)
	}
	if why != "" {
		s.env.Log.Info("a change map begins anew", "device", spec.Name, "generation", m.Writing().Generation.String(), "why", why)
	}
	_, err = st.Attach(track.Name, track.Altitude, track.Driver(m))
	return m, err
}

// saveChanges keeps the map for the next process; nothing is written any more.
func (s *Server) saveChanges(d *Device) error {
	return d.part.Changes.Save(vfs.OS{}, s.changesFile(d.spec.Name), d.spec.backingState())
}

func (s *Server) eraseChanges(name string) error {
	err := os.Remove(s.changesFile(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// backingState is what must be equal at the next start for the map to be true:
// the device, and of an image file who it is and when it was last written.
func (spec Spec) backingState() string {
	st, err := os.Stat(spec.Backing)
	if err != nil || !st.Mode().IsRegular() {
		return spec.ID
	}
	return fmt.Sprintf("%s %d %d", spec.ID, st.Size(), st.ModTime().UnixNano())
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
	newest := m.Info()
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
