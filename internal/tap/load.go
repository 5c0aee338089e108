package tap

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"tidemark/bpf"
)

// Config is what a tap is started with.
type Config struct {
	Instance, Group string
	RingBytes       int // power of two, from 64 KiB
	Targets         []Target
	Options
}

// Options are for machines, and tests, that need less than everything.
type Options struct {
	MetadataOnly bool // do not capture payloads
	MapOnly      bool // keep the change map and nothing else: no record, no gap, no bio in flight
}

// Start loads the programs, calibrates them, pins and attaches everything. When
// it returns, every write queued from now on is captured. ErrExists: adopt or
// discard what is there.
func Start(cfg Config) (*Tap, error) {
	p, err := pinsOf(cfg.Instance, cfg.Group)
	if err != nil {
		return nil, err
	}
	if err := cfg.check(); err != nil {
		return nil, err
	}
	types := btf.NewCache() // read once: it is the most expensive part
	if err := errors.Join(checkKernel(types), rlimit.RemoveMemlock(), mountBPFFS()); err != nil {
		return nil, err
	}
	if _, err := os.Stat(p.path("meta")); err == nil {
		return nil, fmt.Errorf("%s: %w", p.dir, ErrExists)
	}
	if err := p.remove(); err != nil { // half a tap of a start that was killed
		return nil, err
	}
	t := &Tap{pins: p, targets: slices.Clone(cfg.Targets), ringSize: uint64(cfg.RingBytes), options: cfg.Options}
	if _, err := rand.Read(t.ident[:]); err != nil {
		return nil, err
	}
	if err := t.start(bpf.Tap, layout, types); err != nil {
		return nil, errors.Join(err, t.Remove())
	}
	return t, nil
}

func (c Config) check() error {
	if c.RingBytes < 64<<10 || c.RingBytes > 1<<30 || c.RingBytes&(c.RingBytes-1) != 0 {
		return fmt.Errorf("ring of %d bytes: want a power of two from 64 KiB to 1 GiB: %w", c.RingBytes, ErrConfig)
	}
	if len(c.Targets) == 0 || len(c.Targets) > disksMax {
		return fmt.Errorf("%d disks: want 1 to %d: %w", len(c.Targets), disksMax, ErrConfig)
	}
	onWhole := map[uint32]int{}
	for i, t := range c.Targets {
		onWhole[t.Whole]++
		switch {
		case t.Len > 1<<62 || t.Start > 1<<62:
			return fmt.Errorf("disk %s: %d bytes from %d: no disk is that large: %w", t.Name, t.Len, t.Start, ErrConfig)
		case t.Len <= 0 || t.Start < 0 || t.Len%512 != 0 || t.Start%512 != 0:
			return fmt.Errorf("disk %s: %d bytes from %d: want whole sectors: %w", t.Name, t.Len, t.Start, ErrConfig)
		case t.BlockSize < 512 || t.BlockSize&(t.BlockSize-1) != 0:
			return fmt.Errorf("disk %s: block size %d: want a power of two from 512: %w", t.Name, t.BlockSize, ErrConfig)
		case onWhole[t.Whole] > targetsMax:
			return fmt.Errorf("disk %s: more than %d partitions of one disk: %w", t.Name, targetsMax, ErrConfig)
		}
		for _, o := range c.Targets[:i] {
			switch {
			case o.Whole != t.Whole:
			case o.Start < t.Start+t.Len && t.Start < o.Start+o.Len:
				return fmt.Errorf("disks %s and %s overlap: %w", o.Name, t.Name, ErrConfig)
			case o.DiskSeq != t.DiskSeq || o.BioBased != t.BioBased || o.Pass != t.Pass:
				return fmt.Errorf("disks %s and %s are parts of one disk, but said to be of different ones: %w", o.Name, t.Name, ErrConfig)
			}
		}
	}
	return nil
}

// places lays the targets' parts of change map and gap map one behind the other.
func (t *Tap) places() (changePages, gapPages uint32) {
	var change, gap uint64
	t.base = t.base[:0]
	for _, target := range t.targets {
		n := blocksOf(target)
		t.base = append(t.base, offsets{change: change, gap: gap, blocks: n})
		change += (n + 4095) &^ 4095
		gap += (n + 63) / 64
	}
	return uint32(change / pageSize), uint32((gap*8 + pageSize - 1) / pageSize)
}

