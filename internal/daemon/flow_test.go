package daemon

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
	"testing/synctest"

	"tidemark/internal/batch"
	"tidemark/internal/block"
	"tidemark/internal/drain"
)

// batchMaker makes batches 1 to last, of a payload that tells which.
type batchMaker struct {
	last  uint64
	after []uint64      // what was asked for
	hung  chan struct{} // not nil: from batch 2 on it waits for this
}

var errLast = errors.New("there is none")

func (m *batchMaker) make(_ context.Context, after uint64) (*drain.Batch, error) {
	m.after = append(m.after, after)
	if m.hung != nil && after > 0 {
		<-m.hung
	}
	if after >= m.last {
		return nil, errLast
	}
	var b batch.Builder
	b.Add(&batch.Record{Op: block.OpWrite, Range: block.Range{Len: 4096}, Payload: bytes.Repeat([]byte{byte(after + 1)}, 4096)})
	return b.Encode(batch.Header{Kind: batch.Writes, Number: after + 1, Disks: []batch.Disk{{Name: "x", Size: 1 << 20}}})
}

// numbersOf are the batches that something gives to its end.
func numbersOf(t *testing.T, r io.Reader) (out []uint64) {
	t.Helper()
	for {
		b, err := batch.Read(r)
		if err == io.EOF {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		if b.Number != uint64(len(out)+1) || b.Records[0].Payload[0] != byte(b.Number) || b.Records[0].Payload[4095] != byte(b.Number) {
			t.Fatalf("batch %d in the place of %d, with %d", b.Number, len(out)+1, b.Records[0].Payload[0])
		}
		out = append(out, b.Number)
	}
}

// TestFlow: as many batches as were asked for and are there, in order, whether the
// group has room for one that is made ahead or not, read or written; in the end all
// room is free.
func TestFlow(t *testing.T) {
	for _, c := range []struct{ last, asked, want, room int }{{5, 0, 1, 4}, {5, 3, 3, 4}, {5, 9, 5, 4}, {5, 9, 5, 1}, {5, 5, 5, 2}, {1, 9, 1, 1}} {
		for _, written := range []bool{false, true} {
			m, room := &batchMaker{last: uint64(c.last)}, make(chan struct{}, c.room)
			f, err := flowing(t.Context(), room, c.asked, m.make)
			if err != nil {
				t.Fatal(err)
			}
			var got []uint64
			if written {
				var all bytes.Buffer
				if _, err := f.WriteTo(&all); err != nil {
					t.Fatal(err)
				}
				got = numbersOf(t, &all)
			} else {
				got = numbersOf(t, f)
			}
			if len(got) != c.want {
				t.Errorf("%+v: batches %v", c, got)
			}
			if err := f.Close(); err != nil || len(room) != 0 {
				t.Errorf("%+v: %d of the room are taken in the end, %v", c, len(room), err)
			}
			if made := len(m.after); made > c.asked+1 {
				t.Errorf("%+v: %d were made", c, made)
			}
		}
	}
}

// TestFlowWaitsForRoom, as long as its caller does; where there is no batch at all
// the room is free again.
func TestFlowWaitsForRoom(t *testing.T) {
	room := make(chan struct{}, 1)
	if _, err := flowing(t.Context(), room, 1, (&batchMaker{}).make); !errors.Is(err, errLast) || len(room) != 0 {
		t.Errorf("%v, %d taken", err, len(room))
	}
	room <- struct{}{}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := flowing(ctx, room, 1, (&batchMaker{last: 1}).make); !errors.Is(err, context.Canceled) || len(room) != 1 {
		t.Errorf("%v, %d taken", err, len(room))
	}
}

// TestFlowGivenUp: who goes away does not wait for the batch that is being made,
// whose room is free when it is made.
func TestFlowGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, room := &batchMaker{last: 9, hung: make(chan struct{})}, make(chan struct{}, 4)
		f, err := flowing(t.Context(), room, 9, m.make)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Read(make([]byte, 100)); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil || len(room) != 1 {
			t.Errorf("%v, %d taken while one is being made", err, len(room))
		}
		close(m.hung)
		synctest.Wait()
		if len(room) != 0 {
			t.Errorf("%d taken in the end", len(room))
		}
	})
}
