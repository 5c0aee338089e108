package involflt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"tidemark/internal/abi/involflt"
)

// The real thing is driven in a virtual machine (test/vm/guest); here is what
// can be asked without a kernel.

// changesOf reads a block's data file.
func changesOf(t testing.TB, b involflt.DirtyBlock) (path string, changes []involflt.Change) {
	t.Helper()
	path, err := involflt.ParseFileName(b.Tags[:])
	if err != nil || b.Flags&involflt.FlagDataFile == 0 {
		t.Fatalf("flags %#x: %v", b.Flags, err)
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	_, _, changes, err = involflt.ParseStream(raw)
	if err != nil || len(raw) != int(b.StreamBytes) || len(changes) != int(b.Changes) {
		t.Fatalf("%d bytes, %d changes: %v; the block says %d and %d", len(raw), len(changes), err, b.StreamBytes, b.Changes)
	}
	return path, changes
}

// TestDrain: nothing, then two batches. The same block until it is committed;
// wrong numbers change nothing; what was committed is the next one's end.
func TestDrain(t *testing.T) {
	m := newSystem("/dev/a")
	c := newClient(t, m)
	f, q := c.started("/dev/a"), m.queues["/dev/a"]
	q.known = involflt.Stamp{Time: 500, Sequence: 2}

	c.is(syscall.EFAULT, f, involflt.CommitDirtyBlocks, commitOf(0)) // nothing was given yet
	b := c.mustBlock(f)
	first, last, _, _, err := involflt.ParseTagList(b.Tags[:])
	if err != nil || b.Flags != involflt.FlagEmpty || b.Changes != 0 || b.Transaction == 0 || first != q.known || last != q.known {
		t.Errorf("nothing is pending: %#x %d %v %v %v", b.Flags, b.Transaction, first, last, err)
	}
	c.is(nil, f, involflt.CommitDirtyBlocks, commitOf(b.Transaction+77))
	if next := c.mustBlock(f); next.Transaction == b.Transaction || next.PrevTime != 0 {
		t.Errorf("transaction %d again, previous end %d", next.Transaction, next.PrevTime)
	}
	b = c.mustBlock(f)
	c.is(nil, f, involflt.CommitDirtyBlocks, commitOf(b.Transaction))

	q.write(7, 512, 4096)
	q.write(9, 1024)
	b = c.mustBlock(f)
	path, changes := changesOf(t, b)
	if want := "pre_completed_diff_S1007_7_E1007_8_WE0.dat"; filepath.Base(path) != want {
		t.Errorf("the file's name is %s, not %s", filepath.Base(path), want)
	}
	if b.ChangeBytes != 4608 || b.ChangesPending != 1 || b.BytesPending != 1024 || b.WriteOrder != involflt.OrderData || b.PrevTime != 500 || b.PrevSequence != 2 ||
		changes[1].Offset != 1<<30 || len(changes[1].Data) != 4096 || changes[1].At != (involflt.Stamp{Time: 1007, Sequence: 8}) {
		t.Errorf("%+v", b)
	}
	for _, name := range []string{path, filepath.Dir(path), c.s.files.dir} {
		if info, err := os.Stat(name); err != nil || info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
	for range 2 {
		again := c.mustBlock(f)
		if again != b {
			t.Error("another block before the commit")
		}
		c.is(syscall.EFAULT, f, involflt.CommitDirtyBlocks, commitOf(b.Transaction+1))
	}
	c.is(nil, f, involflt.CommitDirtyBlocks, commitOf(b.Transaction))
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a committed block's file: %v", err)
	}
	c.is(syscall.EFAULT, f, involflt.CommitDirtyBlocks, commitOf(b.Transaction))
	next := c.mustBlock(f)
	if next.Transaction != b.Transaction+1 || next.PrevTime != 1007 || next.PrevSequence != 8 || next.BytesPending != 0 {
		t.Errorf("%+v", next)
	}
}

// TestEmptyStamp: an empty answer says that all up to its stamp has been given;
// what came while it was made is later.
func TestEmptyStamp(t *testing.T) {
	m := newSystem("/dev/a")
	c := newClient(t, m)
	f, q := c.started("/dev/a"), m.queues["/dev/a"]
	q.known, q.late = involflt.Stamp{Time: 500, Sequence: 2}, true
	b := c.mustBlock(f)
	if first, _, _, _, err := involflt.ParseTagList(b.Tags[:]); err != nil || first.Time != 500 {
		t.Errorf("%v, %v", first, err)
	}
}

// TestSplit: random batches of changes, some larger than a block. What a client
// that applies whole changes has at their end is what was written; each part
// comes again alike, also for a server that begins anew.
func TestSplit(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	const size = 10 << 20
	m := newSystem("/dev/a")
	c := newClient(t, m)
	f, q := c.started("/dev/a"), m.queues["/dev/a"]
	want, have := make([]byte, size), make([]byte, size)
	at := involflt.Stamp{Time: 1, Sequence: 1}
	for range 3 {
		b := Batch{Kind: Writes}
		for range rng.IntN(16) {
			n := int64(1+rng.IntN(64)) * 512
			if rng.IntN(8) == 0 {
				n = int64(1+rng.IntN(9<<20/512)) * 512
			}
			ch := Change{Offset: rng.Int64N((size-n)/512) * 512, Length: n, At: at}
			if rng.IntN(4) > 0 {
				ch.Data = bytes.Repeat([]byte{byte(rng.Uint32()), byte(rng.Uint32())}, int(n/2))
			}
			b.Changes = append(b.Changes, ch)
			at.Sequence += uint64(1 + rng.IntN(3))
			at.Time += rng.Uint64N(3)
			if rng.IntN(6) == 0 {
				at.Time += 1 << 33 // more than a block's deltas can say
			}
			if ch.Data != nil {
				copy(want[ch.Offset:], ch.Data)
			} else {
				clear(want[ch.Offset : ch.Offset+n])
			}
		}
		q.add(entry{batch: b})
	}
	prev, expect, restarts := involflt.Stamp{}, uint32(1), 3
	for {
		b := c.mustBlock(f)
		if b.Flags&involflt.FlagEmpty != 0 {
			break
		}
		if b.PrevTime != prev.Time || b.PrevSequence != prev.Sequence {
			t.Fatalf("previous end %d %d, not %v", b.PrevTime, b.PrevSequence, prev)
		}
		_, changes := changesOf(t, b)
		if b.StreamBytes > streamMax+involflt.StreamOverhead+involflt.ChangeOverhead {
			t.Errorf("a stream of %d bytes", b.StreamBytes)
		}
		for _, ch := range changes {
			if ch.At.Before(prev) {
				t.Errorf("%v after %v", ch.At, prev)
			}
			copy(have[ch.Offset:], ch.Data)
			prev = ch.At
		}
		switch {
		case b.Split == 0 && b.Flags == involflt.FlagDataFile && expect == 1:
		case b.Split == expect && len(changes) == 1 && b.Flags&involflt.FlagSplitStart != 0 == (expect == 1):
			if expect++; b.Flags&involflt.FlagSplitEnd != 0 {
				expect = 1
			}
		default:
			t.Fatalf("part %d with flags %#x; want part %d", b.Split, b.Flags, expect)
		}
		if restarts > 0 && rng.IntN(4) == 0 { // a new process: the batch begins again, from its first part
			restarts--
			s, err := New(m, filepath.Dir(filepath.Dir(mustFile(t, b))), nil)
			if err != nil {
				t.Fatal(err)
			}
			if left, _ := filepath.Glob(filepath.Join(s.files.dir, "*", "*")); len(left) > 0 {
				t.Errorf("files of an earlier process: %v", left)
			}
			c.s = s
			f = c.open()
			c.is(nil, f, involflt.StartFiltering, info("/dev/a", "na"))
			prev, expect = q.State().Committed, 1
			continue
		}
		c.is(nil, f, involflt.CommitDirtyBlocks, commitOf(b.Transaction))
	}
	if !bytes.Equal(want, have) {
		t.Error("the copy is another")
	}
}

func mustFile(t testing.TB, b involflt.DirtyBlock) string {
	t.Helper()
	path, err := involflt.ParseFileName(b.Tags[:])
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// TestPendingOfParts: what is pending behind a block, and what is said of the disk, goes down with
// each part of a batch that is committed. What cannot be counted is no answer but a block's.
func TestPendingOfParts(t *testing.T) {
	m := newSystem("/dev/a")
	c := newClient(t, m)
	f, q := c.started("/dev/a"), m.queues["/dev/a"]
	q.write(7, 9<<20, 512)
	q.write(9, 1024)
	pending := func() uint64 {
		t.Helper()
		space := newSpace()
		if _, err := c.callCtx(t.Context(), f, involflt.AdditionalStats, involflt.Additional{Device: named("/dev/a")}, space); err != nil {
			t.Fatal(err)
		}
		var out involflt.Additional
		if err := involflt.Decode(space.b[:involflt.Size(out)], &out); err != nil {
			t.Fatal(err)
		}
		return out.Pending
	}
	left, changes := uint64(9<<20+512+1024), []uint32{3, 3, 2, 1, 0} // the first is pending until its last part is handed over
	for i, size := range []uint64{4 << 20, 4 << 20, 1 << 20, 512, 1024} {
		if n := pending(); n != left {
			t.Errorf("before part %d %d bytes are pending, want %d", i, n, left)
		}
		b := c.mustBlock(f)
		left -= size
		if b.ChangeBytes != size || b.BytesPending != left || b.ChangesPending != changes[i] {
			t.Errorf("part %d: %d bytes, behind it %d and %d changes; want %d, %d and %d", i, b.ChangeBytes, b.BytesPending, b.ChangesPending, size, left, changes[i])
		}
		c.is(nil, f, involflt.CommitDirtyBlocks, commitOf(b.Transaction))
	}
	q.write(10, 512)
	q.uncounted = syscall.EAGAIN
	c.mustBlock(f)
	c.is(syscall.EAGAIN, f, involflt.AdditionalStats, involflt.Additional{Device: named("/dev/a")})
}

// TestKinds: copies are data without order, ranges come in the block's own arrays
// and get a new number from a new drainer, tags are alone.
func TestKinds(t *testing.T) {
	m := newSystem("/dev/a")
	c := newClient(t, m)
	f, q := c.started("/dev/a"), m.queues["/dev/a"]
	at := involflt.Stamp{Time: 50, Sequence: 5}
	q.add(entry{batch: Batch{Kind: Copies, Changes: []Change{{Offset: 4096, Length: 512, At: at}}}})
	var ranges []Change
	for i := range 200 {
		ranges = append(ranges, Change{Offset: int64(i) << 20, Length: 4096, At: at})
	}
	q.add(entry{batch: Batch{Kind: Ranges, Changes: append(ranges, Change{Length: 100 << 20, At: at})}})
	q.add(entry{batch: Batch{Kind: Writes}}) // only discards were in it
	q.add(entry{batch: Batch{Kind: Tags, At: at, Tags: [][]byte{[]byte("one"), []byte("two")}}})

	b := c.mustBlock(f)
	if path, _ := changesOf(t, b); b.WriteOrder != involflt.OrderBitmap || !strings.HasSuffix(path, "_ME0.dat") {
		t.Errorf("copies: order %d, file %s", b.WriteOrder, path)
	}
	c.is(nil, f, involflt.CommitDirtyBlocks, commitOf(b.Transaction))

	drainer := c.open()
	c.is(nil, drainer, involflt.ProcessStart, uint32(0))
	b = c.mustBlock(f)
	if b.Flags != 0 || b.WriteOrder != involflt.OrderMetadata || b.Changes != 170 || b.Offsets[3] != 3<<20 || b.Lengths[3] != 4096 || b.ChangeBytes != 170*4096 {
		t.Errorf("ranges: %#x %d %d", b.Flags, b.Changes, b.ChangeBytes)
	}
	drainer.Close()
	c.is(syscall.EFAULT, f, involflt.CommitDirtyBlocks, commitOf(b.Transaction)) // it is out no more
	if again := c.mustBlock(f); again.Transaction != b.Transaction+1 || again.Offsets != b.Offsets {
		t.Errorf("ranges for a new drainer have number %d after %d", again.Transaction, b.Transaction)
	}
	c.is(nil, f, involflt.CommitDirtyBlocks, commitOf(b.Transaction+1))
	b = c.mustBlock(f)
	if b.Changes != 32 || b.Lengths[30] != 64<<20 || b.Lengths[31] != 36<<20 || b.Offsets[31] != 64<<20 {
		t.Errorf("a large range: %d %d", b.Changes, b.Lengths[30])
	}
	c.is(nil, f, involflt.CommitDirtyBlocks, commitOf(b.Transaction))

	b = c.mustBlock(f)
	first, last, source, texts, err := involflt.ParseTagList(b.Tags[:])
	if err != nil || b.Flags != 0 || b.Changes != 0 || b.WriteOrder != involflt.OrderData || first != at || last != at || source != 2 || len(texts) != 2 || string(texts[1]) != "two" {
		t.Errorf("tags: %+v %v %v %d %q %v", b.Flags, first, last, source, texts, err)
	}
	c.is(nil, f, involflt.CommitDirtyBlocks, commitOf(b.Transaction))
	if b := c.mustBlock(f); b.Flags != involflt.FlagEmpty {
		t.Errorf("what was left: %#x", b.Flags)
	}
}

// TestDrainerDies: its end gives what it had to another one, with the same
// number; the end of any other descriptor does not.
func TestDrainerDies(t *testing.T) {
	m := newSystem("/dev/a")
	c := newClient(t, m)
	lease, f := c.open(), c.started("/dev/a")
	c.is(nil, lease, involflt.ProcessStart, uint32(0))
	c.is(syscall.EINVAL, c.open(), involflt.ProcessStart, uint32(0))
	c.is(syscall.EINVAL, lease, involflt.ProcessStart, uint32(0))
	m.queues["/dev/a"].write(1, 512)
	b := c.mustBlock(f)
	f.Close()
	f = c.started("/dev/a")
	c.is(nil, f, involflt.CommitDirtyBlocks, commitOf(b.Transaction)) // it was still out

	m.queues["/dev/a"].write(2, 512)
	b = c.mustBlock(f)
	lease.Close()
	c.is(syscall.EFAULT, f, involflt.CommitDirtyBlocks, commitOf(b.Transaction))
	again := c.mustBlock(f)
	if again != b {
		t.Error("another block for the next drainer")
	}
	if _, changes := changesOf(t, again); len(changes) != 1 {
		t.Error("its file is gone")
	}
	c.is(nil, c.open(), involflt.ProcessStart, uint32(0)) // it can be had again
	service := c.open()
	c.is(nil, service, involflt.ServiceStart, uint32(3))
	c.is(syscall.EINVAL, c.open(), involflt.ServiceStart, uint32(3))
	service.Close()
	c.is(nil, c.open(), involflt.ServiceStart, uint32(3))
}

// TestBinding: a descriptor is for the disk that it started first.
func TestBinding(t *testing.T) {
	m := newSystem("/dev/a", "/dev/b")
	c := newClient(t, m)
	f, other := c.started("/dev/a"), c.started("/dev/b")
	m.queues["/dev/a"].write(1, 512)
	c.is(nil, f, involflt.StartFiltering, info("/dev/b", "nb"))
	b := c.mustBlock(f)
	if b.Changes != 1 {
		t.Error("the descriptor is for another disk now")
	}
	if b := c.mustBlock(other); b.Flags != involflt.FlagEmpty {
		t.Error("blocks of another disk")
	}
	c.is(syscall.EINVAL, f, involflt.StartFiltering, info("/dev/a", "nb"))
	c.is(syscall.EINVAL, f, involflt.StartFiltering, info("/dev/a", "else"))
	c.is(syscall.EINVAL, f, involflt.StartFiltering, info("/dev/c", "na"))
	c.is(syscall.ENODEV, f, involflt.StartFiltering, info("/dev/c", "nc"))

	c.is(nil, f, involflt.StartFiltering, info("/alias/a", "na"))
	c.is(syscall.EINVAL, f, involflt.StartFiltering, info("/alias/a", "else"))
	if len(c.s.all()) != 2 {
		t.Error("another path is another disk")
	}
	second := c.started("/dev/a")
	c.is(nil, second, involflt.StopFiltering, named("/dev/a"))
	if _, err := c.block(f); err != syscall.EBUSY {
		t.Errorf("of a disk that is filtered no more: %v", err)
	}
	if _, err := c.block(second); err != syscall.EINVAL {
		t.Errorf("who stopped it has none any more: %v", err)
	}
	c.is(nil, f, involflt.CommitDirtyBlocks, commitOf(b.Transaction)) // what it had counts for nothing
	c.is(syscall.EBUSY, f, involflt.CommitDirtyBlocks, commitOf(b.Transaction))
	c.is(syscall.ENODEV, f, involflt.StopFiltering, named("/dev/a"))
	if left, _ := filepath.Glob(filepath.Join(c.s.files.dir, "*-na*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	c.is(nil, f, involflt.StartFiltering, info("/dev/a", "na"))
	if b := c.mustBlock(f); b.Changes != 1 {
		t.Error("it was started again, and the descriptor is not for it")
	}
	c.is(nil, other, involflt.UnstackAll, [0]byte{})
	if len(c.s.all()) != 0 {
		t.Error("disks are left")
	}
	c.started("/dev/b") // unlike with the driver
}

// TestUnprotected: a disk whose group was unprotected behind the interface's back can be filtered anew;
// the descriptors of before see that it was stopped.
func TestUnprotected(t *testing.T) {
	m := newSystem("/dev/a")
	c := newClient(t, m)
	f, q := c.started("/dev/a"), m.queues["/dev/a"]
	q.write(1, 512)
	id := c.mustBlock(f).Transaction
	q.uncounted = ErrNoDevice
	fresh := newQueue(m)
	m.queues["/dev/a"] = fresh
	fresh.write(9, 1024)
	g := c.started("/dev/a")
	if b := c.mustBlock(g); b.ChangeBytes != 1024 {
		t.Errorf("%d bytes", b.ChangeBytes)
	}
	if _, err := c.block(f); err != syscall.EBUSY {
		t.Errorf("the descriptor of before: %v", err)
	}
	c.is(nil, f, involflt.CommitDirtyBlocks, commitOf(id)) // has no effect
	if n, _ := fresh.Pending(t.Context()); n.Bytes != 1024 {
		t.Errorf("%+v", n)
	}
}

// TestClear: numbers begin anew, what was out counts for nothing.
func TestClear(t *testing.T) {
	m := newSystem("/dev/a")
	c := newClient(t, m)
	f, q := c.started("/dev/a"), m.queues["/dev/a"]
	q.resync = Resync{Count: 2, Code: 5, Time: 9, Text: "changes were lost"}
	q.write(7, 512)
	b := c.mustBlock(f)
	if b.Flags&involflt.FlagResync == 0 || b.ResyncCount != 2 || b.ResyncCode != 5 || b.ResyncTime != 9 || string(b.ResyncText[:17]) != q.resync.Text {
		t.Errorf("resync: %+v", b.ResyncText)
	}
	c.is(nil, c.open(), involflt.ClearDifferentials, named("/dev/a"))
	c.is(nil, c.open(), involflt.ClearDifferentials, named("/dev/unknown"))
	c.is(nil, f, involflt.CommitDirtyBlocks, commitOf(b.Transaction))
	c.is(syscall.EFAULT, f, involflt.CommitDirtyBlocks, commitOf(b.Transaction))
	q.write(9, 512)
	if b := c.mustBlock(f); b.Transaction != 1 || b.Flags != involflt.FlagDataFile || b.PrevTime != 0 {
		t.Errorf("after clearing: %d %#x", b.Transaction, b.Flags)
	}
}

// TestResync: a reason is told until a commit that counts has dealt with it; one
// that came later stays.
func TestResync(t *testing.T) {
	m := newSystem("/dev/a")
	c := newClient(t, m)
	f, q := c.started("/dev/a"), m.queues["/dev/a"]
	q.resync = Resync{Count: 1, Code: 5}
	q.write(7, 512)
	b := c.mustBlock(f)
	wrong := commitOf(b.Transaction + 5)
	wrong.Flags = involflt.ResetResync
	c.is(syscall.EFAULT, f, involflt.CommitDirtyBlocks, wrong)
	if q.State().Resync.Count != 1 {
		t.Error("a commit that failed has dealt with it")
	}
	q.mu.Lock()
	q.resync.Count = 2
	q.mu.Unlock()
	right := commitOf(b.Transaction)
	right.Flags = involflt.ResetResync
	c.is(nil, f, involflt.CommitDirtyBlocks, right)
	if q.State().Resync.Count != 1 {
		t.Error("the reason that came later is gone")
	}
	b = c.mustBlock(f)
	right = commitOf(b.Transaction)
	right.Flags = involflt.ResetResync
	c.is(nil, f, involflt.CommitDirtyBlocks, right)
	if b := c.mustBlock(f); q.State().Resync.Count != 0 || b.Flags != involflt.FlagEmpty {
		t.Error("an empty answer's commit deals with it too")
	}

	q.write(11, 512)
	b = c.mustBlock(f)
	c.is(nil, f, involflt.CommitDirtyBlocks, commitOf(b.Transaction))
	stamps := func(cmd uint32) (r involflt.Resync) {
		t.Helper()
		sp := newSpace()
		if _, err := c.callCtx(context.Background(), f, cmd, involflt.Resync{Device: named("/dev/a")}, sp); err != nil {
			t.Fatal(err)
		}
		if err := involflt.Decode(sp.b[:144], &r); err != nil {
			t.Fatal(err)
		}
		return r
	}
	if r := stamps(involflt.ResyncStart); r.Time != 1011 || r.Sequence != 11 || q.settled != 1 {
		t.Errorf("start: %v, settled %d times", r, q.settled)
	}
	if r := stamps(involflt.ResyncEnd); r.Time < 1<<50 {
		t.Errorf("end: %d", r.Time)
	}
}

// TestNoRoom: a data file that cannot be written is an errno, and the block comes when it can.
func TestNoRoom(t *testing.T) {
	m := newSystem("/dev/a")
	c := newClient(t, m)
	f := c.started("/dev/a")
	m.queues["/dev/a"].write(1, 512)
	in := filepath.Join(c.s.files.dir, "disk-na")
	if err := os.WriteFile(in, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := c.block(f); err != syscall.ENOMEM {
		t.Errorf("no file: %v", err)
	}
	if err := os.Remove(in); err != nil {
		t.Fatal(err)
	}
	if b := c.mustBlock(f); b.Transaction != 1 || b.Changes != 1 {
		t.Errorf("%+v", b.Transaction)
	}
}

func TestList(t *testing.T) {
	m := newSystem("/dev/b", "/dev/a")
	c := newClient(t, m)
	c.started("/dev/b")
	f := c.started("/dev/a")
	for _, length := range []uint32{0, 13, 14} {
		sp := newSpace()
		_, err := c.callCtx(context.Background(), f, involflt.ProtectedVolumes, involflt.List{Buffer: array, Length: length}, sp)
		var l involflt.List
		if derr := involflt.Decode(sp.b[:16], &l); derr != nil {
			t.Fatal(derr)
		}
		text := sp.b[array-base:][:16]
		if length < 15 && (err != syscall.EAGAIN || l.Length < 15+involflt.ListReserve || l.Buffer != 0 || !bytes.Equal(text, make([]byte, 16))) {
			t.Errorf("room for %d: %v, %+v", length, err, l)
		}
	}
	sp := newSpace()
	if _, err := c.callCtx(context.Background(), f, involflt.ProtectedVolumes, involflt.List{Buffer: array, Length: 15}, sp); err != nil || string(sp.b[array-base:][:15]) != "/dev/a\n/dev/b\n\x00" {
		t.Errorf("%v: %q", err, sp.b[array-base:][:15])
	}
}

// TestStats: what is told, and into how many bytes.
func TestStats(t *testing.T) {
	m := newSystem("/dev/a")
	c := newClient(t, m)
	f := c.started("/dev/a")
	m.queues["/dev/a"].write(1, 512, 512)
	sp := newSpace()
	for i := range sp.b {
		sp.b[i] = 0xee
	}
	if _, err := f.command(t.Context(), involflt.GlobalStats, base, sp); err != nil || !strings.Contains(string(sp.b[:4096]), "Pending Bytes               : 1024\n") || sp.b[4095] != 0 || sp.b[4096] != 0xee {
		t.Errorf("%v: %s", err, sp.b[:4096])
	}
	for _, name := range []string{"/dev/a", "na"} {
		for i := range sp.b {
			sp.b[i] = 0xee
		}
		if _, err := c.callCtx(t.Context(), f, involflt.VolumeStats, involflt.Stats{Device: named(name), Buffer: array, Length: 100}, sp); err != nil ||
			!strings.HasPrefix(string(sp.b[array-base:]), "Volume ") || sp.b[array-base+99] != 0 || sp.b[array-base+100] != 0xee {
			t.Errorf("%v: %q", err, sp.b[array-base:][:101])
		}
	}
	c.is(syscall.ENODEV, f, involflt.VolumeStats, involflt.Stats{Device: named("/dev/x"), Buffer: array, Length: 100})
	if _, err := c.callCtx(t.Context(), f, involflt.AdditionalStats, involflt.Additional{Device: named("/dev/a")}, sp); err != nil {
		t.Error(err)
	}
	var a involflt.Additional
	if err := involflt.Decode(sp.b[:152], &a); err != nil || a.Pending != 1024 || a.Oldest != 1001 || a.Now < 1<<50 {
		t.Errorf("%+v, %v", a, err)
	}
	if _, err := c.callCtx(t.Context(), f, involflt.NotifyThreshold, involflt.Threshold{Device: named("/dev/a")}, sp); err != nil || fmt.Sprint(sp.b[128:132]) != "[0 0 64 0]" {
		t.Errorf("%v %v", err, sp.b[128:132])
	}
	if _, err := c.callCtx(t.Context(), f, involflt.DriverVersion, involflt.Version{}, sp); err != nil || sp.b[0] != 2 || sp.b[2] != 3 {
		t.Errorf("%v %v", err, sp.b[:16])
	}
}
