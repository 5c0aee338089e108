package mount

import (
	"encoding/binary"
	"fmt"
	"io"
	"strings"

	"tidemark/internal/block"
)

// Partition is an entry of a partition table.
type Partition struct {
	Number int
	Range  block.Range // bytes of the disk
}

const (
	partitionsMax = 256 // of one table: more is taken for damage
	mbrEntries    = 446
)

// Partitions reads the table of a disk, GPT or MBR with logical partitions. A
// disk without one has none. The kernel's own reader is not relied on: not every kernel has it.
func Partitions(disk block.Device) ([]Partition, error) {
	if disk.Size() < 1024 {
		return nil, nil
	}
	mbr := make([]byte, 512)
	if err := readFull(disk, mbr, 0); err != nil {
		return nil, err
	}
	if !signed(mbr) || isBootSector(mbr) {
		return nil, nil
	}
	for _, sector := range []int64{512, 4096} { // logical block sizes that disks have
		parts, ok, err := readGPT(disk, sector)
		if ok || err != nil {
			return parts, err
		}
	}
	return readMBR(disk, mbr)
}

func signed(mbr []byte) bool { return mbr[510] == 0x55 && mbr[511] == 0xaa }

// isBootSector is true for a FAT or NTFS that begins with the disk: its boot
// sector has the same signature and code where a table would be.
func isBootSector(b []byte) bool {
	return string(b[54:58]) == "FAT1" || string(b[82:87]) == "FAT32" || string(b[3:11]) == "NTFS    " || string(b[3:11]) == "EXFAT   "
}

func readGPT(disk block.Device, sector int64) ([]Partition, bool, error) {
	head := make([]byte, 92)
	if err := readFull(disk, head, sector); err != nil || string(head[:8]) != "EFI PART" {
		return nil, false, err
	}
	table, count, size := binary.LittleEndian.Uint64(head[72:]), binary.LittleEndian.Uint32(head[80:]), binary.LittleEndian.Uint32(head[84:])
	if count > partitionsMax || size < 128 || size > 4096 || table > uint64(disk.Size()/sector) {
		return nil, true, fmt.Errorf("the disk's GPT is damaged: %d entries of %d bytes at block %d", count, size, table)
	}
	entries := make([]byte, int64(count)*int64(size))
	if err := readFull(disk, entries, int64(table)*sector); err != nil {
		return nil, true, err
	}
	var out []Partition
	for i := range int(count) {
		e := entries[i*int(size):]
		first, last := binary.LittleEndian.Uint64(e[32:]), binary.LittleEndian.Uint64(e[40:])
		if [16]byte(e[:16]) == [16]byte{} || last < first || last >= uint64(disk.Size()/sector) {
			continue
		}
		out = append(out, Partition{i + 1, block.Range{Off: int64(first) * sector, Len: int64(last-first+1) * sector}})
	}
	return out, true, nil
}

func readMBR(disk block.Device, mbr []byte) ([]Partition, error) {
	var out []Partition
	add := func(number int, r block.Range) {
		if !r.Empty() && block.CheckBounds(r, disk.Size()) == nil {
			out = append(out, Partition{number, r})
		}
	}
	var extended int64
	for i := range 4 {
		kind, r := mbrEntry(mbr, i)
		if kind == 5 || kind == 0xf || kind == 0x85 {
			extended = r.Off
		} else if kind != 0 {
			add(i+1, r)
		}
	}
	next := extended
	for n := 5; next > 0 && n < partitionsMax; n++ {
		if block.CheckBounds(block.Range{Off: next, Len: 512}, disk.Size()) != nil {
			break
		}
		ebr := make([]byte, 512)
		if err := readFull(disk, ebr, next); err != nil {
			return nil, err
		}
		if !signed(ebr) {
			break
		}
		_, r := mbrEntry(ebr, 0)
		r.Off += next
		add(n, r)
		_, link := mbrEntry(ebr, 1)
		if link.Off == 0 {
			break
		}
		next = extended + link.Off
	}
	return out, nil
}

func mbrEntry(mbr []byte, i int) (kind byte, r block.Range) {
	e := mbr[mbrEntries+16*i:]
	return e[4], block.Range{
		Off: int64(binary.LittleEndian.Uint32(e[8:])) * block.SectorSize,
		Len: int64(binary.LittleEndian.Uint32(e[12:])) * block.SectorSize,
	}
}

func readFull(d io.ReaderAt, p []byte, off int64) error {
	if n, err := d.ReadAt(p, off); n < len(p) {
		return fmt.Errorf("reading the partition table: %w", err)
	}
	return nil
}

// choose finds the range to mount: partition number, or the whole disk for 0.
func choose(view block.Device, number int) (block.Range, error) {
	whole := block.Range{Len: view.Size()}
	parts, err := Partitions(view)
	switch {
	case err != nil:
		return whole, err
	case number == 0 && len(parts) == 0:
		return whole, nil
	case number == 0:
		return whole, fmt.Errorf("%w: choose one of: %s", ErrPartition, list(parts))
	case len(parts) == 0:
		return whole, fmt.Errorf("%w: the disk has no partition table; leave the number out", ErrPartition)
	}
	for _, p := range parts {
		if p.Number == number {
			return p.Range, nil
		}
	}
	return whole, fmt.Errorf("%w: there is no %d; choose one of: %s", ErrPartition, number, list(parts))
}

func list(parts []Partition) string {
	var out []string
	for _, p := range parts {
		out = append(out, fmt.Sprintf("%d (%d MiB from byte %d)", p.Number, p.Range.Len>>20, p.Range.Off))
	}
	return strings.Join(out, ", ")
}
