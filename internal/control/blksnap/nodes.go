package blksnap

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
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
		if have, ok := n.device(name); ok && have == d { // also where others were faster
			err = nil
		}
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

// adopt knows what an earlier process left as its own: an image that is still
// there keeps its index, and show takes away the rest.
func (n *nodes) adopt() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	entries, err := os.ReadDir(n.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		text, ok := strings.CutPrefix(e.Name(), blksnap.Image)
		number, err := strconv.ParseUint(text, 10, 32)
		dev, isNode := n.device(e.Name())
		if !ok || err != nil || !isNode {
			continue
		}
		n.made[e.Name()] = dev
		if number == uint64(dev.Minor) || number >= indexMax || slices.Contains(n.indexes, dev) {
			continue
		}
		for uint64(len(n.indexes)) <= number {
			n.indexes = append(n.indexes, blksnap.Dev{})
		}
		n.indexes[number] = dev
	}
	return nil
}

// indexMax bounds what an index is taken for that was found.
const indexMax = 1 << 16

// device is the number of a node of the folder; false: it is none of a block device.
func (n *nodes) device(name string) (blksnap.Dev, bool) {
	var st unix.Stat_t
	if unix.Lstat(filepath.Join(n.dir, name), &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return blksnap.Dev{}, false
	}
	return blksnap.Dev{Major: unix.Major(st.Rdev), Minor: unix.Minor(st.Rdev)}, true
}
