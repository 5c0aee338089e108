package spool

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
	"tidemark/internal/segment"
	"tidemark/internal/sim"
	"tidemark/internal/stream"
)

// attempt is a segment that was, or may have been, appended.
type attempt struct {
	digest  segment.Digest
	records []stream.Record
	marks   []int // numbers of records
}

// world is a machine with a spool, and what the caller was told.
type world struct {
	t        *testing.T
	r        *rand.Rand
	fs       *sim.FS
	s        *Spool
	c        *Cursor
	acked    map[uint64]attempt
	newest   uint64               // acknowledged
	tried    map[uint64][]attempt // of newest+1: any may turn up after a crash
	commit   uint64               // sequence behind the last acknowledged commit
	most     uint64               // the same, with commits that failed and may have happened
	previous segment.Summary
}

func newWorld(t *testing.T, seed uint64) *world {
	return &world{t: t, r: rand.New(rand.NewPCG(seed, 3)), fs: sim.New(seed), acked: map[uint64]attempt{}, tried: map[uint64][]attempt{}, commit: 1, most: 1}
}

var testDisks = []segment.Disk{{Name: "d", Size: 1 << 20, BlockSize: 4096, SectorSize: 512}}

func (w *world) seal(sequence uint64) (*segment.Sealed, attempt) {
	b := segment.NewBuilder(1 << 12)
	var a attempt
	for range 1 + w.r.IntN(6) {
		p := make([]byte, 512*(1+w.r.IntN(40)))
		for i := 0; i < len(p); i += 8 {
			binary.LittleEndian.PutUint64(p[i:], w.r.Uint64())
		}
		r := stream.Record{Kind: stream.KindWrite, Op: block.OpWrite, Position: stream.Position(w.r.Uint32()), Range: block.Range{Len: int64(len(p))}, Payload: p}
		if err := b.Append(&r); err != nil {
			w.t.Fatal(err)
		}
		a.records = append(a.records, r)
		if w.r.IntN(2) == 0 {
			b.Mark(segment.State{Source: segment.Source{Place: uint64(len(a.records))}})
			a.marks = append(a.marks, len(a.records))
		}
	}
	g, err := b.Seal(segment.Header{Group: "g", Sequence: sequence, Previous: w.previous.Digest, Disks: testDisks}, segment.State{Source: segment.Source{Place: uint64(len(a.records))}})
	if err != nil {
		w.t.Fatal(err)
	}
	a.digest = g.Summary.Digest
	return g, a
}

func (w *world) open() error {
	s, _, err := Open("/spool", Options{MaxBytes: 200 << 10, FS: w.fs})
	if err != nil {
		return err
	}
	if w.c, err = s.Cursor("vault"); err != nil {
		return errors.Join(err, s.Close())
	}
	w.s = s
	return nil
}

func (w *world) append() error {
	g, a := w.seal(w.newest + 1)
	w.tried[w.newest+1] = append(w.tried[w.newest+1], a)
	err := w.s.Append(g)
	if err == nil {
		w.acked[w.newest+1] = a
		w.newest++
		w.previous = g.Summary
	}
	return err
}

func (w *world) drain() error {
	if w.c.Drained() {
		return nil
	}
	item, err := w.c.Next(w.t.Context())
	if err != nil {
		return err
	}
	if item.Sequence != w.commit {
		return fmt.Errorf("next gives segment %d, want %d", item.Sequence, w.commit)
	}
	if err := w.check(item); err != nil {
		return err
	}
	w.most = w.commit + 1
	if err := w.c.Commit(item.Sequence); err != nil {
		return err
	}
	w.commit = w.most
	return nil
}

// check reads an item and compares it with what was acknowledged.
func (w *world) check(item Item) error {
	got, err := w.contents(item)
	if err != nil {
		return err
	}
	a, ok := w.acked[item.Sequence]
	if !ok || item.Summary.Digest != a.digest || !sameRecords(got, a.records) {
		return fmt.Errorf("segment %d is not what was acknowledged", item.Sequence)
	}
	return nil
}

func (w *world) contents(item Item) (out []stream.Record, err error) {
	f, err := item.Open()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	g, err := segment.Open(f, item.Summary.Size)
	if err != nil {
		return nil, err
	}
	err = g.Records(func(r *stream.Record) error {
		c := *r
		c.Payload = bytes.Clone(r.Payload)
		out = append(out, c)
		return nil
	})
	return out, err
}

func sameRecords(a, b []stream.Record) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i].Position != b[i].Position || !bytes.Equal(a[i].Payload, b[i].Payload) {
			return false
		}
	}
	return true
}

// restart is what comes after a crash: opening works, and everything that was
// acknowledged is there.
func (w *world) restart() {
	w.t.Helper()
	w.fs = w.fs.Crash()
	if err := w.open(); err != nil {
		w.fail("open after a crash: %v", err)
	}
	last, ok := w.s.Last()
	switch {
	case last.Sequence < w.newest || ok != (last.Sequence > 0):
		w.fail("newest is %d, and %d was acknowledged", last.Sequence, w.newest)
	case last.Sequence > w.newest+1:
		w.fail("newest is %d, and only %d was tried", last.Sequence, w.newest+1)
	case last.Sequence == w.newest+1:
		w.adopt(last)
	}
	w.previous = last
	next := max(w.c.next, 1)
	if next < w.commit || next > w.most {
		w.fail("the cursor is at %d, want %d to %d", next, w.commit, w.most)
	}
	w.commit, w.most = next, next
	w.tried = map[uint64][]attempt{}
	for _, item := range w.s.items {
		if err := w.check(item); err != nil {
			w.fail("%v", err)
		}
	}
}

