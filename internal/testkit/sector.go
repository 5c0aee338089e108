package testkit

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

// Sector is the unit of Fill and Check, in bytes.
const Sector = 512

const sectorMagic = 0x6b72616d65646974 // "tidemark"

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Fill writes into every sector of p which disk and place it is for and in
// which write it came, so that a copy tells by itself where it is wrong.
// off is the byte offset of p on the disk; off and len(p) are multiples of Sector.
// Sequence 0 is for sectors never written.
func Fill(p []byte, disk int, off int64, seq uint64) {
	for at := 0; at < len(p); at += Sector {
		s := p[at : at+Sector]
		lba := uint64(off+int64(at)) / Sector
		binary.LittleEndian.PutUint64(s[0:], sectorMagic)
		binary.LittleEndian.PutUint32(s[8:], uint32(disk))
		binary.LittleEndian.PutUint64(s[16:], lba)
		binary.LittleEndian.PutUint64(s[24:], seq)
		x := seq*0x9e3779b97f4a7c15 + lba + uint64(disk)<<48 + 1
		for i := 32; i < Sector; i += 8 { // content that does not compress to nothing
			x ^= x << 13
			x ^= x >> 7
			x ^= x << 17
			binary.LittleEndian.PutUint64(s[i:], x)
		}
		binary.LittleEndian.PutUint32(s[12:], sectorSum(s))
	}
}

func sectorSum(s []byte) uint32 {
	return crc32.Update(crc32.Checksum(s[:12], castagnoli), castagnoli, s[16:])
}

// Check gives the sequence of the write that each sector of p came with, 0 for
// one that is all zero. The first sector that is torn or belongs elsewhere is an error.
func Check(p []byte, disk int, off int64) ([]uint64, error) {
	seqs := make([]uint64, 0, len(p)/Sector)
	var zero [Sector]byte
	for at := 0; at < len(p); at += Sector {
		s := p[at : at+Sector]
		if [Sector]byte(s) == zero {
			seqs = append(seqs, 0)
			continue
		}
		lba := uint64(off+int64(at)) / Sector
		if binary.LittleEndian.Uint64(s) != sectorMagic || binary.LittleEndian.Uint32(s[12:]) != sectorSum(s) {
			return seqs, fmt.Errorf("sector %d of disk %d: torn or foreign: it begins with % x", lba, disk, s[:32])
		}
		gotDisk, gotLBA := binary.LittleEndian.Uint32(s[8:]), binary.LittleEndian.Uint64(s[16:])
		if int(gotDisk) != disk || gotLBA != lba {
			return seqs, fmt.Errorf("sector %d of disk %d holds sector %d of disk %d", lba, disk, gotLBA, gotDisk)
		}
		seqs = append(seqs, binary.LittleEndian.Uint64(s[24:]))
	}
	return seqs, nil
}
