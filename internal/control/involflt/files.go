package involflt

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"tidemark/internal/abi/involflt"
)

// folder is where the data files lie, in a folder for each disk: one of a few
// MiB for each disk that is being drained. They are copies: what they hold stays
// in the disk's queue until it is committed, so they are never synced, and an
// earlier process's are of no use.
type folder struct{ dir string }

const filePrefix = "pre_completed_diff_"

func openFolder(dir string) (*folder, error) {
	f := &folder{dir: dir}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := os.Chmod(dir, 0o700); err != nil { // it may be an older one
		return nil, err
	}
	return f, f.clear()
}

// clear removes all data files and the folders that are empty then.
func (f *folder) clear() error {
	files, err := filepath.Glob(filepath.Join(f.dir, "*", filePrefix+"*"))
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range files {
		errs = append(errs, remove(name))
	}
	entries, err := os.ReadDir(f.dir)
	errs = append(errs, err)
	for _, e := range entries {
		if e.IsDir() {
			_ = os.Remove(filepath.Join(f.dir, e.Name())) // something of somebody else's in it: it stays
		}
	}
	return errors.Join(errs...)
}

func (f *folder) of(disk string) string { return filepath.Join(f.dir, "disk-"+disk) }

// leave removes the folder of a disk that is filtered no more, if it is empty:
// what somebody else has put there stays.
func (f *folder) leave(disk string) { _ = os.Remove(f.of(disk)) }

func remove(name string) error {
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// fileName is how clients know a data file: from which stamp to which, in write
// order or not, and which part of a change that takes several.
func fileName(p *part) string {
	order, more := "M", "E"
	if p.order == involflt.OrderData {
		order = "W"
	}
	if p.split > 0 && p.flags&involflt.FlagSplitEnd == 0 {
		more = "C"
	}
	return fmt.Sprintf("%sS%d_%d_E%d_%d_%s%s%d.dat", filePrefix, p.first.Time, p.first.Sequence, p.last.Time, p.last.Sequence, order, more, p.split)
}

// write makes the data file of a part and gives its path. Where it fails there is none.
func (f *folder) write(disk string, p *part) (path string, err error) {
	dir := f.of(disk)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	path = filepath.Join(dir, fileName(p))
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return "", err
	}
	w := bufio.NewWriterSize(file, 1<<20)
	err = errors.Join(involflt.WriteStream(w, p.first, p.last, p.changes), w.Flush(), file.Close())
	if err != nil {
		return "", errors.Join(err, remove(path))
	}
	return path, nil
}
