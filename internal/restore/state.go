package restore

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// The state file, version 1. Integers are little-endian, sums are CRC-32C.
//
//	0   8   "TIDEREST"
//	8   4   version, 1
//	12  4   length L of the header
//	16  L   the header, JSON: source, target, size
//	    4   sum of everything before
//	then, one after another, an entry for each unit that was written, flushed and read back:
//	0   8   number of the unit
//	8   16  the first 16 bytes of the BLAKE3 hash of its content
//	24  4   sum of the 24 bytes before, continued from the sum of the header
//
// An entry that is cut off or has a wrong sum ends the list: it and what follows do not count.
const (
	stateMagic   = "TIDEREST"
	stateVersion = 1
	headerMax    = 64 << 10
	entryLen     = 8 + 16 + 4
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

type digest [16]byte

// header says what is restored to where.
type header struct {
	Source string `json:"source"`
	Target string `json:"target"`
	Size   int64  `json:"size"`
}

// state is what an interrupted restore leaves for the next run. Without a
// source identity it is kept nowhere.
type state struct {
	path   string
	header header
	done   map[int64]digest // of an earlier run with the same header
	there  bool             // a state file was there, whoever's
	other  bool             // it is of another restore to this very target, unfinished
	file   *os.File
	sum    uint32 // of the header: seeds the sums of the entries
}

// openState reads what an earlier run left. A state of another restore, or a
// damaged one, is as good as none.
func openState(path string, h header) *state {
	s := &state{path: path, header: h}
	raw, err := os.ReadFile(path)
	if err != nil {
		return s
	}
	s.there = true
	got, done, err := decodeState(raw)
	switch {
	case err != nil:
	case got == h && h.Source != "":
		s.done = done
	default:
		s.other = got.Target == h.Target
	}
	return s
}

// resumes says whether an earlier run of the same restore is continued.
func (s *state) resumes() bool { return s.done != nil }

func (s *state) restart() { s.done = nil }

// begin writes the header and what is known already, durably.
func (s *state) begin() error {
	if s.header.Source == "" {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(s.path), 0o700); err != nil {
		return err
	}
	head, err := encodeHeader(s.header)
	if err != nil {
		return err
	}
	s.sum = binary.LittleEndian.Uint32(head[len(head)-4:])
	for unit, d := range s.done {
		head = s.appendEntry(head, unit, d)
	}
	tmp := s.path + ".new"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	s.file = f
	if _, err := f.Write(head); err != nil {
		return errors.Join(err, removeIfThere(tmp))
	}
	if err := errors.Join(f.Sync(), os.Rename(tmp, s.path)); err != nil {
		return errors.Join(err, removeIfThere(tmp))
	}
	return syncDir(filepath.Dir(s.path))
}

// add notes units, durably.
func (s *state) add(units map[int64]digest) error {
	if s.file == nil {
		return nil
	}
	var b []byte
	for unit, d := range units {
		b = s.appendEntry(b, unit, d)
	}
	if _, err := s.file.Write(b); err != nil {
		return err
	}
	return unix.Fdatasync(int(s.file.Fd()))
}

func (s *state) appendEntry(b []byte, unit int64, d digest) []byte {
	from := len(b)
	b = binary.LittleEndian.AppendUint64(b, uint64(unit))
	b = append(b, d[:]...)
	return binary.LittleEndian.AppendUint32(b, crc32.Update(s.sum, castagnoli, b[from:]))
}

func (s *state) close() error {
	if s.file == nil {
		return nil
	}
	f := s.file
	s.file = nil
	return f.Close()
}

// remove forgets the restore, also one of an earlier run that this one replaced.
func (s *state) remove() error {
	if s.file == nil && !s.there {
		return nil
	}
	return errors.Join(s.close(), removeIfThere(s.path))
}

func encodeHeader(h header) ([]byte, error) {
	body, err := json.Marshal(h)
	if err != nil {
		return nil, err
	}
	if len(body) > headerMax {
		return nil, fmt.Errorf("the identity of the source has %d bytes; at most about %d can be kept", len(h.Source), headerMax)
	}
	b := append([]byte(nil), stateMagic...)
	b = binary.LittleEndian.AppendUint32(b, stateVersion)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(body)))
	b = append(b, body...)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli)), nil
}

var errState = errors.New("not a state file of a restore")

// decodeState reads a state file; torn and damaged entries end it.
func decodeState(b []byte) (header, map[int64]digest, error) {
	if len(b) < 20 || !bytes.HasPrefix(b, []byte(stateMagic)) || binary.LittleEndian.Uint32(b[8:]) != stateVersion {
		return header{}, nil, errState
	}
	n := int64(binary.LittleEndian.Uint32(b[12:]))
	if n > headerMax || int64(len(b)) < 20+n {
		return header{}, nil, errState
	}
	sum := crc32.Checksum(b[:16+n], castagnoli)
	if binary.LittleEndian.Uint32(b[16+n:]) != sum {
		return header{}, nil, errState
	}
	var h header
	if err := json.Unmarshal(b[16:16+n], &h); err != nil {
		return header{}, nil, fmt.Errorf("%w: %w", errState, err)
	}
	done := map[int64]digest{}
	for b = b[20+n:]; len(b) >= entryLen; b = b[entryLen:] {
		if crc32.Update(sum, castagnoli, b[:24]) != binary.LittleEndian.Uint32(b[24:]) {
			break
		}
		done[int64(binary.LittleEndian.Uint64(b))] = digest(b[8:24])
	}
	return h, done, nil
}

// syncDir makes the names in a folder durable.
func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
