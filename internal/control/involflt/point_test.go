package involflt

import (
	"context"
	"errors"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"tidemark/internal/abi/involflt"
)

const cp = "0f8fad5b-d9cb-469f-a165-70867728950e"

// synced runs a test in time of its own, with disks a, b and c; a and b are filtered.
func synced(t *testing.T, run func(t *testing.T, c *client, m *memSystem)) {
	synctest.Test(t, func(t *testing.T) {
		m := newSystem("/dev/a", "/dev/b", "/dev/c")
		c := newClient(t, m)
		c.started("/dev/a")
		c.started("/dev/b")
		run(t, c, m)
	})
}

func barrier(ms int32) involflt.Barrier { return involflt.Barrier{GUID: guid(cp), Timeout: ms} }

func verdict(v uint32) involflt.TagVerdict { return involflt.TagVerdict{GUID: guid(cp), Verdict: v} }

func tagInfo(ms int32, flags uint32) involflt.TagInfo {
	return involflt.TagInfo{GUID: guid(cp), Timeout: ms, Flags: flags}
}

// pendingTags is how many tags a disk's queue would give now.
func (q *memQueue) pendingTags() (n int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, e := range q.entries {
		if e.mark != nil && !e.mark.open && !e.mark.revoked {
			n++
		}
	}
	return n
}

// TestFrozenPoint: freeze, tag, thaw, commit, each from a descriptor that is
// closed at once, as clients do it.
func TestFrozenPoint(t *testing.T) {
	synced(t, func(t *testing.T, c *client, m *memSystem) {
		st, err := c.volumesCall(c.open(), involflt.FreezeVolume, cp, 60000, "/dev/a", "/dev/c")
		wants(t, "freeze", nil, err, st, 0, 0)
		st, err = c.volumesCall(c.open(), involflt.FreezeVolume, cp, 60000, "/dev/b", "/dev/a", "/dev/x")
		wants(t, "freeze more", syscall.EPERM, err, st, 0, 1, 1)
		st, err = c.volumesCall(c.open(), involflt.FreezeVolume, "other", 60000, "/dev/b")
		wants(t, "another name", syscall.EINVAL, err, st, 0)
		if len(m.frozen) != 3 {
			t.Errorf("frozen: %v", m.frozen)
		}
		c.is(syscall.EAGAIN, c.open(), involflt.CreateBarrier, barrier(100))
		c.is(syscall.EINVAL, c.open(), involflt.TagCommit, verdict(1))
		_, st, err = c.tag(c.open(), involflt.TagVolume, tagInfo(0, involflt.AllVolumes), []string{"x"})
		wants(t, "all without a barrier", syscall.EINVAL, err, st)
		n, st, err := c.tag(c.open(), involflt.TagVolume, tagInfo(0, 0), []string{"x", "why"}, "/dev/a", "/dev/b")
		wants(t, "tag", nil, err, st, 0, 0)
		if n != 0 {
			t.Errorf("returned %d", n)
		}
		f := c.started("/dev/a")
		if _, err := c.block(f); err != syscall.EAGAIN {
			t.Errorf("a tag without verdict is drained: %v", err)
		}
		_, st, err = c.tag(c.open(), involflt.TagVolume, tagInfo(0, 0), []string{"x"}, "/dev/a")
		wants(t, "a second tag", syscall.EINVAL, err, st, 0)
		c.is(syscall.EINVAL, c.open(), involflt.TagCommit, verdict(1)) // still frozen
		st, err = c.volumesCall(c.open(), involflt.ThawVolume, "other", 0, "/dev/a")
		wants(t, "another name", syscall.EINVAL, err, st, 0)
		st, err = c.volumesCall(c.open(), involflt.ThawVolume, cp, 0, "/dev/b", "/dev/x")
		wants(t, "thaw", syscall.EPERM, err, st, 0, 1)
		st, err = c.volumesCall(c.open(), involflt.ThawVolume, cp, 0, "/dev/a", "/dev/c")
		wants(t, "thaw", nil, err, st, 0, 0)
		c.is(syscall.EINVAL, c.open(), involflt.TagCommit, verdict(2))
		c.is(nil, c.open(), involflt.TagCommit, verdict(1))
		c.is(syscall.EINVAL, c.open(), involflt.TagCommit, verdict(1))
		b := c.mustBlock(f)
		_, _, _, texts, err := involflt.ParseTagList(b.Tags[:])
		if err != nil || len(texts) != 2 || string(texts[1]) != "why" || m.queues["/dev/b"].pendingTags() != 1 {
			t.Errorf("%q %v", texts, err)
		}
	})
}