// adopt takes a segment that a crash let through unacknowledged: as tried, or
// cut at one of its marks.
func (w *world) adopt(last segment.Summary) {
	item := w.s.items[len(w.s.items)-1]
	got, err := w.contents(item)
	if err != nil {
		w.fail("%v", err)
	}
	for _, a := range w.tried[last.Sequence] {
		cuts := append([]int{len(a.records)}, a.marks...)
		for _, n := range cuts {
			if sameRecords(got, a.records[:n]) && last.Source.Place == uint64(n) {
				w.newest++
				w.acked[w.newest] = attempt{digest: last.Digest, records: a.records[:n]}
				return
			}
		}
	}
	w.fail("segment %d, which was not acknowledged, is none of those tried", last.Sequence)
}

func (w *world) fail(format string, args ...any) {
	w.t.Helper()
	w.t.Fatalf("%s\nhistory:\n%s", fmt.Sprintf(format, args...), w.fs.History())
}

// TestCrash plays random histories with crashes and failing operations.
func TestCrash(t *testing.T) {
	for seed := range sim.Seeds(150) {
		w := newWorld(t, seed)
		for range 6 {
			w.fs.CrashAt(1 + w.r.IntN(80))
			if w.r.IntN(2) == 0 {
				w.fs.Fail(1+w.r.IntN(40), 1+w.r.IntN(4), []error{unix.ENOSPC, unix.EIO}[w.r.IntN(2)])
			}
			w.live(seed)
			w.restart()
			if err := w.s.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// live works until the machine crashes.
func (w *world) live(seed uint64) {
	w.t.Helper()
	for err := w.open(); err != nil; err = w.open() {
		if w.fs.Crashed() {
			return
		}
		if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EIO) {
			w.fail("seed %d: open: %v", seed, err)
		}
	}
	for !w.fs.Crashed() {
		work := w.append
		if w.r.IntN(2) == 0 {
			work = w.drain
		}
		if err := work(); err != nil && !errors.Is(err, ErrFull) && !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EIO) && !errors.Is(err, sim.ErrCrashed) {
			w.fail("seed %d: %v", seed, err)
		}
	}
}

// TestCrashAtEveryOperation crashes one history at each of its operations, with
// several outcomes each.
func TestCrashAtEveryOperation(t *testing.T) {
	play := func(w *world) {
		if w.open() != nil {
			return
		}
		for _, work := range []func() error{w.append, w.append, w.drain, w.append, w.drain, w.drain, w.append} {
			if work() != nil {
				return
			}
		}
	}
	whole := newWorld(t, 1)
	play(whole)
	if whole.newest != 4 || whole.commit != 4 {
		t.Fatalf("without a crash: newest %d, commit %d", whole.newest, whole.commit)
	}
	for n := 1; n <= whole.fs.Ops()+1; n++ {
		for outcome := range uint64(12) {
			w := newWorld(t, 1)
			w.fs = sim.New(outcome)
			w.fs.CrashAt(n)
			play(w)
			w.restart()
			for range 3 { // the next life works, and a crash in it too
				if err := w.append(); err != nil {
					w.fail("%v", err)
				}
				if err := w.drain(); err != nil {
					w.fail("%v", err)
				}
			}
			w.restart()
		}
	}
}

// TestOrder pins what Append and Commit do, in which order.
func TestOrder(t *testing.T) {
	w := newWorld(t, 1)
	for _, work := range []func() error{w.open, w.append, w.append, w.drain} {
		if err := work(); err != nil {
			t.Fatal(err)
		}
	}
	lines := []string{}
	for l := range bytes.Lines([]byte(w.fs.History())) {
		f := bytes.Fields(l)
		if n := len(lines); n > 0 && bytes.Equal(f[0], []byte("write")) && lines[n-1][:5] == "write" {
			continue
		}
		lines = append(lines, fmt.Sprintf("%s %s", f[0], bytes.TrimPrefix(f[1], []byte("/spool/"))))
	}
	const seg1, seg2 = "0000000000000001.seg", "0000000000000002.seg"
	want := []string{"syncdir /", "syncdir /spool",
		"create vault.cursor.new", "write vault.cursor.new", "sync vault.cursor.new", "rename vault.cursor.new", "syncdir /spool",
		"create " + seg1 + ".new", "write " + seg1 + ".new", "sync " + seg1 + ".new", "rename " + seg1 + ".new", "syncdir /spool",
		"create " + seg2 + ".new", "write " + seg2 + ".new", "sync " + seg2 + ".new", "rename " + seg2 + ".new", "syncdir /spool",
		"write vault.cursor", "sync vault.cursor", "remove " + seg1}
	if fmt.Sprint(lines) != fmt.Sprint(want) {
		t.Errorf("got\n%q\nwant\n%q", lines, want)
	}
}
