package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	abi "tidemark/internal/abi/blksnap"
	"tidemark/internal/backing"
	"tidemark/internal/block"
	"tidemark/internal/cbt"
	"tidemark/internal/control/blksnap"
	"tidemark/internal/diff"
	"tidemark/internal/health"
	"tidemark/internal/serve"
	"tidemark/internal/snapshot"
)

// blksnapSystem is what /dev/blksnap commands: the served devices by their numbers.
type blksnapSystem struct {
	devices *serve.Server
	health  *health.Set

	mu      sync.Mutex
	tracked map[string]bool // by name: a client has asked for it; others are where they have a snapshot
}

var _ blksnap.System = (*blksnapSystem)(nil)

// numberOf is the number of a node; false: it is none, or not there.
func numberOf(node string) (abi.Dev, bool) {
	var st unix.Stat_t
	if node == "" || strings.Contains(node, "://") || unix.Stat(node, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return abi.Dev{}, false
	}
	return abi.Dev{Major: unix.Major(st.Rdev), Minor: unix.Minor(st.Rdev)}, true
}

// numbers gives the served devices' names by their numbers.
func (b *blksnapSystem) numbers() map[abi.Dev]string {
	out := map[abi.Dev]string{}
	for name, node := range b.devices.Nodes() {
		if dev, ok := numberOf(node); ok {
			out[dev] = name
		}
	}
	return out
}

// name finds a served device by its number, or by that of an image of it.
func (b *blksnapSystem) name(dev abi.Dev) (string, error) {
	if name, ok := b.numbers()[dev]; ok {
		return name, nil
	}
	for _, i := range b.devices.Snapshots() {
		for _, d := range i.Devices {
			if image, ok := numberOf(b.devices.ImageNode(d.Name, i.ID)); ok && image == dev {
				return d.Name, nil
			}
		}
	}
	path, err := pathOf(dev)
	if err != nil {
		return "", err
	}
	return "", fmt.Errorf("%s: %w", path, blksnap.ErrForeign)
}

// pathOf is the kernel's node of a block device.
func pathOf(dev abi.Dev) (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%s/uevent", dev))
	if err != nil {
		return "", fmt.Errorf("%s: %w", dev, blksnap.ErrNoDevice)
	}
	for line := range strings.Lines(string(b)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "DEVNAME="); ok {
			return filepath.Join("/dev", name), nil
		}
	}
	return "", fmt.Errorf("%s: %w", dev, blksnap.ErrNoDevice)
}

// Tracked lists the devices that have, or had, a snapshot since their tracking began.
func (b *blksnapSystem) Tracked() ([]blksnap.Tracking, error) {
	inSnapshot, held := map[string]bool{}, map[string]bool{}
	for _, i := range b.devices.Snapshots() {
		for _, d := range i.Devices {
			inSnapshot[d.Name] = true
			held[d.Name] = held[d.Name] || i.State != "created"
		}
	}
	out := []blksnap.Tracking{}
	for dev, name := range b.numbers() {
		m, err := b.devices.Changes(name)
		if err != nil {
			continue // offline
		}
		info := m.Info()
		b.mu.Lock()
		asked := b.tracked[name]
		b.mu.Unlock()
		if !asked && !inSnapshot[name] && info.Number == 0 {
			continue
		}
		out = append(out, blksnap.Tracking{Dev: dev, BlockSize: info.BlockSize, Capacity: info.Size, Blocks: info.Blocks,
			Generation: info.Generation, Number: info.Number, Held: held[name]})
	}
	slices.SortFunc(out, func(x, y blksnap.Tracking) int { // as the kernel would list them
		return cmp.Or(cmp.Compare(x.Dev.Major, y.Dev.Major), cmp.Compare(x.Dev.Minor, y.Dev.Minor))
	})
	return out, nil
}

// mapOf is the change map of a tracked device.
func (b *blksnapSystem) mapOf(dev abi.Dev) (string, *cbt.Map, error) {
	name, err := b.name(dev)
	if errors.Is(err, blksnap.ErrForeign) {
		err = fmt.Errorf("%w: %v", blksnap.ErrUntracked, err)
	}
	if err != nil {
		return "", nil, err
	}
	m, err := b.devices.Changes(name)
	if err != nil {
		return "", nil, fmt.Errorf("%w: %w", blksnap.ErrUntracked, err)
	}
	return name, m, nil
}

func (b *blksnapSystem) Table(dev abi.Dev, p []byte, i int64) (int, error) {
	_, m, err := b.mapOf(dev)
	if err != nil || len(p) == 0 {
		return 0, err
	}
	c, ok := m.Newest()
	if !ok {
		return 0, blksnap.ErrUntracked
	}
	n, _ := c.Read(p, i) // io.EOF says no more than 0 does
	return n, nil
}

// Untrack forgets what changed: whoever asks again begins anew. Tidemark goes on tracking.
func (b *blksnapSystem) Untrack(dev abi.Dev) error {
	name, m, err := b.mapOf(dev)
	if err != nil {
		return err
	}
	m.Reset()
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.tracked, name)
	return nil
}

func (b *blksnapSystem) MarkDirty(dev abi.Dev, ranges []block.Range) error {
	_, m, err := b.mapOf(dev)
	if err != nil {
		return err
	}
	all := block.Range{Len: m.Info().Size}
	for _, r := range ranges {
		if r.End() > all.End() {
			return fmt.Errorf("%v of a device of %d bytes: %w", r, all.Len, blksnap.ErrRange)
		}
	}
	for _, r := range ranges {
		if err := m.MarkDirty(r); err != nil {
			return fmt.Errorf("%w: %w", blksnap.ErrRange, err)
		}
	}
	return nil
}

