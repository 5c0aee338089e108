package daemon

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	abi "tidemark/internal/abi/involflt"
	"tidemark/internal/control/involflt"
	"tidemark/internal/protect"
	"tidemark/internal/tap"
	"tidemark/internal/testkit"
)

// replica applies what a queue gives.
type replica struct {
	t     *testing.T
	q     involflt.Queue
	image []byte
	end   abi.Stamp
	tags  []string
	at    [][]byte // the image at each of tags
}

// next applies a batch and commits it; its error is the queue's.
func (r *replica) next() error {
	r.t.Helper()
	b, err := r.q.Next(r.t.Context())
	if err != nil {
		return err
	}
	again, err := r.q.Next(r.t.Context())
	if err != nil || again.Number != b.Number || len(again.Changes) != len(b.Changes) {
		r.t.Fatalf("batch %d, and then %d: %v", b.Number, again.Number, err)
	}
	for _, c := range b.Changes {
		if c.At.Before(r.end) {
			r.t.Fatalf("%v after %v", c.At, r.end)
		}
		r.end = c.At
		switch to := r.image[c.Offset : c.Offset+c.Length]; {
		case b.Kind == involflt.Ranges: // copies of them follow
		case c.Data == nil:
			clear(to)
		default:
			copy(to, c.Data)
		}
	}
	for _, tag := range b.Tags {
		r.tags, r.at = append(r.tags, string(tag)), append(r.at, bytes.Clone(r.image))
	}
	return r.q.Commit(r.t.Context(), b.Number, 0)
}

// until drains until the queue's error is one, or done.
func (r *replica) until(want error, done func() bool) {
	r.t.Helper()
	for late := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		err := r.next()
		switch {
		case errors.Is(err, want) && done():
			return
		case err != nil && !errors.Is(err, involflt.ErrEmpty) && !errors.Is(err, want) && !errors.Is(err, unix.EAGAIN):
			r.t.Fatal(err)
		case time.Now().After(late):
			r.t.Fatalf("%v, tags %q, state %+v", err, r.tags, r.q.State())
		}
	}
}

// openInvolflt is a daemon's part of it, with nothing else.
func openInvolflt(t *testing.T, state, vault string) (*service, *involfltSystem) {
	t.Helper()
	s := &service{groups: map[string]*protect.Group{}, env: &protect.Env{StateDir: state, Instance: "0123456789abcdee", Log: slog.New(slog.DiscardHandler)}}
	if err := errors.Join(os.MkdirAll(filepath.Join(state, "groups"), 0o700), s.openMarks(nil), s.open()); err != nil {
		t.Fatal(err)
	}
	for _, g := range s.list() { // as start does, without served devices
		g.Start()
	}
	b, err := newInvolflt(s, filepath.Join(state, "involflt"), vault)
	if err != nil {
		t.Fatal(err)
	}
	return s, b
}

