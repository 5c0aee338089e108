package cbt

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"math"
	"path/filepath"

	"tidemark/internal/block"
	"tidemark/internal/vfs"
)

// The file of a map, all integers little endian:
//
//	magic "TMCBTMAP" | version u32 | length of identity u32 | identity
//	size u64 | twice (write, read): generation 16 bytes | number u32 | runs
//	CRC-32C of everything before
//
// runs: pairs of uvarint length (from 1) and byte, until all blocks are covered; none
// where the number is 0, as no snapshot was taken.
const (
	magic       = "TMCBTMAP"
	version     = 1
	identityMax = 4096
	sizeMax     = 1 << 62
)

// ErrDamaged: a map's file is not what Save wrote.
var ErrDamaged = errors.New("change map file is damaged")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Open continues the map that Save left under a name, where fits says of the
// identity that Save was given that nothing was written since, and the size is the
// same; otherwise it begins a new generation and why says the reason. In either case
// the file is gone, stable, when Open returns: nobody can take it for the truth after
// a crash.
func Open(fsys vfs.FS, name string, fits func(identity string) bool, size int64) (m *Map, why string, err error) {
	b, err := fsys.ReadFile(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return New(size), "there is no map from before: the device is new, or the daemon or the machine was not shut down in order", nil
	case err != nil:
		return nil, "", fmt.Errorf("change map: %w", err)
	}
	if err := errors.Join(fsys.Remove(name), fsys.SyncDir(filepath.Dir(name))); err != nil {
		return nil, "", fmt.Errorf("change map: it cannot be opened for changes: %w", err)
	}
	m, was, err := decode(b)
	switch {
	case err != nil:
		return New(size), err.Error(), nil
	case !fits(was):
		return New(size), fmt.Sprintf("the map is of another device, or of one that was written to since (%s)", was), nil
	case m.write.Load().size != size:
		return New(size), fmt.Sprintf("the device had %d bytes and has %d", m.write.Load().size, size), nil
	}
	return m, "", nil
}

// Save leaves the map for the next Open, unless it is blind. No write may come after it.
func (m *Map) Save(fsys vfs.FS, name, identity string) error {
	if m.isBlind() {
		return nil // Open has removed the file: the next one begins a new generation
	}
	m.mu.Lock()
	b := m.encode(identity)
	m.mu.Unlock()
	if err := vfs.WriteWhole(fsys, name, b); err != nil {
		return fmt.Errorf("change map: saving it: %w", err)
	}
	return nil
}

func (m *Map) encode(identity string) []byte {
	le := binary.LittleEndian
	w := m.write.Load()
	b := append([]byte(magic), 0, 0, 0, 0)
	le.PutUint32(b[len(magic):], version)
	b = le.AppendUint32(b, uint32(len(identity)))
	b = append(b, identity...)
	b = le.AppendUint64(b, uint64(w.size))
	for _, s := range []*side{w, m.read.Load()} {
		b = append(b, s.generation[:]...)
		b = le.AppendUint32(b, s.number)
		if s.number != 0 {
			b = s.blocks.appendRuns(b)
		}
	}
	return appendSum(b)
}

func appendSum(b []byte) []byte {
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

func (t *table) appendRuns(b []byte) []byte {
	for i, n := int64(0), t.blocks(); i < n; {
		v, from := t.at(i), i
		for i++; i < n && t.at(i) == v; i++ {
		}
		b = append(binary.AppendUvarint(b, uint64(i-from)), v)
	}
	return b
}

// reader takes fields off the front of a file; after the first that is not there
// everything is zero and err says so.
type reader struct {
	b   []byte
	err error
}

func (r *reader) take(n int) []byte {
	if r.err == nil && n > len(r.b) {
		r.err = io.ErrUnexpectedEOF
	}
	if r.err != nil {
		return make([]byte, n)
	}
	p := r.b[:n]
	r.b = r.b[n:]
	return p
}

func (r *reader) u32() uint32 { return binary.LittleEndian.Uint32(r.take(4)) }
func (r *reader) u64() uint64 { return binary.LittleEndian.Uint64(r.take(8)) }

func decode(b []byte) (*Map, string, error) {
	if len(b) < len(magic)+8 || string(b[:len(magic)]) != magic {
		return nil, "", fmt.Errorf("no magic: %w", ErrDamaged)
	}
	body, sum := b[:len(b)-4], binary.LittleEndian.Uint32(b[len(b)-4:])
	if crc32.Checksum(body, castagnoli) != sum {
		return nil, "", fmt.Errorf("checksum: %w", ErrDamaged)
	}
	r := &reader{b: body[len(magic):]}
	if v := r.u32(); v != version {
		return nil, "", fmt.Errorf("version %d, want %d: %w", v, version, ErrDamaged)
	}
	n := r.u32()
	if n > identityMax {
		return nil, "", fmt.Errorf("identity of %d bytes: %w", n, ErrDamaged)
	}
	identity := string(r.take(int(n)))
	size := r.u64()
	if size > sizeMax {
		return nil, "", fmt.Errorf("device of %d bytes: %w", size, ErrDamaged)
	}
	m := &Map{}
	m.write.Store(r.side(int64(size)))
	m.read.Store(r.side(int64(size)))
	w := m.write.Load()
	if r.err == nil && (len(r.b) != 0 || w.number == 0) {
		r.err = errors.New("more or less than a map")
	}
	if r.err != nil {
		return nil, "", fmt.Errorf("%w: %w", r.err, ErrDamaged)
	}
	return m, identity, nil
}

func (r *reader) side(size int64) *side {
	s := &side{size: size, generation: Generation(r.take(16)), number: r.u32()}
	if s.number > numberMax && r.err == nil {
		r.err = fmt.Errorf("number %d", s.number)
	}
	if s.number == 0 || r.err != nil {
		s.blocks = newTable(0)
		return s
	}
	s.blocks = newTable(size)
	for at, n := uint64(0), uint64(s.blocks.blocks()); at < n && r.err == nil; {
		run, k := binary.Uvarint(r.b)
		if k <= 0 || run == 0 || run > n-at || run > math.MaxInt64>>s.blocks.shift {
			r.err = errors.New("a run that does not fit")
			return s
		}
		r.b = r.b[k:]
		v := r.take(1)[0]
		if uint32(v) > s.number {
			r.err = fmt.Errorf("a block of number %d in a table of %d", v, s.number)
			return s
		}
		from := int64(at) << s.blocks.shift
		s.blocks.raise(block.Range{Off: from, Len: min(int64(at+run)<<s.blocks.shift, size) - from}, v)
		at += run
	}
	return s
}
