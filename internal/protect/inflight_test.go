package protect

import (
	"testing"
	"time"

	"tidemark/internal/block"
	"tidemark/internal/fill"
	"tidemark/internal/source"
)

// flights is a source that only knows what is on its way.
type flights struct {
	source.Source
	scan source.Scan
}

func (f *flights) ScanInFlight() (source.Scan, error) { return f.scan, nil }
func (f *flights) Producer() source.Place             { return f.scan.Producer }

// TestNothingIsReadBehindAWriteOnItsWay: rules 1 and 2 of gap and fill as they are wired
// here. A block is read when every captured write from before its last drop has
// ended, and every lost one to it; the producer's place says neither.
func TestNothingIsReadBehindAWriteOnItsWay(t *testing.T) {
	const size = 1 << 20
	all := []block.DiskRange{{Disk: 0, Range: block.Range{Len: size}}}
	f := &flights{}
	s := &session{source: f, engine: fill.New([]fill.Disk{{Size: size, BlockSize: 4096}})}
	s.engine.Open(all, 50)
	s.engine.Checkpoint(100, 1)
	look := func(scan source.Scan) (fill.Job, bool) {
		t.Helper()
		f.scan, s.lastScan = scan, time.Time{}
		if err := s.lookInFlight(); err != nil {
			t.Fatal(err)
		}
		return s.engine.Next(size)
	}
	if j, ok := look(source.Scan{Producer: 100, Low: 49, InFlight: 1}); ok {
		t.Errorf("%+v while a captured write from before the drop is on its way", j)
	}
	if j, ok := look(source.Scan{Producer: 100, Low: 100, InFlight: 1, Dropped: all}); ok {
		t.Errorf("%+v while the lost write is on its way", j)
	}
	half := []block.DiskRange{{Disk: 0, Range: block.Range{Len: size / 2}}}
	if j, ok := look(source.Scan{Producer: 100, Low: 100, InFlight: 1, Dropped: half}); !ok || j.Range != (block.Range{Off: size / 2, Len: size / 2}) {
		t.Errorf("%+v, %v: want what no lost write is on its way to", j, ok)
	}
	if j, ok := look(source.Scan{Producer: 100, Low: 100}); !ok || j.Range != (block.Range{Len: size / 2}) {
		t.Errorf("%+v, %v when all have ended", j, ok)
	}
	f.scan.Low = 0
	if err := s.lookInFlight(); err != nil || time.Since(s.lastScan) > time.Minute {
		t.Error(err)
	}
}