// hooks are what a tap of these disks is attached to. Ends before beginnings, so
// that no bio is seen to begin whose end could be missed. A program that would
// have nothing to do costs each write of the machine 50 ns.
func (t *Tap) hooks() []string {
	var out []string
	if !t.options.MapOnly {
		out = append(out, "rq_complete", "bio_complete")
	}
	passes := func(target Target) bool { return target.Pass.Kind != PassNone }
	if slices.ContainsFunc(t.targets, passes) {
		out = append(out, "rq_issue")
	}
	return append(out, "queue")
}

// allHooks are those that there are programs for.
var allHooks = []string{"queue", "rq_complete", "bio_complete", "rq_issue"}

func (t *Tap) start(object []byte, layout int, types *btf.Cache) error {
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(object))
	if err != nil {
		return err
	}
	changePages, gapPages := t.places()
	spec.Maps["change"].MaxEntries = changePages
	spec.Maps["gaps"].MaxEntries = gapPages
	spec.Maps["ring"].MaxEntries = uint32(t.ringSize)
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{Cache: types})
	if err != nil {
		return fmt.Errorf("loading the tap's programs: %w", err)
	}
	defer coll.Close()
	if err := t.adoptMaps(coll.Maps); err != nil {
		return err
	}
	t.setUp(types)
	if err := t.putTargets(); err != nil {
		return err
	}
	if err := os.MkdirAll(t.pins.dir, 0o700); err != nil {
		return err
	}
	for name, m := range t.maps {
		if err := m.Pin(t.pins.path("map_" + name)); err != nil {
			return err
		}
	}
	if err := t.attach(coll); err != nil {
		return err
	}
	t.meta = meta{Layout: layout, Identity: t.ident, Targets: t.targets, Ring: int(t.ringSize), Options: t.options, Programs: programsOf(object)}
	mm, err := newMetaMap(t.meta)
	if err != nil {
		return err
	}
	defer mm.Close()
	return mm.Pin(t.pins.path("meta")) // last: a tap without it is half a tap
}

// adoptMaps takes clones of maps over and maps them into memory.
func (t *Tap) adoptMaps(maps map[string]*ebpf.Map) error {
	t.maps = map[string]*ebpf.Map{}
	for name, m := range maps {
		if name == "scratch" || name[0] == '.' {
			continue
		}
		c, err := m.Clone()
		if err != nil {
			return err
		}
		t.maps[name] = c
	}
	return t.mapMemory()
}

func (t *Tap) mapMemory() error {
	st, err := t.mmap("state", int(unsafe.Sizeof(state{})))
	if err != nil {
		return err
	}
	t.state = (*state)(unsafe.Pointer(&st[0]))
	counts, err := t.mmap("counts", disksMax*int(unsafe.Sizeof(counters{})))
	if err != nil {
		return err
	}
	t.counts = unsafe.Slice((*counters)(unsafe.Pointer(&counts[0])), disksMax)
	if t.change, err = t.mmap("change", int(t.maps["change"].MaxEntries())*pageSize); err != nil {
		return err
	}
	gaps, err := t.mmap("gaps", int(t.maps["gaps"].MaxEntries())*pageSize)
	if err != nil {
		return err
	}
	t.gaps = unsafe.Slice((*uint64)(unsafe.Pointer(&gaps[0])), len(gaps)/8)
	return t.mapRing()
}

func (t *Tap) mmap(name string, size int) ([]byte, error) {
	page := unix.Getpagesize()
	size = (size + page - 1) / page * page
	b, err := unix.Mmap(t.maps[name].FD(), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("mapping the tap's %s: %w", name, err)
	}
	t.mappings = append(t.mappings, b)
	return b, nil
}

