package drain

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"

	"tidemark/internal/stream"
	"tidemark/internal/vfs"
)

type stage uint8

const (
	records stage = 1
	filling stage = 2
)

// state is a consumer's: what its batches follow from. Stored; see encode.
type state struct {
	group  [16]byte
	number uint64 // of the newest committed batch
	disk   int    // allDisks: all of the group
	most   int64  // bytes of payload of a batch, unless one record has more
	ranges bool   // ranges to read from the disk are wanted while a gap is open

	stage stage
	at    stream.Position // the copy was right at it last
	time  int64           // of at
	place place           // records: the next one; filling: where what is to be filled begins
	until uint64          // filling: the segment that the fill reaches to at least
	next  int             // filling: the disk ...
	off   int64           // ... and offset to go on at
	told  uint64          // filling: the segment whose ranges are told next; 0: of place
	asked bool            // filling: because it was cleared
	leapt bool            // number is that of no batch: it was cleared, and has committed none since
	mixed stream.Position // filling: the copy may have content of up to it, of batches that are not committed
}

const allDisks = -1

// The file: two slots, written in turn and in place, and a note of how far
// batches were handed out, which is not synced: after a power cut a consumer
// gets what it has not committed once more. Little-endian.
const (
	slotSize   = 128
	slotEvery  = 4096 // bytes between them: no write touches two
	noteAt     = 2 * slotEvery
	noteSize   = 24
	fileSize   = 3 * slotEvery
	slotFormat = 1
)

var (
	slotMagic  = []byte("TIDECON1")
	noteMagic  = []byte("TIDEGIV1")
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	le         = binary.LittleEndian
)

func (v *state) encode(turn uint64) []byte {
	b := make([]byte, 0, slotSize)
	b = append(b, slotMagic...)
	b = le.AppendUint32(b, slotFormat)
	b = append(b, byte(v.stage), flag(v.ranges)|flag(v.asked)<<1|flag(v.leapt)<<2, 0, 0)
	b = le.AppendUint64(b, turn)
	b = append(b, v.group[:]...)
	b = le.AppendUint64(b, v.number)
	b = le.AppendUint32(b, uint32(int32(v.disk)))
	b = le.AppendUint32(b, uint32(v.place.Entry))
	for _, n := range [...]uint64{uint64(v.most), uint64(v.at), uint64(v.time), v.place.Sequence, v.until, uint64(v.off), v.told, uint64(v.mixed)} {
		b = le.AppendUint64(b, n)
	}
	b = le.AppendUint32(b, uint32(v.next))
	b = b[:slotSize-4]
	return le.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

func flag(b bool) byte {
	if b {
		return 1
	}
	return 0
}

func decode(b []byte) (v state, turn uint64, ok bool) {
	if len(b) < slotSize || !bytes.Equal(b[:8], slotMagic) || le.Uint32(b[8:]) != slotFormat ||
		crc32.Checksum(b[:slotSize-4], castagnoli) != le.Uint32(b[slotSize-4:]) {
		return v, 0, false
	}
	v.stage, v.ranges, v.asked, v.leapt = stage(b[12]), b[13]&1 != 0, b[13]&2 != 0, b[13]&4 != 0
	turn = le.Uint64(b[16:])
	copy(v.group[:], b[24:])
	v.number = le.Uint64(b[40:])
	v.disk, v.place.Entry = int(int32(le.Uint32(b[48:]))), int(le.Uint32(b[52:]))
	v.most, v.at, v.time = int64(le.Uint64(b[56:])), stream.Position(le.Uint64(b[64:])), int64(le.Uint64(b[72:]))
	v.place.Sequence, v.until, v.off = le.Uint64(b[80:]), le.Uint64(b[88:]), int64(le.Uint64(b[96:]))
	v.told, v.mixed, v.next = le.Uint64(b[104:]), stream.Position(le.Uint64(b[112:])), int(le.Uint32(b[120:]))
	return v, turn, v.stage == records || v.stage == filling
}

// file is where a consumer's state is kept. It is used by one goroutine at a time.
type file struct {
	fs   vfs.FS
	path string
	turn uint64
}

// create makes the file, whole and stable or not at all.
func (f *file) create(v *state) error {
	b := make([]byte, fileSize)
	copy(b, v.encode(0))
	f.turn = 0
	return vfs.WriteWhole(f.fs, f.path, b)
}

// load reads the newer good slot, and how far batches were given. ErrState: both
// slots are damaged; nothing is guessed.
func (f *file) load() (v state, given uint64, err error) {
	b, err := f.fs.ReadFile(f.path)
	if err != nil {
		return v, 0, err
	}
	found := false
	for at := 0; at <= slotEvery && at+slotSize <= len(b); at += slotEvery {
		if have, turn, ok := decode(b[at : at+slotSize]); ok && (!found || turn > f.turn) {
			v, f.turn, found = have, turn, true
		}
	}
	if !found {
		return v, 0, fmt.Errorf("%s: %w", f.path, ErrState)
	}
	if len(b) >= noteAt+noteSize {
		given = decodeNote(b[noteAt : noteAt+noteSize])
	}
	return v, given, nil
}

func decodeNote(b []byte) uint64 {
	if !bytes.Equal(b[:8], noteMagic) || crc32.Checksum(b[:noteSize-4], castagnoli) != le.Uint32(b[noteSize-4:]) {
		return 0
	}
	return le.Uint64(b[8:])
}

// save makes a state durable. After an error the one before counts, or this one,
// and its slot is the one that is written next.
func (f *file) save(v *state) error {
	turn := f.turn + 1
	if err := f.write(v.encode(turn), int64(turn%2*slotEvery), true); err != nil {
		return err
	}
	f.turn = turn
	return nil
}

// note says that batches up to number were given. It survives the daemon, not the machine.
func (f *file) note(number uint64) error {
	b := le.AppendUint64(append(make([]byte, 0, noteSize), noteMagic...), number)
	b = append(b, 0, 0, 0, 0)
	return f.write(le.AppendUint32(b, crc32.Checksum(b, castagnoli)), noteAt, false)
}

func (f *file) write(b []byte, at int64, sync bool) error {
	out, err := f.fs.OpenFile(f.path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = out.WriteAt(b, at)
	if err == nil && sync {
		err = out.Sync()
	}
	return errors.Join(err, out.Close())
}

func (f *file) remove() error {
	if err := f.fs.Remove(f.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
