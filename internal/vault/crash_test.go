package vault

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"tidemark/internal/block"
	"tidemark/internal/segment"
	"tidemark/internal/sim"
	"tidemark/internal/stream"
	"tidemark/internal/vfs"
)

const (
	crashVault = "/a/vault"
	crashSpool = "/spool"
)

// links says what kind of hard links a file system has.
type links int

const (
	linksAll    links = iota
	linksInside       // vault and spool are two file systems
	linksNone         // as FAT
)

// disks is a simulated file system with fewer links.
type disks struct {
	*sim.FS
	links links
}

func (d disks) Link(from, to string) error {
	switch {
	case d.links == linksInside && path.Dir(from) != path.Dir(to):
		return &fs.PathError{Op: "link", Path: from, Err: unix.EXDEV}
	case d.links == linksNone:
		return &fs.PathError{Op: "link", Path: from, Err: unix.EPERM}
	}
	return d.FS.Link(from, to)
}

// world is a machine with a vault, and what its user was told.
type world struct {
	t       *testing.T
	r       *rand.Rand
	fs      *sim.FS
	links   links
	v       *Vault
	l       *Lock
	id      string // of the vault, once Create has returned
	sealed  [][]byte
	sums    []segment.Summary
	acked   int // segments that Put has returned for
	written int // segments whose file stands in the spool
}

func newWorld(t *testing.T, seed uint64, l links) *world {
	return &world{t: t, r: rand.New(rand.NewPCG(seed, 3)), fs: sim.New(seed), links: l}
}

func (w *world) fail(format string, args ...any) {
	w.t.Helper()
	w.t.Fatalf("%s\nhistory:\n%s", fmt.Sprintf(format, args...), w.fs.History())
}

func (w *world) disks() vfs.FS { return disks{w.fs, w.links} }

// segment gives number i (from 0) of the history, sealed.
func (w *world) segment(i int) ([]byte, segment.Summary) {
	for len(w.sealed) <= i {
		var prev segment.Summary
		if n := len(w.sums); n > 0 {
			prev = w.sums[n-1]
		}
		b := segment.NewBuilder(1 << 12)
		for range 1 + w.r.IntN(3) {
			p := make([]byte, 512*(1+w.r.IntN(9)))
			for j := range p {
				p[j] = byte(w.r.Uint32())
			}
			prev.Last++
			r := stream.Record{Kind: stream.KindWrite, Op: block.OpWrite, Position: prev.Last, Range: block.Range{Len: int64(len(p))}, Payload: p}
			if err := b.Append(&r); err != nil {
				w.t.Fatal(err)
			}
		}
		s, err := b.Seal(segment.Header{Group: "g", Sequence: prev.Sequence + 1, Previous: prev.Digest,
			Disks: []segment.Disk{{Name: "d", Size: 1 << 20, SectorSize: 512, BlockSize: 4096}}}, segment.State{Last: prev.Last})
		if err != nil {
			w.t.Fatal(err)
		}
		var buf bytes.Buffer
		if _, err := s.WriteTo(&buf); err != nil {
			w.t.Fatal(err)
		}
		w.sealed, w.sums = append(w.sealed, buf.Bytes()), append(w.sums, s.Summary)
	}
	return w.sealed[i], w.sums[i]
}

// spooled makes a segment's file stable where the spool keeps it.
func (w *world) spooled(i int) (string, segment.Summary, error) {
	b, sum := w.segment(i)
	name := fmt.Sprintf("%s/%016x.seg", crashSpool, sum.Sequence)
	if i < w.written {
		return name, sum, nil
	}
	if err := w.fs.MkdirAll(crashSpool, 0o700); err != nil {
		return "", sum, err
	}
	f, err := w.fs.OpenFile(name, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return "", sum, err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), w.fs.SyncDir(crashSpool), w.fs.SyncDir("/")); err == nil {
		w.written = i + 1
	}
	return name, sum, err
}

// begin opens or makes the vault and takes its lock.
func (w *world) begin() error {
	v, err := createFolder(w.t.Context(), w.disks(), crashVault)
	if err != nil {
		return err
	}
	if w.id != "" && v.ID() != w.id {
		w.fail("another vault than before the crash")
	}
	w.v, w.id = v, v.ID()
	w.l, err = v.Lock(w.t.Context(), "g", Holder{PID: 1 + w.r.IntN(1<<20), Host: "h"})
	return err
}