// mapRing maps the consumer's page, then the producer's with the data twice
// behind it, so that a record never wraps (Linux, kernel/bpf/ringbuf.c).
func (t *Tap) mapRing() error {
	fd, page := t.maps["ring"].FD(), unix.Getpagesize()
	cons, err := unix.Mmap(fd, 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("mapping the ring's consumer: %w", err)
	}
	t.mappings = append(t.mappings, cons)
	data, err := unix.Mmap(fd, int64(page), page+2*int(t.ringSize), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("mapping the ring: %w", err)
	}
	t.mappings = append(t.mappings, data)
	t.consumer = (*uint64)(unsafe.Pointer(&cons[0]))
	t.producer = (*uint64)(unsafe.Pointer(&data[0]))
	t.ring = data[page:]
	return nil
}

// setUp fills the state in that the programs read. Ends are tracked from the
// start: bios older than the tap are on their way.
func (t *Tap) setUp(types *btf.Cache) {
	*t.state = state{RingSize: t.ringSize, PayloadMax: min(t.ringSize/4, payloadMax), Ends: endsOn, Change: 1}
	for _, target := range t.targets {
		if target.BioBased {
			t.state.Remapped = 1
		}
	}
	t.watchControllers()
	if t.options.MapOnly {
		t.state.Payload, t.state.Ends, t.noPayload = payloadMap, endsOff, ErrMetadataOnly
		return
	}
	t.calibrate(types)
}

// watchControllers has the programs look at commands of no disk where one of the
// group's is NVMe.
func (t *Tap) watchControllers() {
	for _, target := range t.targets {
		if target.Pass.Kind == PassNVMe {
			atomic.StoreUint32(&t.state.NVMe, target.Pass.Offset+1)
		}
	}
}

// calibrate has payloads captured from now on, if it can be shown that they are
// the right ones. Otherwise only ranges are, and noPayload says why.
func (t *Tap) calibrate(types *btf.Cache) {
	if t.options.MetadataOnly {
		t.noPayload = ErrMetadataOnly
		return
	}
	c, err := calibrate(types)
	if t.noPayload = err; err != nil {
		return
	}
	t.state.VABase, t.state.VAShift = c.base, c.shift
	atomic.StoreUint32(&t.state.Payload, payloadYes) // last: a program may be running
}

func (t *Tap) putTargets() error {
	wholes := map[uint32]*whole{}
	for i, target := range t.targets {
		w := wholes[target.Whole]
		if w == nil {
			w = &whole{DiskSeq: target.DiskSeq, Slot: uint32(i), Passthrough: target.Pass.Kind, PassOffset: target.Pass.Offset}
			wholes[target.Whole] = w
		}
		if target.BioBased {
			w.BioBased = 1
		}
		w.T[w.Count] = targetOf(target, i, t.base[i])
		w.Count++
	}
	for dev, w := range wholes {
		if len(wholes) == 1 {
			if err := t.maps["only"].Put(uint32(0), w); err != nil {
				return err
			}
			t.state.Only = dev
		}
		if err := t.maps["targets"].Put(dev, w); err != nil {
			return err
		}
	}
	return nil
}

func targetOf(t Target, disk int, o offsets) target {
	return target{Start: uint64(t.Start) / 512, Length: uint64(t.Len) / 512, Disk: uint32(disk),
		Shift: shiftOf(t.BlockSize) - 9, Change: o.change, Gap: o.gap}
}

// attach fills the tables, then attaches the stubs.
func (t *Tap) attach(coll *ebpf.Collection) error {
	for _, h := range allHooks {
		if err := coll.Maps["to_"+h].Put(uint32(0), coll.Programs[h]); err != nil {
			return fmt.Errorf("table of %s: %w", h, err)
		}
	}
	mark, err := coll.Programs["bookmark"].Clone()
	if err != nil {
		return err
	}
	t.mark = mark
	if err := mark.Pin(t.pins.path("bookmark")); err != nil {
		return err
	}
	for _, h := range t.hooks() {
		stub := coll.Programs["stub_"+h]
		l, err := link.AttachTracing(link.TracingOptions{Program: stub})
		if err != nil {
			return fmt.Errorf("attaching to the %s tracepoint: %w", h, err)
		}
		err = errors.Join(l.Pin(t.pins.path("link_"+h)), stub.Pin(t.pins.path("stub_"+h)), l.Close())
		if err != nil {
			return err
		}
	}
	return t.loadStubs()
}

