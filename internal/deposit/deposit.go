// Package deposit puts snapshots into a vault, each as one recovery point of a
// group of its own, with only what changed since the one before.
//
// What is copied of a disk is, since the newest point in the vault:
//
//	what its change map names         between the two snapshots
//	what either image was changed in  images are writable; the point is what the image holds
//	what a copy that was cut off left fills ahead of their position, see below
//
// Where the map does not know, because its generation is another one, the whole
// image is read, and what differs from the newest point is stored.
//
// # In the stream
//
// The first copy opens a gap over all disks at position 1. Each copy appends
// fills whose rank is the position that its bookmark is going to have, and then,
// in one segment, the last of them and the bookmark. A copy that is cut off has
// given out no position: its fills lie ahead of the history, are seen by nobody,
// and the next copy overwrites every one of them. Points that were there stay,
// and "latest" is the newest whole copy.
//
// # What the next copy has to know
//
// That is in the vault alone: each disk's identity in the newest segment's header
// says, as JSON, which snapshot the newest point is (base).
package deposit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/stream"
	"tidemark/internal/vault"
)

// Errors that callers branch on.
var (
	ErrOtherDisks = errors.New("the vault holds a history of other disks under this name")
	ErrOlder      = errors.New("the vault holds a later snapshot of the same devices")
	ErrPoint      = errors.New("the group has a point with that name")
	ErrChanged    = errors.New("written to while it was copied")
)

// Disk is a device of the snapshot.
type Disk struct {
	Name       string
	Size       int64 // bytes
	SectorSize int64
	BlockSize  int64 // of the change map
	Image      io.ReaderAt
	Generation string // of the change map at the snapshot; "": it is not tracked
	Number     uint8  // of the snapshot in it
	// Since yields what changed since an earlier snapshot, or more. The error says
	// why that is not known.
	Since func(generation string, number uint8) (iter.Seq[block.Range], error)
	// Private lists what the image itself was changed in, with a number that is
	// another one once there is more of it; false while that is going on.
	Private func() (ranges []block.Range, number uint64, quiet bool)
}

// Request is what to copy, and where.
type Request struct {
	Group       string
	Point       string // the bookmark's name
	Snapshot    string // which one it is, to know it again
	Time        time.Time
	Consistency stream.Consistency
	Disks       []Disk
	Holder      vault.Holder
	Folder      string                  // for segments on their way to the vault; the caller makes and removes it
	Progress    func(done, total int64) // bytes read of the images; nil: nobody asks
	Segment     int                     // bytes at which a segment is sealed; 0: 8 MiB
}

// Result is the point that there is now.
type Result struct {
	Group       string
	Point       string
	Position    stream.Position
	Time        time.Time
	Consistency stream.Consistency
	Already     bool // it was there before
	Disks       []DiskResult
}

// DiskResult says what was done for one disk, in bytes.
type DiskResult struct {
	Name   string
	Why    string // why all of it was read; "": only what changed was
	Read   int64
	Stored int64 // content that went into the vault, zeroes and what was there already left out
}

// base is what the vault says of a disk's newest point, in the disk's identity.
type base struct {
	Kind       string        `json:"kind"` // "snapshot"
	Snapshot   string        `json:"snapshot,omitempty"`
	Time       time.Time     `json:"time,omitzero"`
	Generation string        `json:"generation,omitempty"`
	Number     uint8         `json:"number,omitempty"`
	Private    []block.Range `json:"private,omitempty"` // what its image was changed in
}

const kind = "snapshot"

// privateMax bounds what is noted of an image that was changed all over: beyond
// it the next copy reads everything.
const privateMax = 2000

func (b base) encode() string {
	text, err := json.Marshal(b)
	if err != nil {
		panic(err) // of these fields it cannot fail
	}
	return string(text)
}

// Put copies a snapshot into a vault. It may be cut off at any moment, by ctx or
// by the end of the process: what is in the vault stays sound, and Put can be
// called again, for this or a later snapshot.
func Put(ctx context.Context, v *vault.Vault, r Request) (Result, error) {
	if err := errors.Join(vault.CheckName(r.Group), stream.CheckBookmarkName(r.Point)); err != nil {
		return Result{}, err
	}
	lock, err := v.Lock(ctx, r.Group, r.Holder)
	if err != nil {
		return Result{}, err
	}
	c := &copying{r: r, vault: v, lock: lock}
	out, err := c.run(ctx)
	return out, errors.Join(err, c.close())
}

// older says whether a snapshot is one from before the base.
func (b base) older(d Disk, at time.Time) bool {
	if b.Generation != "" && b.Generation == d.Generation {
		return d.Number < b.Number
	}
	return at.Before(b.Time)
}

func parseBase(group, identity string) (b base, err error) {
	if err := json.Unmarshal([]byte(identity), &b); err != nil || b.Kind != kind {
		return b, fmt.Errorf("group %s is not one of snapshots: %w", group, ErrOtherDisks)
	}
	return b, nil
}
