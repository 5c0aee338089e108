package stack

import (
	"testing"

	"tidemark/internal/block"
	"tidemark/internal/health"
)

// null is a device that does nothing.
type null struct{}

func (null) ReadAt(p []byte, _ int64) (int, error)   { return len(p), nil }
func (null) WriteAt(p []byte, _ int64) (int, error)  { return len(p), nil }
func (null) WriteFUA(p []byte, _ int64) (int, error) { return len(p), nil }
func (null) WriteZeroes(block.Range) error           { return nil }
func (null) Discard(block.Range) error               { return nil }
func (null) Flush() error                            { return nil }
func (null) Size() int64                             { return 1 << 40 }

func (null) Move(block.Op, block.Range, bool, block.Load) error { return nil }

// still is data that costs nothing to bring here.
type still struct{ p []byte }

func (s *still) Data() ([]byte, error)  { return s.p, nil }
func (s *still) Carry(int, int64) error { return nil }

type passing struct{}

func (passing) Handle(r *Request, next Next) error { return next.Do(r) }
func (passing) Spoil(error) string                 { return "nothing" }
func (passing) Detach(Reason)                      {}

type sieving struct{ passing }

func (sieving) Pass(*Request) bool { return true }

type inlining struct{ passing }

func (inlining) Inline() {}

// kinds are the ways to be in a stack, three filters of each.
var kinds = []struct {
	name   string
	filter Filter
}{{"none", nil}, {"sieve", sieving{}}, {"inline", inlining{}}, {"guarded", passing{}}}

func costStack(t testing.TB, f Filter) *Stack {
	y := New(Config{}, &health.Set{})
	t.Cleanup(func() {
		if err := y.Close(); err != nil {
			t.Error(err)
		}
	})
	s, err := y.Add("d", null{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		if f == nil {
			break
		}
		if _, err := s.Attach(string(rune('a'+i)), i, DriverFunc(func(*Below) (Filter, error) { return f, nil })); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// TestPassThroughAllocatesNothing, whatever the filters' kind and the request's.
func TestPassThroughAllocatesNothing(t *testing.T) {
	if raceEnabled {
		return // the detector's pools forget on purpose
	}
	p := make([]byte, 4096)
	load := &still{p}
	for _, k := range kinds {
		s := costStack(t, k.filter)
		for name, do := range map[string]func() error{
			"read":    func() error { _, err := s.ReadAt(p, 0); return err },
			"write":   func() error { _, err := s.WriteAt(p, 4096); return err },
			"fua":     func() error { _, err := s.WriteFUA(p, 4096); return err },
			"zeroes":  func() error { return s.WriteZeroes(block.Range{Len: 4096}) },
			"discard": func() error { return s.Discard(block.Range{Len: 4096}) },
			"flush":   func() error { return s.Flush() },
			"move":    func() error { return s.Move(block.OpRead, block.Range{Len: 4096}, false, load) },
		} {
			var err error
			if n := testing.AllocsPerRun(500, func() { err = do() }); n != 0 || err != nil {
				t.Errorf("%s through %s: %v allocations, %v", name, k.name, n, err)
			}
		}
	}
}

func BenchmarkPassThrough(b *testing.B) {
	for _, k := range kinds {
		b.Run(k.name, func(b *testing.B) {
			s := costStack(b, k.filter)
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				p := make([]byte, 4096)
				for pb.Next() {
					if _, err := s.WriteAt(p, 0); err != nil {
						b.Fatal(err)
					}
				}
			})
		})
	}
}
