// Package drain hands a group's stream to consumers, in batches.
//
// A consumer is a named reader of one group, or of one disk of it, that keeps a
// copy. A batch is what it gets next; it gets the same one until it commits it.
// docs/drain.md tells it for users.
//
// # From one right state to the next
//
// A consumer's copy is right at a position: it is what the source was then. In
// the stage records it gets what follows there: writes in order, and each
// bookmark alone; after each batch the copy is right at the batch's end.
//
// A prepared mark holds up what follows it until its verdict is sealed; it is
// handed out as a bookmark then, or passed over.
//
// The stream's gaps, fills and settled marks are not handed out. Fills carry
// ranks: applied in the order of the stream they would overwrite newer writes.
// A consumer that meets a gap (or a fill that its copy lacks) waits in the stage
// fill until a settled mark follows, and then gets what changed between where it
// stands and the mark, as it was at the mark: ranges with content, in any order
// (timeline.Window). With the last of these the copy is right again.
// A consumer whose copy is empty stands before the first segment, and its first
// fill is everything; one that has cleared what was pending gets that as a fill.
//
// # The same batch again
//
// Batches are made of sealed segments only, which never change, and how they are
// cut depends on nothing but the consumer's durable state: so the same batch
// comes again, also from another daemon after a kill -9, and no copy of it is
// kept. Several can be outstanding: a batch follows from the state behind the
// one before. A batch never spans segments, but for those of a fill.
//
// The state is two checksummed slots, written in turn and in place, so that a
// commit needs no room on a full disk (docs/formats/consumer.md).
package drain

import (
	"context"
	"errors"
	"fmt"

	"tidemark/internal/segment"
	"tidemark/internal/stream"
)

// Errors that callers branch on.
var (
	ErrNothing    = errors.New("nothing is pending")
	ErrUndecided  = errors.New("it is prepared, and waits for its verdict") // comes with ErrNothing
	ErrNotSealed  = errors.New("not sealed yet")
	ErrNoConsumer = errors.New("no such consumer")
	ErrName       = errors.New("not a consumer's name")
	ErrOptions    = errors.New("not valid for a consumer")
	ErrExists     = errors.New("the consumer was made with other options")
	ErrCommit     = errors.New("not a batch that can be committed")
	ErrPending    = errors.New("the consumer has not got everything yet")
	ErrState      = errors.New("the consumer's state is damaged")
	ErrStopped    = errors.New("the group's consumers are stopped")
)

// CommitError says which batches could have been committed.
type CommitError struct {
	Consumer         string
	Number           uint64
	Committed, Given uint64 // newest of each
	Cleared          bool   // Committed is of no batch: what was pending was cleared
}

func (e *CommitError) Error() string {
	if e.Committed == e.Given && e.Cleared {
		return fmt.Sprintf("consumer %s: commit of batch %d, and what was pending was cleared: the next batch is %d, which next has not given yet", e.Consumer, e.Number, e.Committed+1)
	}
	if e.Committed == e.Given {
		return fmt.Sprintf("consumer %s: commit of batch %d, and batch %d is the newest committed one: next has given none since", e.Consumer, e.Number, e.Committed)
	}
	return fmt.Sprintf("consumer %s: commit of batch %d, and batches %d to %d can be committed", e.Consumer, e.Number, e.Committed+1, e.Given)
}

func (e *CommitError) Unwrap() error { return ErrCommit }

// Source is a group's stream, as far as it is durable.
type Source interface {
	// Open opens a segment. ErrNotSealed: there is none of this sequence yet.
	Open(ctx context.Context, sequence uint64) (*segment.File, error)
	// Newest is the newest sealed segment; false: there is none here.
	Newest() (segment.Summary, bool)
	// Changed is closed when a segment was sealed since, or the source has ended.
	Changed() <-chan struct{}
}

// Disk is one of the group's.
type Disk struct {
	Name       string
	Size       int64 // bytes
	SectorSize int64
}

// place is where a consumer's next record stands.
type place = segment.Place

// end is where a fill ends: a position inside a stretch, and the place behind it.
type end struct {
	at    stream.Position
	time  int64
	place place
}
