package batch

import (
	"bytes"
	"fmt"
	"io"

	"tidemark/internal/block"
	"tidemark/internal/stream"
)

func damaged(format string, a ...any) error {
	return fmt.Errorf("%w: %s", ErrDamaged, fmt.Sprintf(format, a...))
}

// sizes are what the header says of the parts behind it.
type sizes struct {
	disks, records, names  int
	payloads               int64
	namesSum, recordsTable uint32
}

// Read reads one batch, checks every part of it, and leaves r behind its last
// byte. Payloads share memory. Errors wrap ErrDamaged, ErrVersion, or are r's own;
// io.EOF: there is nothing.
func Read(r io.Reader) (*Batch, error) {
	head := make([]byte, headerSize)
	if _, err := io.ReadFull(r, head); err != nil {
		if err == io.EOF {
			return nil, err
		}
		return nil, ended(err, "header")
	}
	out := &Batch{}
	z, err := out.Header.parse(head)
	if err != nil {
		return nil, err
	}
	names, err := part(r, int64(z.names), "names")
	if err != nil {
		return nil, err
	}
	if crc(names) != z.namesSum {
		return nil, damaged("the checksum of its names does not fit")
	}
	if err := out.Header.parseNames(names, z.disks); err != nil {
		return nil, err
	}
	table, err := part(r, int64(z.records)*entrySize, "table")
	if err != nil {
		return nil, err
	}
	if crc(table) != z.recordsTable {
		return nil, damaged("the checksum of its table does not fit")
	}
	payloads, err := part(r, z.payloads, "payloads")
	if err != nil {
		return nil, err
	}
	return out, out.parseTable(table, payloads)
}

// atOnce is how much memory is taken at the word of a header: what is usual.
const atOnce = 16 << 20

// part reads n bytes. Much that is not there takes no memory.
func part(r io.Reader, n int64, what string) ([]byte, error) {
	if n <= atOnce {
		b := make([]byte, n)
		if _, err := io.ReadFull(r, b); err != nil {
			return nil, ended(err, what)
		}
		return b, nil
	}
	var b bytes.Buffer
	b.Grow(atOnce)
	if _, err := io.CopyN(&b, r, n); err != nil {
		return nil, ended(err, what)
	}
	return b.Bytes(), nil
}

// ended is what an end means that came too early. One that r itself tells of in
// other words, as of a connection that was cut, stays what it is.
func ended(err error, what string) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return damaged("it ends inside its %s", what)
	}
	return err
}

func (h *Header) parse(b []byte) (z sizes, err error) {
	sum := headerSize - 4
	if !bytes.Equal(b[:8], magic[:]) || crc(b[:sum]) != le.Uint32(b[sum:]) {
		return z, damaged("it does not begin with a good header")
	}
	if v := le.Uint32(b[8:]); v != version {
		return z, fmt.Errorf("%w: %d", ErrVersion, v)
	}
	h.Kind, h.Consistent = Kind(b[12]), b[13]&flagRight != 0
	z.disks = int(le.Uint16(b[14:]))
	copy(h.GroupID[:], b[16:])
	h.Number, h.From, h.To = le.Uint64(b[32:]), stream.Position(le.Uint64(b[40:])), stream.Position(le.Uint64(b[48:]))
	h.Time = int64(le.Uint64(b[56:]))
	z.records, z.names = int(le.Uint32(b[64:])), int(le.Uint32(b[68:]))
	z.payloads = int64(le.Uint64(b[72:]))
	z.namesSum, z.recordsTable = le.Uint32(b[80:]), le.Uint32(b[84:])
	h.Consistency = stream.Consistency(b[88])
	switch {
	case h.Kind < Writes || h.Kind > Ranges || b[13]&^flagRight != 0:
		return z, fmt.Errorf("%w: kind %d, flags %#x", ErrVersion, b[12], b[13])
	case z.records > RecordsMax || z.names > namesMax || z.payloads < 0 || z.payloads > PayloadMax:
		return z, damaged("%d records, %d bytes of names, %d of payloads", z.records, z.names, z.payloads)
	case h.Consistency > stream.Application:
		return z, damaged("consistency %d", h.Consistency)
	}
	return z, nil
}

func (h *Header) parseNames(b []byte, disks int) error {
	take := func(n int) []byte {
		if b == nil || n > len(b) {
			b = nil
			return make([]byte, n)
		}
		out := b[:n]
		b = b[n:]
		return out
	}
	name := func() string { return string(take(int(take(1)[0]))) }
	h.Group, h.Consumer, h.Bookmark = name(), name(), name()
	for range disks {
		d := Disk{Size: int64(le.Uint64(take(8))), SectorSize: int64(le.Uint32(take(4)))}
		d.Name = name()
		if b == nil || d.Size < 0 {
			break
		}
		h.Disks = append(h.Disks, d)
	}
	if b == nil || len(b) > 0 || len(h.Disks) != disks {
		return damaged("its names do not fill their part")
	}
	return nil
}

func (b *Batch) parseTable(table, payloads []byte) error {
	b.Records = make([]Record, len(table)/entrySize)
	for i := range b.Records {
		e, r := table[i*entrySize:], &b.Records[i]
		r.Op, r.Disk = block.Op(e[0]), int(le.Uint16(e[2:]))
		r.Position, r.Time = stream.Position(le.Uint64(e[8:])), int64(le.Uint64(e[16:]))
		r.Range = block.Range{Off: int64(le.Uint64(e[24:])), Len: int64(le.Uint64(e[32:]))}
		if err := b.checkRecord(r); err != nil {
			return fmt.Errorf("record %d: %w", i, err)
		}
		if r.Op != block.OpWrite {
			continue
		}
		if r.Range.Len > int64(len(payloads)) {
			return damaged("record %d: its payload of %d bytes is not there", i, r.Range.Len)
		}
		r.Payload, payloads = payloads[:r.Range.Len], payloads[r.Range.Len:]
		if crc(r.Payload) != le.Uint32(e[4:]) {
			return damaged("record %d: the checksum of its payload does not fit", i)
		}
	}
	if len(payloads) > 0 {
		return damaged("%d bytes follow the last payload", len(payloads))
	}
	return nil
}

func (b *Batch) checkRecord(r *Record) error {
	data := r.Op == block.OpWrite || r.Op == block.OpZeroes || r.Op == block.OpDiscard
	if b.Kind == Bookmark || b.Kind == Ranges && r.Op != block.OpRead || b.Kind != Ranges && !data {
		return damaged("a record of %s in a batch of kind %s", r.Op, b.Kind)
	}
	if r.Disk >= len(b.Disks) {
		return damaged("disk %d of %d", r.Disk, len(b.Disks))
	}
	if err := block.CheckBounds(r.Range, b.Disks[r.Disk].Size); err != nil {
		return damaged("%v", err)
	}
	return nil
}
