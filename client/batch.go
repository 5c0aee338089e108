package client

import (
	"time"

	"tidemark/internal/batch"
)

// Kind is what a batch holds.
type Kind uint8

const (
	Writes   Kind = 1 // in order
	Bookmark Kind = 2 // one, alone
	Fill     Kind = 3 // ranges with their content at position To, in any order
	Ranges   Kind = 4 // to be read from the disk itself; a fill will still bring what is right
)

func (k Kind) String() string { return batch.Kind(k).String() }

// Op is what becomes of a record's range.
type Op uint8

const (
	Read    Op = 0 // read it from the disk: of Ranges only
	Write   Op = 1 // it becomes the payload
	Zeroes  Op = 2
	Discard Op = 3 // its content is undefined until it is written again; restore gives zeroes
)

// Disk is one of the group's.
type Disk struct {
	Name       string
	Size       int64 // bytes
	SectorSize int64
}

// Batch is what a consumer gets next.
type Batch struct {
	Kind        Kind
	Number      uint64
	From, To    uint64    // positions: it lies behind From, up to To
	Time        time.Time // of To
	Consistent  bool      // with it applied, and all before it, the copy is the source at To
	Bookmark    string    // of Kind Bookmark
	Consistency string    // of Kind Bookmark: crash, filesystem or application
	Disks       []Disk
	Records     []Record
}

// Record is a write, or a range of a fill.
type Record struct {
	Op             Op
	Disk           int       // number in Batch.Disks
	Position       uint64    // of a write
	Time           time.Time // of a write
	Offset, Length int64     // bytes
	Payload        []byte    // of Write: Length bytes
}

// Bytes is how much payload the batch has.
func (b *Batch) Bytes() (n int64) {
	for i := range b.Records {
		n += int64(len(b.Records[i].Payload))
	}
	return n
}

func batchOf(b *batch.Batch) *Batch {
	out := &Batch{Kind: Kind(b.Kind), Number: b.Number, From: uint64(b.From), To: uint64(b.To), Time: time.Unix(0, b.Time).UTC(), Consistent: b.Consistent}
	if b.Kind == batch.Bookmark {
		out.Bookmark, out.Consistency = b.Bookmark, b.Consistency.String()
	}
	for _, d := range b.Disks {
		out.Disks = append(out.Disks, Disk(d))
	}
	out.Records = make([]Record, len(b.Records))
	for i, r := range b.Records {
		out.Records[i] = Record{Op: Op(r.Op), Disk: r.Disk, Position: uint64(r.Position), Time: time.Unix(0, r.Time).UTC(), Offset: r.Range.Off, Length: r.Range.Len, Payload: r.Payload}
	}
	return out
}
