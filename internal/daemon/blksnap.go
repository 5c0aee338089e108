package daemon

import (
	"cmp"
	"context"
	"crypto/sha256"
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

// name finds a served device by its number.
func (b *blksnapSystem) name(dev abi.Dev) (string, error) {
	if name, ok := b.numbers()[dev]; ok {
		return name, nil
	}
	path, err := pathOf(dev)
	if err != nil {
		return "", err
	}
	return "", fmt.Errorf("%s: %w", path, blksnap.ErrForeign)
}

// imageOf is the name of the device that an image with a number is of, "" for none.
func (b *blksnapSystem) imageOf(dev abi.Dev) string {
	for _, i := range b.devices.Snapshots() {
		for _, d := range i.Devices {
			if image, ok := numberOf(b.devices.ImageNode(d.Name, i.ID)); ok && image == dev {
				return d.Name
			}
		}
	}
	return ""
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
	prepared, held := map[string]bool{}, map[string][]snapshot.DeviceInfo{}
	for _, i := range b.devices.Snapshots() {
		for _, d := range i.Devices {
			if i.State == "created" {
				prepared[d.Name] = true
			} else {
				held[d.Name] = append(held[d.Name], d)
			}
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
		if !asked && !prepared[name] && len(held[name]) == 0 && info.Number == 0 {
			continue
		}
		t := blksnap.Tracking{Dev: dev, BlockSize: info.BlockSize, Capacity: info.Size, Blocks: info.Blocks, Held: len(held[name]) > 0}
		t.Generation, t.Number = trackedAs(info, held[name])
		out = append(out, t)
	}
	slices.SortFunc(out, func(x, y blksnap.Tracking) int { // as the kernel would list them
		return cmp.Or(cmp.Compare(x.Dev.Major, y.Dev.Major), cmp.Compare(x.Dev.Minor, y.Dev.Minor))
	})
	return out, nil
}

// trackedAs is the generation and number that a program is told. It notes them
// together with what it copies from an image, and nothing says which of the held
// ones that is: so the number is that of the oldest. Where one of them is of another
// generation than the map, which began anew since, no note of it may ever be
// continued: then the generation is one that no map has.
func trackedAs(newest cbt.Info, held []snapshot.DeviceInfo) (cbt.Generation, uint8) {
	number := newest.Number
	for _, d := range held {
		if d.Generation != newest.Generation.String() {
			sum := sha256.Sum256(append([]byte("held over a new beginning"), append(newest.Generation[:], newest.Number)...))
			return cbt.Generation(sum[:16]), newest.Number
		}
		number = min(number, d.Number)
	}
	return newest.Generation, number
}

// mapOf is the change map of a tracked device.
func (b *blksnapSystem) mapOf(dev abi.Dev) (string, *cbt.Map, error) {
	name, err := b.name(dev)
	if err != nil {
		return "", nil, untracked(err)
	}
	m, err := b.devices.Changes(name)
	if err != nil {
		return "", nil, fmt.Errorf("%w: %w", blksnap.ErrUntracked, err)
	}
	return name, m, nil
}

// untracked is the error for a device that is there, and not tracked; err is why
// it has no name, nil: it has one.
func untracked(err error) error {
	if err == nil || errors.Is(err, blksnap.ErrNoDevice) {
		return cmp.Or(err, blksnap.ErrUntracked)
	}
	return fmt.Errorf("%w: %v", blksnap.ErrUntracked, err)
}

func (b *blksnapSystem) Table(dev abi.Dev) (blksnap.Table, error) {
	_, m, err := b.mapOf(dev)
	if err != nil {
		return nil, err
	}
	c, ok := m.Newest()
	if !ok {
		return nil, blksnap.ErrUntracked
	}
	return c, nil
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
	name := b.imageOf(dev)
	if name == "" {
		all, err := b.Tracked()
		if err != nil {
			return err
		}
		var found error
		if name, found = b.name(dev); found != nil || !slices.ContainsFunc(all, func(t blksnap.Tracking) bool { return t.Dev == dev }) {
			return untracked(found)
		}
	}
	m, err := b.devices.Changes(name)
	if err != nil {
		return fmt.Errorf("%w: %w", blksnap.ErrUntracked, err)
	}
	all := block.Range{Len: m.Info().Size}
	for _, r := range ranges {
		if r.End() > all.End() {
			return fmt.Errorf("%v of a device of %d bytes: %w", r, all.Len, blksnap.ErrRange)
		}
	}
	for _, r := range merged(ranges) {
		if err := m.MarkDirty(r); err != nil {
			return fmt.Errorf("%w: %w", blksnap.ErrRange, err)
		}
	}
	return nil
}

// merged puts ranges that overlap or touch together: a million of them may each be
// of the whole device.
func merged(ranges []block.Range) (out []block.Range) {
	for _, r := range slices.SortedFunc(slices.Values(ranges), func(a, b block.Range) int { return cmp.Compare(a.Off, b.Off) }) {
		if n := len(out); n > 0 && r.Off <= out[n-1].End() {
			out[n-1].Len = max(out[n-1].End(), r.End()) - out[n-1].Off
			continue
		}
		out = append(out, r)
	}
	return out
}

func (b *blksnapSystem) Create(devs []abi.Dev) (abi.ID, error) {
	req := snapshot.Request{Low: 512 << 20}
	for _, dev := range devs {
		name, err := b.name(dev)
		if errors.Is(err, blksnap.ErrForeign) && b.imageOf(dev) == "" {
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
	b.settleForeign()
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, name := range req.Devices {
		b.tracked[name] = true
	}
	return abi.ID(id), err
}

// settleForeign ends the conditions of what a program asked for in vain and is served by now.
func (b *blksnapSystem) settleForeign() {
	if !slices.ContainsFunc(b.health.List(), func(c health.Condition) bool { return c.Code == "snapshot-foreign-device" }) {
		return
	}
	for _, d := range b.devices.List() {
		for _, path := range []string{d.Spec.Backing, d.Node} {
			if dev, ok := numberOf(path); ok {
				b.health.Clear("snapshot-foreign-device", dev.String())
			}
		}
	}
}

func (b *blksnapSystem) Append(id abi.ID, dev abi.Dev, ranges []block.Range) error {
	path, err := pathOf(dev)
	if err != nil {
		return err
	}
	sum := int64(0)
	for _, r := range ranges {
		if r.Off%diff.Align != 0 || r.Len%diff.Align != 0 {
			return fmt.Errorf("%v: %w: whole pages of %d bytes", r, blksnap.ErrRange, diff.Align)
		}
		if sum < 1<<40 {
			sum += min(r.Len, 1<<40)
		}
	}
	i, err := b.devices.Snapshot(snapshot.ID(id))
	if err != nil {
		return snapshotError(err)
	}
	if sum < i.Chunk+2*diff.Align { // less than a chunk with its tables: the module wastes it too
		return nil
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

// Event passes over that the storage is full: what it spoils follows, device by device.
func (b *blksnapSystem) Event(ctx context.Context, id abi.ID, after uint64) (blksnap.Event, error) {
	for {
		events, err := b.devices.Events(ctx, snapshot.FormatID(snapshot.ID(id)), after)
		if err != nil {
			return blksnap.Event{}, snapshotError(err)
		}
		if len(events) == 0 {
			return blksnap.Event{}, context.Cause(ctx)
		}
		for _, e := range events {
			if e.Kind != diff.Overflow {
				return b.eventOf(e), nil
			}
			after = e.Sequence
		}
	}
}

func (b *blksnapSystem) eventOf(e serve.Event) blksnap.Event {
	out := blksnap.Event{Sequence: e.Sequence, Time: e.Time, Code: abi.EventCorrupted, Errno: syscall.EIO}
	if e.Kind == diff.LowSpace {
		out.Code, out.Bytes = abi.EventLowFreeSpace, e.Bytes
	}
	if errno := syscall.Errno(0); errors.As(e.Cause, &errno) && errno != 0 {
		out.Errno = errno
	}
	for dev, name := range b.numbers() {
		if name == e.Device {
			out.Original = dev
		}
	}
	return out
}

func (b *blksnapSystem) OnImages(f func()) { b.devices.OnImages(f) }

// snapshotError translates, and keeps the text.
func snapshotError(err error) error {
	for _, c := range []struct{ is, as error }{{snapshot.ErrNoSuch, blksnap.ErrNoSnapshot}, {snapshot.ErrNoDevice, blksnap.ErrNoDevice}, {snapshot.ErrTaken, blksnap.ErrTaken},
		{snapshot.ErrNotTaken, blksnap.ErrNotTaken}, {snapshot.ErrNoStorage, blksnap.ErrNoStorage}, {diff.ErrRefused, blksnap.ErrRange},
		{snapshot.ErrRequest, syscall.EINVAL}, {serve.ErrRefused, syscall.EINVAL}, {serve.ErrInUse, syscall.EBUSY}} {
		if errors.Is(err, c.is) {
			return fmt.Errorf("%w: %w", c.as, err)
		}
	}
	return err
}
