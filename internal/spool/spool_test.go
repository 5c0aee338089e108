package spool

import (
	"context"
	"errors"
	"path/filepath"
	"testing"

	"tidemark/internal/block"
	"tidemark/internal/segment"
	"tidemark/internal/stream"
)

func sealed(t *testing.T, sequence uint64) *segment.Sealed {
	t.Helper()
	b := segment.NewBuilder(1 << 16)
	pos := stream.Position(sequence)
	r := stream.Record{Kind: stream.KindWrite, Op: block.OpWrite, Position: pos, Range: block.Range{Len: 4096}, Payload: make([]byte, 4096)}
	if err := b.Append(&r); err != nil {
		t.Fatal(err)
	}
	s, err := b.Seal(segment.Header{Group: "g", Sequence: sequence, Disks: []segment.Disk{{Name: "d", Size: 1 << 20, BlockSize: 4096, SectorSize: 512}}}, segment.State{Last: pos})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func open(t *testing.T, dir string, most int64) (*Spool, Report) {
	t.Helper()
	s, report, err := Open(dir, Options{MaxBytes: most})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s, report
}

func TestSameUntilCommit(t *testing.T) {
	dir := t.TempDir()
	s, _ := open(t, dir, 1<<20)
	c, err := s.Cursor("vault")
	if err != nil {
		t.Fatal(err)
	}
	for seq := range uint64(3) {
		if err := s.Append(sealed(t, seq+1)); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if i, err := c.Next(t.Context()); err != nil || i.Sequence != 1 {
			t.Fatalf("next: %+v, %v", i, err)
		}
	}
	if err := c.Commit(2); !errors.Is(err, ErrCommit) {
		t.Fatalf("a wrong commit: %v", err)
	}
	if err := c.Commit(1); err != nil {
		t.Fatal(err)
	}
	s.Close()
	s, _ = open(t, dir, 1<<20)
	c, _ = s.Cursor("vault")
	for seq := uint64(2); seq <= 3; seq++ {
		if i, err := c.Next(t.Context()); err != nil || i.Sequence != seq {
			t.Fatalf("after reopening: %+v, %v", i, err)
		}
		if err := c.Commit(seq); err != nil {
			t.Fatal(err)
		}
	}
	if last, ok := s.Last(); !ok || last.Sequence != 3 || !c.Drained() {
		t.Fatalf("the newest is not kept: %+v", last)
	}
	if files, _ := filepath.Glob(filepath.Join(dir, "*.seg")); len(files) != 1 {
		t.Errorf("%d segments are kept, want the newest", len(files))
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Next(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("next of a drained cursor: %v", err)
	}
}

func TestFullChangesNothing(t *testing.T) {
	s, _ := open(t, t.TempDir(), 2000)
	c, _ := s.Cursor("vault")
	var last uint64
	for seq := uint64(1); ; seq++ {
		err := s.Append(sealed(t, seq))
		if errors.Is(err, ErrFull) {
			break
		}
		if err != nil || seq > 100 {
			t.Fatal(seq, err)
		}
		last = seq
	}
	if err := c.Commit(1); err != nil {
		t.Fatal(err)
	}
	for seq := uint64(2); seq <= last; seq++ {
		if err := c.Commit(seq); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Append(sealed(t, last+1)); err != nil {
		t.Fatalf("after draining: %v", err)
	}
}

func TestOneProcess(t *testing.T) {
	dir := t.TempDir()
	open(t, dir, 1<<20)
	if _, _, err := Open(dir, Options{}); !errors.Is(err, ErrInUse) {
		t.Fatalf("second open: %v", err)
	}
}
