package protect

import (
	"context"
	"strings"
	"testing"
	"time"

	"tidemark/internal/disk"
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

// TestTold: what the kernel tells of a disk of the group has it looked at in the next
// round; what may not be to be seen any more then is kept.
func TestTold(t *testing.T) {
	volume := &tappedDisk{Info: &disk.Info{Name: "dm-3", Whole: "dm-3", Mapping: &disk.Mapping{}}, cfg: DiskConfig{Name: "data"}}
	plain := &tappedDisk{Info: &disk.Info{Name: "sda1", Whole: "sda"}, cfg: DiskConfig{Name: "sda1"}}
	for name, c := range map[string]struct {
		event  disk.Uevent
		look   bool
		unseen string
	}{
		"of another disk": {disk.Uevent{Name: "dm-4", Action: "change", Resumed: true}, false, ""},
		"changed":         {disk.Uevent{Name: "dm-3", Action: "change"}, true, ""},
		"resumed":         {disk.Uevent{Name: "dm-3", Action: "change", Resumed: true}, true, "another table"},
		"resized":         {disk.Uevent{Name: "sda", Action: "change", Resized: true}, true, "its size changed"},
		"some were lost":  {disk.Uevent{}, true, "disk data: the kernel told more than could be heard"},
	} {
		s := &session{disks: []target{volume, plain}, lastWatch: time.Now()}
		s.told(c.event)
		if s.lastWatch.IsZero() != c.look || (s.unseen == "") != (c.unseen == "") || !strings.Contains(s.unseen, c.unseen) {
			t.Errorf("%s: looked at at once: %v, unseen %q", name, s.lastWatch.IsZero(), s.unseen)
		}
	}
}
