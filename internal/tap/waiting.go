package tap

import (
	"errors"
	"fmt"
	"io/fs"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Waiting is how many bytes the ring of a pinned tap holds that were not let
// go, without taking the tap over. ErrNoPins: there is no such ring.
func Waiting(instance, group string) (uint64, error) {
	p, err := pinsOf(instance, group)
	if err != nil {
		return 0, err
	}
	m, err := ebpf.LoadPinnedMap(p.path("map_ring"), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, fmt.Errorf("group %s: %w", group, ErrNoPins)
	}
	if err != nil {
		return 0, err
	}
	defer m.Close()
	page := unix.Getpagesize()
	var place [2]uint64 // consumer, producer: a page each
	for i := range place {
		b, err := unix.Mmap(m.FD(), int64(i*page), page, unix.PROT_READ, unix.MAP_SHARED)
		if err != nil {
			return 0, fmt.Errorf("mapping the ring of group %s: %w", group, err)
		}
		place[i] = atomic.LoadUint64((*uint64)(unsafe.Pointer(&b[0])))
		if err := unix.Munmap(b); err != nil {
			return 0, err
		}
	}
	return place[1] - place[0], nil
}