// TestTimes: each state that nobody ends ends by itself, and nothing of it counts.
func TestTimes(t *testing.T) {
	synced(t, func(t *testing.T, c *client, m *memSystem) {
		f := c.started("/dev/a")
		// Frozen for too long, tagged.
		_, _ = c.volumesCall(f, involflt.FreezeVolume, cp, 5000, "/dev/a")
		_, st, err := c.tag(f, involflt.TagVolume, tagInfo(60000, 0), []string{"x"}, "/dev/a")
		wants(t, "tag", nil, err, st, 0)
		time.Sleep(4 * time.Second)
		st, err = c.volumesCall(f, involflt.FreezeVolume, cp, 60000, "/dev/b")
		wants(t, "a tag lets no more in", syscall.EAGAIN, err, st, 0)
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if len(m.frozen) != 0 || !m.marks[0].revoked {
			t.Errorf("frozen %v, revoked %v", m.frozen, m.marks[0].revoked)
		}
		st, err = c.volumesCall(f, involflt.ThawVolume, cp, 0, "/dev/a")
		wants(t, "thaw too late", syscall.EINVAL, err, st, 0)
		c.is(syscall.EINVAL, f, involflt.TagCommit, verdict(1))

		// A barrier that nobody removes.
		c.is(nil, f, involflt.CreateBarrier, barrier(300))
		if m.held != 1 {
			t.Error("nothing holds")
		}
		_, _, err = c.tag(f, involflt.TagVolume, tagInfo(0, involflt.AllVolumes), []string{"x"})
		time.Sleep(301 * time.Millisecond)
		synctest.Wait()
		if m.held != 0 || err != nil || !m.marks[1].revoked {
			t.Errorf("held %d, %v, revoked %v", m.held, err, m.marks[1].revoked)
		}
		c.is(syscall.EINVAL, f, involflt.RemoveBarrier, involflt.BarrierEnd{GUID: guid(cp)})

		// A verdict that nobody gives.
		_, st, err = c.tag(f, involflt.TagVolume, tagInfo(2000, 0), []string{"x"}, "/dev/a")
		wants(t, "tag alone", nil, err, st, 0)
		time.Sleep(2001 * time.Millisecond)
		synctest.Wait()
		if b := c.mustBlock(f); !m.marks[2].revoked || b.Flags != involflt.FlagEmpty {
			t.Errorf("revoked %v, %#x", m.marks[2].revoked, b.Flags)
		}

		// The timers of one point leave the next one alone.
		_, _ = c.volumesCall(f, involflt.FreezeVolume, cp, 1000, "/dev/a")
		_, _ = c.volumesCall(f, involflt.ThawVolume, cp, 0, "/dev/a")
		time.Sleep(500 * time.Millisecond)
		_, _ = c.volumesCall(f, involflt.FreezeVolume, cp, 1000, "/dev/a")
		time.Sleep(700 * time.Millisecond)
		synctest.Wait()
		if len(m.frozen) != 1 {
			t.Error("thawed by an earlier point's time")
		}
		_, _ = c.volumesCall(f, involflt.ThawVolume, cp, 0, "/dev/a")
	})
}