// put stores the next segment.
func (w *world) put() error {
	name, sum, err := w.spooled(w.acked)
	if err != nil {
		return err
	}
	if err := w.v.Put(w.t.Context(), w.l, name, sum); err != nil {
		return err
	}
	w.acked++
	w.check()
	if n, last, err := w.v.Newest(w.t.Context(), "g"); err != nil || n != uint64(w.acked) || last != sum.Last {
		w.fail("after segment %d, %d is noted as the newest, with position %d: %v", w.acked, n, last, err)
	}
	for _, name := range w.files("/") {
		if strings.HasSuffix(name, temporary) {
			w.fail("%s is still there after a Put", name)
		}
	}
	return nil
}

// files lists everything below a folder.
func (w *world) files(dir string) (out []string) {
	entries, err := w.fs.ReadDir(dir)
	if err != nil {
		w.fail("%v", err)
	}
	for _, e := range entries {
		name := path.Join(dir, e.Name())
		if e.IsDir() {
			out = append(out, w.files(name)...)
		} else {
			out = append(out, name)
		}
	}
	return out
}

// check looks at the vault as a reader does: everything that Put has returned
// for is there, all that is listed is whole, and nothing lies elsewhere.
func (w *world) check() {
	w.t.Helper()
	for _, name := range w.files("/") {
		if !strings.HasPrefix(name, crashVault+"/") && !strings.HasPrefix(name, crashSpool+"/") {
			w.fail("%s lies outside the vault", name)
		}
	}
	v, err := openFolder(w.t.Context(), w.disks(), crashVault)
	if w.id == "" && errors.Is(err, ErrNotVault) {
		return // Create has not returned yet
	}
	if err != nil {
		w.fail("opening the vault: %v", err)
	}
	if err := v.CheckLock(w.t.Context(), "g"); err != nil {
		w.fail("the lock: %v", err)
	}
	newest, _, noteErr := v.Newest(w.t.Context(), "g")
	refs, strays, err := v.Contents(w.t.Context(), "g")
	if noteErr != nil || newest > uint64(len(refs)) {
		w.fail("%d segments are listed, %d is noted as the newest: %v", len(refs), newest, noteErr)
	}
	if err != nil && !(errors.Is(err, ErrNoGroup) && w.acked == 0) || len(strays) > 0 {
		w.fail("listing: %v, strays %v", err, strays)
	}
	if len(refs) < w.acked || len(refs) > min(w.acked+1, max(w.written, w.acked)) {
		w.fail("%d segments are listed, %d were acknowledged, %d exist", len(refs), w.acked, w.written)
	}
	for i, ref := range refs {
		o, err := v.OpenSegment(w.t.Context(), "g", ref)
		if err != nil || ref != refOf(w.sums[i]) || o.Summary() != w.sums[i] {
			w.fail("segment %d: %v", i+1, err)
		}
		got, err := w.fs.ReadFile(path.Join(crashVault, segmentsOf("g"), ref.Name))
		if err != nil || !bytes.Equal(got, w.sealed[i]) {
			w.fail("segment %d is not what was put: %v", i+1, err)
		}
		o.Check(func(_, _ uint64, err error) { w.fail("segment %d: %v", i+1, err) })
	}
}

// crash ends the machine, or only the process: then everything that it did is
// there, stable or not.
func (w *world) crash(machine bool) {
	w.t.Helper()
	if machine {
		w.fs = w.fs.Crash()
	} else {
		w.fs.Fail(1, 0, nil)
		if w.l != nil {
			_ = w.l.Unlock() // the kernel does it
		}
	}
	w.v, w.l = nil, nil
	w.check()
}

var injected = []error{unix.ENOSPC, unix.EIO}

func wasInjected(err error) bool {
	return errors.Is(err, sim.ErrCrashed) || slices.ContainsFunc(injected, func(e error) bool { return errors.Is(err, e) })
}

// live works until the machine or the process is gone.
func (w *world) live(gone func() bool) {
	w.t.Helper()
	for !gone() {
		work := w.put
		if w.l == nil {
			work = w.begin
		}
		if err := work(); err != nil && !wasInjected(err) {
			w.fail("%v", err)
		}
	}
}

// TestCrash plays random histories with crashes of the machine, kills of the
// process, and failing operations.
func TestCrash(t *testing.T) {
	for seed := range sim.Seeds(100) {
		w := newWorld(t, seed, links(seed%3))
		for range 6 {
			n := 1 + w.r.IntN(60)
			if machine := w.r.IntN(2) == 0; machine {
				w.fs.CrashAt(n)
				if w.r.IntN(2) == 0 {
					w.fs.Fail(1+w.r.IntN(n), 1+w.r.IntN(4), injected[w.r.IntN(2)])
				}
				w.live(w.fs.Crashed)
				w.crash(true)
			} else { // from the n-th on nothing can be done any more
				w.fs.Fail(n, 1<<30, unix.EIO)
				from := w.fs.Ops()
				w.live(func() bool { return w.fs.Ops() >= from+n })
				w.crash(false)
			}
		}
		for range 2 {
			if err := errors.Join(w.begin(), w.put(), w.put()); err != nil {
				w.fail("seed %d: after all: %v", seed, err)
			}
			w.crash(true)
		}
	}
}

