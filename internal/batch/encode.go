package batch

import (
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"slices"
	"sync"

	"tidemark/internal/block"
)

var le = binary.LittleEndian

// Builder collects the records of one batch.
type Builder struct {
	table    []byte
	payloads []byte
	count    int
}

// Add copies a record.
func (b *Builder) Add(r *Record) {
	b.entry(r, crc(r.Payload))
	b.room(len(r.Payload))
	b.payloads = append(b.payloads, r.Payload...)
}

// released are the payloads of batches that have gone: memory that is new costs
// more than what is put into it.
var released sync.Pool

// room makes room for n bytes of payload.
func (b *Builder) room(n int) {
	if b.payloads == nil && n > 0 {
		if p, ok := released.Get().(*[]byte); ok {
			b.payloads = (*p)[:0]
		}
	}
	b.payloads = slices.Grow(b.payloads, n)
}

// AddFrom is Add for a payload that read puts in its place.
func (b *Builder) AddFrom(r *Record, read func(dst []byte) error) error {
	at, n := len(b.payloads), int(r.Range.Len)
	b.room(n)
	b.payloads = b.payloads[:at+n]
	if err := read(b.payloads[at : at+n]); err != nil {
		b.payloads = b.payloads[:at]
		return err
	}
	b.entry(r, crc(b.payloads[at:]))
	return nil
}

func (b *Builder) entry(r *Record, sum uint32) {
	if r.Op != block.OpWrite {
		sum = 0
	}
	b.table = append(b.table, byte(r.Op), 0)
	b.table = le.AppendUint16(b.table, uint16(r.Disk))
	b.table = le.AppendUint32(b.table, sum)
	b.table = le.AppendUint64(b.table, uint64(r.Position))
	b.table = le.AppendUint64(b.table, uint64(r.Time))
	b.table = le.AppendUint64(b.table, uint64(r.Range.Off))
	b.table = le.AppendUint64(b.table, uint64(r.Range.Len))
	b.count++
}

// Records and Bytes say how much was added: records, and bytes of payload.
func (b *Builder) Records() int { return b.count }
func (b *Builder) Bytes() int64 { return int64(len(b.payloads)) }

// Encoded is a finished batch.
type Encoded struct {
	Header  Header
	Records int
	Bytes   int64 // of payload
	parts   [3][]byte
}

// Size is how many bytes WriteTo writes.
func (e *Encoded) Size() int64 {
	return int64(len(e.parts[0]) + len(e.parts[1]) + len(e.parts[2]))
}

// Parts are the batch's bytes, one behind the other.
func (e *Encoded) Parts() [3][]byte { return e.parts }

// Release gives the memory of the payloads to the next batch: nothing of Parts is
// to be used any more. To leave it to the garbage collector is no mistake.
func (e *Encoded) Release() {
	if p := e.parts[2]; cap(p) > 0 {
		e.parts = [3][]byte{}
		released.Put(&p)
	}
}

// WriteTo writes the batch's bytes.
func (e *Encoded) WriteTo(w io.Writer) (n int64, err error) {
	for _, p := range e.parts {
		k, err := w.Write(p)
		n += int64(k)
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// Encode finishes the batch. The builder is not to be used any more.
func (b *Builder) Encode(h Header) (*Encoded, error) {
	names, err := appendNames(nil, &h)
	if err != nil {
		return nil, err
	}
	if b.count > RecordsMax || len(b.payloads) > PayloadMax {
		return nil, fmt.Errorf("batch of %d records and %d bytes: at most %d and %d", b.count, len(b.payloads), RecordsMax, PayloadMax)
	}
	head := make([]byte, 0, headerSize+len(names))
	head = append(head, magic[:]...)
	head = le.AppendUint32(head, version)
	flags := byte(0)
	if h.Consistent {
		flags |= flagRight
	}
	head = append(head, byte(h.Kind), flags)
	head = le.AppendUint16(head, uint16(len(h.Disks)))
	head = append(head, h.GroupID[:]...)
	for _, n := range [...]uint64{h.Number, uint64(h.From), uint64(h.To), uint64(h.Time)} {
		head = le.AppendUint64(head, n)
	}
	head = le.AppendUint32(head, uint32(b.count))
	head = le.AppendUint32(head, uint32(len(names)))
	head = le.AppendUint64(head, uint64(len(b.payloads)))
	head = le.AppendUint32(head, crc(names))
	head = le.AppendUint32(head, crc(b.table))
	head = append(head, byte(h.Consistency), 0, 0, 0)
	head = le.AppendUint32(head, crc(head))
	return &Encoded{Header: h, Records: b.count, Bytes: int64(len(b.payloads)), parts: [3][]byte{append(head, names...), b.table, b.payloads}}, nil
}

// appendNames adds the part with the names.
func appendNames(b []byte, h *Header) ([]byte, error) {
	name := func(s string) error {
		if len(s) > math.MaxUint8 {
			return fmt.Errorf("name %q has %d bytes: at most %d", s, len(s), math.MaxUint8)
		}
		b = append(append(b, byte(len(s))), s...)
		return nil
	}
	for _, s := range [...]string{h.Group, h.Consumer, h.Bookmark} {
		if err := name(s); err != nil {
			return nil, err
		}
	}
	if len(h.Disks) > math.MaxUint16 {
		return nil, fmt.Errorf("%d disks: at most %d", len(h.Disks), math.MaxUint16)
	}
	for _, d := range h.Disks {
		b = le.AppendUint64(b, uint64(d.Size))
		b = le.AppendUint32(b, uint32(d.SectorSize))
		if err := name(d.Name); err != nil {
			return nil, err
		}
	}
	return b, nil
}