// TestBarrier: tags of all disks; what changes which disks there are waits; an empty disk is no empty answer.
func TestBarrier(t *testing.T) {
	synced(t, func(t *testing.T, c *client, m *memSystem) {
		f := c.started("/dev/a")
		c.is(nil, f, involflt.CreateBarrier, barrier(200))
		c.is(syscall.EAGAIN, f, involflt.CreateBarrier, barrier(200))
		_, err := c.volumesCall(f, involflt.FreezeVolume, cp, 100, "/dev/a")
		if err != syscall.EAGAIN {
			t.Errorf("freeze within a barrier: %v", err)
		}
		if _, err := c.block(f); err != syscall.EAGAIN {
			t.Errorf("nothing is pending within a barrier: %v", err)
		}
		begun := time.Now()
		started := make(chan time.Duration)
		go func() {
			c.started("/dev/c")
			started <- time.Since(begun)
		}()
		time.Sleep(50 * time.Millisecond)
		_, _, err = c.tag(f, involflt.TagVolume, tagInfo(0, involflt.AllVolumes), []string{"x"})
		if err != nil || len(m.marks[0].mark.Devices) != 2 {
			t.Errorf("%v %v", err, m.marks[0].mark.Devices)
		}
		c.is(syscall.EINVAL, f, involflt.TagCommit, verdict(1))
		c.is(syscall.EINVAL, f, involflt.RemoveBarrier, involflt.BarrierEnd{GUID: guid("other")})
		c.is(nil, f, involflt.RemoveBarrier, involflt.BarrierEnd{GUID: guid(cp)})
		if d := <-started; d != 50*time.Millisecond {
			t.Errorf("a disk was started after %v", d)
		}
		c.is(nil, f, involflt.TagCommit, verdict(0))
		if !m.marks[0].revoked || m.held != 0 {
			t.Error("not revoked")
		}
		c.is(syscall.EINVAL, f, involflt.CreateBarrier, barrier(0))
		c.is(syscall.EINVAL, f, involflt.CreateBarrier, barrier(301))
		m.queues["/dev/b"].order = involflt.OrderBitmap
		c.is(syscall.EPERM, f, involflt.CreateBarrier, barrier(100))
		m.queues["/dev/b"].order = involflt.OrderData
		m.failing = errors.New("the disks are too busy")
		c.is(syscall.EAGAIN, f, involflt.CreateBarrier, barrier(100))
		m.failing = nil
		c.is(nil, f, involflt.UnstackAll, [0]byte{})
		c.is(syscall.ENODEV, f, involflt.CreateBarrier, barrier(100))
	})
}

// TestBrokenBarrier: whose writes went on too early is told so, and its tags are revoked.
func TestBrokenBarrier(t *testing.T) {
	synced(t, func(t *testing.T, c *client, m *memSystem) {
		f := c.started("/dev/a")
		m.loose = true
		for _, tagged := range []bool{true, false} {
			c.is(nil, f, involflt.CreateBarrier, barrier(200))
			if tagged {
				if _, _, err := c.tag(f, involflt.TagVolume, tagInfo(0, involflt.AllVolumes), []string{"x"}); err != nil {
					t.Error(err)
				}
			}
			c.is(syscall.EINVAL, f, involflt.RemoveBarrier, involflt.BarrierEnd{GUID: guid(cp)})
			c.is(syscall.EINVAL, f, involflt.TagCommit, verdict(1))
		}
		if !m.marks[0].revoked || m.held != 0 {
			t.Error("not revoked")
		}
		m.loose = false
		c.is(nil, f, involflt.CreateBarrier, barrier(200))
		c.is(nil, f, involflt.RemoveBarrier, involflt.BarrierEnd{GUID: guid(cp)})
	})
}

// TestAtomicTag: IOBARRIER_TAG_VOLUME needs no verdict, but where a volume asks for one.
func TestAtomicTag(t *testing.T) {
	synced(t, func(t *testing.T, c *client, m *memSystem) {
		f := c.started("/dev/a")
		n, _, err := c.tag(f, involflt.BarrierTag, tagInfo(0, involflt.AllVolumes), []string{"x"})
		if n != 0 || err != nil || m.queues["/dev/a"].pendingTags() != 1 || m.queues["/dev/b"].pendingTags() != 1 {
			t.Errorf("%d %v", n, err)
		}
		n, st, err := c.tag(f, involflt.BarrierTag, tagInfo(0, 0), []string{"x"}, "/dev/a", "/dev/c")
		wants(t, "some", nil, err, st, 0, involflt.StatusNotProtected)
		if n != involflt.PartialTags {
			t.Errorf("returned %d", n)
		}
		_, st, err = c.tag(f, involflt.BarrierTag, tagInfo(0, 0), []string{"x"}, "/dev/c")
		wants(t, "none", syscall.EPERM, err, st, involflt.StatusNotProtected)
		_, st, err = c.tag(f, involflt.BarrierTag, tagInfo(-1, 0), []string{"x"}, "/dev/a")
		wants(t, "less than no time", syscall.EINVAL, err, st, 99)
		m.queues["/dev/b"].order = involflt.OrderMetadata
		_, _, err = c.tag(f, involflt.BarrierTag, tagInfo(0, involflt.AllVolumes), []string{"x"})
		if err != syscall.EPERM {
			t.Errorf("a disk is not in order: %v", err)
		}
		_, st, err = c.tag(f, involflt.BarrierTag, tagInfo(0, 0), []string{"x"}, "/dev/b", "/dev/c")
		wants(t, "none in order", syscall.EAGAIN, err, st, involflt.StatusNotInOrder, involflt.StatusNotProtected)
		n, st, err = c.tag(f, involflt.BarrierTag, tagInfo(0, 0), []string{"x"}, "/dev/b", "/dev/a")
		wants(t, "one in order", nil, err, st, involflt.StatusNotInOrder, 0)
		if n != 1 {
			t.Errorf("returned %d", n)
		}
		m.queues["/dev/b"].order = involflt.OrderData

		sp := newSpace()
		in := tagInfo(0, 0)
		in.Tags, in.Volumes, in.Array, in.TagArray = 1, 2, array, tags
		copy(sp.b[array-base:], involflt.Bytes([]involflt.VolumeInfo{{Device: long("/dev/a"), Flags: involflt.DrainBarrier}, {Device: long("/dev/b")}}))
		if _, err := c.callCtx(t.Context(), f, involflt.BarrierTag, in, sp); err != syscall.EINVAL {
			t.Errorf("a verdict within no time: %v", err)
		}
		in.Timeout = 100
		if _, err := c.callCtx(t.Context(), f, involflt.BarrierTag, in, sp); err != nil {
			t.Error(err)
		}
		_, st, err = c.tag(f, involflt.BarrierTag, tagInfo(0, 0), []string{"x"}, "/dev/a")
		wants(t, "while one waits for its verdict", syscall.EAGAIN, err, st, 0)
		c.is(nil, f, involflt.TagCommit, verdict(1))
		last := m.marks[len(m.marks)-1]
		if last.open || last.revoked {
			t.Error("not committed")
		}
	})
}

