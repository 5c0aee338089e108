package blksnap

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"tidemark/internal/abi/blksnap"
)

// nodes are the names under which clients look for images: blksnap-image
// followed by the minor number of the image's device, and by its index, lowest
// free first. Where one number is the minor of one image and could be the index
// of another, it is the minor.
type nodes struct {
	dir string

	mu      sync.Mutex
	made    map[string]blksnap.Dev
	indexes []blksnap.Dev // by index; zero: free
}

// show makes the nodes of these images and takes others away.
func (n *nodes) show(images []Image) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	want, alive := map[string]blksnap.Dev{}, map[blksnap.Dev]bool{}
	for _, i := range images {
		if i.Image != (blksnap.Dev{}) {
			alive[i.Image] = true
			want[fmt.Sprint(blksnap.Image, i.Image.Minor)] = i.Image
		}
	}
	for i, d := range n.indexes {
		if !alive[d] {
			n.indexes[i] = blksnap.Dev{}
		}
		delete(alive, d)
	}
	for _, i := range images { // in their order
		if alive[i.Image] {
			n.index(i.Image)
			delete(alive, i.Image)
		}
	}
	for i, d := range n.indexes {
		name := fmt.Sprint(blksnap.Image, i)
		if _, ok := want[name]; !ok && d != (blksnap.Dev{}) {
			want[name] = d
		}
	}
	var errs []error
	for name, d := range n.made {
		if want[name] != d {
			errs = append(errs, n.remove(name))
		}
	}
	for name, d := range want {
		if n.made[name] == d {
			continue
		}
		err := unix.Mknod(filepath.Join(n.dir, name), unix.S_IFBLK|0o600, int(unix.Mkdev(d.Major, d.Minor)))
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: mknod: %w", name, err))
			continue
		}
		n.made[name] = d
	}
	return errors.Join(errs...)
}

func (n *nodes) index(d blksnap.Dev) {
	for i, have := range n.indexes {
		if have == (blksnap.Dev{}) {
			n.indexes[i] = d
			return
		}
	}
	n.indexes = append(n.indexes, d)
}

func (n *nodes) remove(name string) error {
	delete(n.made, name)
	err := os.Remove(filepath.Join(n.dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// clear takes all away, also what an earlier process left.
func (n *nodes) clear() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	entries, err := os.ReadDir(n.dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if number, ok := strings.CutPrefix(e.Name(), blksnap.Image); ok && e.Type()&fs.ModeDevice != 0 && strings.Trim(number, "0123456789") == "" {
			errs = append(errs, n.remove(e.Name()))
		}
	}
	n.indexes = nil
	return errors.Join(errs...)
}