// TestCrashAtEveryOperation cuts one history at each of its operations, with
// several outcomes each, on every kind of file system.
func TestCrashAtEveryOperation(t *testing.T) {
	play := func(w *world) {
		if w.begin() != nil {
			return
		}
		for range 3 {
			if w.put() != nil {
				return
			}
		}
	}
	for _, kind := range []links{linksAll, linksInside, linksNone} {
		whole := newWorld(t, 1, kind)
		play(whole)
		if whole.acked != 3 {
			whole.fail("without a crash: %d segments", whole.acked)
		}
		for n := 1; n <= whole.fs.Ops()+1; n++ {
			for outcome := range uint64(6) {
				w := newWorld(t, 1, kind)
				w.fs = sim.New(outcome)
				w.fs.CrashAt(n)
				play(w)
				w.crash(true)
				if err := errors.Join(w.begin(), w.put(), w.put()); err != nil { // the next life works
					w.fail("crash at %d, outcome %d: %v", n, outcome, err)
				}
				w.crash(true)
			}
		}
	}
}

// TestOrder pins what Create, Lock and Put do, in which order.
func TestOrder(t *testing.T) {
	const marker, seg = "tidemark-vault", "groups/g/segments/L00/0000000000000001-0000000000000001-"
	begin := []string{"syncdir /", "syncdir /a", "create MARKER.writing", "write MARKER.writing", "sync MARKER.writing"}
	named := map[links][]string{
		linksAll:    {"link MARKER.writing MARKER", "remove MARKER.writing"},
		linksInside: {"link MARKER.writing MARKER", "remove MARKER.writing"},
		linksNone:   {"rename MARKER.writing MARKER"},
	}
	settled := []string{"syncdir /a/vault", "sync MARKER", "syncdir /a/vault"}
	lock := []string{"syncdir /a/vault", "syncdir /a/vault/groups", "create LOCK", "truncate LOCK", "sync LOCK", "write LOCK", "sync LOCK"}
	spooled := []string{"create SPOOLED", "write SPOOLED", "sync SPOOLED", "syncdir /spool", "syncdir /"}
	dirs := []string{"syncdir /a/vault/groups/g", "syncdir /a/vault/groups/g/segments"}
	folder := "syncdir /a/vault/groups/g/segments/L00"
	note := func(n, last int) string { return fmt.Sprintf("newest-%016x-%016x", n, last) }
	copied := []string{"create SEGMENT.writing", "write SEGMENT.writing", "sync SEGMENT.writing"}
	put := map[links][]string{
		linksAll:    {"sync SPOOLED", "link SPOOLED SEGMENT", folder},
		linksInside: slices.Concat([]string{"sync SPOOLED"}, copied, []string{"link SEGMENT.writing SEGMENT", "remove SEGMENT.writing", folder}),
		linksNone:   slices.Concat([]string{"sync SPOOLED"}, copied, []string{"rename SEGMENT.writing SEGMENT", folder}),
	}
	for _, kind := range []links{linksAll, linksInside, linksNone} {
		w := newWorld(t, 1, kind)
		if err := errors.Join(w.begin(), w.put()); err != nil {
			t.Fatal(err)
		}
		first := int(w.sums[0].Last)
		short := strings.NewReplacer(crashVault+"/"+marker, "MARKER", crashVault+"/groups/g/lock", "LOCK",
			crashVault+"/"+seg+fmt.Sprintf("%016x.seg", w.sums[0].Last), "SEGMENT", crashSpool+"/0000000000000001.seg", "SPOOLED",
			" "+marker, " MARKER", fmt.Sprintf(" 0000000000000001-0000000000000001-%016x.seg", w.sums[0].Last), " SEGMENT", fmt.Sprintf(".%d-", os.Getpid()), ".N-")
		var got []string
		for line := range strings.Lines(short.Replace(w.fs.History())) {
			f := strings.Fields(line)
			for i := range f {
				if name, _, ok := strings.Cut(f[i], ".N-"); ok {
					f[i] = name + temporary
				}
			}
			if f[0] == "write" || f[0] == "truncate" {
				f = f[:2]
			}
			if line := strings.Join(f, " "); len(got) == 0 || f[0] != "write" || got[len(got)-1] != line {
				got = append(got, line)
			}
		}
		want := slices.Concat(begin, named[kind], settled, lock, spooled, dirs, put[kind], []string{"create /a/vault/groups/g/" + note(1, first)})
		if !slices.Equal(got, want) {
			t.Errorf("file system %d: got\n%s\nwant\n%s", kind, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
}