// TestTagsThatGo: tags that were dropped before their verdict are told; freezes that did not hold give no tags.
func TestTagsThatGo(t *testing.T) {
	synced(t, func(t *testing.T, c *client, m *memSystem) {
		f := c.open()
		_, st, err := c.tag(f, involflt.TagVolume, tagInfo(1000, 0), []string{"x"}, "/dev/a", "/dev/b")
		wants(t, "tag", nil, err, st, 0, 0)
		c.is(nil, f, involflt.ClearDifferentials, named("/dev/b"))
		if n, err := c.call(f, involflt.TagCommit, verdict(1)); n != 1 || err != nil {
			t.Errorf("one is gone: %d %v", n, err)
		}
		_, _ = c.volumesCall(f, involflt.FreezeVolume, cp, 1000, "/dev/a")
		_, _, _ = c.tag(f, involflt.TagVolume, tagInfo(0, 0), []string{"x"}, "/dev/a")
		m.loose = true
		st, err = c.volumesCall(f, involflt.ThawVolume, cp, 0, "/dev/a")
		wants(t, "it did not hold", syscall.EPERM, err, st, 1)
		c.is(syscall.EINVAL, f, involflt.TagCommit, verdict(1))
		if !m.marks[1].revoked {
			t.Error("a mark within a freeze that did not hold counts")
		}
		m.loose = false
		m.failing = ErrNoOrder
		_, st, err = c.tag(f, involflt.TagVolume, tagInfo(1000, 0), []string{"x"}, "/dev/a")
		wants(t, "no mark", syscall.EAGAIN, err, st, 1)
		m.failing = nil
		_, st, err = c.tag(f, involflt.TagVolume, tagInfo(1000, 0), []string{"x"}, "/dev/a")
		wants(t, "after it", nil, err, st, 0)
	})
}

// TestClosingEndsPoints: nothing stays frozen or held when the device goes.
func TestClosingEndsPoints(t *testing.T) {
	synced(t, func(t *testing.T, c *client, m *memSystem) {
		_, _ = c.volumesCall(c.open(), involflt.FreezeVolume, cp, 60000, "/dev/a")
		_, _, _ = c.tag(c.open(), involflt.TagVolume, tagInfo(0, 0), []string{"x"}, "/dev/a")
		if err := c.s.Close(); err != nil || len(m.frozen) != 0 || !m.marks[0].revoked {
			t.Errorf("%v, %v, %v", err, m.frozen, m.marks[0].revoked)
		}
	})
}

