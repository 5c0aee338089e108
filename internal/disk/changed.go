package disk

import (
	"fmt"
	"strconv"
	"strings"

	"tidemark/internal/block"
)

// Changed names what turns a disk that was captured into unknown territory,
// between two looks at it: none where nothing did. new is nil for a disk that is gone.
func Changed(old, new *Info) []string {
	if new == nil {
		return []string{"the disk is gone"}
	}
	var out []string
	differ := func(what string, a, b any) {
		if a != b {
			out = append(out, fmt.Sprintf("%s changed from %v to %v", what, a, b))
		}
	}
	differ("device number", old.Dev, new.Dev)
	differ("whole disk", old.Whole, new.Whole)
	differ("disk sequence number", old.DiskSeq, new.DiskSeq)
	differ("start (bytes)", old.Start, new.Start)
	differ("size (bytes)", old.Size, new.Size)
	differ("logical sector size", old.LogicalSector, new.LogicalSector)
	differ("kind", old.Kind, new.Kind)
	differ("drive", old.Identity.ByID, new.Identity.ByID)
	differ("loop backing", old.backingText(), new.backingText())
	out = append(out, mappingChanged(old.Mapping, new.Mapping)...)
	differ("mounts that go past the block layer", old.daxPoints(), new.daxPoints())
	differ("mounts with inline encryption", old.inlinePoints(), new.inlinePoints())
	differ("stacked on it", strings.Join(old.Holders, " "), strings.Join(new.Holders, " "))
	return out
}

// mappingChanged compares the tables; the event number counts too, because
// some targets (a merge, a mirror) change the content under the same table.
func mappingChanged(a, b *Mapping) []string {
	switch {
	case a == nil && b == nil:
		return nil
	case a == nil || b == nil:
		return []string{"device-mapper mapping appeared or vanished"}
	case a.UUID != b.UUID:
		return []string{fmt.Sprintf("device-mapper UUID changed from %q to %q", a.UUID, b.UUID)}
	case a.Table != b.Table:
		return []string{"device-mapper table changed"}
	case a.Event != b.Event:
		return []string{fmt.Sprintf("device-mapper event number changed from %d to %d", a.Event, b.Event)}
	}
	return nil
}

// Fingerprint is a text that stays the same, within one boot, as long as the
// disk maps to the same bytes: to tell whether it changed while nobody looked.
func (i *Info) Fingerprint() string {
	f := fmt.Sprintf("%d %d %d %d %s %q", i.Dev, i.DiskSeq, i.Start, i.Size, i.Kind, i.backingText())
	if m := i.Mapping; m != nil {
		f += fmt.Sprintf(" %q %s %d", m.UUID, m.Table, m.Event)
	}
	return f
}

func (i *Info) backingText() string {
	if i.Backing == nil {
		return "none"
	}
	return fmt.Sprintf("%s at %d", i.Backing.File, i.Backing.Offset)
}

// Stat reads how much was written to the whole disk and discarded on it, in
// bytes since it appeared. enabled is false where the disk does not count.
func Stat(i *Info) (written, discarded uint64, enabled bool, err error) {
	f := strings.Fields(i.host.attr(i.Whole, "stat"))
	if len(f) < 11 {
		return 0, 0, false, fmt.Errorf("%s: statistics: %w", i.Whole, ErrNotFound)
	}
	sectors, err := strconv.ParseUint(f[6], 10, 64)
	if err != nil {
		return 0, 0, false, fmt.Errorf("%s: statistics: %w", i.Whole, err)
	}
	var dropped uint64
	if len(f) > 13 {
		if dropped, err = strconv.ParseUint(f[13], 10, 64); err != nil {
			return 0, 0, false, fmt.Errorf("%s: statistics: %w", i.Whole, err)
		}
	}
	// Bio-based disks have no switch and always count.
	enabled = i.host.attr(i.Whole, "queue/iostats") != "0"
	return sectors * block.SectorSize, dropped * block.SectorSize, enabled, nil
}

// InFlight is how many reads and writes the whole disk counts as issued and
// not ended. Bios that wait above the driver are not among them.
func InFlight(i *Info) (reads, writes int, err error) {
	if _, err := fmt.Sscan(i.host.attr(i.Whole, "inflight"), &reads, &writes); err != nil {
		return 0, 0, fmt.Errorf("%s: requests in flight: %w", i.Whole, ErrNotFound)
	}
	return reads, writes, nil
}
