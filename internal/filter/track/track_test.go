package track

import (
	"errors"
	"slices"
	"testing"

	"tidemark/internal/block"
	"tidemark/internal/cbt"
	"tidemark/internal/health"
	"tidemark/internal/sim"
	"tidemark/internal/stack"
)

func served(t *testing.T, disk *sim.Disk, m *cbt.Map) (*stack.System, *stack.Stack) {
	t.Helper()
	y := stack.New(stack.Config{}, &health.Set{})
	t.Cleanup(func() { _ = y.Close() })
	s, err := y.Add("d", disk)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Attach(Name, Altitude, Driver(m)); err != nil {
		t.Fatal(err)
	}
	return y, s
}

// TestMarks: every kind of change, also a failed one, and nothing else.
func TestMarks(t *testing.T) {
	disk := sim.NewDisk(1 << 20)
	m := cbt.New(1 << 20)
	_, s := served(t, disk, m)
	m.Take()
	p := make([]byte, 512)
	bad := errors.New("bad sector")
	disk.Fault = func(op block.Op, r block.Range) error {
		live, err := m.Live(m.Info().Generation, 1)
		if err != nil {
			t.Error(err)
		}
		marked := slices.ContainsFunc(slices.Collect(live.Ranges()), func(have block.Range) bool { return have.Contains(r) })
		if op != block.OpRead && op != block.OpFlush && !marked {
			t.Errorf("%s %s reached the disk before it was marked", op, r)
		}
		if r.Off == 5*4096 {
			return bad
		}
		return nil
	}
	_, e1 := s.WriteAt(p, 0)
	_, e2 := s.WriteFUA(p, 2*4096)
	_, e3 := s.ReadAt(p, 7*4096)
	_, e4 := s.WriteAt(p, 5*4096)
	if err := errors.Join(e1, e2, e3, s.WriteZeroes(block.Range{Off: 9 * 4096, Len: 4097}), s.Discard(block.Range{Off: 20 * 4096, Len: 4096}), s.Flush()); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(e4, bad) {
		t.Errorf("the failed write: %v", e4)
	}
	since, err := m.Take().Since(m.Info().Generation, 1)
	if err != nil {
		t.Fatal(err)
	}
	want := []block.Range{{Off: 0, Len: 4096}, {Off: 2 * 4096, Len: 4096}, {Off: 5 * 4096, Len: 4096}, {Off: 9 * 4096, Len: 8192}, {Off: 20 * 4096, Len: 4096}}
	if got := slices.Collect(since.Ranges()); !slices.Equal(got, want) {
		t.Errorf("marked %v, want %v", got, want)
	}
}

// TestGenerationEnds where the map would miss something, and only there.
func TestGenerationEnds(t *testing.T) {
	for what, c := range map[string]struct {
		do   func(y *stack.System, s *stack.Stack, disk *sim.Disk) error
		ends bool
	}{
		"the filter is detached": {func(y *stack.System, s *stack.Stack, _ *sim.Disk) error { return s.Detach(Name) }, true},
		"the device is removed":  {func(y *stack.System, s *stack.Stack, _ *sim.Disk) error { return y.Remove("d") }, false},
		"the device is gone":     {func(y *stack.System, s *stack.Stack, _ *sim.Disk) error { return y.Surprise("d") }, true},
		"the device grows": {func(y *stack.System, s *stack.Stack, disk *sim.Disk) error {
			disk.Resize(2 << 20)
			s.Resized()
			_, err := s.WriteAt([]byte("x"), 1<<20)
			return err
		}, true},
	} {
		disk := sim.NewDisk(1 << 20)
		m := cbt.New(1 << 20)
		y, s := served(t, disk, m)
		before := m.Take().Info()
		if err := c.do(y, s, disk); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if got := m.Writing().Generation != before.Generation; got != c.ends {
			t.Errorf("%s: the generation ended: %v", what, got)
		}
	}
	f := &Filter{cbt.New(1 << 20)}
	g := f.changes.Writing().Generation
	if f.Spoil(nil); f.changes.Writing().Generation == g {
		t.Error("the filter was lost, and the generation goes on")
	}
	y := stack.New(stack.Config{}, &health.Set{})
	defer y.Close()
	s, err := y.Add("d", sim.NewDisk(1<<20))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Attach(Name, Altitude, Driver(cbt.New(4096))); err == nil {
		t.Error("a map of another size was taken")
	}
}

// BenchmarkTracked is what tracking adds to a write that costs nothing else.
func BenchmarkTracked(b *testing.B) {
	m := cbt.New(1 << 30)
	f := &Filter{m}
	r := &stack.Request{Op: block.OpWrite, Range: block.Range{Len: 4096}}
	b.ReportAllocs()
	for b.Loop() {
		r.Range.Off = (r.Range.Off + 7919*4096) % (1 << 30)
		f.Pass(r)
	}
}
