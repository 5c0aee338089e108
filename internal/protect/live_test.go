package protect

import (
	"bytes"
	"io"
	"slices"
	"testing"

	"tidemark/internal/block"
	"tidemark/internal/stream"
)

// stillView is a view of some bytes, of which the last block is undefined.
type stillView struct {
	*bytes.Reader
	at stream.Position
}

func (v stillView) Position() stream.Position { return v.at }
func (v stillView) Close() error              { return nil }

func (v stillView) Extents(r block.Range) (out []block.Extent, err error) {
	end := v.Size() - liveGrain
	if r.Off < end {
		out = append(out, block.Extent{Range: block.Range{Off: r.Off, Len: min(r.End(), end) - r.Off}, State: block.Data})
	}
	if r.End() > end {
		from := max(r.Off, end)
		out = append(out, block.Extent{Range: block.Range{Off: from, Len: r.End() - from}, State: block.Undefined})
	}
	return out, nil
}

// TestLiveDifferences: what is on its way to the disk is no difference, however
// long it takes; what stays different is one, and where; what never holds still
// is told as such; what is undefined is left out.
func TestLiveDifferences(t *testing.T) {
	const blocks = 600 // more than one read
	for name, test := range map[string]struct {
		arrives, changes bool
		different        int64
		settled          bool
	}{
		"on its way":       {arrives: true, settled: true},
		"lost":             {different: liveGrain, settled: true},
		"never still":      {changes: true},
		"at last, and hot": {arrives: true, changes: true, settled: true},
	} {
		t.Run(name, func(t *testing.T) {
			stored := bytes.Repeat([]byte{7}, blocks*liveGrain)
			disk := slices.Clone(stored)
			clear(disk[(blocks-1)*liveGrain:]) // discarded
			const bad = 300 * liveGrain
			clear(disk[bad : bad+liveGrain])
			looks, waits := 0, 0
			c := comparison{disk: bytes.NewReader(disk), view: func() (pointView, error) {
				if looks++; test.changes && waits == 0 || test.changes && !test.arrives {
					stored[bad] = byte(looks)
				}
				return stillView{bytes.NewReader(slices.Clone(stored)), stream.Position(looks)}, nil
			}, wait: func() error {
				if waits++; test.arrives {
					copy(disk[bad:bad+liveGrain], stored[bad:])
				}
				return nil
			}}
			got, err := c.run(t.Context(), int64(len(disk)))
			want := LiveDisk{Position: stream.Position(looks), Compared: got.Compared, Different: test.different, FirstDifferent: -1, Settled: test.settled}
			if test.different > 0 {
				want.FirstDifferent = bad
			}
			if err != nil || got != want || waits != 1 || got.Compared < int64(len(disk)) {
				t.Errorf("%+v, want %+v; waited %d times: %v", got, want, waits, err)
			}
			if test.changes && looks < liveRounds {
				t.Errorf("looked %d times only", looks)
			}
		})
	}
}

var _ io.ReaderAt = stillView{}