func (b *blksnapSystem) Create(devs []abi.Dev) (abi.ID, error) {
	req := snapshot.Request{Low: 512 << 20}
	for _, dev := range devs {
		name, err := b.name(dev)
		if errors.Is(err, blksnap.ErrForeign) {
			b.health.Raise(health.Condition{Code: "snapshot-foreign-device", Severity: health.Warning, Subject: dev.String(),
				Detail: "A program asked /dev/blksnap for a snapshot of " + strings.TrimSuffix(err.Error(), ": "+blksnap.ErrForeign.Error()) + ", which is not a served device.",
				Remedy: "Put it under Tidemark: tidemark device create --backing DISK, and use what that prints in the disk's place; a device-mapper volume in use: tidemark device splice VOLUME."})
		}
		if err != nil {
			return abi.ID{}, err
		}
		req.Devices = append(req.Devices, name)
	}
	i, err := b.devices.CreateSnapshot(req)
	if err != nil {
		return abi.ID{}, snapshotError(err)
	}
	id, err := snapshot.ParseID(i.ID)
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, name := range req.Devices {
		b.tracked[name] = true
	}
	return abi.ID(id), err
}

func (b *blksnapSystem) Append(id abi.ID, dev abi.Dev, ranges []block.Range) error {
	path, err := pathOf(dev)
	if err != nil {
		return err
	}
	for _, r := range ranges {
		if r.Off%diff.Align != 0 || r.Len%diff.Align != 0 {
			return fmt.Errorf("%v: %w: whole pages of %d bytes", r, blksnap.ErrRange, diff.Align)
		}
	}
	err = b.devices.AppendStorage(snapshot.ID(id), snapshot.Storage{Path: path, Ranges: ranges})
	if errors.Is(err, backing.ErrInUse) || errors.Is(err, serve.ErrInUse) {
		b.health.Raise(health.Condition{Code: "snapshot-foreign-storage", Severity: health.Warning, Subject: dev.String(),
			Detail: "A program gave /dev/blksnap ranges of " + path + " for difference storage, a disk that others use and Tidemark does not serve: whether the file that they belong to still has them nobody could watch, and what gets them next would be overwritten.",
			Remedy: "Have it put its file on the device that is snapshotted, or on another served one; or give a file yourself, which is then written through its file system: tidemark snapshot append " + snapshot.FormatID(snapshot.ID(id)) + " FILE."})
	} else if err == nil {
		b.health.Clear("snapshot-foreign-storage", dev.String())
	}
	return snapshotError(err)
}

func (b *blksnapSystem) Take(ctx context.Context, id abi.ID) error {
	return snapshotError(b.devices.TakeSnapshot(ctx, snapshot.ID(id)))
}

func (b *blksnapSystem) Destroy(ctx context.Context, id abi.ID) error {
	return snapshotError(b.devices.DestroySnapshot(ctx, snapshot.ID(id)))
}

func (b *blksnapSystem) Snapshots() []abi.ID {
	var out []abi.ID
	for _, i := range b.devices.Snapshots() {
		if id, err := snapshot.ParseID(i.ID); err == nil {
			out = append(out, abi.ID(id))
		}
	}
	return out
}

func (b *blksnapSystem) Images(id abi.ID) ([]blksnap.Image, error) {
	i, err := b.devices.Snapshot(snapshot.ID(id))
	switch {
	case err != nil:
		return nil, snapshotError(err)
	case i.State == "created":
		return nil, blksnap.ErrNotTaken
	}
	nodes, out := b.devices.Nodes(), []blksnap.Image{}
	for _, d := range i.Devices {
		var pair blksnap.Image
		pair.Original, _ = numberOf(nodes[d.Name])
		pair.Image, _ = numberOf(b.devices.ImageNode(d.Name, i.ID))
		out = append(out, pair)
	}
	return out, nil
}

func (b *blksnapSystem) Event(ctx context.Context, id abi.ID, after uint64) (blksnap.Event, error) {
	events, err := b.devices.Events(ctx, snapshot.FormatID(snapshot.ID(id)), after)
	if err != nil {
		return blksnap.Event{}, snapshotError(err)
	}
	if len(events) == 0 {
		return blksnap.Event{}, context.Cause(ctx)
	}
	e := events[0]
	out := blksnap.Event{Sequence: e.Sequence, Time: e.Time, Code: abi.EventCorrupted, Errno: syscall.EIO}
	switch e.Kind {
	case diff.LowSpace:
		out.Code, out.Bytes = abi.EventLowFreeSpace, e.Bytes
	case diff.Overflow:
		out.Errno = syscall.ENOSPC
	}
	device := e.Device
	if i, err := b.devices.Snapshot(snapshot.ID(id)); err == nil && device == "" && len(i.Devices) > 0 {
		device = i.Devices[0].Name
	}
	for dev, name := range b.numbers() {
		if name == device {
			out.Original = dev
		}
	}
	return out, nil
}

// snapshotError translates, and keeps the text.
func snapshotError(err error) error {
	for _, c := range []struct{ is, as error }{{snapshot.ErrNoSuch, blksnap.ErrNoSnapshot}, {snapshot.ErrNoDevice, blksnap.ErrNoDevice}, {snapshot.ErrTaken, blksnap.ErrTaken},
		{snapshot.ErrNotTaken, blksnap.ErrNotTaken}, {snapshot.ErrNoStorage, blksnap.ErrNoStorage}, {diff.ErrRefused, blksnap.ErrRange},
		{serve.ErrInUse, syscall.EBUSY}} {
		if errors.Is(err, c.is) {
			return fmt.Errorf("%w: %w", c.as, err)
		}
	}
	return err
}
