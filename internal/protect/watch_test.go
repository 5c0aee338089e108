package protect

import (
	"context"
	"testing"
	"time"

	"tidemark/internal/source"
)

// TestCrossCheck: bytes that the kernel counted and nobody traced make the disks
// unknown; those that are traced and have not ended, and disks that do not
// count, do not.
func TestCrossCheck(t *testing.T) {
	s := &session{cfg: &Config{Disks: []DiskConfig{{Name: "sda"}, {Name: "sdb"}}}, gapOpen: true}
	for _, c := range []struct {
		ended [2]int64
		found bool
	}{
		{[2]int64{1100, -1}, false},
		{[2]int64{1000, 0}, false},
		{[2]int64{1101, -1}, true},
		{[2]int64{1100, 2001}, true},
	} {
		now := watched{excess: []int64{100, 0}, counters: source.Counters{Disks: []source.DiskCounters{{Traced: 1000}, {Traced: 2000}}}}
		s.watched.excess = now.excess
		if why := s.crossCheck(&now, c.ended[:]); (why != "") != c.found {
			t.Errorf("%v: %q", c.ended, why)
		} else if c.found && s.watched.excess != nil {
			t.Errorf("%v: the difference is not noted anew", c.ended)
		}
	}
}

// TestWithin: what hangs is waited for a bounded time, and what it gives later is not lost.
func TestWithin(t *testing.T) {
	late := make(chan int, 1)
	put := func(n int) { late <- n }
	if n, ok := within(time.Minute, func(context.Context) int { return 7 }, put); n != 7 || !ok {
		t.Errorf("%d, %v", n, ok)
	}
	hang := make(chan struct{})
	if n, ok := within(20*time.Millisecond, func(ctx context.Context) int {
		<-ctx.Done()
		<-hang
		return 8
	}, put); n != 0 || ok {
		t.Errorf("it hangs: %d, %v", n, ok)
	}
	close(hang)
	if n := <-late; n != 8 {
		t.Errorf("what came late: %d", n)
	}
}