// TestInvolfltSystem: a disk that is in no group gets one; what is drained is the
// disk, at each tag too; tags without a verdict hold the drain, revoked ones
// are passed; it goes on with another daemon; stopped it leaves nothing.
func TestInvolfltSystem(t *testing.T) {
	testkit.Need(t, "root", "tap", "loop")
	testkit.NoLeaks(t)
	const size = 8 << 20
	disk := testkit.NewDisk(t, size)
	state := t.TempDir()
	vault := filepath.Join(t.TempDir(), "vault")
	open := func() (*service, *involfltSystem) { return openInvolflt(t, state, vault) }
	s, b := open()
	closeAll := func() { s.closeAllConsumers(); s.stop() }
	t.Cleanup(func() {
		closeAll()
		if err := tap.Discard(s.env.Instance, "_dev_disk"); err != nil {
			t.Error(err)
		}
	})
	if _, err := b.Start(t.Context(), "/dev/null", "x"); !errors.Is(err, involflt.ErrRefused) {
		t.Errorf("/dev/null: %v", err)
	}
	if _, err := b.Start(t.Context(), "/dev/nothing", "x"); !errors.Is(err, involflt.ErrNoDevice) {
		t.Errorf("/dev/nothing: %v", err)
	}
	if _, err := b.Start(t.Context(), disk.Path, "{x}"); !errors.Is(err, involflt.ErrRefused) {
		t.Errorf("a name that cannot be one: %v", err)
	}
	if _, err := (&involfltSystem{s: s, tags: b.tags, queues: b.queues}).Start(t.Context(), disk.Path, "x"); !errors.Is(err, involflt.ErrRefused) {
		t.Errorf("no vault, and no group: %v", err)
	}
	f, err := os.OpenFile(disk.Path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf, err := unix.Mmap(-1, 0, 64<<10, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(buf)
	truth := make([]byte, size)
	write := func(at int64, with byte) {
		t.Helper()
		copy(buf, bytes.Repeat([]byte{with, with + 1}, len(buf)/2))
		if _, err := f.WriteAt(buf, at); err != nil {
			t.Fatal(err)
		}
		copy(truth[at:], buf)
	}
	write(1<<20, 10) // before anybody looks: it comes as a copy
	q, err := b.Start(t.Context(), disk.Path, "_dev_disk")
	if err != nil {
		t.Fatal(err)
	}
	ordered := func() bool { return q.State().Order == abi.OrderData }
	r := &replica{t: t, q: q, image: make([]byte, size)}
	r.until(involflt.ErrEmpty, ordered)
	if !bytes.Equal(r.image, truth) {
		t.Error("what was there before is not copied")
	}

	mark := func(tag string, until time.Time) involflt.Marked {
		t.Helper()
		m, err := b.Mark(t.Context(), involflt.Mark{GUID: "guid\x00:/x", Tags: [][]byte{[]byte(tag)}, Devices: []string{disk.Path}, Until: until})
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	write(2<<20, 20)
	first := bytes.Clone(truth)
	mark("first", time.Time{})
	write(2<<20, 30)
	prepared := mark("revoked", time.Now().Add(time.Minute))
	write(3<<20, 40)
	r.until(involflt.ErrVerdict, func() bool { return true })
	if !slices.Equal(r.tags, []string{"first"}) || !bytes.Equal(r.at[0], first) {
		t.Errorf("tags %q; the first is the disk as it was: %v", r.tags, bytes.Equal(r.at[0], first))
	}
	if bytes.Equal(r.image, truth) {
		t.Error("writes behind a mark without a verdict came")
	}
	if err := prepared.Revoke(t.Context()); err != nil {
		t.Error(err)
	}
	prepared = mark("committed", time.Now().Add(time.Minute))
	second := bytes.Clone(truth)
	if err := prepared.Commit(t.Context()); err != nil {
		t.Error(err)
	}
	r.until(involflt.ErrEmpty, func() bool { return len(r.tags) == 2 })
	if r.tags[1] != "committed" || !bytes.Equal(r.at[1], second) {
		t.Errorf("tags %q", r.tags)
	}
	if left, _ := filepath.Glob(filepath.Join(state, "involflt", "tags", "*")); len(left) > 0 {
		t.Errorf("tags that everybody has: %v", left)
	}
	if err := q.Settle(t.Context()); err != nil {
		t.Error(err)
	}

	write(4<<20, 50) // nobody has drained it when the daemon ends
	closeAll()
	s, b = open()
	kept := b.Kept()
	if len(kept) != 1 || kept[0].Device != disk.Path || kept[0].Name != "_dev_disk" {
		t.Fatalf("kept: %+v", kept)
	}
	q = kept[0].Queue
	r.q = q
	r.until(involflt.ErrEmpty, func() bool { return bytes.Equal(r.image, truth) })

	began := uint64(time.Now().UnixNano()) / 100
	write(5<<20, 60)
	waited, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	err = q.Wait(waited, 4096)
	if p, failed := q.Pending(t.Context()); err != nil || failed != nil || p.Bytes != int64(len(buf)) || p.Changes != 1 || p.Oldest < began || !p.Any {
		t.Errorf("%v, %v, %+v; the write was after %d", err, failed, p, began)
	}
	err = q.Clear(t.Context())
	if p, failed := q.Pending(t.Context()); err != nil || failed != nil || p != (involflt.Pending{}) {
		t.Errorf("cleared: %v, %v, %+v", err, failed, p)
	}
	if err := b.Stop(t.Context(), disk.Path); err != nil {
		t.Error(err)
	}
	if q, err = b.Start(t.Context(), disk.Path, "_dev_disk"); err != nil {
		t.Fatal(err)
	}
	if err := s.Unprotect(t.Context(), "_dev_disk", true, true); err != nil { // by somebody else
		t.Fatal(err)
	}
	if _, err := q.Pending(t.Context()); !errors.Is(err, involflt.ErrNoDevice) {
		t.Errorf("its group is gone: %v", err)
	}
	if err := b.Stop(t.Context(), disk.Path); err != nil {
		t.Error(err)
	}
	if left, _ := filepath.Glob(filepath.Join(state, "groups", "*")); len(left) > 0 || len(s.list()) > 0 || len(b.Kept()) > 0 {
		t.Errorf("left: %v, %v", left, b.Kept())
	}
}

// TestInvolfltMoved: after a start of the machine at which disks changed their
// names a client's disk is the same one, and what has its old name is not touched.
func TestInvolfltMoved(t *testing.T) {
	testkit.Need(t, "root", "tap", "loop", "ext4")
	testkit.NoLeaks(t)
	const size = 16 << 20
	ours, other := testkit.NewDisk(t, size), testkit.NewDisk(t, size)
	testkit.Mkfs(t, ours.Path, "ext4")
	testkit.Mkfs(t, other.Path, "ext4")
	state, vault := t.TempDir(), filepath.Join(t.TempDir(), "vault")
	s, b := openInvolflt(t, state, vault)
	t.Cleanup(func() { s.closeAllConsumers(); s.stop() })
	if _, err := b.Start(t.Context(), ours.Path, "ours"); err != nil {
		t.Fatal(err)
	}
	shut := func() {
		t.Helper()
		s.closeAllConsumers()
		s.stop()
		if err := tap.Discard(s.env.Instance, "ours"); err != nil {
			t.Fatal(err)
		}
	}
	kept := func() (devices []string) {
		s, b = openInvolflt(t, state, vault)
		for _, k := range b.Kept() {
			devices = append(devices, k.Device)
		}
		return devices
	}
	shut()
	testkit.Run(t, "losetup", "-d", ours.Path)
	if got := kept(); !slices.Equal(got, []string{ours.Path}) {
		t.Errorf("a disk that is not there yet is kept as %q; want %s, where it may come", got, ours.Path)
	}
	shut()
	testkit.Run(t, "losetup", "-d", other.Path)
	testkit.Run(t, "losetup", ours.Path, other.File)
	if got := kept(); len(got) > 0 {
		t.Errorf("kept as %q, which is another disk", got)
	}
	if err := b.Stop(t.Context(), ours.Path); err != nil || len(b.kept()) != 1 {
		t.Errorf("another disk was stopped, and ours with it: %v, %d", err, len(b.kept()))
	}
	shut()
	testkit.Run(t, "losetup", other.Path, ours.File)
	if got := kept(); !slices.Equal(got, []string{other.Path}) {
		t.Errorf("kept as %q; want %s", got, other.Path)
	}
	if err := b.Stop(t.Context(), other.Path); err != nil || len(b.kept()) != 0 {
		t.Errorf("%v, %d", err, len(b.kept()))
	}
}