// TestWait: enough, not enough, nothing; wakes, signals, the disk's end.
func TestWait(t *testing.T) {
	synced(t, func(t *testing.T, c *client, m *memSystem) {
		f, q := c.started("/dev/a"), m.queues["/dev/a"]
		wait := func(ctx context.Context, seconds int32, meanwhile func()) (time.Duration, error) {
			begun, ended := time.Now(), make(chan error)
			go func() {
				_, err := c.callCtx(ctx, f, involflt.WaitForBlocks, involflt.Wait{Device: named("/dev/a"), Seconds: seconds}, newSpace())
				ended <- err
			}()
			time.Sleep(time.Second)
			meanwhile()
			err := <-ended
			return time.Since(begun), err
		}
		is := func(what string, err error, d time.Duration, want error, after time.Duration) {
			t.Helper()
			if err != want || d != after {
				t.Errorf("%s: %v after %v; want %v after %v", what, err, d, want, after)
			}
		}
		d, err := wait(t.Context(), 65, func() {})
		is("nothing", err, d, syscall.ETIMEDOUT, 65*time.Second)
		d, err = wait(t.Context(), 65, func() { c.s.wakeAll() })
		is("a wake", err, d, syscall.ETIMEDOUT, time.Second)
		ctx, cancel := context.WithCancel(t.Context())
		d, err = wait(ctx, 65, cancel)
		is("a signal", err, d, syscall.ETIMEDOUT, time.Second)
		d, err = wait(t.Context(), 65, func() { q.write(1, 4096) })
		is("a little", err, d, nil, 65*time.Second)
		d, err = wait(t.Context(), 65, func() { _, _, _ = c.tag(c.open(), involflt.BarrierTag, tagInfo(0, 0), []string{"x"}, "/dev/a") })
		is("a tag", err, d, nil, time.Second)
		d, err = wait(t.Context(), 65, func() { q.write(2, 4<<20) })
		is("enough", err, d, nil, time.Second)
		d, err = wait(t.Context(), -5, func() {})
		is("less than no time", err, d, nil, time.Second)
		c.is(nil, f, involflt.ClearDifferentials, named("/dev/a"))
		c.is(syscall.EINVAL, f, involflt.WaitForBlocks, involflt.Wait{Device: named("/dev/b"), Seconds: 1})
		c.is(syscall.EINVAL, f, involflt.WaitForBlocksOld, involflt.Wait{Device: named("/dev/x"), Seconds: 1})
		c.is(syscall.ETIMEDOUT, c.open(), involflt.WaitForBlocksOld, involflt.Wait{Device: named("/dev/b"), Seconds: 1})
		d, err = wait(t.Context(), 65, func() { c.is(nil, c.open(), involflt.StopFiltering, named("/dev/a")) })
		is("the disk's end", err, d, syscall.EBUSY, time.Second+time.Millisecond)
		c.is(syscall.EBUSY, f, involflt.WaitForBlocks, involflt.Wait{Device: named("/dev/a"), Seconds: 1})
		c.is(syscall.EINVAL, c.open(), involflt.WaitForBlocks, involflt.Wait{Device: named("/dev/a"), Seconds: 1})
	})
}

// TestTagSizes: what cannot be a tag.
func TestTagSizes(t *testing.T) {
	synced(t, func(t *testing.T, c *client, m *memSystem) {
		f := c.open()
		info := tagInfo(1000, 0)
		long256 := strings.Repeat("x", 256)
		for _, x := range []struct {
			what string
			want error
			tags []string
		}{
			{"none", syscall.EINVAL, nil},
			{"more than a block holds", syscall.EINVAL, slices.Repeat([]string{long256}, 14)},
			{"just as many as a block holds", nil, slices.Repeat([]string{long256}, 13)},
		} {
			_, _, err := c.tag(f, involflt.TagVolume, info, x.tags, "/dev/a")
			if err != x.want {
				t.Errorf("%s: %v", x.what, err)
			}
		}
		c.is(nil, f, involflt.TagCommit, verdict(1))
		for count, want := range map[int32]error{-1: syscall.EINVAL, 0: syscall.EINVAL, 1 << 30: syscall.EINVAL, 441: syscall.EINVAL} {
			in := info
			in.Tags, in.Volumes, in.Array, in.TagArray = count, 1, array, tags
			c.is(want, f, involflt.TagVolume, in)
			in.Tags, in.Volumes = 1, count
			if count == 441 {
				want = syscall.EFAULT // more than the memory has
			}
			c.is(want, f, involflt.TagVolume, in)
		}
		in := info
		in.Tags, in.Volumes, in.Array, in.TagArray = 1, 1, array, tags
		sp := newSpace()
		copy(sp.b[tags-base:], involflt.Bytes(involflt.Tag{Length: 257}))
		if _, err := c.callCtx(t.Context(), f, involflt.TagVolume, in, sp); err != syscall.EPERM {
			t.Errorf("a tag of 257 bytes: %v", err)
		}
	})
}