func (t *Tap) loadStubs() error {
	t.stubs = map[string]*ebpf.Program{}
	for _, h := range t.hooks() {
		p, err := ebpf.LoadPinnedProgram(t.pins.path("stub_"+h), nil)
		if err != nil {
			return err
		}
		t.stubs[h] = p
	}
	return nil
}

// programsOf tells the programs of one object from those of any other.
func programsOf(object []byte) string {
	sum := sha256.Sum256(object)
	return hex.EncodeToString(sum[:])
}

// Adopt takes a pinned tap over and puts this build's programs into it, if it
// has others (the kernel takes seconds to look through them), without a moment in which nothing is captured; the tap may be of an older layout, back
// to layoutOldest. ErrNoPins, ErrLayout.
func Adopt(instance, group string) (*Tap, error) {
	p, err := pinsOf(instance, group)
	if err != nil {
		return nil, err
	}
	m, err := p.meta()
	if err != nil {
		return nil, fmt.Errorf("group %s: %w", group, err)
	}
	if err := rlimit.RemoveMemlock(); err != nil {
		return nil, err
	}
	t := &Tap{pins: p, targets: m.Targets, ident: m.Identity, ringSize: uint64(m.Ring), options: m.Options, meta: m}
	types := btf.NewCache()
	if err := t.adopt(types); err != nil {
		return nil, errors.Join(fmt.Errorf("taking over the tap of group %s: %w", group, err), t.Close())
	}
	switch atomic.LoadUint32(&t.state.Payload) {
	case payloadNo:
		t.calibrate(types) // what stood in its way may be gone
	case payloadMap:
		t.noPayload = ErrMetadataOnly
	}
	return t, nil
}

func (t *Tap) adopt(types *btf.Cache) error {
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(bpf.Tap))
	if err != nil {
		return err
	}
	t.places()
	t.maps = map[string]*ebpf.Map{}
	for name := range spec.Maps {
		if name == "scratch" || name[0] == '.' {
			continue
		}
		m, err := ebpf.LoadPinnedMap(t.pins.path("map_"+name), nil)
		if err != nil {
			return err
		}
		t.maps[name] = m
	}
	for _, h := range t.hooks() {
		if _, err := os.Stat(t.pins.path("link_" + h)); err != nil {
			return err // not attached: nothing was captured
		}
	}
	if t.meta.Programs == programsOf(bpf.Tap) {
		if t.mark, err = ebpf.LoadPinnedProgram(t.pins.path("bookmark"), nil); err == nil {
			return errors.Join(t.loadStubs(), t.mapMemory())
		}
	}
	return t.upgrade(spec, types)
}

// upgrade puts the programs of spec in the place of those that the tap has.
func (t *Tap) upgrade(spec *ebpf.CollectionSpec, types *btf.Cache) error {
	for _, h := range allHooks {
		delete(spec.Programs, "stub_"+h)
	}
	spec.Maps["change"].MaxEntries = t.maps["change"].MaxEntries()
	spec.Maps["gaps"].MaxEntries = t.maps["gaps"].MaxEntries()
	spec.Maps["ring"].MaxEntries = uint32(t.ringSize)
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: t.maps, Cache: types})
	if err != nil {
		return fmt.Errorf("loading the tap's programs: %w", err)
	}
	defer coll.Close()
	t.meta.Programs = "" // for now they are from two
	if err := t.pins.replaceMeta(t.meta); err != nil {
		return err
	}
	for _, h := range allHooks {
		if err := t.maps["to_"+h].Put(uint32(0), coll.Programs[h]); err != nil {
			return err
		}
	}
	if t.mark, err = coll.Programs["bookmark"].Clone(); err != nil {
		return err
	}
	if err := t.repinMark(); err != nil {
		return err
	}
	if err := errors.Join(t.loadStubs(), t.mapMemory()); err != nil {
		return err
	}
	if t.meta.Layout != layout {
		t.watchControllers()
		t.meta.Layout = layout
	}
	t.meta.Programs = programsOf(bpf.Tap)
	return t.pins.replaceMeta(t.meta)
}

// repinMark pins the program that puts bookmarks in the place of an older one.
func (t *Tap) repinMark() error {
	path := t.pins.path("bookmark")
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return t.mark.Pin(path)
}
